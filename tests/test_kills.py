"""Kill -9 in the middle of the work: every accepted job ends, once. And SIGTERM: nobody loses an attempt."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from agentflow import videos
from agentflow.ids import new_id
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.clips import real_clips  # noqa: F401 - a fixture
from tests.processes import eventually, worker

pytestmark = pytest.mark.flaky(reruns=0)  # a job lost once is lost

PINGS = 500
QUICK_LEASES = {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1", "JOB_MAX_CRASHES": "50"}


def submit_pings(system: System, count: int = PINGS) -> list[UUID]:
    """Some quick, some slow, some that fail once, some native."""
    mixed = [{}, {"sleep_ms": 40}, {"sleep_ms": 400}, {"wait_ms": 300}, {"fail_attempts": 1}]
    return [
        system.submit(1, NewJob("ping", {"native_ms": 300} if n % 100 == 99 else mixed[n % len(mixed)])).job.id
        for n in range(count)
    ]


def submit_analysis(system: System, clip: Path) -> UUID:
    video_id = new_id()
    key = videos.upload_key(1, video_id, clip.name)
    size = system.storage.put_file(key, clip)
    with system.transaction() as transaction:
        videos.create_upload(
            transaction.conn, 1, video_id, storage_key=key, filename=clip.name, content_type=None, size_bytes=size
        )
        return transaction.submit(1, NewJob("analyze_video", {"video_id": str(video_id)})).job.id


def open_jobs(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from agentflow.jobs where state in ('queued', 'running')").fetchone()
    return int(row[0]) if row else 0


def assert_each_ended_once(conn: psycopg.Connection, ids: list[UUID]) -> None:
    states = dict(conn.execute("select id, state from agentflow.jobs").fetchall())
    assert set(ids) <= set(states)
    assert Counter(states[i] for i in ids) == {"succeeded": len(ids)}
    ends = conn.execute(
        "select job_id, count(*) filter (where outcome = 'succeeded'), count(*) from agentflow.job_attempts group by 1"
    ).fetchall()
    assert all(succeeded == 1 for _, succeeded, _ in ends)
    fences = dict(conn.execute("select id, fence from agentflow.jobs").fetchall())
    assert all(fences[job_id] == attempts for job_id, _, attempts in ends)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_killing_the_worker_again_and_again_loses_nothing(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    tmp_path: Path,
    real_clips: Path,  # noqa: F811
) -> None:
    environment.update(QUICK_LEASES)
    ids = [submit_analysis(system, real_clips / "bikes.mp4"), *submit_pings(system)]

    for _ in range(3):
        with worker(environment, tmp_path / "worker.log"):
            time.sleep(0.7)  # the block's end kills -9 the master, its child and the children of that
        assert open_jobs(conn) > 0, "the kill came too late to prove anything"
    with worker(environment, tmp_path / "worker.log"):
        eventually(lambda: open_jobs(conn) == 0, within_s=120)

    assert_each_ended_once(conn, ids)
    row = conn.execute("select count(*) from agentflow.job_attempts where outcome = 'crashed'").fetchone()
    assert row and row[0] > 0
    row = conn.execute("select max(attempt) from agentflow.jobs where payload->>'fail_attempts' = '0'").fetchone()
    assert row and row[0] == 1, "a death of the process cost a job its attempt"


@pytest.mark.timeout(180)
def test_killing_the_child_of_an_analysis_repeats_it(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    tmp_path: Path,
    real_clips: Path,  # noqa: F811
) -> None:
    with worker(environment, tmp_path / "worker.log") as process:
        ids = [submit_analysis(system, real_clips / "bikes.mp4"), *submit_pings(system, 50)]
        child = eventually(lambda: next((p for p in process.family()[2:] if "video" in " ".join(p.cmdline())), None))
        child.kill()
        eventually(lambda: open_jobs(conn) == 0, within_s=90)

    assert_each_ended_once(conn, ids)
    row = conn.execute("select attempt, result from agentflow.jobs where id = %s", (ids[0],)).fetchone()
    assert row and row[0] == 2 and len(row[1]["shots"]) > 1


@pytest.mark.timeout(180)
def test_sigterm_hands_running_jobs_back_without_spending_an_attempt(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment["SHUTDOWN_GRACE"] = "5"
    submitted = [
        system.submit(1, NewJob("ping", {how: 30_000}, max_attempts=1)).job.id for how in ("sleep_ms", "native_ms") * 2
    ]
    short = system.submit(1, NewJob("ping", {"sleep_ms": 1500}, max_attempts=1)).job.id

    with worker(environment, tmp_path / "worker.log") as process:
        eventually(lambda: _count(conn, "running") >= 5)
        started = time.monotonic()
        status = process.terminate()
        took_s = time.monotonic() - started

    assert status == 0, process.text()[-3000:]
    assert took_s < 15  # the grace of 5 s, and what Dramatiq's own loops take
    rows = conn.execute("select id, state, attempt, fence from agentflow.jobs").fetchall()
    assert {row[0]: row[1:] for row in rows} == {
        **dict.fromkeys(submitted, ("queued", 0, 1)),
        short: ("succeeded", 1, 1),
    }
    assert _outcomes(conn) == {"handback": 4, "succeeded": 1}


@pytest.mark.timeout(180)
def test_a_deploy_in_the_middle_of_the_work_costs_no_attempt(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment["SHUTDOWN_GRACE"] = "5"
    ids = [
        system.submit(1, NewJob("ping", {"sleep_ms": n % 7 * 100}, max_attempts=1)).job.id for n in range(PINGS // 2)
    ]

    with worker(environment, tmp_path / "old.log") as old:
        eventually(lambda: _count(conn, "succeeded") > 20)
        with worker(environment, tmp_path / "new.log"):
            assert old.terminate() == 0
            eventually(lambda: open_jobs(conn) == 0, within_s=60)

    assert_each_ended_once(conn, ids)


def test_a_worker_gone_with_its_jobs_has_them_taken_over_within_the_lease(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment.update(QUICK_LEASES)
    with worker(environment, tmp_path / "other.log"):
        with worker({**environment, "JOB_CONCURRENCY": "4"}, tmp_path / "first.log"):
            job = system.submit(1, NewJob("ping", {"sleep_ms": 2000})).job
            eventually(lambda: _count(conn, "running") == 1)
            row = conn.execute(
                "select w.pid from agentflow.jobs j join agentflow.workers w on w.id = j.worker"
            ).fetchone()
            assert row is not None
            os.kill(row[0], signal.SIGKILL)
            killed = time.monotonic()
            eventually(lambda: _fence(conn, job.id) == 2 or _count(conn, "succeeded") == 1, within_s=30)
            assert time.monotonic() - killed < 4 + 5 + 4  # lease, rescue's round, back-off of up to 2 s and a margin
            eventually(lambda: _count(conn, "succeeded") == 1)


def _fence(conn: psycopg.Connection, job_id: UUID) -> int:
    row = conn.execute("select fence from agentflow.jobs where id = %s", (job_id,)).fetchone()
    return int(row[0]) if row else 0


def _count(conn: psycopg.Connection, state: str) -> int:
    row = conn.execute("select count(*) from agentflow.jobs where state = %s", (state,)).fetchone()
    return int(row[0]) if row else 0


def _outcomes(conn: psycopg.Connection) -> dict[str, int]:
    return dict(conn.execute("select outcome, count(*) from agentflow.job_attempts group by 1").fetchall())
