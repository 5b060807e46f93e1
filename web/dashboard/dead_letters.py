"""Dead letters by what they died of: tried again or laid aside, one, a group or all that a search finds, with a preview first."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, cast
from uuid import UUID

from flask import Response, request

from agentflow.jobs import dead_letters as letters
from agentflow.jobs.dead_letters import Action, Which
from agentflow.jobs.text import is_storable
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import plural, say
from web.problems import Refused

pages = Pages()

#: Jobs a second that are tried again; None: all at once.
RATES: Final[dict[str, float | None]] = {"all": None, "10": 10.0, "1": 1.0, "0.1": 0.1}
_EXAMPLES: Final = 5


@pages.get("/dead-letters")
def dead_letters(visit: Visit) -> Response:
    with visit.system.database.connection() as conn:
        groups = visit.system.kept.get(conn, letters.groups, visit.sees)
        count = visit.system.kept.get(conn, letters.count, visit.sees)
    slugs = {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {}
    values: dict[str, Any] = {"groups": groups, "count": count, "most": letters.MOST_COUNTED, "slugs": slugs}
    if request.args.get("part") == "groups":
        return visit.part("dead_letters_groups.html", **values)
    return visit.page("dead_letters.html", **values, types=sorted({group.example.type for group in groups}))


@pages.get("/dead-letters/<any(retry,discard):action>")
def preview(visit: Visit, action: str) -> Response:
    """What would be done to whom."""
    which, organization_id = _which(visit, request.args)
    with visit.system.database.connection() as conn:
        count = letters.count(conn, organization_id, which)
        examples = letters.find(conn, organization_id, which, limit=_EXAMPLES, newest=True)
    return visit.page(
        "dead_letters_preview.html", action=action, count=count, most=letters.MOST_COUNTED, examples=examples,
        number=min(count, letters.MOST_AT_ONCE), at_once=letters.MOST_AT_ONCE, rates=list(RATES), which=which,
        until=datetime.now(UTC).isoformat(), group=organization_id if which.fingerprint else None,
    )  # fmt: skip


@pages.post("/dead-letters/<any(retry,discard):action>", scope="manage")
def deal_with(visit: Visit, action: str) -> Response:
    """With those that were previewed: what failed since then is left alone."""
    which, organization_id = _which(visit, request.form)
    rate = request.form.get("rate", "all")
    if rate not in RATES:
        raise Refused(422, say("{field} is not known.", field="rate"))
    said = _done(visit, cast(Action, action), which, organization_id, RATES[rate])
    visit.system.kept.forget(letters.groups, letters.count)
    return visit.go("dead_letters", said=said)


def _done(visit: Visit, action: Action, which: Which, organization_id: int | None, per_s: float | None) -> str:
    with visit.system.transaction() as transaction:
        conn = transaction.conn
        found = letters.find(conn, organization_id, which, to_deal_with=True)
        if action == "discard":
            done = sum(
                letters.discard(conn, each, [job.id for job in found if job.organization_id == each])
                for each in {job.organization_id for job in found}
            )
            return plural(done, "{n} dead letter is laid aside.", "{n} dead letters are laid aside.")
        retried = letters.retry(
            conn, found, now=datetime.now(UTC), per_s=per_s, max_payload_bytes=visit.system.settings.job_payload_bytes
        )
        transaction.rings.extend(retried.rings)
    said = plural(retried.done, "{n} job is tried again.", "{n} jobs are tried again.")
    if retried.refused:
        why = next(iter(retried.refused.values()))
        said += " " + plural(
            len(retried.refused), "{n} could not be: {why}", "{n} could not be, the first one: {why}", why=why
        )
    return said


def _which(visit: Visit, given: Any) -> tuple[Which, int | None]:
    """The letters that a preview or its form names, and whose they may be."""
    text = {
        name: str(given.get(name, "")).strip()[:200]
        for name in ("fingerprint", "type", "error", "until", "job", "group")
    }
    if not all(map(is_storable, text.values())):
        raise Refused(422, say("{field} is not known.", field="type"))
    try:
        which = Which(
            fingerprint=text["fingerprint"] or None,
            type=text["type"] or None,
            error=text["error"] or None,
            until=datetime.fromisoformat(text["until"]) if text["until"] else None,
            job_id=UUID(text["job"]) if text["job"] else None,
        )
        organization_id = int(text["group"][:18]) if text["group"] else visit.sees
    except ValueError:
        raise Refused(422, say("{field} is not known.", field="until")) from None
    if visit.sees is not None and organization_id != visit.sees:
        raise Refused(404, say("There is nothing here."))
    return which, organization_id
