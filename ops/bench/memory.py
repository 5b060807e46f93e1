"""A worker in 512 MB for ten minutes of videos, documents and pings: with admission by memory, and without.

    .venv/bin/python ops/bench/memory.py [--minutes 10] [--limit 512] [--without-minutes 10]

Starts `agentflow worker` in a memory control group of the kernel's (root, and a writable /sys/fs/cgroup); Postgres and Valkey
stand outside, as on platforms. Three 1080p films and three documents are kept in work or waiting at all times, and two pings
come each second. Counted are the kernel's kills, the most that was charged to the group, what became of the jobs, and how long
pings took. Without admission (MEMORY_ADMISSION=false) the run ends with the first kill. Writes ops/bench/results/memory.json;
ends with status 1 when the kernel killed with admission.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import av

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import actors  # noqa: E402, F401 - found by the path above; makes the types known
from agentflow import embedded, schema, settings, videos  # noqa: E402
from agentflow.jobs.model import Job  # noqa: E402
from agentflow.jobs.requests import NewJob  # noqa: E402
from agentflow.knowledge import documents  # noqa: E402
from agentflow.knowledge.documents import Source  # noqa: E402
from agentflow.prove.ports import free_port  # noqa: E402
from agentflow.system import System  # noqa: E402
from tests.clips import moved, scene  # noqa: E402
from tests.memory_group import MemoryGroup, memory_group  # noqa: E402
from tests.processes import BIN, started  # noqa: E402

ORGANIZATION = 1
WIDTH, HEIGHT, RATE = 1920, 1080, 25
SCENES, SCENE_S = 4, 3
KEPT_OPEN = 3
PINGS_PER_S = 2
WORDS = 12_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--without-minutes", type=float, default=10.0, help="at most so long without admission; 0: not at all"
    )
    parser.add_argument("--limit", type=int, default=512, help="MB")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/memory.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "limit MB": options.limit,
        "work": f"{KEPT_OPEN} films of {SCENES * SCENE_S} s 1080p, {KEPT_OPEN} documents, {PINGS_PER_S} pings/s",
    }
    if options.without_minutes:
        figures["without admission"] = run(options.without_minutes, options.limit, admission=False)
        print(json.dumps(figures["without admission"], indent=2), flush=True)
    figures["with admission"] = run(options.minutes, options.limit, admission=True)
    print(json.dumps(figures["with admission"], indent=2))
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["with admission"]["kernel kills"] else 0


def run(minutes: float, limit_mb: int, *, admission: bool) -> dict[str, Any]:
    home = Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    home.chmod(0o755)
    try:
        with embedded.join(home / "servers") as servers, memory_group(limit_mb) as group:
            environment = {
                "AGENTFLOW_HOME": str(home),
                "DATABASE_URL": servers.database_url,
                "REDIS_URL": servers.redis_url,
                "STORAGE_URL": (home / "storage").as_uri(),
                "STORAGE_SHARED": "true",
                "MEMORY_ADMISSION": str(admission).lower(),
                "CANARY_INTERVAL": "0",
                "PORT": str(free_port()),
            }
            system = System(settings.load(environment), "bench")
            with system.database.connect() as conn:
                schema.migrate(conn)
            command = group.inside([str(BIN / "python"), "-m", "agentflow.cli", "worker"])
            with started(command, environment, home / "worker.log") as process:
                process.wait_for("worker ready", within_s=120)
                figures = load(system, group, write_film(home / "film.mp4"), minutes, until_kill=not admission)
            system.close()
            return figures
    finally:
        shutil.rmtree(home, ignore_errors=True)


def load(system: System, group: MemoryGroup, film: Path, minutes: float, *, until_kill: bool) -> dict[str, Any]:
    began, number = time.monotonic(), 0
    waited = 0
    while (now := time.monotonic()) < began + 60 * minutes and not (until_kill and group.kills):
        number += 1
        open_ = counts(
            system, "select type, count(*) from agentflow.jobs where state in ('queued', 'running') group by 1"
        )
        for _ in range(open_.get("analyze_video", 0), KEPT_OPEN):
            hand_in_film(system, film)
        for _ in range(open_.get("generate_embeddings", 0), KEPT_OPEN):
            hand_in_text(system, number)
        for _ in range(PINGS_PER_S):
            system.submit(ORGANIZATION, NewJob("ping", {}))
        parked = (
            "select 'memory', count(*) from agentflow.jobs where state = 'queued' and wait_reason = 'memory' group by 1"
        )
        waited += counts(system, parked).get("memory", 0)
        time.sleep(max(0.0, now + 1.0 - time.monotonic()))
    pings_s = [
        row[0]
        for row in rows(
            system,
            "select extract(epoch from finished_at - created_at)::float8 from agentflow.jobs"
            " where type = 'ping' and state = 'succeeded'",
        )
    ]
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "kernel kills": group.kills,
        "most charged MB": round(group.most_charged / 2**20),
        "jobs": {" ".join(row[:2]): row[2] for row in rows(system, ENDED)},
        "attempts that ended badly": {" ".join(row[:2]): row[2] for row in rows(system, BAD)},
        "job-seconds parked for memory": waited,
        "pings p50 / p99 / most ms": [
            round(1000 * each, 1) for each in (statistics.median(pings_s), *quantiles(pings_s))
        ],
        "learned MB, p95": learned(system),
    }


ENDED = "select type, state, count(*) from agentflow.jobs group by 1, 2 order by 1, 2"
BAD = (
    "select j.type, coalesce(a.error ->> 'code', a.outcome), count(*) from agentflow.attempts a join agentflow.jobs j"
    " on j.id = a.job_id where a.outcome not in ('wait', 'handback') group by 1, 2 order by 1, 2"
)


def quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[int(len(ordered) * 0.99)], ordered[-1]


def learned(system: System) -> dict[str, int]:
    from agentflow.jobs import peaks

    with system.database.connection() as conn:
        known = peaks.Learned(peaks.read(conn))
    return {type_: known.need(type_, None, 0) >> 20 for type_ in ("analyze_video", "generate_embeddings", "ping")}


def counts(system: System, query: str) -> dict[str, int]:
    return dict(rows(system, query))


def rows(system: System, query: str) -> list[Any]:
    with system.database.connection() as conn:
        return conn.execute(query.encode()).fetchall()


def hand_in_film(system: System, film: Path) -> Job:
    video_id: UUID = videos.new_id()
    key = videos.upload_key(ORGANIZATION, video_id, film.name)
    system.storage.put_file(key, film)
    with system.transaction() as transaction:
        videos.create_upload(
            transaction.conn,
            ORGANIZATION,
            video_id,
            storage_key=key,
            filename=film.name,
            content_type="video/mp4",
            size_bytes=film.stat().st_size,
        )
        return transaction.submit(ORGANIZATION, NewJob("analyze_video", {"video_id": str(video_id)})).job


def hand_in_text(system: System, number: int) -> None:
    """Words that no document had before: each chunk wants its vector."""
    chance = random.Random(number * 1000 + random.randrange(1000))
    known = [
        "ferry",
        "harbour",
        "ice",
        "паром",
        "порт",
        "winter",
        "captain",
        "ledger",
        "машина",
        "engine",
        "letter",
        "snow",
    ]
    text = " ".join(
        f"{chance.choice(known)}{'.' if n % 12 == 0 else ''} {chance.randrange(10**6)}" for n in range(WORDS // 2)
    )
    key = documents.upload_key(ORGANIZATION, "text.txt")
    system.storage.put_bytes(key, text.encode())
    source = Source(storage_key=key, filename="text.txt", size_bytes=len(text.encode()))
    with system.transaction() as transaction:
        document, _ = documents.hand_in(transaction.conn, ORGANIZATION, key, source, title=None)
        made = transaction.submit(ORGANIZATION, documents.reading(document.id, graph=False)).job
        documents.ask(transaction.conn, document, chain_id=made.id, job_id=made.id)


def write_film(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", {"preset": "veryfast"}
        for number in range(SCENES):
            picture = scene(number, WIDTH, HEIGHT)
            for shown in range(SCENE_S * RATE):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(moved(picture, 2 * shown), "bgr24")))
        out.mux(stream.encode())
    return path


if __name__ == "__main__":
    sys.exit(main())
