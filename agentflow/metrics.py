"""What this process counts, in Prometheus' text format. The `worker_*` names are the product's contract.

Counters are this process's own; the gauges of queues come from the database at scrape time and are the same from every
process: take one of them, or `max by (queue, state)`.
"""

from __future__ import annotations

import hmac
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from agentflow import log
from agentflow.database import Connection, Unavailable
from agentflow.jobs import registry, staffing, statistics
from agentflow.jobs.model import State
from agentflow.jobs.registry import JobType
from agentflow.schedules import canaries, ticks
from agentflow.webhooks import silence

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

#: Kept by `agentflow worker` itself (agentflow.cli.worker_health): worker processes that died and were started again.
PROCESS_RESTARTS: Final = "agentflow_worker_process_restarts"
CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
#: The queues' gauges are at least so old before the database is asked again; and 20 times as old as asking took, so that
#: scraping never costs more than a twentieth of a connection.
CACHE_S: Final = 5.0
_CACHE_SHARE: Final = 20

prometheus_client.disable_created_metrics()

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_JOB: Final = ("job_type", "queue")
# The library adds `_total` to the names of counters, so those are written here without it.
_jobs = Counter("worker_jobs", "Attempts started by this process", _JOB, registry=REGISTRY)
_completed = Counter("worker_jobs_completed", "Attempts that succeeded", _JOB, registry=REGISTRY)
_failed = Counter("worker_jobs_failed", "Jobs that ended as failed", _JOB, registry=REGISTRY)
_processing = Gauge("worker_jobs_processing", "Attempts running now", _JOB, registry=REGISTRY)
_duration = Histogram(
    "worker_job_duration_seconds",
    "From claim to the end of the attempt",
    _JOB,
    buckets=(0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
    registry=REGISTRY,
)
_redis_status = Gauge("worker_redis_connection_status", "1 while Redis answers", registry=REGISTRY)
_redis_reconnects = Counter("worker_redis_reconnect_attempts", "Connections to Redis made anew", registry=REGISTRY)

_rabbitmq_status = Gauge("worker_rabbitmq_connection_status", "1 while RabbitMQ answers", registry=REGISTRY)
_rabbitmq_reconnects = Gauge(
    "worker_rabbitmq_reconnects", "Connections to RabbitMQ made anew by this process", registry=REGISTRY
)

_pickup = Histogram(
    "agentflow_pickup_seconds",
    "From the moment a job was due to its claim",
    ("queue",),
    buckets=(0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
    registry=REGISTRY,
)
_rescued = Counter("agentflow_rescued", "Jobs taken from workers whose leases ran out", registry=REGISTRY)
_dropped = Counter("agentflow_messages_dropped", "Messages that led to no claim", ("why",), registry=REGISTRY)
_time_limits = Counter("agentflow_time_limits", "Attempts ended by their time limit", ("job_type",), registry=REGISTRY)
_lost_leases = Counter("agentflow_lost_leases", "Attempts whose lease another process took", registry=REGISTRY)

_memory_kills = Counter(
    "agentflow_memory_kills",
    "Processes that the kernel killed for want of memory: child (of a job), worker",
    ("process",),
    registry=REGISTRY,
)

_http_requests = Counter(
    "agentflow_http_requests", "Requests answered", ("method", "route", "status"), registry=REGISTRY
)
_http_seconds = Histogram(
    "agentflow_http_seconds",
    "From the head of the request to the head of the answer",
    ("method", "route"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)

_keys_refused = Counter(
    "agentflow_keys_refused",
    "API keys that opened nothing: unknown, revoked, expired, limited",
    ("why",),
    registry=REGISTRY,
)

_ticks = Counter(
    "agentflow_schedule_ticks", "Ticks that this process claimed", ("schedule", "outcome"), registry=REGISTRY
)
_deleted = Counter("agentflow_cleanup_deleted", "Rows and files deleted by retention", ("what",), registry=REGISTRY)
_webhooks = Counter(
    "agentflow_webhooks",
    "Webhooks that came: verified, by_token, duplicate, conflict (same id, other body), refused, unknown (no such URL)",
    ("source", "verdict"),
    registry=REGISTRY,
)
_webhooks_handled = Counter(
    "agentflow_webhooks_handled",
    "Webhooks by what became of them: done, stale (a newer state was handled), ignored, failed",
    ("source", "outcome"),
    registry=REGISTRY,
)

_comfyui_connections = Gauge(
    "agentflow_comfyui_connections",
    "Open connections of this process to a render server",
    ("server",),
    registry=REGISTRY,
)
_renders = Counter(
    "agentflow_renders",
    "Prompts by how they ended: done, no_output, partly_failed, node_error, out_of_memory, interrupted, timed_out, lost, stuck",
    ("outcome",),
    registry=REGISTRY,
)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def known_types(types: Iterable[JobType]) -> None:
    """Show these types with zeros from the start: a counter that appears with its first failure hides that failure."""
    for process in ("child", "worker"):
        _memory_kills.labels(process)
    for each in types:
        for metric in (_jobs, _completed, _failed, _processing, _duration):
            metric.labels(each.name, each.queue)


def job_started(job_type: str, queue: str, pickup_s: float) -> None:
    _jobs.labels(job_type, queue).inc()
    _processing.labels(job_type, queue).inc()
    _pickup.labels(queue).observe(max(0.0, pickup_s))


def job_ended(job_type: str, queue: str, state: State | None, seconds: float) -> None:
    """The state that was written: `queued` after a retry, a wait or a hand-back; None when the lease was lost."""
    _processing.labels(job_type, queue).dec()
    _duration.labels(job_type, queue).observe(seconds)
    if state == "succeeded":
        _completed.labels(job_type, queue).inc()
    elif state == "failed":
        _failed.labels(job_type, queue).inc()


def key_refused(why: str) -> None:
    _keys_refused.labels(why).inc()


def ticked(schedule: str, outcome: str, number: int = 1) -> None:
    """Of an entry of the calendar; user-defined schedules are one, `user`."""
    _ticks.labels(schedule, outcome).inc(number)


def cleaned_up(what: str, number: int) -> None:
    _deleted.labels(what).inc(number)


def webhook_received(source: str, verdict: str) -> None:
    """Both are words of ours, never what the request said."""
    _webhooks.labels(source, verdict).inc()


def webhook_handled(source: str, outcome: str) -> None:
    _webhooks_handled.labels(source, outcome).inc()


def comfyui_connections(server: str, count: Callable[[], int]) -> None:
    """`count` is asked at each scrape; `server` is an address without credentials."""
    _comfyui_connections.labels(server).set_function(count)


def render_ended(outcome: str) -> None:
    _renders.labels(outcome).inc()


def redis_connected(connected: bool) -> None:
    _redis_status.set(1 if connected else 0)


def redis_reconnect() -> None:
    _redis_reconnects.inc()


def rabbitmq_connected(connected: bool, reconnects: int) -> None:
    _rabbitmq_status.set(1 if connected else 0)
    _rabbitmq_reconnects.set(reconnects)


def rescued(jobs: int) -> None:
    _rescued.inc(jobs)


def message_dropped(why: str) -> None:
    """`why` is one of a few words of ours."""
    _dropped.labels(why).inc()


def time_limit(job_type: str) -> None:
    _time_limits.labels(job_type).inc()


def lease_lost(jobs: int = 1) -> None:
    _lost_leases.inc(jobs)


def killed_for_memory(process: str) -> None:
    _memory_kills.labels(process).inc()


def http_answered(method: str, route: str, status: int, seconds: float) -> None:
    """`route` is the pattern (`/api/jobs/<id>`), never the path that was asked for."""
    method = method if method in _METHODS else "other"
    _http_requests.labels(method, route, str(status)).inc()
    _http_seconds.labels(method, route).observe(seconds)


def jobs() -> dict[str, int]:
    """This process's jobs, for the JSON forms of /metrics and /health."""
    return {
        "total": _sum(_jobs, "_total"),
        "completed": _sum(_completed, "_total"),
        "failed": _sum(_failed, "_total"),
        "processing": _sum(_processing, ""),
    }


def _sum(metric: Counter | Gauge, suffix: str) -> int:
    return int(sum(s.value for m in metric.collect() for s in m.samples if s.name == m.name + suffix))


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for JSON. Prometheus names text formats; a browser and curl name neither."""
    return "application/json" in accept.lower() and "text/plain" not in accept.lower()


def permitted(system: System, authorization: str | None) -> bool:
    """Whether METRICS_TOKEN is unset, or was sent as the bearer token."""
    if system.settings.metrics_token is None:
        return True
    scheme, _, token = (authorization or "").partition(" ")
    wanted = system.settings.metrics_token.get_secret_value()
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), wanted.encode())


def render(system: System, *, with_queues: bool = True) -> bytes:
    """Everything, as text; without the gauges of the queues when the database is away, or known to be."""
    registries = (REGISTRY, _queues_of(system)) if with_queues else (REGISTRY,)
    return b"".join(prometheus_client.generate_latest(registry) for registry in registries)


_of_systems: weakref.WeakKeyDictionary[System, CollectorRegistry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _queues_of(system: System) -> CollectorRegistry:
    with _lock:
        if system not in _of_systems:
            _of_systems[system] = CollectorRegistry()
            _of_systems[system].register(Queues(weakref.ref(system)))
        return _of_systems[system]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database said."""

    queues: list[statistics.Queue]
    staff: staffing.Staff
    entries: list[ticks.Latest]
    canaries: list[canaries.Canary]
    webhooks: list[silence.Watch]


class Queues(prometheus_client.registry.Collector):
    """Gauges from the database: queues, and the calendar. One scrape at a time asks it; the others get what was known before."""

    def __init__(self, system: weakref.ref[System]) -> None:
        self._system = system
        self._found: _Known | None = None
        self._fresh_until = 0.0
        self._asking = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask the database

    def collect(self) -> Iterator[Metric]:
        self._refresh()
        if self._found is None:
            return
        jobs_ = GaugeMetricFamily("agentflow_jobs", "Jobs by queue and state", labels=("queue", "state"))
        parked = GaugeMetricFamily("agentflow_jobs_parked", "Queued jobs that wait", labels=("queue", "reason"))
        oldest = GaugeMetricFamily("agentflow_oldest_due_age_seconds", "Age of the oldest due job", labels=("queue",))
        threads = GaugeMetricFamily("agentflow_worker_threads", "Threads of live workers", labels=("queue",))
        for queue in self._found.queues:
            jobs_.add_metric((queue.name, "due"), queue.due)
            jobs_.add_metric((queue.name, "parked"), sum(queue.parked.values()))
            jobs_.add_metric((queue.name, "running"), queue.running)
            oldest.add_metric((queue.name,), queue.oldest_due_age_s or 0.0)
            threads.add_metric((queue.name,), queue.threads)
            for reason, number in queue.parked.items():
                parked.add_metric((queue.name, reason), number)
        yield from (jobs_, parked, oldest, threads)
        yield from _of_staff(self._found.staff)
        yield from _of_calendar(self._found)
        yield from _of_webhooks(self._found.webhooks)

    def _refresh(self) -> None:
        system: Any = self._system()
        if system is None or time.monotonic() < self._fresh_until or not self._asking.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            with system.database.connection() as conn:
                queues = statistics.queues(conn)
                self._found = _Known(
                    queues,
                    _staff(system, conn, queues),
                    ticks.latest(conn),
                    canaries.states(conn),
                    silence.watches(conn),
                )
            took = time.monotonic() - began
            self._fresh_until = time.monotonic() + max(CACHE_S, _CACHE_SHARE * took)
        except Unavailable as error:
            self._found, self._fresh_until = None, time.monotonic() + CACHE_S
            logger.debug("no gauges of queues: the database is away", error=str(error))
        finally:
            self._asking.release()


def _staff(system: System, conn: Connection, queues: list[statistics.Queue]) -> staffing.Staff:
    limits = {t.name: t.process_limit(system.settings) for t in registry.every() if t.process_limit is not None}
    return staffing.staff(conn, queues, threads=system.settings.job_concurrency, limits=limits)


def _of_staff(staff: staffing.Staff) -> Iterator[Metric]:
    wanted = GaugeMetricFamily(
        "agentflow_workers_wanted", "Worker processes for what waits and runs, of such as serve all queues"
    )
    wanted.add_metric((), staff.of_all)
    of_queue = GaugeMetricFamily(
        "agentflow_queue_workers_wanted", "The same, of such as serve one queue alone", labels=("queue",)
    )
    for name, number in staff.of_queues.items():
        of_queue.add_metric((name,), number)
    yield from (wanted, of_queue)


def _of_calendar(known: _Known) -> Iterator[Metric]:
    last = GaugeMetricFamily(
        "agentflow_schedule_last_tick_timestamp_seconds", "When an entry ticked last", labels=("schedule",)
    )
    behind = GaugeMetricFamily(
        "agentflow_cleanup_behind_seconds",
        "Since clean-up last got to the end of what there was to delete; 0: its last run did",
        labels=("what",),
    )
    for entry in known.entries:
        last.add_metric((entry.schedule,), entry.claimed_at.timestamp())
        kind, _, what = entry.schedule.partition(".")
        if kind == "clean_up":
            behind.add_metric((what,), entry.behind_s)
    trip = GaugeMetricFamily(
        "agentflow_canary_round_trip_seconds", "Of the last canary that came back", labels=("queue",)
    )
    away = GaugeMetricFamily(
        "agentflow_canary_away_seconds",
        "Since the canary that has not come back was sent; 0: it has",
        labels=("queue",),
    )
    failed = GaugeMetricFamily("agentflow_canary_failed", "1 while the last canary failed", labels=("queue",))
    for canary in known.canaries:
        if canary.round_trip_s is not None:
            trip.add_metric((canary.queue,), canary.round_trip_s)
        away.add_metric((canary.queue,), canary.age_s if canary.state == "waiting" else 0.0)
        failed.add_metric((canary.queue,), canary.state == "failed")
    yield from (last, behind, trip, away, failed)


def _of_webhooks(watched: Iterable[silence.Watch]) -> Iterator[Metric]:
    labels = ("source", "endpoint")
    quiet = GaugeMetricFamily("agentflow_webhook_quiet_seconds", "Since the last webhook, where watched", labels=labels)
    silent = GaugeMetricFamily("agentflow_webhook_silence", "1: none for longer than silence_after_s", labels=labels)
    for watch in watched:
        quiet.add_metric((watch.source, str(watch.endpoint_id)), watch.quiet_s)
        silent.add_metric((watch.source, str(watch.endpoint_id)), float(watch.is_silent))
    yield from (quiet, silent)
