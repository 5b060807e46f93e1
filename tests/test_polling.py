"""The tier without a broker: workers look into Postgres. The worker's essential tests again, and what polling must not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.broker import PollingBroker
from agentflow.jobs import dispatch
from agentflow.jobs.model import USUAL_QUEUES, Job
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import core_support, job_types  # noqa: F401 - registers the tests' job types
from tests.core_support import ORGANIZATION, column
from tests.processes import ROOT, Process, eventually, worker
from tests.test_kills import (  # noqa: F401 - run again here, in this tier
    assert_each_ended_once,
    open_jobs,
    submit_pings,
    test_sigterm_hands_running_jobs_back_without_spending_an_attempt,
)
from tests.test_up import AUTH, running_up
from tests.test_worker import (  # noqa: F401 - run again here, in this tier
    ended,
    outcomes,
    read,
    running_worker,
    submit,
    test_critical_jobs_run_while_default_ones_take_all_the_room,
)
from tests.web_support import client  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    quick = {"JOB_LEASE": "6", "JOB_LEASE_RENEW": "2", "JOB_MAX_CRASHES": "50"}
    return {name: value for name, value in environment.items() if name != "REDIS_URL"} | quick


def pings(system: System, count: int, **payload: int) -> list[Job]:
    return [submit(system, "ping", dict(payload)) for _ in range(count)]


def all_done(system: System, jobs: list[Job], within_s: float = 60.0) -> list[Job]:
    with system.database.connection() as conn:
        eventually(lambda: open_jobs(conn) == 0, within_s=within_s)
    done = [read(system, job.id) for job in jobs]
    assert {job.state for job in done} == {"succeeded"}
    return done


def refused_claims(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert "agentflow_messages_dropped" in text
    found = re.findall(r'^agentflow_messages_dropped_total\{[^}]*why="not_claimable"\} (\S+)', text, re.MULTILINE)
    return sum(map(float, found))


def test_database_url_alone_is_a_tier() -> None:
    read = settings.load({"DATABASE_URL": "postgresql://db/x"})

    assert (read.tier, read.uses_redis, read.embedded_redis) == ("database only", False, False)
    assert isinstance(System(read, "test").broker, PollingBroker)


def test_a_job_is_done_and_its_result_waited_for_without_any_redis(
    system: System,
    running_worker: Process,  # noqa: F811
) -> None:
    job = submit(system, "ping", {"result_bytes": 3})

    done = system.wait_finished(job, 25.0)

    assert done is not None and (done.state, done.attempt, done.fence) == ("succeeded", 1, 1)
    assert done.result == {"pong": True, "attempt": 1, "data": "xxx"}
    late = submit(system, "ping", run_at=datetime.now(UTC) + timedelta(seconds=1.5))
    again = submit(system, "ping", {"fail_attempts": 1, "wait_ms": 300})
    assert [ended(system, job).attempt for job in (late, again)] == [1, 2]
    assert read(system, late.id).started_at >= late.run_at  # type: ignore[operator]
    text = running_worker.text().lower()
    assert "redis" not in text and "rabbitmq" not in text and "could not publish" not in text, text


def test_workers_that_poll_do_not_claim_the_same_jobs_nor_sleep_while_there_is_work(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    # An interval in which nothing of this would be done in time: what is due is found by looking again while there is some.
    environment = {**environment, "WORKER_POLLING_INTERVAL": "10"}
    ids = [job.id for job in pings(system, 500, sleep_ms=2)]
    ports = [free_port() for _ in range(3)]
    with ExitStack() as workers:
        for port in ports:
            log = tmp_path / f"{port}.log"
            workers.enter_context(worker({**environment, "PORT": str(port)}, log, ready=False))

        eventually(lambda: open_jobs(conn) == 0, within_s=60)

        refused = sum(map(refused_claims, ports))
    assert_each_ended_once(conn, ids)
    # A pick whose claim is late by 5 s may be picked again: not on a machine that is anything like well.
    assert refused <= 10


def test_no_job_waits_behind_a_busy_worker_while_another_has_a_free_thread(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment = {**environment, "JOB_CONCURRENCY": "4"}  # one of them kept for critical jobs
    gate = tmp_path / "gate"
    with worker(environment, tmp_path / "one.log"), worker(environment, tmp_path / "two.log"):
        held = [submit(system, "test_gate", {"file": str(gate)}) for _ in range(6)]
        eventually(lambda: _running(conn) == 6)
        waiting = submit(system, "ping")
        urgent = submit(system, "ping", priority="critical")

        assert ended(system, urgent).state == "succeeded"
        assert read(system, waiting.id).state == "queued"
        gate.touch()
        all_done(system, [*held, waiting])


def test_a_type_that_has_its_limit_here_is_left_alone_and_blocks_nobody(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with worker(environment, tmp_path / "worker.log"):
        narrow = [submit(system, "test_narrow", {"file": str(gate)}) for _ in range(8)]
        eventually(lambda: _running(conn) == 1)

        assert ended(system, submit(system, "ping")).state == "succeeded"

        assert _running(conn) == 1
        gate.touch()
        all_done(system, narrow)


def test_a_worker_takes_only_types_that_it_knows(
    system: System,
    running_worker: Process,  # noqa: F811
    conn: psycopg.Connection,
) -> None:
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, priority, max_attempts, time_limit_s, wake_at)"
        " values (gen_random_uuid(), 1, 'from_the_future', 'default', 0, 5, 60, clock_timestamp())"
    )

    all_but_one = pings(system, 5)

    eventually(lambda: open_jobs(conn) == 1)
    assert {read(system, job.id).state for job in all_but_one} == {"succeeded"}
    left = conn.execute("select sends, fence from agentflow.jobs where type = 'from_the_future'").fetchone()
    assert left == (0, 0)  # never even picked: a worker that knows it finds it at once


def test_workers_killed_in_the_middle_lose_nothing(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    ids = submit_pings(system, 150)
    with worker(environment, tmp_path / "steady.log", ready=False):
        with worker(environment, tmp_path / "killed.log", ready=False) as process:
            eventually(lambda: open_jobs(conn) < 100 and "worker ready" in process.text())
            process.kill()
        eventually(lambda: open_jobs(conn) == 0, within_s=60)
    assert_each_ended_once(conn, ids)


def test_a_running_job_shows_its_progress_and_is_cancelled_though_nobody_can_be_told(
    client: FlaskClient,  # noqa: F811
    system: System,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    environment = {**environment, "JOB_LEASE": "240", "JOB_LEASE_RENEW": "120"}  # too late for this test
    with worker(environment, tmp_path / "worker.log"):
        job = submit(system, "test_halfway", {"file": str(tmp_path / "never")})

        eventually(lambda: (client.get(f"/api/jobs/{job.id}").json or {})["progress"] == 0.5)
        assert client.post(f"/api/jobs/{job.id}/cancel").status_code in (200, 202)

        assert ended(system, job).state == "cancelled"


def _running(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from agentflow.jobs where state = 'running'").fetchone()
    return int(row[0]) if row else 0


# ---- what is picked ----


def due(conn: psycopg.Connection, count: int, organization: int = ORGANIZATION, **request: int) -> list[Job]:
    return [core_support.submit(conn, organization, **request) for _ in range(count)]


@pytest.fixture
def unrung(conn: psycopg.Connection) -> psycopg.Connection:
    """Nothing is stamped at the insert: as where nobody can be rung."""
    conn.execute("create table public.unrung ()")
    conn.execute(
        "create function public.unring() returns trigger language plpgsql as $$ begin"
        " new.sent_at := null; new.sends := 0; new.wake_at := clock_timestamp(); return new; end $$"
    )
    conn.execute("create trigger unring before insert on agentflow.jobs for each row execute function public.unring()")
    return conn


def test_as_many_are_picked_as_there_is_room_for_and_none_twice(unrung: psycopg.Connection) -> None:
    jobs = due(unrung, 10)

    first, _ = dispatch.poll(unrung, "default", 4, 0, ["test"])
    second, _ = dispatch.poll(unrung, "default", 100, 0, ["test"])
    third, due_in_s = dispatch.poll(unrung, "default", 100, 0, ["test"])

    assert [r.job_id for r in sorted(first, key=lambda r: r.job_id)] == [job.id for job in jobs[:4]]
    assert {r.job_id for r in second} == {job.id for job in jobs[4:]}
    assert third == [] and due_in_s is not None and 0 < due_in_s <= 30


def test_organizations_take_turns_and_classes_come_in_order(unrung: psycopg.Connection) -> None:
    many = due(unrung, 20)
    few = due(unrung, 2, 2)
    low = due(unrung, 20, priority=2)
    critical = due(unrung, 2, priority=0)

    picked = {r.job_id for r in dispatch.poll(unrung, "default", 10, 0, ["test"])[0]}

    assert {job.id for job in critical} <= picked
    assert {job.id for job in few} <= picked
    assert len(picked & {job.id for job in low}) == 1  # a tenth
    assert len(picked & {job.id for job in many}) == 5


def test_a_small_room_is_not_taken_by_low_jobs_nor_kept_from_them(unrung: psycopg.Connection) -> None:
    low = {job.id for job in due(unrung, 40, priority=2)}
    due(unrung, 100)

    taken = [dispatch.poll(unrung, "default", 1, 0, ["test"])[0][0].job_id for _ in range(100)]

    assert (
        1 <= sum(job_id in low for job_id in taken) <= 35
    )  # 10 on the average; out of these bounds once in 30 000 runs


def test_threads_kept_for_critical_jobs_get_no_others(unrung: psycopg.Connection) -> None:
    due(unrung, 10)
    critical = due(unrung, 1, priority=0)

    picked, _ = dispatch.poll(unrung, "default", 4, 3, ["test"])
    more, _ = dispatch.poll(unrung, "default", 3, 3, ["test"])

    assert len(picked) == 2 and critical[0].id in {r.job_id for r in picked}
    assert more == []


def test_other_types_and_other_queues_are_left_alone(unrung: psycopg.Connection) -> None:
    due(unrung, 3, queue="heavy")

    assert dispatch.poll(unrung, "default", 10, 0, ["test"]) == ([], None)
    nothing, due_in_s = dispatch.poll(unrung, "heavy", 10, 0, ["other"])
    assert nothing == [] and due_in_s is not None and due_in_s <= 0
    assert len(dispatch.poll(unrung, "heavy", 10, 0, ["test"])[0]) == 3


def test_what_was_rung_and_claimed_by_nobody_is_picked_after_five_seconds(conn: psycopg.Connection) -> None:
    """As when its message is in a broker that is away, or that was the broker until a deploy."""
    fresh, stale, urgent = due(conn, 1)[0], due(conn, 1)[0], due(conn, 1, priority=0)[0]
    conn.execute(
        "update agentflow.jobs set sent_at = clock_timestamp() - interval '6 s', wake_at = clock_timestamp() + interval '5 min'"
        " where id = any (%s)",
        ([stale.id, urgent.id],),
    )

    picked = [r.job_id for r in dispatch.poll(conn, "default", 1, 1, ["test"])[0]]
    more = [r.job_id for r in dispatch.poll(conn, "default", 10, 0, ["test"])[0]]
    rest = dispatch.poll(conn, "default", 10, 0, ["test"])[0]

    assert (picked, more, rest) == ([urgent.id], [stale.id], [])
    assert column(conn, fresh, "sends") == 1


def test_every_queue_gets_its_share_of_the_room(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    """The queues are looked at in turns: one that is always full does not starve the others."""
    pings(system, 150, sleep_ms=40)
    conn.execute("update agentflow.jobs set queue = %s", (USUAL_QUEUES[0],))
    rest = pings(system, 10)
    conn.execute(
        "update agentflow.jobs set queue = %s where id = any (%s)", (USUAL_QUEUES[-1], [job.id for job in rest])
    )
    with worker({**environment, "JOB_CONCURRENCY": "2"}, tmp_path / "worker.log"):
        eventually(lambda: {read(system, job.id).state for job in rest} == {"succeeded"})

        assert open_jobs(conn) > 0


def test_all_in_one_process_starts_jobs_at_once_and_the_doctor_names_the_tier(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    hour = {**environment, "WORKER_POLLING_INTERVAL": "3600"}
    with running_up(hour, tmp_path / "up.log") as up:
        chain = {"type": "ping", "payload": {}, "then": [{"type": "ping", "payload": {}}]}
        with httpx2.Client(base_url=up.url, headers=AUTH, timeout=30) as api:
            first = api.post("/api/jobs", json=chain).json()["id"]

            assert api.get(f"/api/jobs/{first}?wait=25").json()["state"] == "succeeded"
            eventually(lambda: {job["state"] for job in api.get("/api/jobs").json()["jobs"]} == {"succeeded"})
        assert "no broker" in up.text()
        said = subprocess.run(
            [sys.executable, "-m", "agentflow.cli", "doctor"],
            env={"PATH": os.environ["PATH"], **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert re.search(r"^\S+ tier +database only: .* every 0\.2 s$", said.stdout, re.MULTILINE), said.stdout
    assert said.returncode == 0, said.stdout
