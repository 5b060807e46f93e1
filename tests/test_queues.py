"""`-Q`: workers that take the jobs of some queues only, on both brokers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from agentflow.jobs.model import Job
from agentflow.prove.ports import free_port
from agentflow.system import System
from agentflow.worker.process import UnknownQueue, served_queues, threads_are_told
from tests.cli_support import Command, agentflow  # noqa: F401 - a fixture
from tests.processes import BIN, ROOT, Process, eventually, started
from tests.test_worker import read, submit

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["redis", "rabbitmq"])
def environment(environment: dict[str, str], request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "rabbitmq":
        environment["RABBITMQ_URL"] = request.getfixturevalue("rabbitmq").url
    return environment


@contextmanager
def worker_of(environment: dict[str, str], log: Path, *queues: str) -> Iterator[Process]:
    arguments = [str(BIN / "dramatiq"), "tests.job_types", "--processes", "1", "--path", str(ROOT), "-Q", *queues]
    with started(arguments, {**environment, "PORT": str(free_port())}, log) as process:
        process.wait_for("ready for action", within_s=60)
        yield process


def succeeded(system: System, jobs: list[Job]) -> bool:
    return all(read(system, job.id).state == "succeeded" for job in jobs)


def test_a_worker_takes_the_jobs_of_its_queues_and_no_others(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    tmp_path: Path,
    agentflow: Command,  # noqa: F811
) -> None:
    with worker_of(environment, tmp_path / "default.log", "default", f"{environment['JOB_QUEUE_NAME']}.heavy"):
        for_gpu = [submit(system, "test_gpu"), submit(system, "test_gpu_critical")]
        ordinary = [submit(system, "ping") for _ in range(5)]
        eventually(lambda: succeeded(system, ordinary))
        assert [read(system, job.id).fence for job in for_gpu] == [0, 0]

        shown, checked = agentflow("queues").out, agentflow("doctor")
        assert re.search(r"^no worker serves gpu \(.*test_gpu, .*2 waiting\)$", shown, re.MULTILINE), shown
        assert re.search(r"none serves gpu \(.*test_gpu, .*2 waiting\)$", checked.out, re.MULTILINE), checked.out
        assert checked.status == 0

        with worker_of(environment, tmp_path / "gpu.log", "gpu") as process:
            for_gpu += [submit(system, "test_gpu"), submit(system, "test_gpu_critical")]
            ordinary += [submit(system, "ping") for _ in range(5)]
            eventually(lambda: succeeded(system, for_gpu + ordinary))
            pid = conn.execute("select pid from agentflow.workers where queues = '{gpu}'").fetchone()
            assert "no worker serves" not in agentflow("queues").out
            assert process.terminate() == 0

    by = conn.execute(
        "select j.queue, w.queues, count(*) from agentflow.jobs j join agentflow.workers w on w.id = j.finished_by"
        " group by 1, 2 order by 1"
    ).fetchall()
    assert pid is not None and by == [("default", ["default", "heavy"], 10), ("gpu", ["gpu"], 4)]


def test_jobs_of_a_worker_that_died_are_rescued_by_one_of_other_queues(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    environment |= {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1"}
    with worker_of(environment, tmp_path / "default.log", "default"):
        with worker_of(environment, tmp_path / "gpu.log", "gpu"):
            job = submit(system, "test_gpu", {"sleep_ms": 600_000})
            eventually(lambda: read(system, job.id).state == "running")

        eventually(lambda: read(system, job.id).crashes == 1, within_s=60)

        assert read(system, job.id).state == "queued"


@pytest.mark.parametrize(
    "command",
    [
        [str(BIN / "dramatiq"), "actors", "--processes", "1", "--path", str(ROOT), "-Q", "gpu", "gpux"],
        [str(BIN / "python"), "-m", "agentflow.cli", "worker", "-Q", "gpu", "gpux"],
    ],
)
def test_an_unknown_queue_stops_the_command_with_one_line(
    environment: dict[str, str], tmp_path: Path, command: list[str]
) -> None:
    environment["PORT"] = str(free_port())
    with started(command, environment, tmp_path / "log") as process:
        assert process.popen.wait(60) == 2
        said = [line for line in process.text().splitlines() if "gpux" in line]

    assert said == ["agentflow: -Q: there is no queue 'gpux'; the queues are default, heavy, gpu, large"]
    assert "Traceback" not in process.text()


def test_names_of_queues() -> None:
    assert served_queues(["gpu", "jobs.default"], "jobs") == ["default", "gpu"]
    assert served_queues([], "jobs") == []
    with pytest.raises(UnknownQueue, match="there is no queue"):
        served_queues(["other.gpu"], "jobs")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/venv/bin/dramatiq", "actors"], False),
        (["/venv/bin/dramatiq", "actors", "--threads", "8"], True),
        (["/venv/bin/dramatiq", "-t8", "actors"], True),
        (["/venv/bin/dramatiq", "actors", "--path", "x"], False),
        (["/venv/bin/pytest", "--tb=short"], False),
    ],
)
def test_which_commands_say_how_many_threads(arguments: list[str], told: bool) -> None:
    assert threads_are_told(arguments) is told
