"""Every way in which people, terminals, platforms and the kernel end our processes, on RabbitMQ: what runs a short time longer
is finished, what does not is handed back with no attempt and no crash counted, and nothing of the family is left.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from agentflow import signals
from agentflow.broker import queue_name
from agentflow.jobs.model import Job
from agentflow.prove.ports import free_port
from agentflow.signals import SAME_SIGNAL_S
from agentflow.system import System
from tests.clips import real_clips  # noqa: F401 - a fixture
from tests.processes import BIN, ROOT, Process, eventually, started, worker
from tests.rabbitmq import Node
from tests.test_kills import submit_analysis
from tests.test_worker import outcomes, read, submit

pytestmark = pytest.mark.timeout(150)

COMMANDS = {
    "dramatiq": [str(BIN / "dramatiq"), "actors", "--processes", "1", "--path", str(ROOT)],
    "worker": [sys.executable, "-m", "agentflow.cli", "worker", "-n", "2"],
    "up": [sys.executable, "-m", "agentflow.cli", "up"],
}
GRACE_S = 4.0
#: So much that a test which waits for its end waits in vain.
NO_END_S = 120.0


@pytest.fixture
def environment(environment: dict[str, str], rabbitmq: Node) -> dict[str, str]:
    """With long leases: whatever is taken over soon was handed back, not rescued."""
    return {
        **environment,
        "RABBITMQ_URL": rabbitmq.url,
        "JOB_CONCURRENCY": "8",
        "JOB_LEASE": "120",
        "JOB_LEASE_RENEW": "2",
        "SHUTDOWN_GRACE": str(GRACE_S),
    }


@contextmanager
def family(name: str, environment: dict[str, str], log: Path, **more: str) -> Iterator[Process]:
    """A command that takes jobs, ready to."""
    with started(COMMANDS[name], {**environment, "PORT": str(free_port()), **more}, log) as process:
        said, times = {
            "dramatiq": ("ready for action", 1),
            "worker": ("worker ready", 2),
            "up": ("Ctrl-C stops it.", 1),
        }[name]
        process.wait_for(said, within_s=60)
        eventually(lambda: process.text().count(said) == times, within_s=60)
        yield process


class Work:
    """Running jobs of each kind, each of which has one attempt to lose."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.long = [submit(system, "ping", {how: 3_600_000}, max_attempts=1) for how in ("sleep_ms", "native_ms")]
        self.until_running(self.long)
        self.short = submit(system, "ping", {"sleep_ms": 300}, max_attempts=1)
        eventually(lambda: read(system, self.short.id).state != "queued")

    def until_running(self, jobs: list[Job], fence: int = 1) -> None:
        def all_run() -> bool:
            rows = [read(self._system, job.id) for job in jobs]
            return all(row.state == "running" and row.fence == fence for row in rows)

        eventually(all_run, within_s=60)

    def assert_nothing_is_lost(self, *, short_may_be_handed_back: bool = False) -> None:
        for job in self.long:
            row = read(self._system, job.id)
            assert (row.state, row.attempt, row.fence, row.crashes) == ("queued", 0, 1, 0)
            assert outcomes(self._system, job) == ["handback"]
        row = read(self._system, self.short.id)
        found = (row.state, row.attempt, row.crashes)
        assert found == ("succeeded", 1, 0) or (short_may_be_handed_back and found == ("queued", 0, 0))

    def assert_others_take_it_over(self, environment: dict[str, str], log: Path) -> None:
        with worker(environment, log):
            self.until_running(self.long, fence=2)


def members(process: Process) -> list[psutil.Process]:
    """All of the family, the native child of the long job among them."""
    eventually(lambda: any("actors.ping.native" in " ".join(p.cmdline()) for p in process.family()), within_s=20)
    return process.family()


def assert_gone(processes: list[psutil.Process], within_s: float = 20.0) -> None:
    eventually(lambda: not [p for p in processes if _lives(p)], within_s=within_s)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def not_in_every_run(command: str, way: str) -> object:
    return pytest.param(command, way, marks=pytest.mark.long)


WAYS = {
    "SIGTERM to the parent": lambda p: p.popen.send_signal(signal.SIGTERM),
    "SIGTERM to the group": lambda p: os.killpg(p.pid, signal.SIGTERM),
    "Ctrl-C": lambda p: os.killpg(p.pid, signal.SIGINT),
    "the terminal is closed": lambda p: os.killpg(p.pid, signal.SIGHUP),
}


@pytest.mark.parametrize(
    ("command", "way"),
    [
        not_in_every_run("dramatiq", "SIGTERM to the parent"),  # test_kills.py has it, on both brokers
        ("dramatiq", "SIGTERM to the group"),
        ("dramatiq", "Ctrl-C"),
        not_in_every_run("worker", "SIGTERM to the parent"),
        ("worker", "SIGTERM to the group"),
        not_in_every_run("worker", "Ctrl-C"),
        ("worker", "the terminal is closed"),
        not_in_every_run("up", "SIGTERM to the parent"),
        ("up", "SIGTERM to the group"),
        not_in_every_run("up", "Ctrl-C"),
        not_in_every_run("up", "the terminal is closed"),
    ],
)
def test_a_signal_gives_running_jobs_their_grace_and_hands_the_rest_back(
    environment: dict[str, str], system: System, tmp_path: Path, command: str, way: str
) -> None:
    with family(command, environment, tmp_path / "log") as process:
        work = Work(system)
        all_of_it = members(process)

        WAYS[way](process)

        assert process.popen.wait(60) == 0, process.text()[-4000:]
        assert_gone(all_of_it)
        assert "Traceback" not in process.text(), process.text()[-4000:]
    work.assert_nothing_is_lost()
    if way == "SIGTERM to the group":
        work.assert_others_take_it_over(environment, tmp_path / "other.log")


@pytest.mark.parametrize(
    ("command", "number", "group"),
    [
        ("dramatiq", signal.SIGTERM, False),
        pytest.param("dramatiq", signal.SIGINT, True, marks=pytest.mark.long),
        ("worker", signal.SIGTERM, True),
        pytest.param("worker", signal.SIGINT, True, marks=pytest.mark.long),
        ("up", signal.SIGTERM, False),
        pytest.param("up", signal.SIGINT, True, marks=pytest.mark.long),
    ],
)
def test_a_second_signal_hands_back_at_once(
    environment: dict[str, str], system: System, tmp_path: Path, command: str, number: int, group: bool
) -> None:
    def tell() -> None:
        os.killpg(process.pid, number) if group else process.popen.send_signal(number)

    with family(command, environment, tmp_path / "log", SHUTDOWN_GRACE=str(NO_END_S)) as process:
        work = Work(system)
        all_of_it = members(process)

        tell()
        process.wait_for("stopping")
        time.sleep(SAME_SIGNAL_S + 0.5)  # nearer together they are one
        assert process.popen.poll() is None
        work.until_running(work.long)
        tell()

        assert process.popen.wait(30) == 0, process.text()[-4000:]
        assert_gone(all_of_it)
    work.assert_nothing_is_lost(short_may_be_handed_back=True)


@pytest.mark.parametrize("command", ["dramatiq", "worker", pytest.param("up", marks=pytest.mark.long)])
def test_when_the_parent_is_killed_the_rest_hands_back_and_ends(
    environment: dict[str, str], system: System, tmp_path: Path, command: str
) -> None:
    with family(command, environment, tmp_path / "log") as process:
        work = Work(system)
        all_of_it = members(process)

        process.popen.send_signal(signal.SIGKILL)

        assert process.popen.wait(10) == -signal.SIGKILL
        assert_gone(all_of_it, within_s=60)
        assert "the parent process is gone" in process.text()
        assert "Traceback" not in process.text(), process.text()[-4000:]
    work.assert_nothing_is_lost()


def test_dramatiqs_own_command_starts_over_at_sighup(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    with family("dramatiq", environment, tmp_path / "log") as process:
        work = Work(system)
        before = members(process)[1:]

        process.popen.send_signal(signal.SIGHUP)

        assert_gone(before, within_s=60)
        assert process.popen.poll() is None
        work.until_running(work.long, fence=2)  # by its own successor
        assert [outcomes(system, job) for job in work.long] == [["handback"]] * 2
        assert read(system, work.short.id).state == "succeeded"
        assert process.terminate() == 0


@pytest.mark.parametrize("command", ["dramatiq", "worker"])
def test_what_was_fetched_and_not_begun_goes_to_others_while_the_grace_lasts(
    environment: dict[str, str], system: System, rabbitmq: Node, tmp_path: Path, command: str
) -> None:
    environment["JOB_CONCURRENCY"] = "1"
    lane = queue_name(system.settings.job_queue_name, "default")
    with family(command, environment, tmp_path / "log", SHUTDOWN_GRACE=str(NO_END_S)) as process:
        long = [submit(system, "ping", {"sleep_ms": 3_600_000}) for _ in range(2 if command == "worker" else 1)]
        eventually(lambda: all(read(system, job.id).state == "running" for job in long))
        behind = [submit(system, "ping", {}) for _ in range(4)]

        process.popen.send_signal(signal.SIGTERM)

        process.wait_for("stopping")
        eventually(lambda: rabbitmq.ready_messages(lane)[lane] >= 4)  # a ring may have been doubled
        with worker(environment, tmp_path / "other.log"):
            eventually(lambda: all(read(system, job.id).state == "succeeded" for job in behind))
        assert process.popen.poll() is None
        assert {read(system, job.id).fence for job in long} == {1}


@pytest.mark.long
def test_a_video_in_the_middle_is_analysed_elsewhere(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    tmp_path: Path,
    real_clips: Path,  # noqa: F811
) -> None:
    with family("worker", environment, tmp_path / "log", SHUTDOWN_GRACE="0.2") as process:
        job_id = submit_analysis(system, real_clips / "bikes.mp4")
        eventually(lambda: any("video" in " ".join(p.cmdline()) for p in process.family()), every_s=0.01)
        all_of_it = process.family()

        assert process.terminate() == 0
        assert_gone(all_of_it)
    row = read(system, job_id)
    assert (row.state, row.attempt, row.fence) == ("queued", 0, 1)
    with worker(environment, tmp_path / "other.log"):
        eventually(lambda: read(system, job_id).state == "succeeded", within_s=60)
    row = read(system, job_id)
    assert (row.attempt, row.fence) == (1, 2) and row.result and len(row.result["shots"]) > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_scheduler_ends_at_any_of_them_twice_or_not(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    environment["PORT"] = str(free_port())
    with started([sys.executable, "-m", "scheduler"], environment, tmp_path / "log") as process:
        process.wait_for("scheduler ready", within_s=60)

        os.killpg(process.pid, number)
        os.killpg(process.pid, number)

        assert process.popen.wait(30) == 0, process.text()
        assert "Traceback" not in process.text()


def test_copies_of_a_signal_are_one_and_a_later_one_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Callable[[int, None], None]] = {}
    now = 100.0
    before: list[int] = []
    told: list[str] = []
    monkeypatch.setattr(signals.signal, "getsignal", lambda _: lambda number, _frame: before.append(number))
    monkeypatch.setattr(signals.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    signals.Signals(stop=lambda: told.append("stop"), hurry=lambda: told.append("hurry"), parent=os.getppid())
    monkeypatch.undo()

    with monkeypatch.context() as clock:
        clock.setattr(signals.time, "monotonic", lambda: now)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            handlers[number](number, None)
        eventually(lambda: told == ["stop"])
        now += SAME_SIGNAL_S + 0.1
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    eventually(lambda: told == ["stop", "hurry"])

    assert before == [signal.SIGTERM], "Dramatiq's own handler ends the process at the second call"


# ---- several children of one `dramatiq` ----


def test_one_dead_child_of_several_costs_nobody_an_attempt(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    """Dramatiq's command ends all of them when one dies."""
    environment |= {"JOB_CONCURRENCY": "2", "JOB_LEASE": "4", "JOB_LEASE_RENEW": "1"}
    arguments = ["2" if word == "1" else word for word in COMMANDS["dramatiq"]]
    with started(arguments, {**environment, "PORT": str(free_port())}, tmp_path / "log") as process:
        eventually(lambda: process.text().count("ready for action") == 2, within_s=60)
        assert conn.execute("select threads from agentflow.workers").fetchall() == [(2,), (2,)]
        jobs = [submit(system, "ping", {"sleep_ms": 2_500}, max_attempts=1) for _ in range(4)]
        eventually(lambda: all(read(system, job.id).state == "running" for job in jobs))
        pids = conn.execute(
            "select w.pid, count(*) from agentflow.jobs j join agentflow.workers w on w.id = j.worker group by 1"
        ).fetchall()
        assert sorted(n for _, n in pids) == [2, 2]
        all_of_it = process.family()

        os.kill(pids[0][0], signal.SIGKILL)

        assert process.popen.wait(60) != 0
        assert_gone(all_of_it)
    with worker(environment, tmp_path / "other.log"):
        eventually(lambda: all(read(system, job.id).state == "succeeded" for job in jobs), within_s=60)

    rows = [read(system, job.id) for job in jobs]
    assert [row.attempt for row in rows] == [1] * 4
    assert sorted(row.crashes for row in rows) == [0, 0, 1, 1]
    assert sum("crashed" in outcomes(system, job) for job in jobs) == 2
