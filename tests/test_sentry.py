"""What Sentry is told, by real processes and by hand; and what it is not told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from agentflow import log, sentry, settings
from agentflow.database import Unavailable
from agentflow.jobs import records
from agentflow.jobs.model import Job, Settled
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.sentry import failures, lines
from agentflow.system import System
from agentflow.worker import reporting as worker_reporting
from scheduler.calendar import Done, Entry, every
from tests import (
    sentry_sink,
    watched_worker,  # noqa: F401 - registers its types
    web_support,
)
from tests.calendar_support import calendar
from tests.connection_support import Servers
from tests.http_server import Reply, Request
from tests.log_support import configured_log
from tests.processes import ROOT, eventually, started, worker
from tests.sentry_sink import Sink

__all__ = ["configured_log"]

#: Each stands where it may be found by accident.
SECRETS = {
    "payload": "hunter2-in-a-payload",
    "url": "hunter3-in-an-address",
    "query": "hunter4-in-a-query",
    "webhook": "hunter5-in-a-webhook",
    "header": "hunter6-in-a-header",
}
LEAK = {
    "url": f"https://someone:{SECRETS['url']}@example.com/films?order=1&token={SECRETS['query']}",
    "password": SECRETS["payload"],
}


@pytest.fixture
def sink() -> Iterator[Sink]:
    with sentry_sink.listening() as sink:
        yield sink


@pytest.fixture
def reporting(sink: Sink, environment: dict[str, str], configured_log: None) -> Iterator[Sink]:
    """This process reports."""
    failures._allowance = failures.Allowance(failures.AT_ONCE, failures.PER_S)
    sentry.start(settings.load({**environment, "SENTRY_DSN": sink.dsn}), "test")
    yield sink
    sentry.stop(5.0)


def sent(sink: Sink) -> Sink:
    """Once all that waits has been sent."""
    import sentry_sdk

    sentry_sdk.flush(30.0)
    return sink


def read(system: System, job_id: UUID) -> Job:
    with system.database.connection() as conn:
        job = records.get(conn, None, job_id)
    assert job is not None
    return job


def ended(system: System, job_id: str) -> Job:
    return eventually(lambda: job if (job := read(system, UUID(job_id))).terminal else None, within_s=60)


# ---- whole ----


def test_a_failed_job_is_one_event_in_the_trace_of_the_request_that_handed_it_in_and_no_secret_leaves(
    environment: dict[str, str], system: System, sink: Sink, tmp_path: Path
) -> None:
    environment["SENTRY_DSN"] = sink.dsn
    environment["SENTRY_PROFILES_SAMPLE_RATE"] = "1"
    environment["OPENROUTER_API_KEY"] = SECRETS["header"]
    with (
        web_support.gunicorn(environment, tmp_path, app="tests.watched_web:app") as web,
        worker(environment, tmp_path / "worker.log", types="tests.watched_worker") as process,
    ):

        def submit(type_: str, payload: dict[str, Any], **more: Any) -> str:
            headers = {"X-Api-Key": SECRETS["header"], "Cookie": f"session={SECRETS['header']}"}
            body = {"type": type_, "payload": payload, **more}
            answer = web.http.post("/api/jobs", json=body, headers=headers)
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        failing = submit("watch_leak", LEAK, max_attempts=2)
        flaky = submit("ping", {"fail_attempts": 1, "sleep_ms": 50}, max_attempts=2)
        web.http.post(f"/webhooks/kommo/{SECRETS['webhook']}", content=b"x")
        web.http.get(f"/api/jobs?limit=1&key={SECRETS['query']}")
        assert ended(system, failing).state == "failed"
        assert ended(system, flaky).state == "succeeded"

        assert process.terminate() == 0  # with events that were not sent yet

        web.process.terminate()

    (event,) = sink.events()
    assert event["tags"] == {
        "job_type": "watch_leak",
        "job_id": failing,
        "organization": "1",
        "attempt": "2",
        "queue": "default",
        "code": "unexpected",
        "process": "worker",
    }
    (error,) = event["exception"]["values"]
    assert error["type"] == "LookupError" and error["value"].startswith("cannot open https://")
    assert error["stacktrace"]["frames"][-1]["function"] == "leak"
    assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == ["opening"]
    assert event["breadcrumbs"]["values"][0]["data"]["order"] == 17

    requests = {t["contexts"]["trace"]["trace_id"]: t for t in sink.transactions("/api/jobs")}
    attempts = sink.transactions("watch_leak")
    assert [t["tags"]["attempt"] for t in attempts] == ["1", "2"]
    assert {t["contexts"]["trace"]["status"] for t in attempts} == {"internal_error"}
    trace_ids = {t["contexts"]["trace"]["trace_id"] for t in [*attempts, event]}
    assert len(trace_ids) == 1
    request = requests[trace_ids.pop()]
    assert {t["contexts"]["trace"]["parent_span_id"] for t in attempts} == {request["contexts"]["trace"]["span_id"]}
    assert event["contexts"]["trace"]["span_id"] == attempts[1]["contexts"]["trace"]["span_id"]
    assert {"ok", "internal_error"} == {t["contexts"]["trace"]["status"] for t in sink.transactions("ping")}
    assert sink.items("profile")
    assert not [item for item in sink.items("transaction") if "health" in item.document["transaction"]]

    said = sink.text()
    assert [where for where, secret in SECRETS.items() if secret in said] == []
    assert web_support.AUTH["Authorization"].split()[1] not in said


def test_an_outage_of_every_server_is_no_event_and_what_fails_after_it_is(
    environment: dict[str, str], system: System, servers: Servers, sink: Sink, tmp_path: Path
) -> None:
    with servers.behind() as middlemen:
        environment |= {**servers.environment(), "SENTRY_DSN": sink.dsn}
        with worker(environment, tmp_path / "worker.log", types="tests.watched_worker") as process:
            process.wait_for("RabbitMQ connection ready", within_s=60)
            for middleman in middlemen.values():
                middleman.refuse()
            for server in ("Postgres", "RabbitMQ"):
                process.wait_for(f"{server} connection lost", within_s=60)
            for middleman in middlemen.values():
                middleman.listen()
            job = system.submit(1, NewJob("watch_leak", LEAK, max_attempts=1)).job
            assert ended(system, str(job.id)).state == "failed"
            process.terminate()

    assert [event["tags"].get("job_id") for event in sink.events()] == [str(job.id)]


def test_the_scheduler_and_its_entries_check_in(environment: dict[str, str], sink: Sink, tmp_path: Path) -> None:
    environment |= {"SENTRY_DSN": sink.dsn, "PORT": str(free_port())}
    with started([sys.executable, "-m", "scheduler"], environment, tmp_path / "scheduler.log") as process:
        process.wait_for("scheduler ready")
        (turns, *_) = eventually(lambda: sink.check_ins("agentflow-scheduler"))
        runs = eventually(lambda: r if len(r := sink.check_ins("agentflow-clean-up-batches")) >= 2 else None)

    assert turns["status"] == "ok"
    assert turns["monitor_config"]["schedule"] == {"type": "interval", "value": 1, "unit": "minute"}
    assert [run["status"] for run in runs] == ["in_progress", "ok"]
    assert runs[0]["check_in_id"] == runs[1]["check_in_id"]
    assert runs[0]["monitor_config"]["schedule"] == {"type": "interval", "value": 10, "unit": "minute"}


def test_without_sentry_its_sdk_is_not_even_imported() -> None:
    code = (
        "import sys, actors, agentflow.worker.process, web, scheduler.schedule\nassert 'sentry_sdk' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "SENTRY_DSN": ""})


# ---- by hand ----


def test_a_run_of_the_calendar_that_fails_checks_in_as_an_error(system: System, reporting: Sink) -> None:
    def fails(_system: System) -> Done:
        raise RuntimeError("no")

    calendar(system, [Entry("clean_up.it", every(600), work=fails)]).look()

    assert [c["status"] for c in sent(reporting).check_ins("agentflow-clean-up-it")] == ["in_progress", "error"]


def test_of_many_alike_errors_one_is_sent_and_the_next_one_says_how_many_there_were(
    reporting: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = log.get("agentflow.somewhere")

    def fail(text: str) -> None:
        try:
            raise KeyError("x")
        except KeyError:
            logger.exception(text, password="hunter2-of-a-field")

    for _ in range(5):
        fail("it broke")
    fail("it broke elsewhere")
    monkeypatch.setattr(lines, "AGAIN_S", 0.0)
    fail("it broke")

    events = sent(reporting).events()
    assert [event["logentry"]["message"] for event in events] == ["it broke", "it broke elsewhere", "it broke"]
    assert [event["extra"].get("not_sent_before") for event in events] == [None, None, 4]
    assert events[0]["extra"]["password"] == "[redacted]"
    assert events[0]["exception"]["values"][0]["type"] == "KeyError"


@pytest.mark.parametrize("error", [psycopg.OperationalError("gone"), ConnectionResetError("gone")])
def test_a_lost_connection_is_no_event(reporting: Sink, error: Exception) -> None:
    assert isinstance(error, (*Unavailable, OSError))
    logging.getLogger("agentflow.somewhere").error("it broke", exc_info=error)

    assert sent(reporting).events() == []


def test_an_outage_that_fails_thousands_of_jobs_is_not_thousands_of_events(system: System, reporting: Sink) -> None:
    failures._allowance = failures.Allowance(burst=3, per_s=0.0)
    job = system.submit(1, NewJob("ping", {})).job

    for _ in range(10):
        sentry.job_failed(job, {"code": "away", "message": "no answer"})
    failures._allowance._left = 1
    sentry.job_failed(job, {"code": "away", "message": "no answer"})

    events = sent(reporting).events()
    assert [event["extra"].get("not_sent_before") for event in events] == [None, None, None, 7]
    assert {tuple(event["fingerprint"]) for event in events} == {("ping", "away")}


def test_a_job_that_killed_its_workers_is_reported_by_who_finds_it(
    system: System, reporting: Sink, conn: psycopg.Connection
) -> None:
    job = system.submit(1, NewJob("ping", {})).job
    error = '{"code": "worker_lost", "message": "Three workers died under it."}'
    conn.execute(
        "update agentflow.jobs set state = 'failed', error = %s, finished_at = now(), wake_at = null, sent_at = null",
        (error,),
    )

    worker_reporting.lost(system.database, Settled({}, [(job.id, "default", "ping", "failed")]))

    (event,) = sent(reporting).events()
    assert (event["tags"]["job_id"], event["tags"]["code"]) == (str(job.id), "worker_lost")
    assert event["contexts"]["trace"]["trace_id"] == job.id.hex


def test_a_stop_sends_what_waits_and_nothing_is_sent_after_it(reporting: Sink) -> None:
    def slowly(_request: Request) -> Reply:
        time.sleep(0.2)
        return Reply(body=b"{}")

    reporting.server.on("/api/", slowly)
    logger = log.get("agentflow.somewhere")
    for number in range(5):
        logger.error(f"error {number}")

    sentry.stop(60.0)
    logger.error("too late")

    assert [event["logentry"]["message"] for event in reporting.events()] == [f"error {n}" for n in range(5)]


def test_sentrys_word_that_it_wants_no_more_is_heeded(reporting: Sink) -> None:
    reporting.reply = Reply(429, headers={"Retry-After": "3600"})
    logger = log.get("agentflow.somewhere")

    logger.error("the first")
    sent(reporting)
    for number in range(20):
        logger.error(f"another {number}")
    sent(reporting)

    assert len(reporting.events()) == 1


def test_a_sentry_that_does_not_answer_holds_nobody_up(
    environment: dict[str, str], system: System, caplog: pytest.LogCaptureFixture
) -> None:
    with sentry_sink.listening() as sink:
        dsn = sink.dsn
    sentry.start(settings.load({**environment, "SENTRY_DSN": dsn}), "test")
    job = system.submit(1, NewJob("ping", {})).job
    failures._allowance = failures.Allowance(failures.AT_ONCE, failures.PER_S)

    for _ in range(failures.AT_ONCE):
        sentry.job_failed(job, {"code": "x", "message": "y"})
    eventually(lambda: "Sentry does not take what it is sent" in caplog.text)
    sentry.stop(0.2)
    sentry.stop(0.2)

    sentry.job_failed(job, {"code": "x", "message": "y"})  # after the end: nothing
