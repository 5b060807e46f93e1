"""Workers in real memory groups of the kernel's: jobs that do not fit wait, and those that the kernel kills are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import memory_jobs  # noqa: F401 - makes its type known
from tests.memory_group import MemoryGroup, memory_group
from tests.processes import BIN, Process, eventually, started
from tests.test_worker import ended, read, submit

# Long, since the kernel's groups cannot be had in every container that can run all else.
pytestmark = pytest.mark.timeout(180)

LIMIT_MB = 400


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with memory_group(LIMIT_MB) as made:
        yield made


@contextmanager
def worker(group: MemoryGroup | None, environment: dict[str, str], log: Path, *queues: str) -> Iterator[Process]:
    """`agentflow worker`, in a group or outside of any."""
    arguments = [str(BIN / "python"), "-m", "agentflow.cli", "worker", "--module", "tests.memory_jobs"]
    arguments += [word for queue in queues for word in ("-Q", queue)]
    command = group.inside(arguments) if group is not None else arguments
    with started(command, {"PORT": str(free_port()), "TMPDIR": str(log.parent), **environment}, log) as process:
        process.wait_for("worker ready", within_s=90.0)
        yield process


def hungry(system: System, megabytes: int, **payload: Any) -> Job:
    return submit(system, "test_hungry", {"megabytes": megabytes, **payload})


def errors(system: System, job: Job) -> list[dict[str, Any]]:
    with system.database.connection() as conn:
        return [attempt.error or {} for attempt in records.attempts(conn, job.id) if attempt.error]


def test_a_job_waits_until_another_ones_memory_is_free(
    environment: dict[str, str], system: System, group: MemoryGroup, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with worker(group, environment, tmp_path / "log"):
        first = hungry(system, 120, said_mb=150, until=str(gate))
        eventually((tmp_path / "gate.full").exists)

        second = hungry(system, 120, said_mb=150)
        light = submit(system, "ping")

        waiting = eventually(lambda: parked(system, second))
        assert (waiting.state, waiting.attempt, waiting.error) == ("queued", 0, None)
        assert ended(system, light).state == "succeeded"
        outlook = system.outlooks.of(waiting, None)
        assert outlook is not None and outlook.reason == "memory"
        gate.touch()
        assert [ended(system, job).state for job in (first, second)] == ["succeeded", "succeeded"]
        assert ended(system, second).attempt == 1
    assert group.kills == 0


def serves(conn: psycopg.Connection, queue: str) -> bool:
    return conn.execute("select from agentflow.workers where %s = any (queues)", (queue,)).fetchone() is not None


def parked(system: System, job: Job) -> Job | None:
    found = read(system, job.id)
    return found if found.wait_reason == "memory" else None


def test_a_child_that_the_kernel_killed_is_named_and_the_second_time_its_job_fails_or_goes_to_the_large_queue(
    environment: dict[str, str], system: System, conn: psycopg.Connection, group: MemoryGroup, tmp_path: Path
) -> None:
    with worker(group, environment, tmp_path / "log") as process:
        alone = ended(system, hungry(system, LIMIT_MB), 60.0)

        assert (alone.state, alone.attempt) == ("failed", 2)
        assert alone.error is not None and alone.error["code"] == "out_of_memory"
        killed = [error for error in errors(system, alone) if error["code"] == "out_of_memory"]
        assert len(killed) == 2
        for error in killed:
            assert error["message"].startswith("killed by the kernel: out of memory, peak ")
            assert error["message"].endswith(f" MB of {LIMIT_MB} MB")
            assert 100 << 20 < error["peak_bytes"] < LIMIT_MB << 20
        never = ended(system, hungry(system, 10, said_mb=LIMIT_MB))
        assert never.error is not None and never.error["code"] == "needs_more_memory"
        assert f"need {LIMIT_MB} MB of memory" in never.error["message"]

        with worker(None, environment, tmp_path / "large.log", "large"):
            eventually(lambda: serves(conn, "large"))
            served = [hungry(system, LIMIT_MB, said_mb=1), hungry(system, 10, said_mb=LIMIT_MB)]
            for job in served:
                done = ended(system, job, 60.0)
                assert (done.state, done.queue) == ("succeeded", "large"), done
            assert group.kills == 4
        assert "a worker process died" not in process.text()  # the kernel took the children alone


def test_a_worker_that_the_kernel_killed_is_named_by_its_successor(
    environment: dict[str, str], system: System, group: MemoryGroup, tmp_path: Path
) -> None:
    environment |= {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1", "JOB_MAX_CRASHES": "1"}
    with worker(group, environment, tmp_path / "log") as process:
        held = hungry(system, LIMIT_MB, in_child=False)

        done = ended(system, held, 60.0)

        assert (done.state, done.crashes) == ("failed", 1)
        assert done.error is not None and done.error["code"] == "worker_out_of_memory"
        process.wait_for("killed by the kernel: out of memory")
    assert group.kills == 1
