"""The tier without a broker: workers look into Postgres. The worker's essential tests again, and what polling must not do."""

from __future__ import annotations

import re
import signal
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.broker import PollingBroker
from agentflow.jobs import dispatch
from agentflow.jobs.intake import NewJob
from agentflow.jobs.model import QUEUES, Job
from agentflow.system import System
from tests import core_support, job_types  # noqa: F401 - registers the tests' job types
from tests.core_support import ORGANIZATION, column
from tests.processes import Process, eventually, free_port, worker
from tests.test_kills import (  # noqa: F401 - run again here, in this tier
    assert_each_ended_once,
    open_jobs,
    submit_pings,
    test_sigterm_hands_running_jobs_back_without_spending_an_attempt,
)
from tests.test_worker import (  # noqa: F401 - run again here, in this tier
    ended,
    outcomes,
    read,
    running_worker,
    submit,
    test_a_failing_attempt_is_tried_again_after_a_back_off,
    test_a_job_does_not_start_before_its_time,
    test_a_type_that_this_worker_does_not_know_stays_queued_for_another,
    test_critical_jobs_run_while_default_ones_take_all_the_room,
    test_parking_gives_the_attempt_back,
)
from tests.web_support import client  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(120)
NO_REDIS = "redis://127.0.0.1:1"  # whoever connects there fails


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
    found = re.findall(r'^worker_messages_dropped_total\{reason="not_claimable"\} (\S+)', text, re.MULTILINE)
    return sum(map(float, found))


def test_database_url_alone_is_a_tier() -> None:
    read = settings.load({"DATABASE_URL": "postgresql://db/x"})

    assert (read.tier, read.uses_redis, read.embedded_redis) == ("database only", False, False)
    assert isinstance(System(read, "test").broker, PollingBroker)


def test_a_job_is_done_and_its_result_waited_for_without_any_redis(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"result_bytes": 3})

    done = system.wait_finished(job, 25.0)

    assert done is not None and (done.state, done.attempt, done.fence) == ("succeeded", 1, 1)
    assert done.result == {"pong": True, "attempt": 1, "data": "xxx"}
    text = running_worker.text().lower()
    assert "redis" not in text and "rabbitmq" not in text and "could not publish" not in text, text
