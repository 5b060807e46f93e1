"""Schedules: when each ticks next and what became of the last time, run now, paused; and the installation's own calendar."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.schedules import records, ticks
from web import schedules as api
from web.cursors import cursor_of, read_cursor
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import say
from web.schedules import ScheduleChange

pages = Pages()

PAGE: Final = 50


@pages.get("/schedules")
def schedules(visit: Visit) -> Response:
    cursor = request.args.get("cursor")
    before = read_cursor(cursor) if cursor else None
    with visit.system.database.connection() as conn:
        rows = records.search(conn, visit.sees, before=before, limit=PAGE + 1)
        shown = rows[:PAGE]
        values: dict[str, Any] = {
            "schedules": shown,
            "last": ticks.last(conn, visit.sees, [each.id for each in shown]),
            "calendar": ticks.latest(conn) if visit.sees is None else [],
        }
    values |= {
        "cursor": cursor,
        "older": cursor_of(shown[-1].id) if len(rows) > PAGE else None,
        "slugs": {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {},
    }
    if request.args.get("part") == "rows":
        return visit.part("schedules_rows.html", **values)
    return visit.page("schedules.html", **values)


@pages.get("/schedules/<uuid:schedule_id>")
def schedule(visit: Visit, schedule_id: UUID) -> Response:
    whole = api.show(visit, schedule_id)
    with visit.system.database.connection() as conn:
        history = ticks.history(conn, whole.organization_id, schedule_id)
    return visit.page("schedule.html", schedule=whole, history=history)


@pages.post("/schedules/<uuid:schedule_id>/run", scope="manage")
def run_schedule(visit: Visit, schedule_id: UUID) -> Response:
    made: Any = api.run(visit, schedule_id).model
    return visit.go("job", job_id=made.job_id, said=say("This is the schedule's job. Its times stay as they are."))


@pages.post("/schedules/<uuid:schedule_id>/pause", scope="manage")
def pause_schedule(visit: Visit, schedule_id: UUID) -> Response:
    changed = api.change(visit, schedule_id, ScheduleChange(enabled=False))
    return visit.go("schedules", said=say("{what}: paused.", what=changed.name))


@pages.post("/schedules/<uuid:schedule_id>/resume", scope="manage")
def resume_schedule(visit: Visit, schedule_id: UUID) -> Response:
    changed = api.change(visit, schedule_id, ScheduleChange(enabled=True))
    return visit.go("schedules", said=say("{what}: goes on.", what=changed.name))
