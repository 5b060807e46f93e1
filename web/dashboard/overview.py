"""The first page: what is wrong now, how it went, what waits, who works."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flask import Response, request

from agentflow import health
from agentflow.jobs import dead_letters, history, statistics
from agentflow.schedules import canaries, ticks
from web.dashboard import outside, troubles
from web.dashboard.frame import Pages, Visit
from web.problems import invalid

pages = Pages()


@pages.get("")
def overview(visit: Visit) -> Response:
    part = request.args.get("part")
    if part in ("now", "parts"):
        return visit.part(f"overview_{part}.html", **_now(visit))
    return visit.page("overview.html", **_now(visit), windows=list(history.WINDOWS))


@pages.get("/charts")
def charts(visit: Visit) -> Response:
    """The points of a window, as columns: what the charts are drawn from."""
    window = request.args.get("window", "1h")
    if window not in history.WINDOWS:
        raise invalid("window", f"is one of {', '.join(history.WINDOWS)}", "query")
    with visit.system.database.connection() as conn:
        points = visit.system.kept.get(conn, history.read, visit.sees, window)
    names = [field.name for field in dataclasses.fields(history.Point)]
    columns = {name: [getattr(point, name) for point in points] for name in names}
    document = {"window": window, "seconds": history.WINDOWS[window][0], **columns}
    return Response(json.dumps(document, separators=(",", ":")), content_type="application/json")


def _now(visit: Visit) -> dict[str, Any]:
    system = visit.system
    connections = health.of(system).connections() if visit.is_operator else {}
    with system.database.connection() as conn:
        queues = system.kept.get(conn, statistics.queues, visit.sees)
        found: dict[str, Any] = {
            "queues": queues,
            "outside": outside.services(visit, conn, queues),
            "workers": statistics.workers(conn) if visit.is_operator else [],
            "canaries": canaries.states(conn) if visit.is_operator else [],
            "calendar": ticks.latest(conn) if visit.is_operator else [],
            "dead": system.kept.get(conn, dead_letters.count, visit.sees),
            "history_behind_s": history.behind_s(conn),
            "connections": connections,
        }
    parked = sum(sum(queue.parked.values()) for queue in queues)
    return {**found, "parked": parked, "named": outside.named, "troubles": troubles.of(visit, found)}
