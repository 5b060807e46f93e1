"""What one job leaves behind and asks for: bytes in Postgres, WAL, commits, commands to Redis, messages; what a slot takes.

    .venv/bin/python ops/bench/footprint.py [--paced 3000] [--rate 100] [--chunk 5000] [--chunks 4] [--wait-s 8]

Starts private servers and one worker of 25 threads, once rung by RabbitMQ and once by Redis. After ten idle seconds, `--paced`
jobs of 200 bytes come at `--rate` a second: commits, commands and messages of each, less those of idle seconds, and WAL.
Then `--chunks` times `--chunk` jobs, with a vacuum after each as autovacuum would do it: the growth from the first chunk to the
last, for each job, and of the slim rows that stay when retention has deleted them. Then as many jobs as slots wait `--wait-s`,
with 25 threads and with 200: memory and connections. Writes ops/bench/results/footprint.json.

Needs RabbitMQ (/usr/lib/rabbitmq). ops/bench/capacity.py counts with it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import redis

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agentflow.jobs import retention  # noqa: E402
from agentflow.jobs.retention import Keep  # noqa: E402
from agentflow.worker.threads import regular  # noqa: E402
from ops.bench.comparison import servers, trials  # noqa: E402
from ops.bench.comparison.servers import Servers  # noqa: E402
from ops.bench.comparison.trials import Size, Trial  # noqa: E402
from ops.bench.peers import catalogue  # noqa: E402
from ops.bench.peers.catalogue import Peer  # noqa: E402

TIERS = {"rung by RabbitMQ": "agentflow", "rung by Redis": "agentflow-embedded"}
THREADS = (25, 200)
IDLE_S = 10.0
_STEP_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paced", type=int, default=3000, help="jobs")
    parser.add_argument("--rate", type=int, default=100, help="jobs a second")
    parser.add_argument("--chunk", type=int, default=5000, help="jobs")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--wait-s", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/footprint.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "jobs": f"{options.paced} at {options.rate} a second; {options.chunks} times {options.chunk}; 200 bytes each",
    }
    with servers.running() as started:
        for tier, name in TIERS.items():
            (peer,) = catalogue.named(name)
            figures[tier] = as_they_come(started, peer, options.paced, options.rate)
            print(json.dumps({tier: figures[tier]}, indent=1), flush=True)
        (peer,) = catalogue.named("agentflow")
        figures["kept"] = kept(started, peer, options.chunk, options.chunks)
        print(json.dumps(figures["kept"], indent=1), flush=True)
        figures["slots"] = {
            str(threads): waiting(started, peer, regular(threads), options.wait_s) for threads in THREADS
        }
        print(json.dumps(figures["slots"], indent=1), flush=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


# ---- as they come ----


def as_they_come(started: Servers, peer: Peer, jobs: int, rate: int) -> dict[str, Any]:
    """Of each job, beyond what the same seconds would have cost without it."""
    with trials.trial(started, peer, Size(jobs, processes=1, slots=regular(25))) as made:
        made.start_warm()
        idle = difference(started, lambda: time.sleep(IDLE_S))
        busy = difference(started, lambda: pace(made, rate))
        connections = started.connections()
    took = busy.pop("seconds")
    by_second = {name: value / idle["seconds"] for name, value in idle.items() if name != "seconds"}
    wal = busy.pop("WAL bytes") / jobs  # as it is: what a checkpoint or a vacuum writes comes at any time
    each = {name: round((value - took * by_second[name]) / jobs, 3) for name, value in busy.items()}
    return {
        "jobs a second": round(jobs / took, 1),
        "for each job": {**each, "WAL bytes": round(wal)},
        "idle, a second": {name: round(value, 3) for name, value in by_second.items()},
        # The producer's own are among them: as a web process that hands in.
        "connections of a worker and a producer": connections,
    }


def pace(made: Trial, rate: int) -> None:
    step = max(1, round(rate * _STEP_S))
    began = time.monotonic()
    for first in range(0, made.size.jobs, step):
        made.producer.ask("submit", first=first, count=min(step, made.size.jobs - first), ms=0)
        time.sleep(max(0.0, began + (first + step) / rate - time.monotonic()))
    made.wait(lambda: made.recorded() >= made.size.jobs)


def difference(started: Servers, during: Callable[[], None]) -> dict[str, float]:
    before = totals(started)
    during()
    after = totals(started)
    return {name: after[name] - before[name] for name in after}


def totals(started: Servers) -> dict[str, float]:
    """As the servers count. Those of Redis that a script calls are counted with it; this function's own are a few."""
    with started.connect() as conn:
        row = conn.execute(
            "select sum(xact_commit)::float8, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8"
            " from pg_stat_database"
        ).fetchone()
        assert row is not None
    with redis.Redis.from_url(started.joined.redis_url) as client:
        commands = float(client.info("stats")["total_commands_processed"])
    counters = started.rabbitmq.ctl("eval", "rabbit_global_counters:overview().")
    return {
        "seconds": time.monotonic(),
        "commits": row[0],
        "WAL bytes": row[1],
        "commands to Redis": commands,
        "messages of RabbitMQ": float(received(counters)),
    }


def received(overview: str) -> int:
    """Messages that publishers have sent, from Erlang's text of the counters."""
    words = overview.replace("{", " ").replace("}", " ").replace(",", " ").replace("=>", " ").split()
    return sum(int(words[n + 1]) for n, word in enumerate(words) if word == "messages_received_total")


# ---- what stays ----


def kept(started: Servers, peer: Peer, chunk: int, chunks: int) -> dict[str, Any]:
    """Bytes of each ended job, and of each that retention has deleted."""
    size = Size(chunk * chunks, processes=1, slots=regular(25))
    redis_url = started.joined.redis_url
    with trials.trial(started, peer, size) as made, redis.Redis.from_url(redis_url) as client:
        made.start_warm()
        bytes_in_redis = int(client.info("memory")["used_memory"])
        tables = []
        for number in range(chunks):
            made.producer.ask("submit_many", first=number * chunk, count=chunk, ms=0)
            made.wait(partial(is_recorded, made, (number + 1) * chunk))
            tables.append(sizes(started))
        results = int(client.info("memory")["used_memory"]) - bytes_in_redis
    jobs = chunk * (chunks - 1)
    grown = {name: (tables[-1][name] - tables[0].get(name, 0)) / jobs for name in tables[-1]}
    with started.connect() as conn:
        before = sizes(started)
        conn.execute("update agentflow.jobs set finished_at = finished_at - interval '2 days'")
        deleted = 0
        while found := retention.delete_jobs(conn, succeeded=True, keep=Keep(hours=1.0, count=0)):
            deleted += found
    after = sizes(started)
    slim = {name: after[name] - before[name] for name in after if name.startswith("flight_log")}
    return {
        "bytes of a job": round(sum(grown.values())),
        "of it indexes": round(sum(value for name, value in grown.items() if name.endswith(" indexes"))),
        "bytes by table": {name: round(value) for name, value in sorted(grown.items()) if round(value)},
        "bytes of a deleted job": round(sum(slim.values()) / deleted),
        "bytes of a result in Redis": round(results / size.jobs),
    }


def is_recorded(made: Trial, jobs: int) -> bool:
    return made.recorded() >= jobs


def sizes(started: Servers) -> dict[str, float]:
    """Bytes of each table with what it keeps beside, and of its indexes, vacuumed."""
    with started.connect() as conn:
        conn.execute("vacuum (analyze)")
        rows = conn.execute(
            "select relname, pg_table_size(oid)::float8, pg_indexes_size(oid)::float8 from pg_class"
            " where relnamespace = 'agentflow'::regnamespace and relkind in ('r', 'p')"
        ).fetchall()
    return {
        name: value for table, own, indexes in rows for name, value in ((table, own), (f"{table} indexes", indexes))
    }


# ---- slots ----


def waiting(started: Servers, peer: Peer, slots: int, wait_s: float) -> dict[str, Any]:
    """One worker whose slots all wait."""
    size = Size(slots, ms=round(1000 * wait_s), processes=1, slots=slots)
    found = trials.waits(started, peer, size)
    names = ("pss_mb", "threads", "postgres_connections", "redis_connections", "rabbitmq_connections")
    return {"slots": slots, **{name: round(found[name], 1) for name in names}}


if __name__ == "__main__":
    sys.exit(main())
