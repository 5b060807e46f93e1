"""Webhooks that came: what they said, what became of them, and handling them once more."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field, Strict

from agentflow.webhooks import events, replays
from agentflow.webhooks.events import Event, Filter, Outcome, Verdict
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.endpoints import Source
from web.jobs import Word, within_calendars
from web.problems import Refused

routes = Routes("webhook-events")

Wanted = Literal["pending", "done", "stale", "ignored", "failed"]
_VERDICT = (
    "verified; by_token: its source signs nothing; conflict: another with the same id had another body, this one was left"
    " alone; refused: the signature was wrong"
)
_OUTCOME = "done; stale: a newer state of its entity had been handled; ignored; failed; pending: not handled yet"


class EventView(View):
    id: UUID
    organization_id: int
    endpoint_id: UUID
    received_at: datetime
    verdict: Verdict = Field(description=_VERDICT)
    reason: str | None = Field(description="Why it was refused")
    delivery_id: str | None = Field(description="As the sender calls it")
    type: str | None
    entity: str | None = Field(description="What it is about")
    version: datetime | None = Field(description="When that changed, as the sender says")
    size_bytes: int
    duplicates: int = Field(description="How often it came again")
    replays: int
    job_id: UUID | None = Field(description="The job that handles it")
    outcome: Outcome | None = Field(description=f"{_OUTCOME} (null here)")
    detail: str | None = Field(description="Why it is so")
    action_job_id: UUID | None = Field(description="The job that was made of it")
    handled_at: datetime | None


class EventWhole(EventView):
    headers: dict[str, str] = Field(description="Without what opens anything")
    body: str = Field(description="As it came; of a refused one the beginning")
    body_encoding: Literal["text", "base64"]


class EventQuery(Query):
    endpoint_id: UUID | None = None
    source: Source | None = None
    type: Word | None = None
    verdict: Verdict | None = None
    outcome: Wanted | None = Field(None, description=_OUTCOME)
    received_from: AwareDatetime | None = None
    received_to: AwareDatetime | None = Field(None, description="And before this moment")
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class EventList(View):
    events: list[EventView] = Field(description="The newest first")
    next_cursor: str | None


class ReplayRequest(Body):
    even_if_stale: bool = Field(False, description="Also where a newer state of its entity was handled")


class ReplayManyRequest(ReplayRequest):
    """Those that all of these find."""

    endpoint_id: UUID | None = None
    source: Source | None = None
    type: Word | None = None
    verdict: Literal["verified", "by_token", "conflict"] | None = None
    outcome: Wanted | None = Field(None, description=_OUTCOME)
    received_from: Annotated[AwareDatetime, Strict()] | None = None
    received_to: Annotated[AwareDatetime, Strict()] | None = Field(None, description="And before this moment")
    preview: bool = Field(False, description="Only count them")
    per_minute: Annotated[float, Field(ge=1, le=60_000)] = Field(
        replays.PER_MINUTE, description="So many are handled in a minute"
    )
    most: Annotated[int, Field(ge=1, le=replays.MOST)] = Field(replays.MOST, description="The oldest so many")


class ReplayView(View):
    job_id: UUID


class ReplayManyView(View):
    matched: int = Field(description="How many there are")
    submitted: int = Field(description="How many of them, the oldest, are handled again")
    correlation_id: str | None = Field(description="Of all their jobs: `GET /api/jobs?correlation_id=…`")
    ends_at: datetime | None = Field(description="When the last one is due")


@routes.get("/api/webhook-events", {200: EventList}, query=EventQuery)
def search(call: Call, query: EventQuery) -> EventList:
    """List webhooks that came, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = events.search(conn, call.sees, _filter(query), before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return EventList(
        events=[EventView(**_columns(each)) for each in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get("/api/webhook-events/<uuid:event_id>", {200: EventWhole}, scope="webhooks", problems=(404,))
def show(call: Call, event_id: UUID) -> EventWhole:
    """Look at a webhook as it came, and what became of it."""
    with call.system.database.connection() as conn:
        event = events.get(conn, call.sees, event_id)
        if event is None:
            raise _unknown(event_id)
        headers, body = events.delivered(conn, event)
    try:
        return EventWhole(**_columns(event), headers=headers, body=body.decode(), body_encoding="text")
    except UnicodeDecodeError:
        text = base64.b64encode(body).decode()
        return EventWhole(**_columns(event), headers=headers, body=text, body_encoding="base64")


@routes.post(
    "/api/webhook-events/<uuid:event_id>/replay",
    {202: ReplayView},
    body=ReplayRequest,
    scope="webhooks",
    problems=(404, 409),
)
def replay(call: Call, event_id: UUID, body: ReplayRequest) -> Answer:
    """Handle a webhook once more, by what its endpoint is set to now. 409: it was refused."""
    with call.system.transaction() as transaction:
        event = events.get(transaction.conn, call.sees, event_id)
        if event is None:
            raise _unknown(event_id)
        try:
            job = replays.one(transaction, event, even_if_stale=body.even_if_stale)
        except replays.NotReplayable:
            raise Refused(409, "this webhook was refused: nobody knows who sent it") from None
    return Answer(ReplayView(job_id=job.id), 202, {"Location": f"/api/jobs/{job.id}"})


@routes.post("/api/webhook-events/replay", {202: ReplayManyView}, body=ReplayManyRequest, scope="webhooks")
def replay_many(call: Call, body: ReplayManyRequest) -> Answer:
    """Handle many webhooks once more, the oldest first, at a pace; `preview` says how many there would be."""
    with call.system.transaction() as transaction:
        done = replays.many(
            transaction,
            call.organization_id,
            _filter(body),
            per_minute=body.per_minute,
            most=body.most,
            even_if_stale=body.even_if_stale,
            preview=body.preview,
        )
    view = ReplayManyView(
        matched=done.matched,
        submitted=done.submitted,
        correlation_id=done.correlation_id if done.submitted else None,
        ends_at=done.ends_at,
    )
    return Answer(view, 202)


def _filter(wanted: EventQuery | ReplayManyRequest) -> Filter:
    return Filter(
        endpoint_id=wanted.endpoint_id,
        source=wanted.source,
        type=wanted.type,
        verdict=wanted.verdict,
        outcome=wanted.outcome,
        received_from=within_calendars(wanted.received_from),
        received_to=within_calendars(wanted.received_to),
    )


def _unknown(event_id: UUID) -> Refused:
    return Refused(404, f"there is no webhook event {event_id}")


def _columns(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in EventView.model_fields}
