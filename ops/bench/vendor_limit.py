"""Whether workers keep to a vendor's limit and use it: a vendor that allows so many requests a second and answers 429 above,
eight worker processes; then one that lowers its limit half-way; then what 5,000 parked jobs cost.

    .venv/bin/python ops/bench/vendor_limit.py [--rate 70] [--workers 8] [--seconds 80] [--parked 5000]

Starts private servers. The limit that is set is the vendor's own; the vendor counts exactly, within any second by its own
clock, and refuses with Retry-After. The warm-up is a fifth of the time; half of it is for learning a lowered limit. Writes
ops/bench/results/vendor_limit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fairness import BIN, LASTING, ROOT
from idle import machine
from private import private_system

from agentflow.prove.ports import free_port

sys.path.insert(0, str(ROOT))
from agentflow.jobs import rules
from agentflow.jobs.requests import NewJob
from agentflow.limits import Window
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the job that asks
from tests.http_server import Reply, Request, serve
from tests.openrouter_server import KEY, completion, error

ORGANIZATION = 1
WARM_UP, LEARNING = 0.2, 0.5
#: Who was not told the limit finds it by meeting it: so small a share of the calls.
MOST_FEELERS = 0.01


class Vendor:
    """Lets `rate` requests through within any second, and remembers when each came."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.let_through: list[float] = []
        self.refused: list[float] = []
        self._window: deque[float] = deque()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        with self._lock:
            now = time.monotonic()
            while self._window and now - self._window[0] >= 1.0:
                self._window.popleft()
            if len(self._window) >= self.rate:
                self.refused.append(now)
                return error(429, "Rate limit exceeded", headers={"Retry-After": "1"})
            self._window.append(now)
            self.let_through.append(now)
        return completion("pong", usage={"prompt_tokens": 5, "completion_tokens": 1, "cost": 0.0001})

    def between(self, start: float, end: float) -> dict[str, Any]:
        let, refused = (sum(start <= at < end for at in times) for times in (self.let_through, self.refused))
        return {
            "seconds": round(end - start, 1),
            "let_through_per_s": round(let / (end - start), 2),
            "share_of_the_rate": round(let / (end - start) / self.rate, 3),
            "refused": refused,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=70)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--parked", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/vendor_limit.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": machine(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "rate_per_s": options.rate,
        "workers": options.workers,
        "threads": options.threads,
    }
    vendor = Vendor(options.rate)
    with serve() as server:
        server.on("/", vendor)
        with private_system(**LASTING) as (system, environment):
            environment |= {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": server.url("/api/v1")}
            with workers(system, environment, options.workers, options.threads) as processes:
                figures["steady"], figures["lowered"] = asking(system, vendor, options)
                print(json.dumps(figures, indent=2), flush=True)
                empty(system)
                figures["parked"] = parked(system, vendor, processes, options.parked)
    steady, lowered, at_rest = figures["steady"], figures["lowered"], figures["parked"]
    figures["kept"] = {
        "no refusal after the warm-up": steady["refused"] == 0,
        "nine tenths of the rate are used": steady["share_of_the_rate"] >= 0.9,
        "a lowered limit is followed": lowered["share_of_the_rate"] >= 0.9
        and lowered["refused"] <= MOST_FEELERS * lowered["let_through_per_s"] * lowered["seconds"],
        "parked jobs have no message": at_rest["messages"] == 0,
        "parked jobs hold no thread": at_rest["threads_at_work"] == 0,
        "parked jobs cost less than 1 % of a core": at_rest["more_than_idle_percent_of_a_core"] < 1,
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def asking(system: System, vendor: Vendor, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """More jobs than the limit lets through, to the end. Half-way the vendor lowers its limit to a half."""
    limited(system, [Window(options.rate, 1)])
    hand_in(system, int(options.rate * options.seconds * 1.9))
    wait_for(lambda: bool(vendor.let_through), 120)
    began = time.monotonic()
    settled = began + WARM_UP * options.seconds
    time.sleep(options.seconds)
    steady = vendor.between(settled, began + options.seconds)
    steady["refused_in_the_warm_up"] = vendor.between(began, settled)["refused"]
    vendor.rate = max(1, vendor.rate // 2)
    lowered_at = time.monotonic()
    time.sleep(options.seconds)
    learned = lowered_at + LEARNING * options.seconds
    lowered = vendor.between(learned, lowered_at + options.seconds)
    lowered["refused_while_it_learned"] = vendor.between(lowered_at, learned)["refused"]
    return steady, lowered


def parked(system: System, vendor: Vendor, processes: Sequence[psutil.Process], count: int) -> dict[str, Any]:
    """What so many jobs cost that wait for places, of which the first comes in an hour."""
    idle = percent_of_a_core(processes)
    limited(system, [Window(1, 3600)])
    hand_in(system, count)
    wait_for(lambda: counted(system, "state = 'queued' and wait_reason = 'limit'") >= count - 1, 900)
    before = len(vendor.let_through)
    cost = percent_of_a_core(processes)
    return {
        "jobs": counted(system, "wait_reason = 'limit'"),
        "messages": counted(system, "state = 'queued' and sent_at is not null"),
        "threads_at_work": counted(system, "state = 'running'"),
        "calls_meanwhile": len(vendor.let_through) - before,
        "idle_percent_of_a_core": round(idle, 2),
        "percent_of_a_core": round(cost, 2),
        "more_than_idle_percent_of_a_core": round(cost - idle, 2),
    }


def limited(system: System, windows: Sequence[Window]) -> None:
    with system.database.transaction() as conn:
        rules.set_limit(conn, ORGANIZATION, "openrouter", windows)
    time.sleep(3)  # until every worker has read it


def hand_in(system: System, count: int) -> None:
    prepared = [
        system.prepare(ORGANIZATION, NewJob("test_asker", {"about": f"{time.monotonic()} {n}"}), public_only=False)
        for n in range(count)
    ]
    for first in range(0, count, 1000):
        with system.transaction() as transaction:
            transaction.submit_many(ORGANIZATION, prepared[first : first + 1000])


def empty(system: System) -> None:
    def emptied() -> bool:  # those that run now are parked, and then they go, too
        with system.database.transaction() as conn:
            conn.execute("delete from agentflow.jobs where organization_id = %s and state = 'queued'", (ORGANIZATION,))
        return counted(system, "state in ('queued', 'running')") == 0

    wait_for(emptied, 120)


def counted(system: System, where: str, table: str = "jobs") -> int:
    with system.database.connection() as conn:
        row = conn.execute(f"select count(*) from agentflow.{table} where {where}".encode()).fetchone()  # noqa: S608
    return int(row[0]) if row else 0


def percent_of_a_core(processes: Sequence[psutil.Process], seconds: float = 30.0) -> float:
    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    return 100 * (used() - before) / (time.monotonic() - began)


def wait_for(check: Any, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not check():
        if time.monotonic() > end:
            raise SystemExit(f"did not come true within {within_s:g} s")
        time.sleep(0.2)


@contextmanager
def workers(system: System, environment: dict[str, str], count: int, threads: int) -> Iterator[list[psutil.Process]]:
    home = Path(environment["AGENTFLOW_HOME"])
    command = [
        str(BIN / "dramatiq"),
        "tests.job_types",
        "--path",
        str(ROOT),
        "--processes",
        "1",
        "--threads",
        str(threads),
    ]
    more = {"WORKER_LOG_LEVEL": "WARNING", "JOB_CONCURRENCY": str(threads)}
    started = []
    with ExitStack() as files:
        try:
            for number in range(count):
                log = files.enter_context((home / f"worker-{number}.log").open("wb"))
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment, **more, "PORT": str(free_port())},
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                    )
                )
            wait_for(lambda: counted(system, "stopped_at is null", "workers") >= count, 300)
            parents = [psutil.Process(process.pid) for process in started]
            yield [process for parent in parents for process in (parent, *parent.children(recursive=True))]
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)
            print(*(log.read_text()[-500:] for log in home.glob("worker-*.log")), file=sys.stderr)


if __name__ == "__main__":
    main()
