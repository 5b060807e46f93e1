"""`agentflow worker`: what dies is started again, and what cannot be started is said once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
import pytest

from agentflow import settings
from agentflow.cli import workers
from agentflow.cli.worker_health import WorkerHealth
from agentflow.cli.workers import Child
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.processes import Process, eventually, started
from tests.test_worker import outcomes, read, submit

pytestmark = pytest.mark.timeout(150)

COMMAND = [sys.executable, "-m", "agentflow.cli", "worker"]


@contextmanager
def supervised(environment: dict[str, str], log: Path, *arguments: str) -> Iterator[tuple[Process, httpx2.Client]]:
    """Two workers that are ready, and a client of PORT."""
    port = free_port()
    with started([*COMMAND, "-n", "2", *arguments], {**environment, "PORT": str(port)}, log) as process:
        eventually(lambda: process.text().count("worker ready") == 2, within_s=60)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            eventually(lambda: health(http)["status"] == "ok", within_s=60)
            yield process, http


def health(http: httpx2.Client) -> dict[str, Any]:
    answer = http.get("/health")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_a_dead_worker_is_replaced_and_its_job_done_while_the_other_goes_on(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment |= {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1", "AGENTFLOW_ENV": "production"}
    with supervised(environment, tmp_path / "log", "--threads", "2") as (process, http):
        assert conn.execute("select threads from agentflow.workers").fetchall() == [(2,), (2,)]
        jobs = [submit(system, "ping", {"sleep_ms": 3000}, max_attempts=1) for _ in range(4)]
        eventually(lambda: all(read(system, job.id).state == "running" for job in jobs))
        first, second = (each["pid"] for each in health(http)["processes"])

        os.kill(first, signal.SIGKILL)

        eventually(lambda: [p["restarts"] for p in health(http)["processes"]] == [1, 0])
        eventually(lambda: health(http)["status"] == "ok", within_s=60)
        after = [each["pid"] for each in health(http)["processes"]]
        assert after[0] != first and after[1] == second
        eventually(lambda: all(read(system, job.id).state == "succeeded" for job in jobs), within_s=60)
        deaths = [line for line in process.text().splitlines() if "a worker process died" in line]
        assert len(deaths) == 1 and '"signal": "SIGKILL"' in deaths[0] and f'"worker_pid": {first}' in deaths[0]
        assert process.terminate() == 0
    rows = [read(system, job.id) for job in jobs]
    assert [row.attempt for row in rows] == [1] * 4 and sorted(row.crashes for row in rows) == [0, 0, 1, 1]


def test_health_and_metrics_of_all_are_served_on_one_port(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    environment["METRICS_TOKEN"] = "let-me-see-the-metrics"
    with supervised(environment, tmp_path / "log") as (process, http):
        jobs = [submit(system, "ping", {"sleep_ms": 200}) for _ in range(20)]
        eventually(lambda: all(read(system, job.id).state == "succeeded" for job in jobs))

        found = health(http)
        assert found["service"] == "worker" and found["database"]["connected"] and found["redis"]["connected"]
        assert [each["number"] for each in found["processes"]] == [1, 2]
        assert found["jobs"]["completed"] == sum(each["jobs"]["completed"] for each in found["processes"]) == 20
        assert http.get("/health/live").status_code == http.get("/health/ready").status_code == 200
        assert http.get("/nothing").status_code == 404
        assert http.get("/metrics").status_code == 401
        allowed = {"Authorization": "Bearer let-me-see-the-metrics"}
        text = http.get("/metrics", headers=allowed).text
        assert text.count("# TYPE worker_jobs_completed_total counter") == 1
        done = [line for line in text.splitlines() if line.startswith("worker_jobs_completed_total{")]
        assert sum(float(line.split()[-1]) for line in done) == 20
        assert {p for p in "12" if any(f'process="{p}"' in line for line in done)} == {"1", "2"}
        assert 'agentflow_worker_process_restarts_total{process="2"} 0.0' in text
        document = http.get("/metrics", headers={**allowed, "Accept": "application/json"}).json()
        assert document["jobs"]["completed"] == 20 and document["database"]["connected"]

        one, other = (psutil.Process(each["pid"]) for each in found["processes"])
        one.suspend()
        try:
            assert health(http)["status"] == "stuck"
            refused = http.get("/health/live")
            assert refused.status_code == 503 and "worker process 1" in refused.json()["reason"]
            assert http.get("/health/ready").status_code == 200, "the other one takes jobs"
        finally:
            one.resume()
        eventually(lambda: health(http)["status"] == "ok")
        assert other.is_running()
        assert process.terminate() == 0


@pytest.mark.parametrize(
    ("wrong", "arguments", "status", "said"),
    [
        ({"JOB_LEASE": "soon"}, [], 2, "agentflow: JOB_LEASE: "),
        ({}, ["queues"], 2, "Got unexpected extra argument (queues)"),
        ({"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}, [], 3, "the database cannot be reached"),
        ({}, ["--module", "tests.no_such_module"], 3, "agentflow: no worker process could start"),
    ],
)
def test_what_cannot_work_ends_at_once(
    environment: dict[str, str], tmp_path: Path, wrong: dict[str, str], arguments: list[str], status: int, said: str
) -> None:
    environment |= {"PORT": str(free_port()), **wrong}
    with started([*COMMAND, *arguments], environment, tmp_path / "log") as process:
        assert process.popen.wait(60) == status, process.text()
        lines = [line for line in process.text().splitlines() if said in line]

    assert len(lines) == 1, process.text()
    assert process.text().count("worker process started") == ("--module" in arguments)


def test_settings_that_only_a_child_finds_wrong_end_all_of_it(environment: dict[str, str], tmp_path: Path) -> None:
    environment["PORT"] = str(free_port())
    broken = tmp_path / "broken_types.py"
    broken.write_text("raise SystemExit(2)\n")
    environment["PYTHONPATH"] = str(tmp_path)
    with started([*COMMAND, "-n", "2", "--module", "broken_types"], environment, tmp_path / "log") as process:
        assert process.popen.wait(60) == 2, process.text()

    assert "a worker process cannot work with these settings" in process.text()


def test_the_pause_doubles_up_to_half_a_minute_and_starts_over_after_a_healthy_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = Child(1)
    child.started = now = 1000.0
    monkeypatch.setattr(workers.time, "monotonic", lambda: now)

    assert [child.pause_s() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    now += workers.HEALTHY_S
    assert child.pause_s() == 1
    child.listener.close()


def test_a_process_that_is_down_or_starting_is_not_asked_and_not_taken_for_stuck(
    environment: dict[str, str],
) -> None:
    child = Child(1)
    answers = WorkerHealth(System(settings.load(environment), "test"), [child])

    status, document = answers.health("/health") or (0, {})

    assert status == 200 and document["status"] == "degraded" and document["processes"][0]["status"] == "down"
    assert answers.health("/health/live") == (200, {"status": "live"})
    assert (answers.health("/health/ready") or (0, {}))[0] == 503
    child.listener.close()


def test_a_worker_that_does_not_end_is_killed_in_the_end(tmp_path: Path, environment: dict[str, str]) -> None:
    environment |= {"PORT": str(free_port()), "SHUTDOWN_GRACE": "0.5"}
    with started([*COMMAND], environment, tmp_path / "log") as process:
        process.wait_for("worker ready", within_s=60)
        (child,) = [p for p in process.family()[1:] if "--child" in p.cmdline()]
        child.suspend()

        process.popen.send_signal(signal.SIGTERM)

        assert process.popen.wait(60) == 1
        assert "did not end and is killed" in process.text()
        eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("how", ["fails", "nobody is told"])
def test_what_a_starting_process_has_taken_is_handed_back_though_it_never_gets_ready(
    environment: dict[str, str], system: System, tmp_path: Path, how: str
) -> None:
    """With a long lease: whatever is to be had again soon was handed back."""
    environment |= {"JOB_LEASE": "120", "SHUTDOWN_GRACE": "2"}
    job = submit(system, "ping", {"sleep_ms": 3_600_000}, max_attempts=1)

    with started(
        [sys.executable, "-m", "tests.starting_worker", how, str(job.id)], environment, tmp_path / "log"
    ) as it:
        status = it.popen.wait(60)

    row = read(system, job.id)
    assert (row.state, row.attempt, row.fence, row.crashes) == ("queued", 0, 1, 0), it.text()
    assert outcomes(system, job) == ["handback"]
    assert status == (1 if how == "fails" else 0)
    assert it.text().count("the worker could not start") == (how == "fails")
    assert ("told nobody" in it.text()) == (how != "fails")
