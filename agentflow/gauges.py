"""What the whole installation does, from the database and the container: the same from every process that is asked.

A scrape does not wait for the database: it starts the question, and takes the answer of the one before when this one is not
there within a few milliseconds. Every question is answered from small tables and partial indexes.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentflow import container, log, organizations
from agentflow.database import Connection, Unavailable
from agentflow.jobs import backlog, budgets, registry, staffing, statistics
from agentflow.jobs.backlog import Share
from agentflow.jobs.model import QUEUES
from agentflow.jobs.statistics import Worker
from agentflow.kommo import accounts, syncing
from agentflow.metrics import MOST_ORGANIZATIONS
from agentflow.schedules import canaries, ticks
from agentflow.webhooks import silence

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

#: What is known is at least so old before the database is asked again; and 20 times as old as asking took, so that scraping
#: never costs more than a twentieth of a connection.
CACHE_S: Final = 5.0
_CACHE_SHARE: Final = 20
#: What a scrape waits for the answer; the first one has nothing else to show.
_WAIT_S: Final = 0.01
_FIRST_WAIT_S: Final = 2.0

_of_systems: weakref.WeakKeyDictionary[System, Installation] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def text(system: System, *, ask: bool) -> bytes:
    """`ask`: whether the database is there to be asked."""
    registry = CollectorRegistry()
    registry.register(_Container())
    if ask:
        with _lock:
            if system not in _of_systems:
                _of_systems[system] = Installation(weakref.ref(system))
            registry.register(_of_systems[system])
    return prometheus_client.generate_latest(registry)


class Installation(Collector):
    """The gauges from the database. One thread at a time asks it."""

    def __init__(self, system: weakref.ref[System]) -> None:
        self._system = system
        self._found: list[Metric] = []
        self._fresh_until = 0.0
        self._changed = threading.Condition()
        self._asking = False

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask the database

    def collect(self) -> Iterable[Metric]:
        with self._changed:
            if time.monotonic() >= self._fresh_until and not self._asking:
                self._asking = True
                threading.Thread(target=self._ask, name="gauges", daemon=True).start()
            self._changed.wait_for(lambda: not self._asking, _WAIT_S if self._found else _FIRST_WAIT_S)
            return self._found

    def _ask(self) -> None:
        found: list[Metric] = []
        began = time.monotonic()
        try:
            if (system := self._system()) is not None:
                with system.database.connection() as conn:
                    found = list(read(system, conn))
        except Unavailable as error:
            logger.debug("no gauges: the database is away", error=str(error))
        except Exception:  # the thread's end must be told, or nobody asks again
            logger.exception("the gauges cannot be read")
        finally:
            with self._changed:
                ended = time.monotonic()
                self._found, self._asking = found, False
                self._fresh_until = ended + max(CACHE_S, _CACHE_SHARE * (ended - began))
                self._changed.notify_all()


class _Container(Collector):
    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if (limit := container.limit_bytes()) is not None:
            yield _gauge("agentflow_memory_limit_bytes", "What this container may use of memory", limit)
        yield _gauge(
            "agentflow_memory_used_bytes", "What it uses; without a limit: this process", container.used_bytes()
        )


def read(system: System, conn: Connection) -> Iterator[Metric]:
    """All of them, asked now. Raises Unavailable."""
    workers = statistics.workers(conn)
    shares = system.kept.get(conn, backlog.shares)
    queues = system.kept.get(conn, statistics.queues, None)
    yield from _of_queues(queues)
    yield from _of_workers(workers)
    limits = {t.name: t.process_limit(system.settings) for t in registry.every() if t.process_limit is not None}
    yield from _of_staff(staffing.staff(conn, queues, threads=system.settings.job_concurrency, limits=limits))
    yield from _of_organizations(shares)
    yield _by(
        "agentflow_dispatch_lag_seconds",
        "How long a job that nothing holds back has waited for the relay, with threads free",
        "queue",
        backlog.dispatch_lag(shares, system.rules.now(), workers),
    )
    stuck = dict.fromkeys(QUEUES, 0) | backlog.stuck(conn)
    yield _by("agentflow_jobs_stuck", "Running jobs that nobody ends", "queue", stuck)
    failed = dict.fromkeys(QUEUES, 0) | backlog.failed_lately(conn)
    yield _by("agentflow_dead_letters_lately", "Jobs that failed within the last hour", "queue", failed)
    yield from _of_calendar(ticks.latest(conn), canaries.states(conn))
    yield from _of_webhooks(silence.watches(conn))
    yield from _of_outside(conn)


def _of_queues(queues: Iterable[statistics.Queue]) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("agentflow_jobs", "Jobs by queue and state", labels=("queue", "state"))
    parked = GaugeMetricFamily("agentflow_jobs_parked", "Queued jobs that wait", labels=("queue", "reason"))
    oldest = GaugeMetricFamily("agentflow_oldest_due_age_seconds", "Age of the oldest due job", labels=("queue",))
    threads = GaugeMetricFamily("agentflow_worker_threads", "Threads of live workers", labels=("queue",))
    for queue in queues:
        jobs.add_metric((queue.name, "due"), queue.due)
        jobs.add_metric((queue.name, "parked"), sum(queue.parked.values()))
        jobs.add_metric((queue.name, "running"), queue.running)
        oldest.add_metric((queue.name,), queue.oldest_due_age_s or 0.0)
        threads.add_metric((queue.name,), queue.threads)
        for reason, number in queue.parked.items():
            parked.add_metric((queue.name, reason), number)
    yield from (jobs, parked, oldest, threads)


def _of_workers(workers: list[Worker]) -> Iterator[Metric]:
    yield _gauge("agentflow_workers", "Worker processes that were heard of in the last minute", len(workers))
    yield _gauge("agentflow_threads", "Their threads", sum(worker.threads for worker in workers))


def _of_staff(staff: staffing.Staff) -> Iterator[Metric]:
    wanted = "Worker processes for what waits and runs, of such as serve"
    yield _gauge("agentflow_workers_wanted", f"{wanted} all queues", staff.of_all)
    yield _by("agentflow_queue_workers_wanted", f"{wanted} one queue alone", "queue", staff.of_queues)


def _of_organizations(shares: Iterable[Share]) -> Iterator[Metric]:
    counts: dict[int, tuple[int, int]] = {}
    for share in shares:
        due, running = counts.get(share.organization_id, (0, 0))
        counts[share.organization_id] = (due + share.due, running + share.running)
    by_number = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))
    jobs = GaugeMetricFamily(
        "agentflow_organization_jobs",
        "Due and running jobs of the organizations that have most of them; of all others together as `other`",
        labels=("organization", "state"),
    )
    shown = [(str(id_), counts_) for id_, counts_ in by_number[:MOST_ORGANIZATIONS]]
    if rest := [counts_ for _, counts_ in by_number[MOST_ORGANIZATIONS:]]:
        shown.append(("other", (sum(due for due, _ in rest), sum(running for _, running in rest))))
    for organization, (due, running) in shown:
        jobs.add_metric((organization, "due"), due)
        jobs.add_metric((organization, "running"), running)
    yield jobs


def _of_calendar(entries: Iterable[ticks.Latest], sent: Iterable[canaries.Canary]) -> Iterator[Metric]:
    last = GaugeMetricFamily(
        "agentflow_schedule_last_tick_timestamp_seconds", "When an entry ticked last", labels=("schedule",)
    )
    behind = GaugeMetricFamily(
        "agentflow_cleanup_behind_seconds",
        "Since clean-up last got to the end of what there was to delete; 0: its last run did",
        labels=("what",),
    )
    for entry in entries:
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
    for canary in sent:
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


def _of_outside(conn: Connection) -> Iterator[Metric]:
    lags = {str(id_): lag for id_, lag in syncing.lags(conn, limit=MOST_ORGANIZATIONS).items()}
    yield _by(
        "agentflow_sync_lag_seconds",
        "By how much the mirror of a CRM account is older than its interval allows; of an organization's accounts the most",
        "organization",
        lags,
    )
    used = GaugeMetricFamily(
        "agentflow_budget_used_ratio", "Share of a day's budget that is used up", labels=("organization", "measure")
    )
    for each in budgets.nearest(conn, limit=MOST_ORGANIZATIONS):
        used.add_metric((str(each.organization_id), each.measure), each.share)
    yield used
    ends = {"api_key": organizations.next_end_s(conn), "crm": accounts.next_end_s(conn)}
    yield _by(
        "agentflow_credential_expires_seconds",
        "Until the next credential of this kind ends that nobody but a person can renew",
        "kind",
        {kind: seconds for kind, seconds in ends.items() if seconds is not None},
    )


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def _by(name: str, documentation: str, label: str, values: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=(label,))
    for of, value in values.items():
        family.add_metric((of,), value)
    return family
