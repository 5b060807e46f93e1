"""Jobs: found, filtered, and followed while they change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.jobs import records, registry
from agentflow.jobs.model import STATES
from web.cursors import cursor_of, read_cursor
from web.dashboard import fields
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import say
from web.problems import Refused

pages = Pages()

PAGE: Final = 50
#: Of the last …: what people look for most.
PERIODS: Final = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "24h": timedelta(days=1),
    "7d": timedelta(days=7),
}


@pages.get("/jobs")
def jobs(visit: Visit) -> Response:
    asked = {
        name: fields.asked(name)
        for name in ("q", "state", "type", "error", "correlation", "period", "since", "until", "batch")
    }
    if found := as_id(asked["q"]):
        return visit.go("job", job_id=found)
    problem = None
    try:
        wanted = _filter(asked)
        cursor = request.args.get("cursor")
        before = read_cursor(cursor) if cursor else None
    except Refused as error:
        wanted, before, cursor, problem = None, None, None, error.detail
    rows = []
    if wanted is not None:
        with visit.system.database.connection() as conn:
            rows = records.search(conn, visit.sees, wanted, before=before, limit=PAGE + 1)
    shown = rows[:PAGE]
    values: dict[str, Any] = {
        "asked": asked,
        "filtered": any(asked.values()),
        "problem": problem,
        "jobs": shown,
        "slugs": {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {},
        "older": cursor_of(shown[-1].id) if len(rows) > PAGE else None,
        "cursor": cursor,
    }
    if request.args.get("part") == "rows":
        return visit.part("jobs_rows.html", **values)
    types = sorted(each.name for each in registry.every())
    return visit.page("jobs.html", **values, types=types, states=STATES, periods=list(PERIODS))


def as_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _filter(asked: dict[str, str]) -> records.Filter:
    """Raises Refused where a field is not what it should be. One word that is no id is looked for as a correlation id."""
    since, until = _moment("since", asked["since"]), _moment("until", asked["until"])
    if asked["period"] in PERIODS:
        since = datetime.now(UTC) - PERIODS[asked["period"]]
    batch = as_id(asked["batch"])
    if asked["batch"] and batch is None:
        raise Refused(422, say("A batch is named by its id."))
    return records.Filter(
        state=next((each for each in STATES if each == asked["state"]), None),
        type=asked["type"] or None,
        correlation_id=asked["correlation"] or asked["q"] or None,
        error=asked["error"] or None,
        batch_id=batch,
        since=since,
        until=until,
    )


def _moment(name: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
        found = found if found.tzinfo else found.replace(tzinfo=UTC)
        if not 1970 <= found.year < 9999:
            raise ValueError
    except ValueError:
        raise Refused(422, say("{field} is no moment: write 2026-01-31T12:00.", field=name)) from None
    return found
