"""CRM accounts (Kommo): connecting them, their syncs and plans, their mirror, and writing to them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import Response

from agentflow.jobs.requests import NewJob
from agentflow.jobs.text import is_storable
from agentflow.kommo import accounts, hosts, mirror, runs, syncing
from agentflow.kommo.accounts import Account, Credentials
from web.api import Answer, Call, Routes
from web.crm_views import (
    AccountChange,
    AccountList,
    AccountRequest,
    AccountView,
    DriftRow,
    DriftView,
    MirrorList,
    MirrorQuery,
    MirrorRow,
    NoteItems,
    PageQuery,
    RunList,
    RunView,
    SyncRequest,
    TaskItems,
    WriteItems,
)
from web.cursors import cursor_of, packed, read_cursor, unpacked
from web.jobs import JobSummary, summary
from web.problems import Refused, invalid

routes = Routes("crm")

_ACCOUNT = "/api/crm/accounts/<uuid:account_id>"


@routes.post("/api/crm/accounts", {201: AccountView}, body=AccountRequest, scope="manage")
def connect(call: Call, body: AccountRequest) -> Answer:
    """Connect an account, by a long-lived token or an authorization code.

    Its first sync begins at once and finds out whether the credentials are good: look at `state` then.
    """
    base_url = host_of(call, body.host)
    credentials = _checked(Credentials(**body.model_dump(include=set(Credentials.__dataclass_fields__))))
    with call.system.transaction() as transaction:
        made = accounts.create(
            transaction.conn,
            call.organization_id,
            call.system.sealer,
            name=body.name or base_url.partition("://")[2],
            base_url=base_url,
            credentials=credentials,
        )
        syncing.submit(transaction, made.organization_id, made.id, "incremental")
    return Answer(view(made), 201, {"Location": f"/api/crm/accounts/{made.id}"})


@routes.get("/api/crm/accounts", {200: AccountList}, query=PageQuery)
def search(call: Call, query: PageQuery) -> AccountList:
    """List accounts."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = accounts.every(conn, call.sees, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return AccountList(
        accounts=[view(account) for account in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get(_ACCOUNT, {200: AccountView}, problems=(404,))
def show(call: Call, account_id: UUID) -> AccountView:
    """Look at an account."""
    return view(find(call, account_id))


@routes.patch(_ACCOUNT, {200: AccountView}, body=AccountChange, scope="manage", problems=(404,))
def change(call: Call, account_id: UUID, body: AccountChange) -> AccountView:
    """Change an account, or connect it again with a new token."""
    found: Account | None = find(call, account_id)
    assert found is not None  # noqa: S101 - or it was refused
    with call.system.transaction() as transaction:
        ids = found.organization_id, account_id
        settings = body.model_dump(exclude={"token", "code"})
        found = accounts.change(transaction.conn, *ids, **settings)
        if body.token is not None or body.code is not None:
            given = Credentials(token=body.token, code=body.code)
            found = accounts.reconnect(transaction.conn, *ids, call.system.sealer, _checked(given))
            syncing.submit(transaction, *ids, "incremental")
    if found is None:
        raise _unknown(account_id)
    return view(found)


@routes.delete(_ACCOUNT, {204: "It is gone"}, scope="manage", problems=(404,))
def remove(call: Call, account_id: UUID) -> Response:
    """Forget an account: its tokens at once, its mirror within minutes. Nothing changes at Kommo."""
    found = find(call, account_id)
    with call.system.transaction() as transaction:
        if not accounts.remove(transaction.conn, found.organization_id, account_id):
            raise _unknown(account_id)
        syncing.submit(transaction, found.organization_id, account_id, "incremental")
    return Response(status=204)


@routes.post(f"{_ACCOUNT}/sync", {202: JobSummary}, body=SyncRequest, scope="manage", problems=(404,))
def sync(call: Call, account_id: UUID, body: SyncRequest) -> Answer:
    """Sync now; where a sync of this mode waits or runs already, that job is answered."""
    return _submit(call, find(call, account_id), body.mode, plan=False)


@routes.post(f"{_ACCOUNT}/plan", {202: JobSummary}, body=SyncRequest, scope="manage", problems=(404,))
def plan(call: Call, account_id: UUID, body: SyncRequest) -> Answer:
    """A dry run: the job's result says what a sync would change, and what it costs in calls and seconds."""
    return _submit(call, find(call, account_id), body.mode, plan=True)


@routes.post(f"{_ACCOUNT}/confirm-deletions", {202: JobSummary}, scope="manage", problems=(404, 409))
def confirm_deletions(call: Call, account_id: UUID) -> Answer:
    """Let as many deletions through as are held (`deletions_held`), by a reconciliation that begins now."""
    found = find(call, account_id)
    with call.system.transaction() as transaction:
        if accounts.confirm_deletions(transaction.conn, found.organization_id, account_id) is None:
            raise Refused(409, "no deletions of this account wait to be confirmed")
        job = syncing.submit(transaction, found.organization_id, account_id, "reconcile").job
    return Answer(summary(call, job), 202, {"Location": f"/api/jobs/{job.id}"})


@routes.get(f"{_ACCOUNT}/runs", {200: RunList}, query=PageQuery, problems=(404,))
def list_runs(call: Call, account_id: UUID, query: PageQuery) -> RunList:
    """The log of syncs and plans."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    organization_id = find(call, account_id).organization_id
    with call.system.database.connection() as conn:
        found = runs.of_account(conn, organization_id, account_id, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return RunList(
        runs=[RunView(**{name: getattr(run, name) for name in RunView.model_fields}) for run in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get(f"{_ACCOUNT}/mirror", {200: MirrorList}, query=MirrorQuery, problems=(404,))
def read(call: Call, account_id: UUID, query: MirrorQuery) -> MirrorList:
    """Read the mirror, and later what has changed since: keep the last `cursor`."""
    organization_id = find(call, account_id).organization_id
    with call.system.database.connection() as conn:
        if query.type == "events":
            version, event = _position(query.cursor, (0, ""))
            events = mirror.page_of_events(
                conn, organization_id, account_id, after=(version, event), limit=query.limit + 1
            )
            rows = [
                MirrorRow(id=id_, updated_at=data["created_at"], deleted_at=None, data=data) for _, id_, data in events
            ]
            positions: list[tuple[int, Any]] = [(version, id_) for version, id_, _ in events]
        else:
            things = mirror.page(
                conn,
                organization_id,
                account_id,
                query.type,
                after=_position(query.cursor, (0, 0)),
                limit=query.limit + 1,
            )
            rows = [
                MirrorRow(id=t.entity_id, updated_at=t.updated_at, deleted_at=t.deleted_at, data=t.data) for t in things
            ]
            positions = [(t.version, t.entity_id) for t in things]
    last = (
        positions[: query.limit][-1] if positions else _position(query.cursor, (0, "" if query.type == "events" else 0))
    )
    return MirrorList(rows=rows[: query.limit], cursor=packed(last), more=len(rows) > query.limit)


@routes.get(f"{_ACCOUNT}/drift", {200: DriftView}, problems=(404,))
def drift(call: Call, account_id: UUID) -> DriftView:
    """Fields that Kommo sends and that nobody expected."""
    organization_id = find(call, account_id).organization_id
    with call.system.database.connection() as conn:
        found = mirror.drift_of(conn, organization_id, account_id)
    return DriftView(fields=[DriftRow(type=t, field=f, kind=k, first_seen_at=at) for t, f, k, at in found])


@routes.post(f"{_ACCOUNT}/leads", {202: JobSummary}, body=WriteItems, scope="submit", problems=(404, 409))
def write_leads(call: Call, account_id: UUID, body: WriteItems) -> Answer:
    """Create or change leads; the job's result names the id of each, or what Kommo says is wrong with it."""
    return _write(call, account_id, "leads", body, ("name",))


@routes.post(f"{_ACCOUNT}/contacts", {202: JobSummary}, body=WriteItems, scope="submit", problems=(404, 409))
def write_contacts(call: Call, account_id: UUID, body: WriteItems) -> Answer:
    """Create or change contacts."""
    return _write(call, account_id, "contacts", body, ("name", "first_name"))


@routes.post(f"{_ACCOUNT}/tasks", {202: JobSummary}, body=TaskItems, scope="submit", problems=(404, 409))
def write_tasks(call: Call, account_id: UUID, body: TaskItems) -> Answer:
    """Create or change tasks: `text`, `complete_till`, and what they are about."""
    return _write(call, account_id, "tasks", body, ("text",))


@routes.post(f"{_ACCOUNT}/notes", {202: JobSummary}, body=NoteItems, scope="submit", problems=(404, 409))
def write_notes(call: Call, account_id: UUID, body: NoteItems) -> Answer:
    """Write notes: `entity_id`, `note_type`, `params`."""
    kind = {"leads": "lead_notes", "contacts": "contact_notes", "companies": "company_notes"}[body.of]
    return _write(call, account_id, kind, body, ("params",))


def _write(call: Call, account_id: UUID, kind: str, body: WriteItems, needed: tuple[str, ...]) -> Answer:
    found = find(call, account_id)
    if found.state not in ("connecting", "connected"):
        raise Refused(409, f"the account is {found.state}: {found.state_reason}")
    for n, item in enumerate(body.items):
        given = item.get("id")
        if given is not None and not (type(given) is int and 0 < given < 1 << 63):
            raise invalid(f"items.{n}.id", "is a number of Kommo's")
        # Without it nobody could tell, after a lost answer, what was made.
        if "id" not in item and not any(item.get(name) for name in needed):
            raise invalid(f"items.{n}.{needed[0]}", "is missing")
    payload = {"account_id": str(account_id), "kind": kind, "items": body.items}
    job = call.system.submit(found.organization_id, NewJob("write_crm", payload)).job
    return Answer(summary(call, job), 202, {"Location": f"/api/jobs/{job.id}"})


def _submit(call: Call, found: Account, mode: Any, *, plan: bool) -> Answer:
    with call.system.transaction() as transaction:
        job = syncing.submit(transaction, found.organization_id, found.id, mode, plan=plan).job
    return Answer(summary(call, job), 202, {"Location": f"/api/jobs/{job.id}"})


def find(call: Call, account_id: UUID) -> Account:
    """Raises Refused with 404."""
    with call.system.database.connection() as conn:
        found = accounts.get(conn, call.sees, account_id)
    if found is None:
        raise _unknown(account_id)
    return found


def host_of(call: Call, named: str, field: str = "host", where: str = "body") -> str:
    """422 for what is not Kommo's."""
    try:
        return hosts.base_url(named, allow=call.system.settings.fetch_allow)
    except hosts.NotKommo as error:
        raise invalid(field, str(error), where) from None


def view(account: Account) -> AccountView:
    own = {name: getattr(account, name) for name in AccountView.model_fields.keys() - {"host", "reauth_by"}}
    ends = account.access_expires_at if account.grant_refused_at is not None else None
    return AccountView(**own, host=account.base_url.partition("://")[2], reauth_by=ends)


def _checked(given: Credentials) -> Credentials:
    if (given.token is None) == (given.code is None):
        raise invalid("token", "is given, or a code: one of the two")
    own = (given.client_id, given.client_secret, given.redirect_uri)
    if any(own) and not all(own):
        raise invalid("client_id", "goes with client_secret and redirect_uri: all three, or none")
    return given


def _unknown(account_id: UUID) -> Refused:
    return Refused(404, f"there is no account {account_id}")


def _position(cursor: str | None, start: tuple[int, Any]) -> tuple[int, Any]:
    if cursor is None:
        return start
    try:
        version, last = unpacked(cursor)
    except (ValueError, TypeError):
        version, last = None, None
    of_kind = type(version) is int and 0 <= version < 1 << 63 and type(last) is type(start[1])
    if not of_kind or not (is_storable(last) if isinstance(last, str) else 0 <= last < 1 << 63):
        raise invalid("cursor", "is not a cursor of ours, or one of another type", "query")
    return version, last
