"""A part of the system dies or freezes in the middle of the work, and comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from agentflow import settings
from agentflow.database import Unavailable
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.folders import server_folder
from tests.processes import eventually, worker


@pytest.fixture
def own_environment() -> Iterator[dict[str, str]]:
    """A system with embedded servers of its own, which a test may kill."""
    with server_folder("own") as home:
        yield {
            "AGENTFLOW_ENV": "test",
            "AGENTFLOW_HOME": str(home),
            "JOB_CONCURRENCY": "8",
            "WORKER_POLLING_INTERVAL": "0.2",
            "JOB_LEASE": "6",
            "JOB_LEASE_RENEW": "2",
        }


@pytest.fixture
def own_system(own_environment: dict[str, str]) -> Iterator[System]:
    system = System.start(settings.load(own_environment), "test")
    yield system
    system.close(wait_stopped_s=20)


def server(system: System, name: str) -> psutil.Process:
    """The parent process of one of the home's servers."""
    marks = {"postgres": str(system.home.resolve() / "pg18"), "valkey": "valkey-server"}

    def find() -> psutil.Process | None:
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                if marks[name] in line and name in line and (name == "postgres" or _is_ours(process, system)):
                    return process
            except psutil.Error:
                continue
        return None

    found: psutil.Process = eventually(find)
    return found


def _is_ours(process: psutil.Process, system: System) -> bool:
    home = str(system.home.resolve())
    return home in process.cwd() or home in " ".join(process.cmdline())


def all_ended(system: System, jobs: list[Job]) -> Callable[[], bool]:
    def check() -> bool:
        with system.database.connection() as conn:
            states = dict(conn.execute("select id, state from agentflow.jobs").fetchall())
        return all(states[job.id] == "succeeded" for job in jobs)

    return check


@pytest.mark.timeout(120)
def test_redis_killed_and_empty_loses_no_job_and_costs_no_attempt(
    own_environment: dict[str, str], own_system: System, tmp_path: Path
) -> None:
    system = own_system
    running = [system.submit(1, NewJob("ping", {"sleep_ms": 3000})).job for _ in range(6)]
    waiting = [system.submit(1, NewJob("ping", {})).job for _ in range(60)]
    with worker(own_environment, tmp_path / "worker.log") as process:
        eventually(lambda: _running(system) == 6)
        server(system, "valkey").kill()
        while_down = [system.submit(1, NewJob("ping", {})).job for _ in range(20)]

        jobs = [*running, *waiting, *while_down]
        killed = time.monotonic()
        eventually(all_ended(system, jobs), within_s=60)
        # Sooner than the 30 s after which a ring counts as lost: the emptied broker was noticed.
        assert time.monotonic() - killed < 25, process.text()[-3000:]
    with system.database.connection() as conn:
        attempts = {records.get(conn, 1, job.id).attempt for job in jobs}  # type: ignore[union-attr]
    assert attempts == {1}


@pytest.mark.timeout(120)
def test_postgres_killed_while_jobs_run_lets_them_finish_and_be_written_once(
    own_environment: dict[str, str], own_system: System, tmp_path: Path
) -> None:
    system = own_system
    with worker(own_environment, tmp_path / "worker.log"):
        jobs = [system.submit(1, NewJob("ping", {"sleep_ms": 200 + 40 * n})).job for n in range(40)]
        eventually(lambda: _running(system) > 3)

        for _ in range(3):
            server(system, "postgres").kill()
            time.sleep(2.0)

        eventually(lambda: _safely(all_ended(system, jobs)), within_s=60)
    with system.database.connection() as conn:
        for job in jobs:
            outcomes = [a.outcome for a in records.attempts(conn, job.id)]
            assert outcomes.count("succeeded") == 1
            assert set(outcomes) <= {"succeeded", "handback", "crashed"}, outcomes


@pytest.mark.timeout(120)
def test_postgres_frozen_for_longer_than_a_lease_rescues_nobody_who_lives(
    own_environment: dict[str, str], own_system: System, tmp_path: Path
) -> None:
    system = own_system
    with (
        worker(own_environment, tmp_path / "one.log"),
        worker(own_environment, tmp_path / "two.log"),
    ):
        jobs = [system.submit(1, NewJob("ping", {"sleep_ms": 14_000})).job for _ in range(4)]
        eventually(lambda: _running(system) == 4)
        time.sleep(3)  # both workers are stable by now, and would rescue

        postgres = server(system, "postgres")
        frozen = [postgres, *postgres.children(recursive=True)]
        for process in frozen:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(8)  # the lease is 6 s
        for process in frozen:
            if process.is_running():
                os.kill(process.pid, signal.SIGCONT)

        eventually(lambda: _safely(all_ended(system, jobs)), within_s=60)
    with system.database.connection() as conn:
        ends = [[a.outcome for a in records.attempts(conn, job.id)] for job in jobs]
    assert ends == [["succeeded"]] * 4


@pytest.mark.timeout(60)
def test_submitting_does_not_wait_for_a_frozen_redis(own_environment: dict[str, str], own_system: System) -> None:
    system = own_system
    system.submit(1, NewJob("ping", {}))
    valkey = server(system, "valkey")
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        before = time.monotonic()
        jobs = [system.submit(1, NewJob("ping", {})).job for _ in range(20)]
        took = timedelta(seconds=time.monotonic() - before)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)

    assert took < timedelta(seconds=2)  # a broker that is asked in the request costs its time-out of seconds
    with system.database.connection() as conn:
        assert all(records.get(conn, 1, job.id) for job in jobs)


def _running(system: System) -> int:
    with system.database.connection() as conn:
        row = conn.execute("select count(*) from agentflow.jobs where state = 'running'").fetchone()
    return int(row[0]) if row else 0


def _safely(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Unavailable:
        return False
