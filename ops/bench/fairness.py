"""Whether a flood of one organization holds up nine quiet ones: pick-up of the quiet ones' jobs, idle and under the flood.

    .venv/bin/python ops/bench/fairness.py [--jobs 20000] [--sleep-ms 20] [--threads 16]

Starts private servers and one worker process. First the quiet organizations alone (idle), then 90 % of the jobs from one
organization, handed in at once, and 10 % from the nine others, spread over the time that it takes: one for each nine of the
noisy one that have ended. Last, jobs of five seconds, as many from the noisy one as its share of the threads does in 20 s, and
some short ones from the others meanwhile. All of it once with the relay as it is and once with plain first-in, first-out.
Pick-up is started_at - run_at by the database's clock. Writes ops/bench/results/fairness.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from private import private_system

import actors  # noqa: F401 - registers the job types
from agentflow.jobs import statistics as job_statistics
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
NOISY, QUIET = 1, range(2, 11)
#: So that what ran is still there to be looked at.
LASTING = {"RETAIN_SUCCEEDED_COUNT": "1000000"}
LONG_S, LONG_ROUNDS, LONG_QUIET = 5.0, 4, 9

# All due rows of a queue are rung for as they come, whoever they belong to, and no share of anybody's: the broker has the line.
FIFO = """
create or replace function agentflow.window_1(p_queue text) returns integer language sql stable as 'select 1000000';
create or replace function agentflow.share_1() returns double precision language sql stable as 'select 1::double precision';
create or replace function agentflow.relay_5(p_queue text)
returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision) language plpgsql as $$
begin
    if not pg_try_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7)) then
        return;
    end if;
    return query
    with picked as materialized (
        select id from agentflow.jobs
        where queue = p_queue and state = 'queued' and sent_at is null and wake_at <= clock_timestamp()
        order by wake_at limit 1000 for update skip locked
    )
    update agentflow.jobs j set sent_at = clock_timestamp(), sends = 1, wake_at = clock_timestamp() + interval '30 s'
    from picked where j.id = picked.id returning j.id, j.type, j.priority, null::double precision;
end $$;
create index fifo on agentflow.jobs (queue, wake_at) where state = 'queued';
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--sleep-ms", type=int, default=20)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--idle-jobs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/fairness.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "jobs": options.jobs,
        "sleep_ms": options.sleep_ms,
        "threads": options.threads,
    }
    for relay in ("fair", "fifo"):
        figures[relay] = one_run(relay, options)
        print(relay, json.dumps(figures[relay]), flush=True)
    idle, fair = figures["fair"]["idle_p95_ms"], figures["fair"]["quiet_p95_ms"]
    figures["allowed_p95_ms"] = round(1.5 * idle + 50, 1)
    figures["kept"] = fair <= figures["allowed_p95_ms"]
    figures["kept_beside_long_jobs"] = figures["fair"]["quiet_max_ms_beside_long_jobs"] < LONG_S * 1000
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"quiet p95 {fair} ms, allowed {figures['allowed_p95_ms']} ms: {'kept' if figures['kept'] else 'NOT KEPT'}")
    print(f"beside jobs of {LONG_S:g} s: {'kept' if figures['kept_beside_long_jobs'] else 'NOT KEPT'}")


def one_run(relay: str, options: argparse.Namespace) -> dict[str, Any]:
    with private_system(**LASTING) as (system, environment):
        with system.database.transaction() as conn:
            for number in QUIET:
                conn.execute(
                    "insert into agentflow.organizations (id, slug, name) values (%s, %s, %s)",
                    (number, f"quiet-{number}", f"Quiet {number}"),
                )
            if relay == "fifo":
                conn.execute(FIFO)
        with worker(system, environment, options.threads):
            idle = quiet_jobs(system, options.sleep_ms, options.idle_jobs, every_s=0.05)
            wait_all(system)
            idle_ms = pick_ups(system, idle)
            began = time.monotonic()
            noisy = options.jobs * 9 // 10
            flood(system, options.sleep_ms, noisy)
            quiet = quiet_beside(system, options.sleep_ms, options.jobs // 10, noisy)
            left = still_waiting(system)
            wait_all(system)
            took = time.monotonic() - began
            quiet_ms = pick_ups(system, quiet)
            flood(system, round(LONG_S * 1000), options.threads * 3 // 4 * LONG_ROUNDS)
            long = quiet_jobs(system, options.sleep_ms, LONG_QUIET, every_s=LONG_S * (LONG_ROUNDS - 1) / LONG_QUIET)
            wait_all(system)
            long_ms = pick_ups(system, long)
    return {
        "idle_p50_ms": round(statistics.median(idle_ms), 1),
        "idle_p95_ms": p95(idle_ms),
        "quiet_p50_ms": round(statistics.median(quiet_ms), 1),
        "quiet_p95_ms": p95(quiet_ms),
        "quiet_max_ms": round(max(quiet_ms), 1),
        "jobs_per_s": round(options.jobs / took),
        # Saturated to the end, or the figures above mean little.
        "waiting_when_the_last_quiet_one_came": left,
        "quiet_max_ms_beside_long_jobs": round(max(long_ms), 1),
        "quiet_p50_ms_beside_long_jobs": round(statistics.median(long_ms), 1),
    }


def p95(values: list[float]) -> float:
    return round(statistics.quantiles(values, n=20)[18], 1)


def flood(system: System, sleep_ms: int, count: int) -> None:
    prepared = [system.prepare(NOISY, NewJob("ping", {"sleep_ms": sleep_ms})) for _ in range(count)]
    for start in range(0, count, 1000):
        with system.transaction() as transaction:
            transaction.submit_many(NOISY, prepared[start : start + 1000])


def quiet_jobs(system: System, sleep_ms: int, count: int, *, every_s: float) -> list[Any]:
    chance, made = random.Random(1), []
    for number in range(count):
        time.sleep(chance.uniform(0, 2 * every_s))
        made.append(system.submit(2 + number % 9, NewJob("ping", {"sleep_ms": sleep_ms})).job.id)
    return made


def quiet_beside(system: System, sleep_ms: int, count: int, noisy: int) -> list[Any]:
    """Handed in as the noisy organization's jobs end: the last one when a twentieth of those still waits."""
    made: list[Any] = []
    while len(made) < count:
        with system.database.connection() as conn:
            row = conn.execute(
                "select count(*) from agentflow.jobs where organization_id = %s and state = 'succeeded'", (NOISY,)
            ).fetchone()
        due = min(count, math.ceil((row[0] if row else 0) / (0.95 * noisy) * count))
        if due > len(made):
            made += quiet_jobs(system, sleep_ms, due - len(made), every_s=0.2 / (due - len(made)))
        else:
            time.sleep(0.05)
    return made


def still_waiting(system: System) -> int:
    with system.database.connection() as conn:
        row = conn.execute("select count(*) from agentflow.jobs where state = 'queued'").fetchone()
    return int(row[0]) if row else 0


def wait_all(system: System, within_s: float = 900.0) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with system.database.connection() as conn:
            row = conn.execute("select count(*) from agentflow.jobs where state in ('queued', 'running')").fetchone()
        if row is not None and row[0] == 0:
            return
        time.sleep(0.5)
    raise SystemExit(f"not all jobs ended within {within_s:g} s")


def pick_ups(system: System, ids: list[Any]) -> list[float]:
    with system.database.connection() as conn:
        rows = conn.execute(
            "select extract(epoch from started_at - run_at)::float8 * 1000 from agentflow.jobs where id = any (%s)",
            (ids,),
        ).fetchall()
    return [row[0] for row in rows]


def live_workers(system: System) -> int:
    with system.database.connection() as conn:
        return len(job_statistics.workers(conn))


@contextmanager
def worker(system: System, environment: dict[str, str], threads: int, module: str = "actors") -> Iterator[None]:
    """A process with so many threads, as soon as it is known; `module` declares the types, here or in the root."""
    home = Path(environment["AGENTFLOW_HOME"])
    log = home / f"worker-{uuid4().hex[:8]}.log"
    known = live_workers(system)
    command = [
        str(BIN / "dramatiq"),
        module,
        "--path",
        str(ROOT),
        str(Path(__file__).parent),
        "--processes",
        "1",
        "--threads",
        str(threads),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                **environment,
                "PORT": str(free_port()),
                "WORKER_LOG_LEVEL": "WARNING",
                "JOB_CONCURRENCY": str(threads),
            },
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    try:
        while live_workers(system) <= known:
            if process.poll() is not None:
                raise SystemExit(f"the worker did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
