"""Some of tests/test_signals.py again, on the Redis tier, whose broker keeps what a process fetched under that process's name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentflow.signals import SAME_SIGNAL_S
from agentflow.system import System
from tests.processes import Process, eventually, worker
from tests.test_signals import GRACE_S, NO_END_S, Work, assert_gone, family, members
from tests.test_worker import read, submit

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "JOB_LEASE": "120", "JOB_LEASE_RENEW": "2", "SHUTDOWN_GRACE": str(GRACE_S)}


def to_the_group(process: Process) -> int:
    os.killpg(process.pid, signal.SIGTERM)
    return 0


def twice(process: Process) -> int:
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("stopping")
    time.sleep(SAME_SIGNAL_S + 0.5)  # nearer together they are one
    process.popen.send_signal(signal.SIGTERM)
    return 0


def parent_killed(process: Process) -> int:
    process.popen.send_signal(signal.SIGKILL)
    return -signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "way", "grace_s"),
    [
        ("dramatiq", to_the_group, GRACE_S),
        pytest.param("worker", to_the_group, GRACE_S, marks=pytest.mark.long),
        pytest.param("dramatiq", twice, NO_END_S, marks=pytest.mark.long),
        ("dramatiq", parent_killed, GRACE_S),
    ],
)
def test_nothing_is_lost_and_nobody_is_left(
    environment: dict[str, str],
    system: System,
    tmp_path: Path,
    command: str,
    way: Callable[[Process], int],
    grace_s: float,
) -> None:
    with family(command, environment, tmp_path / "log", SHUTDOWN_GRACE=str(grace_s)) as process:
        work = Work(system)
        all_of_it = members(process)

        status = way(process)

        assert process.popen.wait(60) == status, process.text()[-4000:]
        assert_gone(all_of_it, within_s=60)
        assert "Traceback" not in process.text(), process.text()[-4000:]
    work.assert_nothing_is_lost(short_may_be_handed_back=way is twice)


def test_what_was_fetched_and_not_begun_goes_to_others_while_the_grace_lasts(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    environment["JOB_CONCURRENCY"] = "1"
    with family("dramatiq", environment, tmp_path / "log", SHUTDOWN_GRACE=str(NO_END_S)) as process:
        long = submit(system, "ping", {"sleep_ms": 3_600_000})
        eventually(lambda: read(system, long.id).state == "running")
        behind = [submit(system, "ping", {}) for _ in range(4)]

        process.popen.send_signal(signal.SIGTERM)

        process.wait_for("stopping")
        with worker(environment, tmp_path / "other.log"):
            eventually(lambda: all(read(system, job.id).state == "succeeded" for job in behind))
        assert process.popen.poll() is None and read(system, long.id).fence == 1
