"""Renders: what came out as pictures, what is at work and waits, and the servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flask import Response, request

from agentflow.comfyui import pool, prompts
from agentflow.comfyui.pool import Known
from agentflow.comfyui.prompts import Collected
from agentflow.comfyui.requests import TYPE
from agentflow.comfyui.servers import DEFAULT_POOL
from agentflow.jobs import records
from agentflow.jobs.model import Job
from web import outlook
from web.cursors import cursor_of, read_cursor
from web.dashboard.frame import Pages, Visit
from web.dashboard.job import reason_in_words
from web.dashboard.pictures import Picture, pictures

pages = Pages()

#: Renders on a page of the gallery, and of each so many pictures.
PAGE: Final = 24
_PICTURES: Final = 4
_MOST_WAITING: Final = 10
_MOST_AT_WORK: Final = 50


@dataclass(frozen=True, slots=True)
class Waiting:
    """A render in the line of its pool. `estimate` and `waiting` as the job's own page has them."""

    job: Job
    waiting: outlook.WaitingView | None
    estimate: outlook.EstimateView | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A render of the gallery."""

    render: Collected
    pictures: list[Picture]


@dataclass(frozen=True, slots=True)
class Device:
    """Of a server; memory in bytes, None where it says nothing of it."""

    name: str
    total: int | None
    free: int | None

    @property
    def used(self) -> int | None:
        return None if self.total is None or self.free is None else max(0, self.total - self.free)


@pages.get("/renders")
def renders(visit: Visit) -> Response:
    if request.args.get("part") == "now":
        return visit.part("renders_now.html", **_now(visit))
    cursor = request.args.get("cursor")
    with visit.system.database.connection() as conn:
        rows = prompts.collected(
            conn, visit.sees, before=read_cursor(cursor) if cursor else None, limit=PAGE + 1, outputs=_PICTURES
        )
    gallery = [Shown(each, pictures(visit, each.outputs, each.organization_id)) for each in rows[:PAGE]]
    older = cursor_of(rows[PAGE - 1].job_id) if len(rows) > PAGE else None
    return visit.page("renders.html", gallery=gallery, cursor=cursor, older=older, type=TYPE, **_now(visit))


def _now(visit: Visit) -> dict[str, Any]:
    """The machines are the operator's; what waits and is at work, its owner's."""
    with visit.system.database.connection() as conn:
        servers = pool.servers(conn) if visit.is_operator else []
        lines = [pool.line(name) for name in {DEFAULT_POOL, *pool.names(conn)}]
        queued = records.line(conn, visit.sees, lines, limit=_MOST_WAITING + 1)
        at_work = prompts.at_work(conn, visit.sees, limit=_MOST_AT_WORK)
        jobs = records.by_ids(conn, visit.sees, [each.job_id for each in at_work])
    waiting = [Waiting(job, *outlook.of(visit, job, None)) for job in queued[:_MOST_WAITING]]
    return {
        "servers": [(each, devices(each)) for each in servers],
        "waiting": waiting,
        "more_wait": len(queued) > _MOST_WAITING,
        "at_work": at_work,
        "reason_in_words": reason_in_words,
        "progress": {job.id: visit.services.seats.progress(job) for job in jobs},
    }


def devices(server: Known) -> list[Device]:
    """As the server's /system_stats named them."""
    return [
        Device(str(each.get("name", "")), _bytes(each.get("vram_total")), _bytes(each.get("vram_free")))
        for each in server.devices
        if isinstance(each, dict)
    ]


def _bytes(number: object) -> int | None:
    return number if isinstance(number, int) and number >= 0 else None
