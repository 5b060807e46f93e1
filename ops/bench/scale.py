"""Whether size costs: the same work on an empty database and on one with ten million ended and a million waiting jobs.

    .venv/bin/python ops/bench/scale.py [--finished 10000000] [--waiting 1000000] [--events 1000000] [--pairs 5] [--home FOLDER]

Starts private servers with two databases, fills one of them (ops/bench/generate.py; with --home it is kept, and found filled the
next time), and measures in turns, empty and full, `--pairs` times. Of the job's way (handing in a batch, the relay's round, the
claim, the end): buffers, and seconds of the processor of Postgres' own process, for each job. Of what is looked at (lists,
searches, counts, status, the dashboard's pages) and of a clean-up's batch: milliseconds and buffers. Writes
ops/bench/results/scale.json and scale.md; exit status 1 where a job costs more than a tenth more in the full one (medians).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import psycopg
from flask.testing import FlaskClient
from psycopg import sql

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import actors  # noqa: E402, F401 - registers the job types
from agentflow import embedded, schema, settings  # noqa: E402
from agentflow.jobs import backlog, claims, dispatch, intake, leases, records, retention, settlement  # noqa: E402
from agentflow.jobs import statistics as counts  # noqa: E402
from agentflow.jobs.model import Verdict  # noqa: E402
from agentflow.jobs.records import Filter  # noqa: E402
from agentflow.jobs.requests import NewJob  # noqa: E402
from agentflow.jobs.retention import Keep  # noqa: E402
from agentflow.system import System  # noqa: E402
from ops.bench.comparison.figures import shown  # noqa: E402
from ops.bench.generate import FIRST_ORGANIZATION, Amounts, generate  # noqa: E402
from web import create_app  # noqa: E402

ALLOWED = 1.1
#: The most that a page of the dashboard may take on the full side, and what counts as a big table there.
PAGE_MS = 150.0
BIG_ROWS = 100_000
#: Those that are about many; and those about one.
PAGES = {
    "overview": "/dashboard",
    "charts of 24 h": "/dashboard/charts?window=24h",
    "charts of 7 d": "/dashboard/charts?window=7d",
    "overview of an organization": "/dashboard?organization=bench-150",
    "jobs": "/dashboard/jobs",
    "jobs that failed": "/dashboard/jobs?state=failed",
    "jobs by words of their errors": "/dashboard/jobs?error=timeout",
    "jobs of a type and an organization": "/dashboard/jobs?type=comfy_render&organization=bench-150",
    "dead letters": "/dashboard/dead-letters",
    "dead letters of an organization": "/dashboard/dead-letters?organization=bench-150",
    "webhooks": "/dashboard/webhooks",
    "CRM": "/dashboard/crm",
    "documents": "/dashboard/knowledge",
    "graph": "/dashboard/knowledge/graph",
    "models": "/dashboard/knowledge/models",
    "renders": "/dashboard/renders",
    "limits": "/dashboard/limits",
    "schedules": "/dashboard/schedules",
}
JOB = {"": "/dashboard/jobs/{}", "'s flight record": "/dashboard/flight/job/{}"}
EVENT = {"": "/dashboard/webhooks/{}", "'s flight record": "/dashboard/flight/event/{}"}
_LEASE_S = 30.0
_BATCH = 100
_THREADS = 1000
Connection = psycopg.Connection[Any]
Cost = dict[str, float]


@dataclass
class Side:
    """One of the two databases, with what works on it."""

    name: str
    system: System
    client: FlaskClient
    conn: Connection
    costs: dict[str, list[Cost]] = field(default_factory=dict)

    @property
    def backend(self) -> psutil.Process:
        return psutil.Process(self.conn.info.backend_pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("finished", "waiting", "events", "organizations"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Amounts, name))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1_000, help="of each pair's way from hand-in to end")
    parser.add_argument("--home", type=Path, help="keep the servers' folder here")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/scale.json")
    options = parser.parse_args()
    amounts = Amounts(options.finished, options.waiting, options.events, options.organizations)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "amounts": vars(amounts),
    }
    with home_of(options.home) as home, embedded.join(home) as joined:
        urls = {name: made(joined.database_url, name) for name in ("empty", "full")}
        figures["generated"] = filled(urls["full"], amounts)
        sides = [side(name, url, joined.redis_url, home) for name, url in urls.items()]
        for each in sides:
            each.conn.execute("select pg_stat_reset()")
        for number in range(options.pairs):
            for each in sides[:: 1 if number % 2 else -1]:
                measure(each, options.jobs)
            print(f"pair {number + 1} of {options.pairs} is done", flush=True)
        figures["costs"] = {each.name: each.costs for each in sides}
        figures["sequential scans"] = sequential_scans(sides[-1].conn)
        for each in sides:
            each.conn.close()
            each.system.close()
    figures["ratios"] = ratios(figures["costs"])
    figures["flat"] = all(value <= ALLOWED for value in figures["ratios"].values())
    figures["slow pages"] = slow_pages(figures["costs"]["full"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(figures))
    print(page(figures))
    return 0 if figures["flat"] else 1


# ---- the two databases ----


@contextmanager
def home_of(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True, mode=0o755)
        yield kept
        return
    home = Path(tempfile.mkdtemp(prefix="agentflow-scale-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def made(url: str, name: str) -> str:
    with psycopg.connect(url, autocommit=True) as conn:
        if not conn.execute("select 1 from pg_database where datname = %s", (name,)).fetchone():
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    found = url.replace("/postgres?", f"/{name}?")
    with psycopg.connect(found, autocommit=True) as conn:
        schema.migrate(conn)
    return found


def filled(url: str, amounts: Amounts) -> dict[str, float] | str:
    with psycopg.connect(url, autocommit=True) as conn:
        if conn.execute("select 1 from agentflow.jobs limit 1").fetchone():
            return "found filled"
        return generate(conn, amounts, say=lambda said: print(said, flush=True))


def side(name: str, url: str, redis_url: str, home: Path) -> Side:
    read = settings.load(
        {
            "AGENTFLOW_ENV": "test",
            "AGENTFLOW_HOME": str(home),
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "STORAGE_URL": (home / "storage").as_uri(),
            "STORAGE_SHARED": "true",
            "JOB_QUEUE_NAME": f"scale-{name}",
        }
    )
    system = System.start(read, "web")
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {system.admin_key()}"
    signed = client.post(
        "/dashboard/sign-in", data={"key": system.admin_key()}, headers={"Sec-Fetch-Site": "same-origin"}
    )
    assert signed.status_code in (302, 303), signed.status
    return Side(name, system, client, psycopg.connect(url, autocommit=True))


# ---- what is measured ----


def measure(each: Side, jobs: int) -> None:
    way(each, jobs)
    for name, doing in looks(each).items():
        note(each, name, 1, doing)
    each.conn.execute("delete from agentflow.workers")


def way(each: Side, jobs: int) -> None:
    """Jobs from hand-in to end, with a worker's statements. What the relay picks may be others', which were due before."""
    conn, worker = each.conn, uuid4()
    announce(conn, worker)
    prepared = [each.system.prepare(FIRST_ORGANIZATION, NewJob("ping", {})) for _ in range(jobs)]
    with each.system.database.transaction() as other:  # who hands in is known, and who is looked at
        for n in (0, 150):
            other.execute(
                "insert into agentflow.organizations (id, slug, name) values (%s, %s, %s) on conflict do nothing",
                (FIRST_ORGANIZATION + n, f"bench-{n}", f"Bench {n}"),
            )

    def hand_in() -> None:
        for start in range(0, jobs, _BATCH):
            with conn.transaction():
                intake.submit_many(conn, FIRST_ORGANIZATION, prepared[start : start + _BATCH], ring=False)

    picked: list[UUID] = []

    def relay() -> None:
        while len(picked) < jobs:
            rings, _ = dispatch.pick_due(conn, "default")
            if not rings:
                break
            picked.extend(ring.job_id for ring in rings)

    claimed: list[Verdict] = []

    def claim() -> None:
        for start in range(0, len(picked), _BATCH):
            found, _ = claims.claim(conn, picked[start : start + _BATCH], worker, _LEASE_S)
            claimed.extend(Verdict(job.id, job.fence, "succeeded", result='{"ok": true}') for job in found)

    def settle() -> None:
        for start in range(0, len(claimed), _BATCH):
            batch = claimed[start : start + _BATCH]
            settlement.settle(conn, batch, worker, lease_s=_LEASE_S, max_crashes=3)

    note(each, "job: hand in", jobs, hand_in)
    note(each, "job: relay", jobs, relay)
    assert picked, "the relay found nothing"
    note(each, "job: claim", len(picked), claim)
    note(each, "job: end", len(claimed), settle)
    parts = ("hand in", "relay", "claim", "end")
    each.costs.setdefault("job: whole way", []).append(
        {name: sum(each.costs[f"job: {part}"][-1][name] for part in parts) for name in ("ms", "cpu_ms", "buffers")}
    )


def announce(conn: Connection, worker: UUID) -> None:
    facts = {
        "kind": "worker", "host": "scale", "pid": os.getpid(), "version": "", "queues": ["default"], "threads": _THREADS,
        "demand": {"default": _THREADS}, "memory_bytes": None, "busy": 0,
    }  # fmt: skip
    leases.announce_worker(conn, worker, facts, lease_s=_LEASE_S)


def looks(each: Side) -> dict[str, Callable[[], object]]:
    """What people and their programs ask for, and the chores."""
    conn = each.conn
    small = FIRST_ORGANIZATION + 150
    listed: dict[str, tuple[int | None, Filter]] = {
        "list: newest, everybody's": (None, Filter()),
        "list: newest of a small organization": (small, Filter()),
        "list: failed of a small organization": (small, Filter(state="failed")),
        "list: of a type, of the largest": (FIRST_ORGANIZATION, Filter(type="comfy_render")),
        "list: by correlation": (FIRST_ORGANIZATION, Filter(correlation_id="order-17")),
    }
    statuses = ("/health", "/api/system/queue-stats", "/api/system/stats")
    return {
        **{
            name: lambda whose=whose, wanted=wanted: records.search(conn, whose, wanted, before=None, limit=51)
            for name, (whose, wanted) in listed.items()
        },
        "status: queues": lambda: counts.queues(conn),
        "status: shares": lambda: backlog.shares(conn),
        "status: stuck": lambda: backlog.stuck(conn),
        "clean-up: a batch": lambda: retention.delete_jobs(conn, succeeded=True, keep=Keep(24.0, 1000), limit=1000),
        **{f"page: {name}": lambda path=path: opened(each, path) for name, path in {**PAGES, **of_one(conn)}.items()},
        **{f"status: {path}": lambda path=path: opened(each, path) for path in statuses},
    }


def of_one(conn: Connection) -> dict[str, str]:
    """The pages of one thing each, of the middle of its table."""
    found = {}
    for name, query, paths in (
        (
            "an ended job",
            "select id from agentflow.jobs where state = 'succeeded' order by id desc offset 500 limit 1",
            JOB,
        ),
        ("a failed job", "select id from agentflow.jobs where state = 'failed' order by finished_at desc limit 1", JOB),
        ("a waiting job", "select id from agentflow.jobs where state = 'queued' order by id desc limit 1", JOB),
        ("a webhook", "select id from agentflow.webhook_events order by id desc offset 500 limit 1", EVENT),
    ):
        if row := conn.execute(query.encode()).fetchone():
            found |= {f"{name}{what}": path.format(row[0]) for what, path in paths.items()}
    return found


def opened(each: Side, path: str) -> None:
    answer = each.client.get(path)
    assert answer.status_code == 200, f"{path}: {answer.status}"


def note(each: Side, name: str, jobs: int, doing: Callable[[], object]) -> None:
    """For one job: milliseconds, of them those of the connection's own server process, and 8 kB pages that it looked at."""
    before, cpu, began = buffers(each.conn), sum(each.backend.cpu_times()[:2]), time.monotonic()
    doing()
    took, cpu_after = time.monotonic() - began, sum(each.backend.cpu_times()[:2])
    cost = {
        "ms": 1000 * took / jobs,
        "cpu_ms": 1000 * (cpu_after - cpu) / jobs,
        "buffers": (buffers(each.conn) - before) / jobs,
    }
    each.costs.setdefault(name, []).append(cost)


def buffers(conn: Connection) -> float:
    """That this connection's process has looked at so far."""
    conn.execute("select pg_stat_force_next_flush()")
    row = conn.execute(
        "select coalesce(sum(hits + reads), 0)::float8 from pg_stat_get_backend_io(pg_backend_pid()) where object = 'relation'"
    ).fetchone()
    return float(row[0]) if row else 0.0


def sequential_scans(conn: Connection) -> dict[str, int]:
    """Of big tables, since they were filled: what looked at all of their rows."""
    conn.execute("select pg_stat_force_next_flush()")
    return dict(
        conn.execute(
            "select relname, seq_scan from pg_stat_user_tables"
            " where schemaname = 'agentflow' and n_live_tup > %s and seq_scan > 0",
            (BIG_ROWS,),
        ).fetchall()
    )


# ---- what became of it ----


def slow_pages(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Whose median is over PAGE_MS."""
    medians = {name: statistics.median(cost["ms"] for cost in found) for name, found in costs.items()}
    return {name: round(ms) for name, ms in medians.items() if name.startswith("page: ") and ms > PAGE_MS}


def ratios(costs: dict[str, dict[str, list[Cost]]]) -> dict[str, float]:
    """Full to empty, of a job's way: medians over the pairs."""
    found = {}
    for name in ("cpu_ms", "buffers"):
        pairs = zip(costs["full"]["job: whole way"], costs["empty"]["job: whole way"], strict=True)
        found[name] = statistics.median(full[name] / max(empty[name], 1e-9) for full, empty in pairs)
    return found


def page(figures: dict[str, Any]) -> str:
    amounts = figures["amounts"]
    lines = [
        "# The same work on an empty and on a full database",
        "",
        f"{figures['machine']}. Full: {amounts['finished']:,} ended and {amounts['waiting']:,} waiting jobs,"
        f" {amounts['events']:,} webhooks, of {amounts['organizations']} organizations. Medians, in brackets the least, the most"
        " and how many; of `job` rows for one job. Made by `ops/bench/scale.py`.",
        "",
        f"A job's whole way costs {figures['ratios']['cpu_ms']:.2f} times the processor time of Postgres and"
        f" {figures['ratios']['buffers']:.2f} times the buffers ({ALLOWED:g} are allowed).",
        "",
        f"Pages of the full side that took longer than {PAGE_MS:g} ms: {_listed(figures['slow pages'], ' ms')}. Tables of more"
        f" than {BIG_ROWS:,} rows that were read from one end to the other: {_listed(figures['sequential scans'], ' times')}.",
        "",
        "| | empty, ms | full, ms | empty, buffers | full, buffers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in figures["costs"]["full"]:
        empty, full = (figures["costs"][where].get(name, []) for where in ("empty", "full"))
        cells = [
            shown([cost[what] for cost in costs]) if costs else "–"
            for what in ("ms", "buffers")
            for costs in (empty, full)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _listed(found: dict[str, Any], unit: str) -> str:
    return ", ".join(f"{name.removeprefix('page: ')} {value}{unit}" for name, value in found.items()) or "none"


if __name__ == "__main__":
    sys.exit(main())
