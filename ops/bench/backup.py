"""How fast a backup and a restore are.

    .venv/bin/python ops/bench/backup.py [--jobs 200000] [--chunks 20000] [--files 2000]

Fills a system of its own: ended jobs with payloads and results of about 1 kB, chunks of 100 tokens with vectors of 512 numbers,
files of 256 kB. Makes a backup into a folder on the same disk, a second one after a hundredth of the files has changed, checks
the first, and restores it into an empty database and folder. Writes ops/bench/results/backup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent))
from idle import ROOT, machine
from private import private_system

from agentflow import settings
from agentflow.backup import making, restoring
from agentflow.backup.place import Place
from agentflow.system import System

FILE_BYTES = 256 << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200_000)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=2_000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="agentflow-bench-backup-"))
    try:
        with private_system() as (system, environment):
            fill(system, options.jobs, options.chunks, options.files)
            figures = {"machine": machine(), **vars(options), **measured(system, environment, folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "ops/bench/results/backup.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:40} {value}")


def fill(system: System, jobs: int, chunks: int, files: int) -> None:
    with system.database.connection() as conn:
        conn.execute(
            "insert into agentflow.jobs (id, organization_id, type, queue, payload, state, fence, attempt, max_attempts,"
            " time_limit_s, result, finished_by, started_at, finished_at)"
            " select agentflow.uuid7_1(), 1, 'ping', 'default', jsonb_build_object('text', t), 'succeeded', 1, 1, 5, 60,"
            " jsonb_build_object('text', t), gen_random_uuid(), now(), now() from (select (select string_agg(md5(random()::text"
            " || n || g), ' ') from generate_series(1, 15) g) as t from generate_series(1, %s) n) x",
            (jobs,),
        )
        document = uuid4()
        conn.execute(
            "insert into agentflow.documents (id, organization_id, source_id, title, kind) values (%s, 1, 'x', 'x', 'text')",
            (document,),
        )
        conn.execute(
            "insert into agentflow.chunks (organization_id, document_id, position, key, text, start_offset, end_offset, tokens,"
            " place) select 1, %s, n, sha256(n::text::bytea), (select string_agg(md5(random()::text || n || g), ' ')"
            " from generate_series(1, 12) g), 0, 400, 100, '{}' from generate_series(1, %s) n",
            (document, chunks),
        )
        conn.execute(
            "insert into agentflow.embedding_models (provider, name, dimensions, state) values ('server', 'x', 512, 'active')"
        )
        conn.execute(
            "insert into agentflow.vectors (organization_id, model_id, chunk_key, vector) select 1, 1, sha256(n::text::bytea),"
            " (select array_agg(random() - 0.5 + (n + g) * 0) from generate_series(1, 512) g)::real[]"
            "::agentflow_extensions.halfvec from generate_series(1, %s) n",
            (chunks,),
        )
    for number in range(files):
        system.storage.put_bytes(f"o/1/videos/{number}/file", os.urandom(FILE_BYTES))


def measured(system: System, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    place = Place.open(str(folder / "backups"), make=True)
    first = timed(lambda: making.make(system, place))
    for number in range(0, len(list(system.storage.list("o"))), 100):
        system.storage.put_bytes(f"o/1/videos/{number}/file", os.urandom(FILE_BYTES))
    again = timed(lambda: making.make(system, place))
    said = first[0].manifest
    checked = timed(lambda: restoring.verify(place, said))
    with psycopg.connect(environment["DATABASE_URL"], autocommit=True) as conn:
        conn.execute("create database restored")
        database = system.database_url.replace("/postgres?", "/restored?")
        size = conn.execute("select pg_database_size(current_database())").fetchone()
    target = {**environment, "DATABASE_URL": database, "STORAGE_URL": (folder / "storage").as_uri()}
    new = System(settings.load(target), "bench")
    restored = timed(lambda: restoring.restore(new, place, said, hold=False))
    new.close()
    megabytes = said.files.size / 1e6
    return {
        "rows": said.rows,
        "database MB": round(size[0] / 1e6) if size else None,
        "rows compressed MB": round(sum(table.size for table in said.tables) / 1e6),
        "files MB": round(megabytes),
        "first backup s": first[1],
        "next backup s": again[1],
        "check s": checked[1],
        "restore s": restored[1],
        "restore MB of database and files per s": round((size[0] / 1e6 + megabytes) / restored[1], 1) if size else None,
        "hours for 10 GB": round(10_000 / ((size[0] / 1e6 + megabytes) / restored[1]) / 3600, 2) if size else None,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, round(time.perf_counter() - began, 1)


if __name__ == "__main__":
    main()
