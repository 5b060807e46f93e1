"""How the system does: queues, workers, health, metrics."""

from __future__ import annotations

import json
import platform
from datetime import datetime
from typing import Any
from uuid import UUID

from flask import Response, redirect, request
from pydantic import Field

import agentflow
from agentflow import health, metrics, scraping
from agentflow.jobs import statistics
from agentflow.schedules import canaries, ticks
from web.api import Call, Media, Routes, View
from web.problems import Refused

system_routes = Routes("system")
open_routes = Routes("health")

SERVICE = "agentflow-web"


class QueueView(View):
    name: str
    due: int = Field(description="Queued jobs that could run now")
    parked: dict[str, int] = Field(description="Queued jobs that wait for a time or a slot, by reason")
    running: int
    oldest_due_age_s: float | None
    window: int = Field(description="How many messages may be on their way at once")
    workers: int
    threads: int = Field(description="Threads of live workers that serve this queue")


class QueueStats(View):
    queues: list[QueueView]


class WorkerView(View):
    id: UUID
    kind: str
    host: str
    pid: int
    version: str
    queues: list[str]
    threads: int
    busy: int
    memory_bytes: int | None
    started_at: datetime
    seen_at: datetime


class LatelyView(View):
    seconds: int
    created: int
    ended: dict[str, int] = Field(description="Ends by state, of jobs created within three times as long")


class ConnectionView(View):
    connected: bool
    lastError: str | None


class CalendarView(View):
    """The last tick of an entry of the calendar."""

    schedule: str = Field(description="`canary`, `clean_up.…`, …; `user` is all schedules that organizations made")
    at: datetime = Field(description="When it was due")
    claimed_at: datetime
    outcome: str | None = Field(
        description="submitted, refused, done, behind (there was more than it could do), failed; null: at work, or cut off"
    )
    age_s: float
    behind_s: float = Field(description="Seconds since its last run that got to the end; 0: the last one did")


class CanaryView(View):
    """The last ping through a queue."""

    queue: str
    at: datetime
    state: str = Field(description="well, waiting (it has not come back yet), failed")
    age_s: float
    round_trip_s: float | None = Field(description="From handing in to the end, of the last one that came back")


class SystemStats(View):
    queues: list[QueueView]
    workers: list[WorkerView]
    lately: LatelyView
    versions: dict[str, str | None]
    connections: dict[str, ConnectionView]
    calendar: list[CalendarView] = Field(description="Empty until a scheduler runs")
    canaries: list[CanaryView]


class HealthView(View):
    status: str
    service: str
    timestamp: datetime
    uptime: float
    redis: ConnectionView
    rabbitmq: ConnectionView
    database: ConnectionView
    jobs: dict[str, int]
    degraded: list[str] = Field(description="What does not go well, in sentences")


class ReadyView(HealthView):
    ready: bool


class LiveView(View):
    status: str


@system_routes.get("/api/system/queue-stats", {200: QueueStats})
def queue_stats(call: Call) -> QueueStats:
    """What waits and runs, by queue; of the caller's organization alone. Windows, workers and threads are everybody's."""
    with call.system.database.connection() as conn:
        return QueueStats(
            queues=[_view(QueueView, each) for each in call.system.kept.get(conn, statistics.queues, call.sees)]
        )


@system_routes.get("/api/system/stats", {200: SystemStats}, scope="admin")
def stats(call: Call) -> SystemStats:
    """The whole picture: queues, workers, what was done lately, versions, connections, the calendar."""
    with call.system.database.connection() as conn:
        return SystemStats(
            queues=[_view(QueueView, each) for each in call.system.kept.get(conn, statistics.queues, None)],
            workers=[_view(WorkerView, each) for each in statistics.workers(conn)],
            lately=_view(LatelyView, statistics.lately(conn)),
            versions={
                "agentflow": agentflow.__version__,
                "python": platform.python_version(),
                **statistics.versions(conn),
            },
            connections={
                name: ConnectionView(**each.view()) for name, each in health.of(call.system).connections().items()
            },
            calendar=[_view(CalendarView, each) for each in ticks.latest(conn)],
            canaries=[_view(CanaryView, each) for each in canaries.states(conn)],
        )


def _view(view: type[Any], row: Any) -> Any:
    return view(**{name: getattr(row, name) for name in view.model_fields})


@open_routes.get("/health", {200: HealthView}, open=True)
def whole(call: Call) -> Response:
    """How this process does: `ok`, `degraded`, `draining` or `stuck`. Always 200: for people and monitors."""
    return _health(call)


@open_routes.get("/health/live", {200: LiveView, 503: LiveView}, open=True)
def live(call: Call) -> Response:
    """Whether this process works at all; 503 means that restarting it would help."""
    return _health(call)


@open_routes.get("/health/ready", {200: ReadyView, 503: ReadyView}, open=True)
def ready(call: Call) -> Response:
    """Whether this process should get traffic: 503 without a database, with an older schema, and while it stops."""
    return _health(call)


@open_routes.get(
    "/metrics",
    {200: Media("text/plain", "Prometheus' text format, or JSON with `Accept: application/json`", {"type": "string"})},
    problems=(401,),
    open=True,
)
def show_metrics(call: Call) -> Response:
    """Metrics of this process and of the queues. METRICS_TOKEN, where set, is wanted as the bearer token."""
    if not metrics.permitted(call.system, request.headers.get("Authorization")):
        raise Refused(401, "METRICS_TOKEN is wanted as a bearer token", headers={"WWW-Authenticate": "Bearer"})
    if metrics.wants_json(request.headers.get("Accept", "")):
        return Response(json.dumps(scraping.document(call.system)), content_type="application/json")
    return Response(scraping.text(call.system), content_type=metrics.CONTENT_TYPE)


@open_routes.get("/", {302: "To the documentation"}, open=True)
def root(_call: Call) -> Response:
    """The way to the documentation."""
    answer = redirect("/docs")
    assert isinstance(answer, Response)  # noqa: S101 - flask's own class
    return answer


def _health(call: Call) -> Response:
    found = health.answer(call.system, SERVICE, request.path)
    assert found is not None  # noqa: S101 - the routes above
    return Response(json.dumps(found[1]), found[0], content_type="application/json")
