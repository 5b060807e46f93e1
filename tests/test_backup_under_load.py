"""A backup of a system that works on, and a system of it after the old one was lost: nothing of it is run twice."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.backup_support import target
from tests.cli_support import Command, agentflow
from tests.core_support import rows, value
from tests.processes import eventually, worker

__all__ = ["agentflow", "target"]

Connection = psycopg.Connection
OPEN = "select count(*) from agentflow.jobs where state in ('queued', 'running') and run_at < now() + interval '1 h'"


@pytest.fixture(autouse=True)
def _leases(environment: dict[str, str]) -> None:
    """Long enough for a busy machine: a worker that lost one would do a thing twice, which is counted here."""
    environment.update({"JOB_LEASE": "20", "JOB_LEASE_RENEW": "4"})


class Load:
    """Hands in jobs with an effect until it is stopped; `ids` of all that were accepted."""

    def __init__(self, system: System, folder: Path) -> None:
        self.ids: list[UUID] = []
        self._system, self._folder = system, folder
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        eventually(lambda: len(self.ids) > 50)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            payload = {"folder": str(self._folder), "sleep_ms": 20}
            self.ids.append(self._system.submit(1, NewJob("test_effect", payload)).job.id)


def effects(folder: Path) -> Counter[str]:
    """How often each job had its effect."""
    return Counter(path.name.split(".")[0] for path in folder.iterdir())


@pytest.mark.long
def test_nothing_that_had_ended_is_run_again_and_all_else_ends(
    agentflow: Command,
    system: System,
    conn: Connection,
    tmp_path: Path,
    environment: dict[str, str],
    target: dict[str, str],
) -> None:
    folder, where, gate = tmp_path / "effects", tmp_path / "backups", tmp_path / "gate"
    folder.mkdir()
    with worker(environment, tmp_path / "worker.log"):
        running = system.submit(1, NewJob("test_gate", {"file": str(gate)})).job.id
        later = system.submit(1, NewJob("ping", {}, run_at=datetime.now(UTC) + timedelta(days=1))).job.id
        retried = system.submit(1, NewJob("ping", {"fail_attempts": 1})).job.id
        eventually(lambda: value(conn, "select state from agentflow.jobs where id = %s", retried) == "succeeded")
        with Load(system, folder) as load:
            said = agentflow("backup", str(where), "--json")
            assert said.status == 0, said.err
            at_backup = len(load.ids)
            eventually(lambda: len(load.ids) > at_backup + 20)
    # The old system is gone with its last minute; what it did outside stays done.
    before = effects(folder.rename(tmp_path / "effects of the old system"))
    folder.mkdir()

    restored = agentflow("restore", str(where), **target)
    assert restored.status == 0, restored.err
    with psycopg.connect(target["DATABASE_URL"], autocommit=True) as new:
        assert value(new, "select state from agentflow.jobs where id = %s", running) == "running"
        ended = {str(row.id) for row in rows(new, "select id from agentflow.jobs where finished_at is not null")}
        all_of_it = {str(row.id) for row in rows(new, "select id from agentflow.jobs")}
        missing = {str(each) for each in load.ids} - all_of_it
        assert ended & before.keys() and missing and str(retried) in ended
        assert value(new, "select count(*) from agentflow.jobs") == _manifest_rows(where, "jobs")
        gate.touch()
        new.execute("update agentflow.jobs set lease_until = lease_until - interval '1 h' where id = %s", (running,))
        with worker(target, tmp_path / "new-worker.log"):
            eventually(lambda: value(new, OPEN) == 0, within_s=120)
        was = {row.id: row for row in rows(conn, _OF_A_JOB) if str(row.id) in ended}
        now = {row.id: row for row in rows(new, _OF_A_JOB)}
        states = Counter(row.state for row in now.values())
        attempts = value(
            new, "select array_agg(outcome order by fence) from agentflow.job_attempts where job_id = %s", running
        )

    after = effects(folder)
    assert all(now[id_] == was[id_] for id_ in was)  # what had ended stands as it was
    assert {before[id_] for id_ in ended & before.keys()} == {1}
    open_then = all_of_it - ended - {str(running), str(later)}
    # What was open is done once by the new system, whatever the old one did after the moment of the backup; nothing else is.
    assert after == Counter(dict.fromkeys(open_then, 1))
    assert set(states) == {"succeeded", "queued"} and states["queued"] == 1 and now[later].state == "queued"
    assert attempts == ["crashed", "succeeded"]


_OF_A_JOB = "select id, state, result, fence, attempt, finished_at from agentflow.jobs"


def _manifest_rows(where: Path, table: str) -> int:
    (manifest,) = where.glob("backups/*/manifest.json")
    tables = json.loads(manifest.read_text())["manifest"]["tables"]
    return int(next(each["rows"] for each in tables if each["name"] == table))
