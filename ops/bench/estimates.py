"""Whether estimates hold: 2,000 jobs under a load that changes, each asked about once, and what became of it.

    .venv/bin/python ops/bench/estimates.py [--jobs 2000] [--threads 16] [--check]

Starts private servers and a worker process; half-way a second one, which is stopped some time later. Three organizations hand
in jobs of two lengths, in waves: for a while more than the workers can do, for a while less. Each job is asked about once, at
once or some seconds later, by the same call that answers `GET /api/jobs/{id}`. A tenth as many jobs come before, for learning.
Writes ops/bench/results/estimates.json: the share of jobs that started and ended within the range that was given (to be 85 to
97 %), and how wide the ranges were as multiples of the time that was left in truth (the median to be below 1.5).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import lengths  # noqa: F401 - registers the types
from fairness import LASTING, ROOT, wait_all, worker
from private import private_system

from agentflow.jobs import records
from agentflow.jobs.estimates import Estimate
from agentflow.jobs.requests import NewJob
from agentflow.system import System

#: Medians of the two lengths and the spread of each (of its logarithm), and the share of the long ones.
SHORT_S, LONG_S, SPREAD, LONG_SHARE = 0.3, 2.0, 0.3, 0.25
#: Jobs handed in per second, as a multiple of what one worker can do, over a wave.
LOW, HIGH, WAVE_S = 0.4, 2.0, 30.0
ASKED_AT_ONCE, LATEST_ASK_S = 0.75, 4.0


@dataclass
class Asked:
    """What was said of a job, and when by the database's clock."""

    job_id: UUID
    at: datetime
    state: str
    start: Estimate | None
    end: Estimate | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument(
        "--check", action="store_true", help="a small run, whose figures say nothing: does it work at all?"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/estimates.json")
    options = parser.parse_args()
    if options.check:
        options.jobs = min(options.jobs, 200)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "jobs": options.jobs,
        "threads": options.threads,
        **run(options),
    }
    if not options.check or options.out != parser.get_default("out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    ends = figures["end"]
    kept = ends["held"] is not None and 0.85 <= ends["held"] <= 0.97 and ends["median_width"] < 1.5
    print(f"{ends['held']} of the ends held, median width {ends['median_width']}: {'kept' if kept else 'NOT KEPT'}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    learning = options.jobs // 10
    asked: list[Asked] = []
    with private_system(**LASTING) as (system, environment), ExitStack() as second:
        for number in (2, 3):
            with system.database.connection() as conn:
                conn.execute(
                    "insert into agentflow.organizations (id, slug, name) values (%s, %s, %s)",
                    (number, f"organization-{number}", f"Organization {number}"),
                )
        with worker(system, environment, options.threads, "lengths"):
            asking = Asking(system, asked)
            began = time.monotonic()
            for number, (organization, seconds, at_s) in enumerate(load(learning + options.jobs, options.threads)):
                time.sleep(max(0.0, began + at_s - time.monotonic()))
                if number == options.jobs // 2:
                    second.enter_context(worker(system, environment, options.threads // 2, "lengths"))
                if number == options.jobs * 3 // 4:
                    second.close()
                type_ = "bench_long" if seconds > (SHORT_S * LONG_S) ** 0.5 else "bench_short"
                new = NewJob(type_, {"sleep_ms": round(seconds * 1000)})
                asking.now_or_later(system.submit(organization, new).job.id, counts=number >= learning)
            asking.finish()
            wait_all(system)
            took = time.monotonic() - began
            return {"seconds": round(took), **judged(system, asked)}


def load(count: int, threads: int) -> list[tuple[int, float, float]]:
    """Whose job, how long it takes, and how many seconds after the start it is handed in."""
    chance, made, at = random.Random(7), [], 0.0
    mean_s = (SHORT_S * (1 - LONG_SHARE) + LONG_S * LONG_SHARE) * math.exp(SPREAD**2 / 2)
    for _ in range(count):
        wave = (1 + math.sin(2 * math.pi * at / WAVE_S)) / 2
        rate = threads * 0.75 / mean_s * (LOW + (HIGH - LOW) * wave**2)
        at += chance.expovariate(rate)
        usual_s = LONG_S if chance.random() < LONG_SHARE else SHORT_S
        organization = chance.choices((1, 2, 3), (6, 3, 1))[0]
        made.append((organization, usual_s * math.exp(chance.gauss(0, SPREAD)), at))
    return made


class Asking:
    """Asks about each job at a moment by chance, in a thread of its own."""

    def __init__(self, system: System, asked: list[Asked]) -> None:
        self._system = system
        self._asked = asked
        self._chance = random.Random(8)
        self._due: list[tuple[float, UUID, bool]] = []
        self._lock = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def now_or_later(self, job_id: UUID, *, counts: bool) -> None:
        if self._chance.random() < ASKED_AT_ONCE:
            self._ask(job_id, counts)
            return
        delay_s = self._chance.uniform(0, LATEST_ASK_S)
        with self._lock:
            self._due.append((time.monotonic() + delay_s, job_id, counts))

    def finish(self) -> None:
        self._over = True
        self._thread.join()

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            with self._lock:
                ready = [each for each in self._due if each[0] <= now]
                self._due = [each for each in self._due if each[0] > now]
                over = self._over and not self._due
            for _, job_id, counts in ready:
                self._ask(job_id, counts)
            if over:
                return
            time.sleep(0.01)

    def _ask(self, job_id: UUID, counts: bool) -> None:
        with self._system.database.connection() as conn:
            job = records.get(conn, records.EVERY_ORGANIZATION, job_id)
        found = self._system.outlooks.of(job) if job is not None else None
        if job is not None and found is not None and counts:
            self._asked.append(Asked(job_id, found.at, job.state, found.start, found.end))


def judged(system: System, asked: list[Asked]) -> dict[str, Any]:
    with system.database.connection() as conn:
        times = {
            row[0]: row[1:] for row in conn.execute("select id, started_at, finished_at from agentflow.jobs").fetchall()
        }
    starts, ends, by_state = [], [], {"queued": [], "running": []}  # type: ignore[var-annotated]
    for each in asked:
        started, finished = ((moment - each.at).total_seconds() for moment in times[each.job_id])
        if each.state == "queued" and each.start is not None:
            starts.append((each.start, started))
        if each.end is not None:
            ends.append((each.end, finished))
            by_state[each.state].append((each.end, finished))
    return {
        "asked": len(asked),
        "asked_while_waiting": len(starts),
        "end": held(ends),
        "end_of_waiting": held(by_state["queued"]),
        "end_of_running": held(by_state["running"]),
        "start": held(starts),
    }


def held(said: list[tuple[Estimate, float]]) -> dict[str, Any]:
    """Of the estimates with a range: how many held, how wide they were, and how far off the middle was."""
    ranged = [(e, e.low, e.high, s) for e, s in said if e.low is not None and e.high is not None]
    if not ranged:
        return {"ranges": 0, "without_a_range": len(said), "held": None, "median_width": None}
    return {
        "ranges": len(ranged),
        "without_a_range": len(said) - len(ranged),
        "held": round(statistics.mean(low <= s <= high for _, low, high, s in ranged), 3),
        "median_width": round(statistics.median((high - low) / max(s, 0.001) for _, low, high, s in ranged), 2),
        "median_true_s": round(statistics.median(s for *_, s in ranged), 2),
        "median_error": round(statistics.median(abs(e.middle - s) / max(s, 0.001) for e, _, _, s in ranged), 2),
    }


if __name__ == "__main__":
    main()
