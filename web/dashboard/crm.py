"""CRM accounts: whether their tokens are good, how far their mirrors are behind, what each run did, and all that can be done."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, get_args
from uuid import UUID

from flask import Response, request

from agentflow.jobs.rules import EVERY, Pause
from agentflow.kommo import accounts, mirror, runs, syncing
from agentflow.kommo.accounts import Account
from agentflow.kommo.runs import Latest
from web import crm as api
from web import crm_oauth, crm_views, rules
from web.api import Answer, parse_json, validated
from web.crm_views import WriteItems
from web.cursors import cursor_of, read_cursor
from web.dashboard import fields, frame, shown
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import plural, say

pages = Pages()

PAGE: Final = 50
_RUNS: Final = 20
_ROWS: Final = 50
_SYNC: Final = "sync_crm"
#: One more than a secret may have: a longer one is refused, not cut.
_SECRET_CHARACTERS: Final = 8001
_ITEMS_BYTES: Final = 1 << 20
#: What may be written: the operation that does it, its body, and what else stands in that.
_WRITES: Final[dict[str, tuple[Callable[..., Answer], type[WriteItems], str]]] = {
    "leads": (api.write_leads, WriteItems, ""),
    "contacts": (api.write_contacts, WriteItems, ""),
    "tasks": (api.write_tasks, crm_views.TaskItems, ""),
    "lead_notes": (api.write_notes, crm_views.NoteItems, ', "of": "leads"'),
    "contact_notes": (api.write_notes, crm_views.NoteItems, ', "of": "contacts"'),
    "company_notes": (api.write_notes, crm_views.NoteItems, ', "of": "companies"'),
}
_MIRRORED: Final = get_args(crm_views.MirrorQuery.model_fields["type"].annotation)


# ---- looking ----


@pages.get("/crm")
def crm(visit: Visit) -> Response:
    cursor = request.args.get("cursor")
    before = read_cursor(cursor) if cursor else None
    with visit.system.database.connection() as conn:
        found = accounts.every(conn, visit.sees, before=before, limit=PAGE + 1)
        page = found[:PAGE]
        latest = runs.latest(conn, visit.sees, [each.id for each in page])
    values: dict[str, Any] = {
        "accounts": [_shown(each, latest.get(each.id, Latest(None, None))) for each in page],
        "slugs": {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {},
        "older": cursor_of(page[-1].id) if len(found) > PAGE else None,
        "cursor": cursor,
        "pause": _pause(visit),
        "oauth": _has_oauth(visit),
    }
    if request.args.get("part") == "rows":
        return visit.part("crm_rows.html", **values)
    return visit.page("crm.html", **values)


@pages.get("/crm/<uuid:account_id>")
def crm_account(visit: Visit, account_id: UUID) -> Response:
    account = api.find(visit, account_id)
    cursor = request.args.get("cursor")
    before = read_cursor(cursor) if cursor else None
    with visit.system.database.connection() as conn:
        latest = runs.latest(conn, account.organization_id, [account_id])
        found = runs.of_account(conn, account.organization_id, account_id, before=before, limit=_RUNS + 1)
        drift = mirror.drift_of(conn, account.organization_id, account_id)
    values: dict[str, Any] = {
        **_shown(account, latest.get(account_id, Latest(None, None))),
        "runs": found[:_RUNS],
        "older": cursor_of(found[_RUNS - 1].id) if len(found) > _RUNS else None,
        "cursor": cursor,
        "counts_in_words": counts_in_words,
        "mode_in_words": mode_in_words,
        "pause": _pause(visit),
    }
    if request.args.get("part") == "state":
        return visit.part("crm_account_state.html", **values)
    return visit.page("crm_account.html", **values, drift=drift, oauth=_has_oauth(visit), writes=list(_WRITES))


@pages.get("/crm/<uuid:account_id>/mirror")
def crm_mirror(visit: Visit, account_id: UUID) -> Response:
    account = api.find(visit, account_id)
    type_ = next((each for each in _MIRRORED if each == fields.asked("type")), _MIRRORED[0])
    query = crm_views.MirrorQuery(type=type_, limit=_ROWS, cursor=fields.asked("cursor") or None)
    found = api.read(visit, account_id, query)
    return visit.page("crm_mirror.html", account=account, type=type_, types=_MIRRORED, found=found, cursor=query.cursor)


def _shown(account: Account, latest: Latest) -> dict[str, Any]:
    now = shown.now()
    return {
        "account": account,
        "host": account.base_url.partition("://")[2],
        "token": token_in_words(account),
        "read_at": latest.read_at,
        "run": latest.run,
        "behind_s": syncing.behind_s(account, latest.read_at, now),
        "state_in_words": state_in_words(account),
    }


def state_in_words(account: Account) -> tuple[str, str]:
    """How it is to be marked, and in words."""
    return {
        "connecting": ("queued", say("being connected")),
        "connected": ("well", say("connected")),
        "needs_reauth": ("bad", say("connect it again")),
        "blocked": ("bad", say("blocked by Kommo")),
        "removed": ("off", say("removed")),
    }[account.state]


def token_in_words(account: Account) -> tuple[str, str, datetime | None]:
    """How it is to be marked, in words, and when it ends, where that is known."""
    ends = account.access_expires_at
    if account.state == "needs_reauth":
        return "bad", say("is not good any more"), None
    if account.state == "connecting":
        return "queued", say("is tried by the first sync"), None
    if account.grant_refused_at is not None:
        return "warn", say("could not be renewed, and ends"), ends
    if account.auth == "oauth":
        return "well", say("renews itself; this one ends"), ends
    return "well", say("long-lived; ends") if ends else say("long-lived"), ends


def mode_in_words(run: Any) -> str:
    said = {
        "incremental": say("changes"),
        "backfill": say("everything"),
        "reconcile": say("everything, with deletions"),
        "touched": say("what a webhook named"),
    }[run.mode]
    return say("plan: {what}", what=said) if run.plan else said


def counts_in_words(counts: dict[str, int]) -> str:
    """What was done with how many, of one kind of thing."""
    said: dict[str, Callable[[int], str]] = {
        "created": lambda n: plural(n, "{n} created", "{n} created"),
        "updated": lambda n: plural(n, "{n} updated", "{n} updated"),
        "deleted": lambda n: plural(n, "{n} deleted", "{n} deleted"),
        "held": lambda n: plural(n, "{n} held", "{n} held"),
        "stale": lambda n: plural(n, "{n} stale", "{n} stale"),
        "unchanged": lambda n: plural(n, "{n} unchanged", "{n} unchanged"),
    }
    known = [in_words(counts[name]) for name, in_words in said.items() if counts.get(name)]
    return ", ".join(known + [f"{number} {name}" for name, number in counts.items() if name not in said])


def _has_oauth(visit: Visit) -> bool:
    settings = visit.system.settings
    return bool(settings.kommo_client_id and settings.kommo_client_secret and settings.kommo_redirect_uri)


def _pause(visit: Visit) -> Pause | None:
    """What holds the syncs back."""
    pauses = visit.system.rules.now().pauses
    own = pauses.get(("type", _SYNC, visit.sees)) if visit.sees is not None else None
    return own or pauses.get(("type", _SYNC, EVERY))


# ---- connecting ----


@pages.post("/crm/connect", scope="manage")
def connect_account(visit: Visit) -> Response:
    """By a long-lived token."""
    values = {
        "host": fields.given("host"),
        "name": fields.given("name"),
        "token": fields.given("token", _SECRET_CHARACTERS),
    }
    values = {name: value for name, value in values.items() if value is not None}
    body = validated(lambda: crm_views.AccountRequest.model_validate(values), "body")
    made: Any = api.connect(visit, body).model
    return visit.go("crm_account", account_id=made.id, said=say("The account is being connected."))


@pages.get("/crm/authorize", scope="manage")
def crm_authorize(visit: Visit) -> Response:
    """On to Kommo, to connect an account or to connect one again.

    A link and no form: the policy lets no form lead to another site. Nothing changes here until Kommo sends the browser back.
    """
    named = fields.asked("account")
    values = {"account_id": named or None, "name": fields.asked("name") or None}
    body = validated(lambda: crm_views.AuthorizationRequest.model_validate(values, strict=False), "query")
    return frame.to(crm_oauth.authorize(visit, body).url)


@pages.post("/crm/<uuid:account_id>/token", scope="manage")
def renew_token(visit: Visit, account_id: UUID) -> Response:
    """Connect it again with another long-lived token."""
    values = {"token": fields.given("token", _SECRET_CHARACTERS) or ""}
    api.change(visit, account_id, validated(lambda: crm_views.AccountChange.model_validate(values), "body"))
    return visit.go("crm_account", account_id=account_id, said=say("The account is being connected."))


@pages.post("/crm/<uuid:account_id>/settings", scope="manage")
def change_account(visit: Visit, account_id: UUID) -> Response:
    names = ("name", "sync_every_s", "reconcile_every_s", "delete_share")
    values = {name: value for name in names if (value := fields.given(name)) is not None}
    body = validated(lambda: crm_views.AccountChange.model_validate_strings(values), "body")
    api.change(visit, account_id, body)
    return visit.go("crm_account", account_id=account_id, said=say("The account is changed."))


@pages.post("/crm/<uuid:account_id>/remove", scope="manage")
def remove_account(visit: Visit, account_id: UUID) -> Response:
    api.remove(visit, account_id)
    return visit.go("crm", said=say("The account is forgotten. Nothing has changed at Kommo."))


# ---- syncs ----


@pages.post("/crm/<uuid:account_id>/sync", scope="manage")
def sync_account(visit: Visit, account_id: UUID) -> Response:
    api.sync(visit, account_id, _sync_asked())
    return visit.go("crm_account", account_id=account_id, said=say("The sync is handed in."))


@pages.post("/crm/<uuid:account_id>/plan", scope="manage")
def plan_sync(visit: Visit, account_id: UUID) -> Response:
    job: Any = api.plan(visit, account_id, _sync_asked()).model
    return visit.go(
        "job", job_id=job.id, said=say("The result of this job says what a sync would change, and changes nothing.")
    )


def _sync_asked() -> crm_views.SyncRequest:
    values = {"mode": fields.given("mode") or "incremental"}
    return validated(lambda: crm_views.SyncRequest.model_validate(values), "body")


@pages.post("/crm/<uuid:account_id>/confirm-deletions", scope="manage")
def confirm_deletions(visit: Visit, account_id: UUID) -> Response:
    api.confirm_deletions(visit, account_id)
    said = say("So many may be deleted by the reconciliation that begins now.")
    return visit.go("crm_account", account_id=account_id, said=said)


@pages.post("/crm/pause", scope="admin")
def pause_syncs(visit: Visit) -> Response:
    """Of the organization that the operator looks at, or of all."""
    values = {"pause": "type", "name": _SYNC, "reason": fields.given("reason")}
    rules.pause(visit, validated(lambda: rules.PauseRequest.model_validate(values), "body"))
    visit.system.rules.anew()
    return visit.go("crm", said=say("Syncs are paused. What runs goes on to its end."))


@pages.post("/crm/resume", scope="admin")
def resume_syncs(visit: Visit) -> Response:
    rules.resume(visit, rules.ResumeRequest(resume="type", name=_SYNC))
    visit.system.rules.anew()
    return visit.go("crm", said=say("Syncs go on."))


# ---- writing ----


@pages.post("/crm/<uuid:account_id>/write", scope="submit", max_bytes=_ITEMS_BYTES)
def write_to_crm(visit: Visit, account_id: UUID) -> Response:
    """Things as Kommo's API takes them, in JSON."""
    write, body, more = _WRITES.get(fields.given("kind") or "", _WRITES["leads"])
    items = fields.given("items", _ITEMS_BYTES) or "[]"
    document = f'{{"items": {items if items.startswith("[") else f"[{items}]"}{more}}}'
    job: Any = write(visit, account_id, parse_json(body, document.encode())).model
    return visit.go("job", job_id=job.id, said=say("The result of this job says what has become of each."))
