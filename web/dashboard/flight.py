"""Flight records: what led to a job, a webhook, a file or an edge of the graph, and what came of it, in one view."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.flights import records
from agentflow.flights.telling import Entry, Record
from agentflow.jobs.text import is_storable
from web.dashboard import shown
from web.dashboard.frame import Pages, Visit, current, link
from web.dashboard.webhooks import LOOK, in_words
from web.dashboard.words import say
from web.problems import Refused

pages = Pages()

_WIDTH: Final = 1000.0
#: What the time line is drawn with, so that a moment is seen among days.
_LEAST_WIDTH: Final = 6.0


@dataclass(frozen=True, slots=True)
class Line:
    """An entry as it is drawn: from `x` for `width` of 1000. `address`: where there is more of it."""

    entry: Entry
    what: str
    x: float
    width: float
    address: str | None
    is_asked: bool


@pages.get("/flight/job/<uuid:job_id>")
def flight_job(visit: Visit, job_id: UUID) -> Response:
    with visit.system.database.connection() as conn:
        return _page(visit, records.of_job(conn, visit.sees, job_id))


@pages.get("/flight/event/<uuid:event_id>")
def flight_event(visit: Visit, event_id: UUID) -> Response:
    with visit.system.database.connection() as conn:
        return _page(visit, records.of_event(conn, visit.sees, event_id))


@pages.get("/flight/edge/<uuid:edge_id>")
def flight_edge(visit: Visit, edge_id: UUID) -> Response:
    with visit.system.database.connection() as conn:
        return _page(visit, records.of_edge(conn, visit.sees, edge_id))


@pages.get("/flight/artefact/<path:key>")
def flight_artefact(visit: Visit, key: str) -> Response:
    if not is_storable(key):
        raise Refused(404, say("There is nothing here."))
    with visit.system.database.connection() as conn:
        return _page(visit, records.of_artefact(conn, visit.sees, key))


def _page(visit: Visit, record: Record | None) -> Response:
    if record is None:
        raise Refused(404, say("Nothing is known of it: it was never here, or is forgotten."))
    began_at, ended_at = _span(record)
    values: dict[str, Any] = {
        "lines": [_line(visit, record, each, began_at, ended_at) for each in record.entries],
        "look": LOOK,
        "in_words": in_words,
    }
    if request.args.get("part") == "lines":
        return visit.part("flight_lines.html", **values)
    return visit.page(
        "flight.html",
        **values,
        record=record,
        asked=next((each for each in record.entries if each.id == record.id), None),
        began_at=began_at,
        ended_at=ended_at,
        goes_on=any(map(_is_under_way, record.entries)),
        again=link(current(), part="lines", **(request.view_args or {})),
        kind_in_words=kind_in_words,
    )


def _span(record: Record) -> tuple[datetime, datetime]:
    """From when to when it went; to now while something is under way."""
    if not record.entries:
        return shown.now(), shown.now()
    ends = [shown.now() if _is_under_way(each) else each.ended_at or each.began_at for each in record.entries]
    return min(each.began_at for each in record.entries), max(ends)


def _is_under_way(entry: Entry) -> bool:
    return entry.kind == "job" and entry.ended_at is None


def _line(visit: Visit, record: Record, entry: Entry, began_at: datetime, ended_at: datetime) -> Line:
    whole_s = max(0.001, (ended_at - began_at).total_seconds())
    end = shown.now() if _is_under_way(entry) else entry.ended_at or entry.began_at
    width = max(_LEAST_WIDTH, _WIDTH * (end - entry.began_at).total_seconds() / whole_s)
    x = min(_WIDTH - width, _WIDTH * (entry.began_at - began_at).total_seconds() / whole_s)
    return Line(
        entry,
        kind_in_words(entry.kind),
        round(max(0.0, x), 2),
        round(min(width, _WIDTH), 2),
        _address(visit, record, entry),
        entry.id == record.id,
    )


def _address(visit: Visit, record: Record, entry: Entry) -> str | None:
    if entry.kind == "artefact":
        if entry.id.startswith(f"o/{record.organization_id}/"):
            with suppress(ValueError):  # not a key after all
                return visit.system.links.sign(entry.id)
        return None
    if entry.kind == "edge":
        return link("flight_edge", edge_id=entry.id)
    if not entry.kept:
        return None
    if entry.kind == "job":
        return link("job", job_id=entry.id)
    return link("webhooks_event", event_id=entry.id) if entry.kind == "event" else None


def kind_in_words(kind: str) -> str:
    return {
        "event": say("Webhook"),
        "schedule": say("Schedule"),
        "job": say("Job"),
        "video": say("Video"),
        "document": say("Document"),
        "artefact": say("File"),
        "edge": say("Edge of the graph"),
    }[kind]
