"""What this process counts, in Prometheus' text format. The `worker_*` names are the product's contract.

What the whole installation does comes from the database and is the same from every process: agentflow/gauges.py. What of both
is answered where, agentflow/scraping.py knows.
"""

from __future__ import annotations

import functools
import hmac
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from agentflow.jobs.model import State
from agentflow.jobs.registry import JobType

if TYPE_CHECKING:
    from agentflow.system import System

#: Kept by `agentflow worker` itself (agentflow.cli.worker_health): worker processes that died and were started again.
PROCESS_RESTARTS: Final = "agentflow_worker_process_restarts"
CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
#: Of how many organizations numbers are shown, those with the most; a label for each of thousands would drown who scrapes.
MOST_ORGANIZATIONS: Final = 50

prometheus_client.disable_created_metrics()

REGISTRY: Final = CollectorRegistry()
#: Shown where there is such a server: a status of 0 means that it should be there.
OF_REDIS: Final = CollectorRegistry()
OF_RABBITMQ: Final = CollectorRegistry()
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
_redis_status = Gauge("worker_redis_connection_status", "1 while Redis answers", registry=OF_REDIS)
_redis_reconnects = Counter("worker_redis_reconnect_attempts", "Connections to Redis made anew", registry=OF_REDIS)

_rabbitmq_status = Gauge("worker_rabbitmq_connection_status", "1 while RabbitMQ answers", registry=OF_RABBITMQ)
_rabbitmq_reconnects = Gauge(
    "worker_rabbitmq_reconnects", "Connections to RabbitMQ made anew by this process", registry=OF_RABBITMQ
)
_database_status = Gauge("agentflow_database_connection_status", "1 while Postgres answers", registry=REGISTRY)

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
    ("kind",),  # not `process`: which one of those at the port it is, is said with every sample
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


class _LimitShares(Collector):
    """How near calls come to their limits, as whoever calls has seen it within the last minute."""

    _FRESH_S: Final = 60.0
    _LOOK_EVERY_S: Final = 5.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: dict[tuple[str, int], tuple[float, float | None]] = {}

    def wants(self, provider: str, organization_id: int) -> bool:
        """True for one of those that ask within a few seconds."""
        key, now = (provider, organization_id), time.monotonic()
        with self._lock:
            before, share = self._shares.get(key, (float("-inf"), None))
            if now - before < self._LOOK_EVERY_S:
                return False
            self._shares[key] = (now, share)
            return True

    def set(self, provider: str, organization_id: int, share: float | None) -> None:
        with self._lock:
            self._shares[provider, organization_id] = (time.monotonic(), share)

    def collect(self) -> Iterator[Metric]:
        oldest = time.monotonic() - self._FRESH_S
        with self._lock:
            self._shares = {key: known for key, known in self._shares.items() if known[0] >= oldest}
            known = [(share, key) for key, (_, share) in self._shares.items() if share is not None]
        used = GaugeMetricFamily(
            "agentflow_limit_used_ratio",
            "Share of a provider's fullest window that an organization's calls have used up",
            labels=("provider", "organization"),
        )
        for share, (provider, organization_id) in sorted(known, reverse=True)[:MOST_ORGANIZATIONS]:
            used.add_metric((provider, str(organization_id)), share)
        yield used


_limit_shares: Final = _LimitShares()
REGISTRY.register(_limit_shares)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


# Shown with zeros from the start: a counter that appears with its first failure hides that failure.
for _counter, _words in (
    (_dropped, ("given_back", "malformed", "not_claimable")),
    (_keys_refused, ("unknown", "revoked", "expired", "limited")),
    (
        _renders,
        (
            "done",
            "no_output",
            "partly_failed",
            "node_error",
            "out_of_memory",
            "interrupted",
            "timed_out",
            "lost",
            "stuck",
        ),
    ),
):
    for _word in _words:
        _counter.labels(_word)


def known_types(types: Iterable[JobType]) -> None:
    """The same for these types."""
    for kind in ("child", "worker"):
        _memory_kills.labels(kind)
    for each in types:
        _time_limits.labels(each.name)
        for metric in (_jobs, _completed, _failed, _processing, _duration):
            metric.labels(each.name, each.queue)


@functools.cache
def _of(metric: Any, *labels: str) -> Any:
    """The metric of these labels: looked up once, not six times for each job."""
    return metric.labels(*labels)


def job_started(job_type: str, queue: str, pickup_s: float) -> None:
    _of(_jobs, job_type, queue).inc()
    _of(_processing, job_type, queue).inc()
    _of(_pickup, queue).observe(max(0.0, pickup_s))


def job_ended(job_type: str, queue: str, state: State | None, seconds: float) -> None:
    """The state that was written: `queued` after a retry, a wait or a hand-back; None when the lease was lost."""
    _of(_processing, job_type, queue).dec()
    _of(_duration, job_type, queue).observe(seconds)
    if state == "succeeded":
        _of(_completed, job_type, queue).inc()
    elif state == "failed":
        _of(_failed, job_type, queue).inc()


def failed_unseen(job_type: str, queue: str) -> None:
    """A job that was ended by a rescue: its worker is gone, and counted nothing."""
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


def wants_share(provider: str, organization_id: int) -> bool:
    """Whether it is time to look how much of its limit is used up."""
    return _limit_shares.wants(provider, organization_id)


def limit_share(provider: str, organization_id: int, share: float | None) -> None:
    _limit_shares.set(provider, organization_id, share)


def render_ended(outcome: str) -> None:
    _renders.labels(outcome).inc()


def redis_connected(connected: bool) -> None:
    _redis_status.set(1 if connected else 0)


def redis_reconnect() -> None:
    _redis_reconnects.inc()


def rabbitmq_connected(connected: bool, reconnects: int) -> None:
    _rabbitmq_status.set(1 if connected else 0)
    _rabbitmq_reconnects.set(reconnects)


def database_connected(connected: bool) -> None:
    _database_status.set(1 if connected else 0)


def rescued(jobs: int) -> None:
    _rescued.inc(jobs)


def message_dropped(why: str) -> None:
    """`why` is one of a few words of ours."""
    _dropped.labels(why).inc()


def time_limit(job_type: str) -> None:
    _time_limits.labels(job_type).inc()


def lease_lost(jobs: int = 1) -> None:
    _lost_leases.inc(jobs)


def killed_for_memory(kind: str) -> None:
    _memory_kills.labels(kind).inc()


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


def own_text(system: System) -> bytes:
    """Of this process alone."""
    return b"".join(prometheus_client.generate_latest(registry) for registry in _registries(system))


def own(system: System) -> Iterator[Metric]:
    """The same, not as text."""
    for registry in _registries(system):
        yield from registry.collect()


def _registries(system: System) -> Iterator[CollectorRegistry]:
    yield REGISTRY
    yield _of_pool(system)
    if system.settings.uses_redis:
        yield OF_REDIS
    if system.settings.rabbitmq_url is not None:
        yield OF_RABBITMQ


def _of_pool(system: System) -> CollectorRegistry:
    """Made for each answer: the pool counts by itself."""
    registry = CollectorRegistry()
    waited = Counter(
        "agentflow_database_pool_wait_seconds",
        "Time that threads of this process have waited for one of its DATABASE_POOL_SIZE connections",
        registry=registry,
    )
    waited.inc(system.database.waited_s())
    return registry
