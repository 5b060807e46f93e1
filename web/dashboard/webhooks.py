"""Webhooks: how each endpoint does, what came, what became of it, and handling it once more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.database import Connection
from agentflow.jobs import flights
from agentflow.jobs.flights import Leg
from agentflow.webhooks import browsing, content, endpoints, events, replays
from agentflow.webhooks.events import OUTCOMES, VERDICTS, Event, Filter
from web.cursors import cursor_of, read_cursor
from web.dashboard import fields, shown
from web.dashboard.frame import Pages, Visit
from web.dashboard.jobs import PAGE, PERIODS, as_id
from web.dashboard.words import say
from web.problems import Refused

pages = Pages()

#: Shown with how they do, the newest ones; the others are found by their webhooks.
_MOST_ENDPOINTS: Final = 24
_MOST_TO_CHOOSE: Final = 200
_MOST_JOBS: Final = 50
LOOK: Final = {
    "done": "succeeded",
    "failed": "failed",
    "stale": "cancelled",
    "ignored": "cancelled",
    "pending": "queued",
    "refused": "failed",
    "conflict": "warn",
}


@dataclass(frozen=True, slots=True)
class Body:
    """What came, as text that may be shown. `raw`: neither JSON nor a form; `text` is None for what is no text."""

    text: str | None
    raw: bool


@pages.get("/webhooks")
def webhooks(visit: Visit) -> Response:
    asked = {name: fields.asked(name) for name in ("q", "endpoint_id", "type", "verdict", "outcome", "period")}
    if asked["q"] and (found := _named(visit, asked["q"])) is not None:
        return visit.go("webhooks_event", event_id=found)
    cursor = request.args.get("cursor")
    problem = None
    before: UUID | None = None
    try:
        before = read_cursor(cursor) if cursor else None
    except Refused as error:
        cursor, problem = None, error.detail
    with visit.system.database.connection() as conn:
        known = endpoints.every(conn, visit.sees, limit=_MOST_TO_CHOOSE)
        found_events: list[Event] = []
        older: UUID | None = None
        if not asked["q"]:
            found_events, older = browsing.browse(conn, visit.sees, _filter(asked), before=before, limit=PAGE)
        standings = browsing.standings(conn, visit.sees, [each.id for each in known[:_MOST_ENDPOINTS]])
    values: dict[str, Any] = {
        "asked": asked,
        "filtered": any(asked.values()),
        "problem": problem,
        "events": found_events,
        "names": {each.id: each for each in known},
        "slugs": {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {},
        "older": cursor_of(older) if older else None,
        "cursor": cursor,
        "standings": standings,
        "counted": browsing.MOST_COUNTED,
        "state_of": state_of,
        "in_words": in_words,
        "look": LOOK,
    }
    if request.args.get("part") == "rows":
        return visit.part("webhooks_rows.html", **values)
    if request.args.get("part") == "endpoints":
        return visit.part("webhooks_endpoints.html", **values)
    return visit.page(
        "webhooks.html", **values, verdicts=VERDICTS, outcomes=("pending", *OUTCOMES), periods=list(PERIODS)
    )


@pages.get("/webhooks/<uuid:event_id>")
def webhooks_event(visit: Visit, event_id: UUID) -> Response:
    with visit.system.database.connection() as conn:
        event = events.get(conn, visit.sees, event_id)
        if event is None:
            if flights.get(conn, visit.sees, event_id) is not None:  # what is remembered of it
                return visit.go("flight_event", event_id=event_id)
            raise Refused(404, say("There is no webhook {id}.", id=event_id))
        endpoint = endpoints.get(conn, event.organization_id, event.endpoint_id)
        # What came may open things: it is shown to whom the API shows it.
        headers, body = events.delivered(conn, event) if visit.may("webhooks") else ({}, None)
        values: dict[str, Any] = {
            "event": event,
            "endpoint": endpoint,
            "jobs": _jobs(conn, event),
            "state_of": state_of,
            "in_words": in_words,
            "look": LOOK,
            "why": why,
        }
    if request.args.get("part") == "state":
        return visit.part("webhooks_state.html", **values)
    shown_body = read_body(body, headers.get("content-type", "")) if body is not None else None
    return visit.page("webhooks_event.html", **values, headers=shown.without_secrets(headers), body=shown_body)


@pages.post("/webhooks/<uuid:event_id>/replay", scope="webhooks")
def webhooks_replay(visit: Visit, event_id: UUID) -> Response:
    with visit.system.transaction() as transaction:
        event = events.get(transaction.conn, visit.sees, event_id)
        if event is None:
            raise Refused(404, say("There is no webhook {id}.", id=event_id))
        try:
            replays.one(transaction, event, even_if_stale=request.form.get("even_if_stale") == "yes")
        except replays.NotReplayable:
            raise Refused(409, say("This webhook was refused: nobody knows who sent it.")) from None
    return visit.go("webhooks_event", event_id=event_id, said=say("The webhook is handled once more."))


def _named(visit: Visit, text: str) -> UUID | None:
    """The event of this id of ours, or of its sender's."""
    with visit.system.database.connection() as conn:
        id_ = as_id(text)
        event = events.get(conn, visit.sees, id_) if id_ is not None else None
        event = event or browsing.delivered_as(conn, visit.sees, text)
    return event.id if event is not None else None


def _filter(asked: dict[str, str]) -> Filter:
    period = PERIODS.get(asked["period"])
    return Filter(
        endpoint_id=as_id(asked["endpoint_id"]),
        type=asked["type"] or None,
        verdict=next((each for each in VERDICTS if each == asked["verdict"]), None),
        outcome="pending"
        if asked["outcome"] == "pending"
        else next((o for o in OUTCOMES if o == asked["outcome"]), None),
        received_from=datetime.now(UTC) - period if period is not None else None,
    )


def _jobs(conn: Connection, event: Event) -> list[tuple[str, Leg]]:
    """The jobs that handled it and that were made of it, each with what it was for: handle, replay, action."""
    ids = [id_ for id_ in (event.job_id, event.handled_by, event.action_job_id) if id_ is not None]
    found = flights.by_ids(conn, event.organization_id, ids, limit=_MOST_JOBS)
    if event.job_id is not None:
        found += flights.retries(conn, event.organization_id, [event.job_id], limit=_MOST_JOBS)
    legs = {leg.id: leg for leg in found}
    return [
        ("action" if leg.id == event.action_job_id else "handle" if leg.id == event.job_id else "replay", leg)
        for leg in sorted(legs.values(), key=lambda leg: leg.id)
    ]


def read_body(body: bytes, content_type: str) -> Body:
    """With its secrets hidden."""
    parsed = content.parse(body, content_type)
    if parsed is not None:
        return Body(shown.as_json(parsed), raw=False)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return Body(None, raw=True)
    return Body(shown.hide_pairs(shown.cut(text)), raw=True)


def state_of(event: Event) -> str:
    """What became of it, where anything did; else what was found of it when it came."""
    if event.outcome is not None:
        return event.outcome
    return "pending" if event.job_id is not None else event.verdict


def in_words(name: str) -> str:
    return {
        "done": say("handled"),
        "failed": say("failed"),
        "stale": say("overtaken"),
        "ignored": say("ignored"),
        "pending": say("not handled yet"),
        "verified": say("verified"),
        "by_token": say("by its address alone"),
        "conflict": say("contradicts another"),
        "refused": say("refused"),
    }.get(name, name)


def why(event: Event) -> str | None:
    """What a state means that is not plain, in words."""
    if event.verdict == "refused":
        return say("Its signature was wrong: {reason}", reason=event.reason or "")
    if event.verdict == "conflict" and event.outcome is None:
        return say(
            "Another one with the same id had another body. Which is right nobody here can know: this one was left alone."
        )
    if event.outcome == "stale":
        return say("A newer state of {entity} had been handled before it came.", entity=event.entity or "")
    return event.detail
