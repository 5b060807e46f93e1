"""Schedules that organizations make: a job at certain times, its history, and a tick by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from flask import Response
from pydantic import AwareDatetime, ConfigDict, Field, Strict

from agentflow.database import Connection
from agentflow.schedules import firing, records, ticks
from agentflow.schedules.records import NameTaken, Schedule, TooMany, Wanted
from agentflow.schedules.when import MAX_CRON_CHARACTERS, When
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.jobs import Word, within_calendars
from web.problems import Refused

routes = Routes("schedules")

SHOWN_TIMES: Final = 5
MAX_EVERY_S: Final = 366 * 86_400
MAX_JITTER_S: Final = 86_400

Cron = Annotated[str, Field(min_length=1, max_length=MAX_CRON_CHARACTERS)]
Every = Annotated[int, Field(ge=1, le=MAX_EVERY_S)]
At = Annotated[AwareDatetime, Strict()]
Zone = Annotated[str, Field(min_length=1, max_length=100)]
Jitter = Annotated[int, Field(ge=0, le=MAX_JITTER_S)]


class ScheduleRequest(Body):
    """What to do, and when: one of `cron`, `every_s` and `at`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "every morning", "cron": "30 7 * * mon-fri", "time_zone": "Europe/Berlin", "type": "ping"}
            ]
        }
    )

    name: Word = Field(description="Yours, one of a kind in the organization")
    type: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="One of `GET /api/job-types`")
    payload: dict[str, Any] = Field({}, description="The arguments, as the type's schema says")
    cron: Cron | None = Field(None, description="Minute, hour, day of month, month, day of week")
    every_s: Every | None = Field(None, description="Seconds from tick to tick, the first one so long from now")
    at: At | None = Field(None, description="Once, at this moment")
    time_zone: Zone = Field("UTC", description="Whose clocks `cron` goes by, such as Europe/Berlin")
    jitter_s: Jitter = Field(0, description="Each tick comes up to so many seconds late, at random")
    enabled: bool = Field(True, description="false: paused")


class ScheduleChange(Body):
    """What is to be different; the rest stays. Another of `cron`, `every_s` and `at` takes the place of the one there is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"enabled": False}]})

    name: Word | None = None
    type: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    payload: dict[str, Any] | None = None
    cron: Cron | None = None
    every_s: Every | None = None
    at: At | None = None
    time_zone: Zone | None = None
    jitter_s: Jitter | None = None
    enabled: bool | None = None


class ScheduleView(View):
    id: UUID
    organization_id: int
    name: str
    type: str
    payload: dict[str, Any]
    cron: str | None
    every_s: int | None
    at: datetime | None
    time_zone: str
    jitter_s: int
    enabled: bool
    next_at: datetime | None = Field(description="Null while it is paused, and when nothing is to come")
    created_at: datetime


class ScheduleWhole(ScheduleView):
    next_times: list[datetime] = Field(description="The next five ticks, without jitter")


class ListQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class ScheduleList(View):
    schedules: list[ScheduleView] = Field(description="The newest first")
    next_cursor: str | None


class TickView(View):
    at: datetime = Field(description="When it was due")
    claimed_at: datetime = Field(description="When it came about")
    missed: int = Field(description="How many ticks after it were missed as well, which it makes up for")
    by_hand: bool
    outcome: str | None = Field(description="submitted; refused: the type does not take this payload any more")
    job_id: UUID | None
    error: str | None


class TickList(View):
    ticks: list[TickView] = Field(description="The newest first; the last hundred are kept")


class TickCreated(View):
    job_id: UUID


@routes.get("/api/schedules", {200: ScheduleList}, query=ListQuery)
def search(call: Call, query: ListQuery) -> ScheduleList:
    """List schedules, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = records.search(conn, call.sees, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return ScheduleList(
        schedules=[ScheduleView(**_columns(each)) for each in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.post("/api/schedules", {201: ScheduleWhole}, body=ScheduleRequest, scope="manage", problems=(409,))
def create(call: Call, body: ScheduleRequest) -> Answer:
    """Make a schedule: a job of this type and payload, at these times.

    What was missed while no scheduler ran is made up for by one tick. 409: the name is taken, or there are as many schedules as
    SCHEDULES_MOST says.
    """
    when = When(body.cron, body.every_s, within_calendars(body.at), body.time_zone)
    wanted = Wanted(body.name, when, body.type, body.payload, body.jitter_s, body.enabled)
    with _conflicts(), call.system.database.transaction() as conn:
        firing.check(call.system, call.organization_id, wanted, records.now(conn))
        made = records.create(conn, call.organization_id, wanted, most=call.system.settings.schedules_most)
        view = _whole(conn, made)
    return Answer(view, 201, {"Location": f"/api/schedules/{made.id}"})


@routes.get("/api/schedules/<uuid:schedule_id>", {200: ScheduleWhole}, problems=(404,))
def show(call: Call, schedule_id: UUID) -> ScheduleWhole:
    """Look at a schedule, with its next five times."""
    with call.system.database.connection() as conn:
        return _whole(conn, _find(call, conn, schedule_id))


@routes.patch(
    "/api/schedules/<uuid:schedule_id>",
    {200: ScheduleWhole},
    body=ScheduleChange,
    scope="manage",
    problems=(404, 409),
)
def change(call: Call, schedule_id: UUID, body: ScheduleChange) -> ScheduleWhole:
    """Change a schedule, pause it or let it go on (`enabled`). It is in force within seconds.

    Nothing is made up for of the time in which it was paused.
    """
    with _conflicts(), call.system.database.transaction() as conn:
        held = _find(call, conn, schedule_id, hold=True)
        wanted = _changed(held, body)
        times = bool({"cron", "every_s", "at", "time_zone"} & body.model_fields_set)
        firing.check(call.system, held.organization_id, wanted, records.now(conn), times=times)
        return _whole(conn, records.update(conn, held, wanted))


@routes.delete("/api/schedules/<uuid:schedule_id>", {204: "It is gone"}, scope="manage", problems=(404,))
def delete(call: Call, schedule_id: UUID) -> Response:
    """Delete a schedule and its history. Jobs that it made stay."""
    with call.system.database.transaction() as conn:
        found = _find(call, conn, schedule_id, hold=True)
        records.delete(conn, found.organization_id, schedule_id)
    return Response(status=204)


@routes.post("/api/schedules/<uuid:schedule_id>/run", {202: TickCreated}, scope="manage", problems=(404,))
def run(call: Call, schedule_id: UUID) -> Answer:
    """Hand its job in now, also while it is paused. Its times stay as they are."""
    with call.system.transaction() as transaction:
        found = _find(call, transaction.conn, schedule_id, hold=True)
        job_id = firing.fire_now(transaction, found)
    return Answer(TickCreated(job_id=job_id), 202, {"Location": f"/api/jobs/{job_id}"})


@routes.get("/api/schedules/<uuid:schedule_id>/ticks", {200: TickList}, problems=(404,))
def history(call: Call, schedule_id: UUID) -> TickList:
    """What became of a schedule's ticks."""
    with call.system.database.connection() as conn:
        found = _find(call, conn, schedule_id)
        return TickList(
            ticks=[
                TickView(
                    at=each.at,
                    claimed_at=each.claimed_at,
                    missed=each.missed,
                    by_hand=each.by_hand,
                    outcome=each.outcome,
                    job_id=each.job_id,
                    error=(each.facts or {}).get("error"),
                )
                for each in ticks.history(conn, found.organization_id, schedule_id)
            ]
        )


def _changed(schedule: Schedule, body: ScheduleChange) -> Wanted:
    at = within_calendars(body.at)
    zone = body.time_zone or schedule.time_zone
    if (body.cron, body.every_s, at) == (None, None, None):
        when = When(schedule.cron, schedule.every_s, schedule.once_at, zone)
    else:
        when = When(body.cron, body.every_s, at, zone)
    return Wanted(
        name=body.name if body.name is not None else schedule.name,
        when=when,
        type=body.type if body.type is not None else schedule.type,
        payload=body.payload if body.payload is not None else schedule.payload,
        jitter_s=body.jitter_s if body.jitter_s is not None else schedule.jitter_s,
        enabled=body.enabled if body.enabled is not None else schedule.enabled,
    )


@contextmanager
def _conflicts() -> Iterator[None]:
    try:
        yield
    except (NameTaken, TooMany) as error:
        raise Refused(409, str(error)) from None


def _find(call: Call, conn: Connection, schedule_id: UUID, *, hold: bool = False) -> Schedule:
    found = records.get(conn, call.sees, schedule_id, hold=hold)
    if found is None:
        raise Refused(404, f"there is no schedule {schedule_id}")
    return found


def _whole(conn: Connection, schedule: Schedule) -> ScheduleWhole:
    times = schedule.when.following(records.now(conn), SHOWN_TIMES) if schedule.enabled else []
    return ScheduleWhole(**_columns(schedule), next_times=times)


def _columns(schedule: Schedule) -> dict[str, Any]:
    return {name: schedule.once_at if name == "at" else getattr(schedule, name) for name in ScheduleView.model_fields}
