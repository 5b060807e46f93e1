"""What the code of jobs logs: on each line whose it is, and the newest lines with the job."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import log
from agentflow.cli import commands
from agentflow.database import Database
from agentflow.jobs import lines
from agentflow.jobs.lines import Line, Place
from agentflow.jobs.requests import NewJob
from agentflow.redaction import Redactor
from agentflow.system import System
from agentflow.worker.lines import Writer, collected
from agentflow.worker.running import Running
from tests import watched_worker  # noqa: F401 - registers its types
from tests.log_support import configured_log, unseen
from tests.processes import eventually, worker
from tests.web_support import claim, client, count, problem

__all__ = ["client", "configured_log"]

CALLERS = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def writer(system: System, configured_log: None) -> Iterator[Writer]:
    """Of this process. What it has is written when it stops."""
    writer = Writer(system.database, Redactor(["known-to-us"]))
    writer.start()
    yield writer
    writer.stop(30.0)


def taken(system: System, conn: psycopg.Connection, **payload: Any) -> Running:
    job = system.submit(1, NewJob("ping", payload)).job
    return Running(claim(conn, job.id), sys.float_info.max)


def again(conn: psycopg.Connection, running: Running) -> Running:
    """The same job in its next attempt."""
    conn.execute(
        "update agentflow.jobs set state = 'queued', worker = null, lease_until = null, wake_at = now() where id = %s",
        (running.job.id,),
    )
    return Running(claim(conn, running.job.id), sys.float_info.max)


def kept(client: FlaskClient, running: Running, query: str = "") -> list[dict[str, Any]]:
    return list(client.get(f"/api/jobs/{running.job.id}/logs{query}").json["lines"])


def test_the_lines_of_a_job_are_kept_with_it_and_those_of_its_child_and_every_line_says_whose_it_is(
    environment: dict[str, str], system: System, client: FlaskClient, tmp_path: Path
) -> None:
    job = {"type": "watch_talk", "payload": {"child": True}, "then": [{"type": "watch_talk", "payload": {}}]}
    headers = {"traceparent": f"00-{CALLERS}-00f067aa0ba902b7-01"}
    with worker(environment, tmp_path / "worker.log", types="tests.watched_worker") as process:
        made = client.post("/api/jobs", json=job, headers=headers).json

        def all_kept() -> list[dict[str, Any]] | None:
            found: list[dict[str, Any]] = client.get(f"/api/jobs/{made['id']}/logs").json["lines"]
            return found if len(found) == 4 else None

        found = eventually(all_kept, within_s=60)
        eventually(lambda: process.text().count("careful") == 2, within_s=60)

    assert [(line["level"], line["logger"], line["message"]) for line in found] == [
        ("warning", "tests.watched_worker", "careful"),
        ("error", "some.library", "it said Bearer [redacted]"),
        ("info", "tests.watched_worker", "line 0 xxxxxxxxxx"),
        ("info", "native", "said in the child"),
    ]
    assert found[0]["fields"] == {"of": "heights", "token": "[redacted]"}
    assert {line["attempt"] for line in found} == {1}
    said = [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]
    of_it = [line for line in said if line.get("job_id") == made["id"]]
    assert {"careful", "said in the child"} <= {line["event"] for line in of_it}
    assert {(line["organization"], line["attempt"], line["trace"]) for line in of_it} == {(1, 1, CALLERS)}
    (follower,) = {line["job_id"] for line in said if line["event"] == "careful"} - {made["id"]}
    assert {line["trace"] for line in said if line.get("job_id") == follower} == {CALLERS}


def test_a_job_that_logs_nothing_costs_nothing(system: System, conn: psycopg.Connection, configured_log: None) -> None:
    class Untouched(Database):
        def connection(self) -> Any:
            raise AssertionError("nobody asked for this")

    writer = Writer(Untouched("postgresql://x@127.0.0.1:1/x", application_name="x", pool_size=1), Redactor())
    writer.start()
    running = taken(system, conn)

    with collected(running):
        log.get("agentflow.somewhere").debug("not worth keeping")
    log.get("agentflow.somewhere").error("of no job")
    writer.stop(30.0)

    assert running.lines is None and count(conn, "job_logs") == 0


def test_only_the_newest_lines_are_kept_over_all_attempts(
    system: System, client: FlaskClient, conn: psycopg.Connection, writer: Writer
) -> None:
    first = taken(system, conn)
    with collected(first):
        for number in range(150):
            logging.getLogger("x").info("first %d", number)
    eventually(lambda: count(conn, "job_logs") == 150)
    second = again(conn, first)
    with collected(second):
        for number in range(120):
            logging.getLogger("x").info("second %d", number)
        writer.stop(30.0)

    found = kept(client, second, "?limit=200")
    assert len(found) == lines.MOST_LINES == count(conn, "job_logs")
    assert (found[0]["message"], found[-1]["message"]) == ("first 70", "second 119")
    assert {line["attempt"] for line in found[80:]} == {2}


def test_a_flood_is_cut_before_it_reaches_the_database(
    system: System, client: FlaskClient, conn: psycopg.Connection, writer: Writer
) -> None:
    running = taken(system, conn)

    with collected(running):
        for number in range(500):
            logging.getLogger("x").info("%d %s", number, "x" * 5000)
        assert running.lines is not None and len(running.lines.kept) < lines.MOST_BYTES / 2000 + 1
        writer.stop(30.0)

    found = kept(client, running, "?limit=200")
    assert found[-1]["message"].startswith("499 ")
    assert sum(len(line["message"]) for line in found) <= lines.MOST_BYTES
    row = conn.execute("select sum(bytes) from agentflow.job_logs").fetchone()
    assert row is not None and row[0] <= lines.MOST_BYTES


def test_secrets_are_taken_out_before_lines_are_stored(
    system: System, client: FlaskClient, conn: psycopg.Connection, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    job = system.submit(1, NewJob("ping", {})).job
    conn.execute("update agentflow.jobs set payload = %s", (json.dumps({"api_key": "of-the-payload"}),))
    running = Running(claim(conn, job.id), sys.float_info.max)
    with collected(running):
        try:
            raise ValueError("of-the-payload was refused at https://me:of-a-url@example.com/")
        except ValueError:
            log.get("x").exception(
                "known-to-us is wrong", deep={"list": [{"client_secret": "of-a-field"}]}, tokens_in=7
            )
        with unseen(caplog):
            logging.getLogger("x").info("password=of-a-text NUL \x00 and \ud800")
        writer.stop(30.0)

    found = kept(client, running)
    assert found[0]["message"] == "[redacted] is wrong"
    assert found[0]["fields"]["deep"] == {"list": [{"client_secret": "[redacted]"}]}
    assert found[0]["fields"]["tokens_in"] == 7
    assert "ValueError: [redacted] was refused at https://[redacted]@example.com/" in found[0]["fields"]["exception"]
    assert found[1]["message"] == "password=[redacted] NUL \ufffd and \ufffd"
    row = conn.execute("select string_agg(l::text, '') from agentflow.job_logs l").fetchone()
    assert row is not None and "of-" not in row[0] and "known-to-us" not in row[0]


def test_lines_are_paged_and_filtered_by_level(system: System, client: FlaskClient, conn: psycopg.Connection) -> None:
    running = taken(system, conn)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    made = [
        Line(Place(running.job.fence, n), 1, at, level, "x", f"line {n}", {}, 6)
        for n, level in enumerate((20, 30, 40, 50, 20), 1)
    ]
    lines.write(conn, [(running.job.id, line) for line in reversed(made)])
    lines.write(conn, [(running.job.id, made[0])])  # whose first COMMIT was not heard

    first = client.get(f"/api/jobs/{running.job.id}/logs?limit=2").json
    second = client.get(f"/api/jobs/{running.job.id}/logs?limit=2&cursor={first['next_cursor']}").json
    third = client.get(f"/api/jobs/{running.job.id}/logs?limit=2&cursor={second['next_cursor']}").json

    pages = [[line["message"] for line in page["lines"]] for page in (first, second, third)]
    assert pages == [["line 1", "line 2"], ["line 3", "line 4"], ["line 5"]]
    assert third["next_cursor"] is None
    assert [line["message"] for line in kept(client, running, "?level=error")] == ["line 3", "line 4"]
    assert "cursor" in problem(client.get(f"/api/jobs/{running.job.id}/logs?cursor=x"), 422)["detail"]
    problem(client.get(f"/api/jobs/{UUID(int=0)}/logs"), 404)


def test_lines_go_with_their_job_and_come_late_for_one_that_is_gone(system: System, conn: psycopg.Connection) -> None:
    running = taken(system, conn)
    line = Line(Place(1, 1), 1, datetime.now(UTC), 20, "x", "said", {"a": 1}, 4)
    lines.write(conn, [(running.job.id, line)])
    assert count(conn, "job_logs") == 1

    conn.execute("delete from agentflow.jobs")
    lines.write(conn, [(running.job.id, line)])

    assert count(conn, "job_logs") == 0


def test_lines_wait_for_a_database_that_is_away(
    system: System, client: FlaskClient, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentflow.worker import lines as writing

    monkeypatch.setattr(writing, "_AGAIN_S", 0.1)
    away = True

    class Sometimes(Database):
        def connection(self) -> Any:
            if away:
                raise psycopg.OperationalError("gone")
            return system.database.connection()

    writer = Writer(Sometimes("postgresql://x@127.0.0.1:1/x", application_name="x", pool_size=1), Redactor())
    writer.start()
    running = taken(system, conn)
    with collected(running):
        logging.getLogger("x").error("said meanwhile")
    eventually(lambda: writer.failures > 0)
    away = False

    eventually(lambda: kept(client, running))
    writer.stop(30.0)


def test_the_command_shows_them(
    system: System,
    environment: dict[str, str],
    conn: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from agentflow import settings

    running = taken(system, conn)
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for n, level in enumerate((20, 40), 1):
        line = Line(Place(1, n), 1, at, level, "x", f"line [{n}]", {"of": "heights"}, 4)
        lines.write(conn, [(running.job.id, line)])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings.current.cache_clear()

    assert commands.run(["jobs", "logs", str(running.job.id)]) == 0
    text = capfd.readouterr().out
    assert commands.run(["jobs", "logs", str(running.job.id), "--level", "error", "--json"]) == 0
    (line_,) = capfd.readouterr().out.splitlines()
    settings.current.cache_clear()

    assert text.splitlines() == [
        "2026-01-02 03:04:05 info     1  line [1]  of=heights",
        "2026-01-02 03:04:05 error    1  line [2]  of=heights",
    ]
    assert json.loads(line_)["message"] == "line [2]" and json.loads(line_)["level"] == "error"
