"""One workload with one system, on servers that are as good as new. Each returns figures; raises TrialFailed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psutil

from agentflow.prove.ports import free_port
from agentflow.prove.servers import family
from ops.bench.comparison.crew import Crew, Producer, TrialFailed
from ops.bench.comparison.figures import quantile
from ops.bench.comparison.servers import Servers, cpu_s
from ops.bench.peers.catalogue import OURS, Peer, clean_environment, filled, threads_for
from ops.bench.peers.marks import Marks

_WARM: Final = 10
_LOOK_S: Final = 0.02
_KILLED_LEASE: Final = {"JOB_LEASE": "10", "JOB_LEASE_RENEW": "3"}
#: After a kill: so long without another job's end, and those that are missing count as lost.
_STALLED_S: Final = 90.0


@dataclass(frozen=True)
class Size:
    """`slots` for jobs in each of `processes`; `jobs` that take `ms`."""

    jobs: int
    ms: int = 0
    processes: int = 2
    slots: int = 8
    patience_s: float = 300.0


class Trial:
    """The system's processes, its queue and its marks; nothing of what ran before is left."""

    def __init__(self, servers: Servers, peer: Peer, size: Size, **more: str) -> None:
        self.servers = servers
        self.peer = peer
        self.size = size
        self.slots = min(size.slots, peer.slots_most)
        servers.clean()
        name = f"bench-{uuid4().hex[:8]}"
        path = servers.folder / f"{name}.marks"
        self.marks = Marks.make(path, size.jobs + _WARM)
        self._environment = {**clean_environment(), **self._settings(name), "BENCH_MARKS": str(path), **more}
        self._log = servers.folder / f"{name}.log"
        self.workers = Crew(self._environment, self._log)
        self._producer: Producer | None = None

    def _settings(self, name: str) -> dict[str, str]:
        servers = self.servers
        environment = {
            "BENCH_QUEUE": name,
            "BENCH_RABBITMQ": servers.rabbitmq.url,
            "BENCH_REDIS": servers.redis_url(self.peer.redis),
            "BENCH_POSTGRES": servers.procrastinate_url,
            **self.peer.environment(self.slots),
        }
        if self.peer.records:
            environment |= agentflow_settings(servers, name, embedded=self.peer.embedded)
            environment["JOB_CONCURRENCY"] = str(threads_for(self.slots))
        return environment

    @property
    def producer(self) -> Producer:
        """Started at its first use."""
        if self._producer is None:
            self._producer = Producer(self.peer.producer, self._environment, self._log, self.size.patience_s)
        return self._producer

    def let_producer_go(self) -> None:
        if self._producer is not None:
            self._producer.close()
        self._producer = None

    def start_workers(self) -> None:
        commands = self.peer.worker(self.size.processes, self.slots)
        self.workers.start([filled(command, self._environment) for command in commands], PORT=str(free_port()))

    def start_warm(self) -> None:
        """Workers that have run a few jobs."""
        producer = self.producer  # before them: some make their tables by it
        self.start_workers()
        producer.ask("submit", first=self.size.jobs, count=_WARM, ms=0)
        self.wait(lambda: self.marks.done() >= _WARM)

    def wait(self, check: Callable[[], bool], within_s: float | None = None) -> None:
        """Raises TrialFailed when it is not so in time."""
        within_s = within_s or self.size.patience_s
        end = time.monotonic() + within_s
        while not check():
            self.workers.check()
            if time.monotonic() > end:
                done = self.marks.done()
                raise TrialFailed(f"{done} of {self.size.jobs} within {within_s:g} s: {self.workers.said()}")
            time.sleep(_LOOK_S)

    def recorded(self) -> int:
        with self.servers.connect() as conn:
            row = conn.execute("select count(*) from agentflow.jobs where state = 'succeeded'").fetchone()
        return int(row[0]) if row else 0

    def recorded_at(self) -> float:
        """When the last end was on record, by the clock of the marks."""
        with self.servers.connect() as conn:
            row = conn.execute("select extract(epoch from max(finished_at))::float8 from agentflow.jobs").fetchone()
        assert row is not None
        return float(row[0]) - (time.time() - time.monotonic())

    def close(self) -> None:
        self.let_producer_go()
        self.workers.stop()
        self._log.unlink(missing_ok=True)


@contextmanager
def trial(servers: Servers, peer: Peer, size: Size, **more: str) -> Iterator[Trial]:
    made = Trial(servers, peer, size, **more)
    try:
        yield made
    finally:
        made.close()


def quiet_settings(home: Path, name: str) -> dict[str, str]:
    """Of AgentFlow's processes: as shipped, but that ended jobs stay to be counted, and little is logged."""
    return {
        "PATH": f"{OURS}:{os.environ.get('PATH', '')}",
        "AGENTFLOW_ENV": "test",
        "AGENTFLOW_HOME": str(home),
        "JOB_QUEUE_NAME": name,
        "RETAIN_SUCCEEDED_COUNT": "1000000",
        "WORKER_LOG_LEVEL": "WARNING",
        "CANARY_INTERVAL": "0",
    }


def agentflow_settings(servers: Servers, name: str, *, embedded: bool) -> dict[str, str]:
    environment = quiet_settings(servers.home, name)
    if not embedded:
        environment["DATABASE_URL"] = servers.joined.database_url
        environment["REDIS_URL"] = servers.joined.redis_url
        environment["RABBITMQ_URL"] = servers.rabbitmq.url
        environment["STORAGE_URL"] = (servers.home / "storage").as_uri()
        environment["STORAGE_SHARED"] = "true"
    return environment


# ---- the workloads ----


def drain(servers: Servers, peer: Peer, size: Size) -> dict[str, Any]:
    """Hand in all, then start the workers: jobs a second from the first beginning to the last end (recorded, where it is)."""
    with trial(servers, peer, size) as made:
        figures = _fill(made)
        made.let_producer_go()
        made.start_workers()
        made.wait(lambda: made.marks.begun() > 0)
        before = Usage(made)
        made.wait(lambda: made.marks.done() == size.jobs)
        if peer.records:
            made.wait(lambda: made.recorded() == size.jobs)
        figures |= before.until_now(size.jobs)
        ends = sorted(ended for _, ended, runs in made.marks.every() if runs)
        began = min(begin for begin, _, _ in made.marks.every() if begin)
        last = max(ends[-1], made.recorded_at()) if peer.records else ends[-1]
    tenth = len(ends) // 10
    figures["jobs_per_s"] = size.jobs / (last - began)
    figures["jobs_per_s_in_the_middle"] = (len(ends) - 2 * tenth) / max(1e-6, ends[-1 - tenth] - ends[tenth])
    if size.ms:
        figures["share_of_ideal"] = figures["jobs_per_s"] / (size.processes * made.slots / (size.ms / 1000))
    return figures


def _fill(made: Trial) -> dict[str, Any]:
    """Half of the jobs one by one, where the system has a call for many."""
    count, ms = made.size.jobs, made.size.ms
    single = count // 2 if made.producer.has_batches else count
    told = made.producer.ask("submit", first=0, count=single, ms=ms)
    figures = {"submit_per_s": single / told["seconds"], "submit_cpu_us": 1e6 * told["cpu_s"] / single}
    if single < count:
        told = made.producer.ask("submit_many", first=single, count=count - single, ms=ms)
        figures["submit_many_per_s"] = (count - single) / told["seconds"]
    return figures


def kill(servers: Servers, peer: Peer, size: Size) -> dict[str, Any]:
    """A drain in the middle of which every process of the workers gets kill -9; then they are started again."""
    with trial(servers, peer, size, **(_KILLED_LEASE if peer.records else {})) as made:
        _fill(made)
        made.start_workers()
        made.wait(lambda: made.marks.done() >= size.jobs // 2)
        made.workers.kill()
        killed_at, under_way = made.marks.done(), made.marks.begun() - made.marks.done()
        made.start_workers()
        _wait_or_stall(made)
        every = made.marks.every()[: size.jobs]
        figures: dict[str, Any] = {
            "jobs": size.jobs,
            "done_at_the_kill": killed_at,
            "under_way_at_the_kill": under_way,
            "lost": sum(1 for _, _, runs in every if not runs),
            "ran_twice": sum(1 for _, _, runs in every if runs > 1),
        }
        if peer.records:
            figures["not_recorded"] = size.jobs - made.recorded()
    return figures


def _wait_or_stall(made: Trial) -> None:
    """Until each job has ended, and is recorded; or until nothing has happened for long."""
    seen, seen_at = -1, time.monotonic()
    while time.monotonic() - seen_at < _STALLED_S:
        now = made.marks.done() + (made.recorded() if made.peer.records else 0)
        if now >= made.size.jobs * (2 if made.peer.records else 1):
            return
        if now != seen:
            seen, seen_at = now, time.monotonic()
        made.workers.check()
        time.sleep(0.1)


def one_at_a_time(servers: Servers, peer: Peer, size: Size) -> dict[str, Any]:
    """Each job when the one before has ended, on idle workers. Milliseconds from before the call."""
    with trial(servers, peer, size) as made:
        made.start_warm()
        told = made.producer.ask("one_at_a_time", first=0, count=size.jobs)
    figures = {}
    for name, values in told.items():
        if values:
            figures[name.replace("_ms", "_p50_ms")] = quantile(values, 0.5)
            figures[name.replace("_ms", "_p99_ms")] = quantile(values, 0.99)
    return figures


def waits(servers: Servers, peer: Peer, size: Size) -> dict[str, Any]:
    """As many jobs as slots, all at once, each of which waits; connections and memory while they do."""
    if peer.slots_most < size.slots:
        return {"skipped": "it has a process for each job"}
    with trial(servers, peer, size) as made:
        made.start_warm()
        empty_mb = made.workers.pss_mb()
        for first in range(0, size.jobs, 1000):
            do = "submit_many" if made.producer.has_batches else "submit"
            made.producer.ask(do, first=first, count=min(1000, size.jobs - first), ms=size.ms)
        handed_in = time.monotonic()
        made.let_producer_go()
        made.wait(lambda: made.marks.begun() >= 0.9 * (size.jobs + _WARM) or made.marks.done() > _WARM)
        full_mb, threads = made.workers.pss_mb(), sum(each.num_threads() for each in made.workers.processes)
        connections = servers.connections()
        made.wait(lambda: made.marks.done() == size.jobs + _WARM)
        every = made.marks.every()[: size.jobs]
    began, ended = min(begin for begin, _, _ in every), max(end for _, end, _ in every)
    last_begin = max(begin for begin, _, _ in every)
    rate = size.jobs / (ended - began)
    return {
        "jobs_per_s": rate,
        "share_of_slots": rate / (size.processes * made.slots / (size.ms / 1000 + 0.5)),
        "all_begun_after_s": last_begin - min(began, handed_in),
        "pss_mb": full_mb,
        "kb_per_slot": 1000 * (full_mb - empty_mb) / size.jobs,
        "threads": threads,
        **{f"{name}_connections": count for name, count in connections.items()},
    }


def idle(servers: Servers, peer: Peer, size: Size, seconds: float) -> dict[str, Any]:
    """Memory of the whole tree of processes, and processor time while there is nothing to do."""
    with trial(servers, peer, size) as made:
        made.start_warm()
        made.let_producer_go()
        time.sleep(min(5.0, seconds))
        before, servers_before, began = made.workers.cpu_s(), servers.cpu_s(), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        used, servers_used = made.workers.cpu_s() - before, servers.cpu_s()
        processes = len(made.workers.processes)
        return {
            "processes": processes,
            "pss_mb": made.workers.pss_mb(),
            "idle_cpu_percent": 100 * used / took,
            "idle_cpu_percent_per_process": 100 * used / took / processes,
            **{
                f"{name}_cpu_percent": 100 * (servers_used[name] - servers_before[name]) / took for name in servers_used
            },
        }


class Usage:
    """Processor time from here on: of the workers, of the servers, and of whoever else is on the machine."""

    def __init__(self, made: Trial) -> None:
        self._made = made
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        workers, servers = self._made.workers.cpu_s(), self._made.servers.cpu_s()
        ours = workers + sum(servers.values()) + cpu_s(family(os.getpid())[:1])
        return {"at": time.monotonic(), "workers": workers, **servers, "others": busy - ours}

    def until_now(self, jobs: int) -> dict[str, float]:
        used = {name: value - self._before[name] for name, value in self._now().items()}
        took = used.pop("at")
        others = used.pop("others")
        return {
            **{f"{name}_cpu_us": 1e6 * seconds / jobs for name, seconds in used.items()},
            "foreign_cores": max(0.0, others / took),
        }
