"""What attempts use up is kept, however they end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.database import Database
from agentflow.jobs import claims, records, usage
from agentflow.jobs.model import Job, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.jobs.usage import Usage
from agentflow.models import answers
from agentflow.system import System
from agentflow.worker import running as running_module
from agentflow.worker.running import JobContext, Running
from agentflow.worker.settler import Ended, Settler
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.cli_support import Command
from tests.cli_support import agentflow as command  # noqa: F401 - a fixture
from tests.processes import eventually, worker
from tests.web_support import client  # noqa: F401 - a fixture

ORGANIZATION = 1
SPENT = {"usd": 0.75, "tokens_in": 100, "gpu_s": 1.5}


def claimed(system: System, conn: psycopg.Connection, type_: str = "test_spender") -> Job:
    job = system.submit(ORGANIZATION, NewJob(type_, {})).job
    (taken,), _ = claims.claim(conn, [job.id], uuid4(), 30.0)
    return taken


def kept(conn: psycopg.Connection, job: Job) -> list[tuple[int, dict[str, float]]]:
    query = "select fence, measures from agentflow.usage where job_id = %s order by fence"
    return conn.execute(query, (job.id,)).fetchall()


def test_each_attempt_shows_what_it_used_up_however_it_ended(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    client: FlaskClient,  # noqa: F811
    tmp_path: Path,
    command: Command,  # noqa: F811
) -> None:
    with worker(environment, tmp_path / "worker.log"):
        jobs = {
            how: system.submit(ORGANIZATION, NewJob("test_spender", {"then": how})).job
            for how in ("succeed", "fail", "wait")
        }
        for job in jobs.values():
            eventually(lambda job=job: records.get(conn, None, job.id).terminal)  # type: ignore[union-attr]

    seen = {how: client.get(f"/api/jobs/{job.id}/attempts").json["attempts"] for how, job in jobs.items()}

    assert {how: [(a["outcome"], a["usage"]) for a in attempts] for how, attempts in seen.items()} == {
        "succeed": [("succeeded", SPENT)],
        "fail": [("failed", SPENT)],
        "wait": [("wait", SPENT), ("succeeded", SPENT)],
    }
    shown = json.loads(command("jobs", "show", str(jobs["fail"].id), "--json").out)
    assert [attempt["usage"] for attempt in shown["attempts"]] == [SPENT]
    assert "0.75 usd" in command("jobs", "show", str(jobs["fail"].id), COLUMNS="200").out


def test_it_is_written_while_the_attempt_runs_so_that_a_kill_loses_nothing(
    system: System, conn: psycopg.Connection
) -> None:
    context = JobContext(Running(claimed(system, conn), time.monotonic() + 30), system)

    context.spent(usd=0.5)
    context.spent(usd=0.25, model_calls=1)

    assert kept(conn, context.job) == [(1, {"usd": 0.75, "model_calls": 1})]


def test_what_is_spent_while_the_database_is_away_is_written_with_the_end(
    system: System, conn: psycopg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(system, conn)
    running = Running(job, time.monotonic() + 30)
    with monkeypatch.context() as away:
        away.setattr(running_module.usage, "record", _unavailable)
        JobContext(running, system).spent(usd=0.5)
    assert kept(conn, job) == []
    database = Database(database_url, application_name="test", pool_size=1)
    assert job.worker is not None
    settler = Settler(database, job.worker, 30.0, 3, settled=lambda ended, state: None, after=lambda s, e: None)

    settler.start()
    settler.put(Ended(Verdict(*running.key, "failed"), running))
    assert settler.flush(30.0)
    settler.stop()

    assert [(a.outcome, a.usage) for a in records.attempts(conn, job.id)] == [("failed", {"usd": 0.5})]


def _unavailable(conn: Any, usages: Any) -> None:
    raise psycopg.OperationalError("the server closed the connection")


def test_totals_that_arrive_twice_or_late_change_nothing(system: System, conn: psycopg.Connection) -> None:
    job = claimed(system, conn)

    for measures in ({"usd": 1.0}, {"usd": 2.0, "calls": 1}, {"usd": 2.0, "calls": 1}, {"usd": 1.0}):
        usage.record(conn, [Usage(job.id, 1, measures), Usage(uuid4(), 1, {"usd": 9.0})])
    usage.record(conn, [Usage(job.id, 2, {"usd": 0.5})])

    assert kept(conn, job) == [(1, {"usd": 2.0, "calls": 1}), (2, {"usd": 0.5})]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_no_amount_is_refused(system: System, conn: psycopg.Connection, value: float) -> None:
    with pytest.raises(ValueError, match="not amounts"):
        JobContext(Running(claimed(system, conn), 0.0), system).spent(usd=value)


def test_an_answer_that_was_paid_for_is_found_by_its_own_organization_until_it_is_old(conn: psycopg.Connection) -> None:
    key = answers.key_of(b"picture", "model", "prompt 1")

    answers.keep(conn, 1, key, {"caption": "a \x00 cat \ud800"})
    answers.keep(conn, 1, key, {"caption": "another"})

    assert answers.find(conn, 1, key) == {"caption": "a \ufffd cat \ufffd"}
    assert answers.find(conn, 2, key) is None
    assert answers.find(conn, 1, answers.key_of(b"picturemodel", "prompt 1")) is None
    assert answers.delete_old(conn, hours=1) == 0
    conn.execute("update agentflow.model_answers set created_at = created_at - interval '2 h'")
    assert answers.delete_old(conn, hours=1) == 1
