"""Callers of the API in tests: in this process, or over a socket to gunicorn; and ends of jobs without a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psutil
import psycopg
import pytest
from flask.testing import FlaskClient

import actors  # noqa: F401 - makes ping and analyze_video known
from agentflow.jobs import claims, settlement
from agentflow.jobs.model import Job, Outcome, Verdict
from agentflow.jobs.registry import Payload, job
from agentflow.live import Finished
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.processes import BIN, Process, eventually
from web import create_app

AUTH = {"Authorization": f"Bearer {ADMIN_KEY}"}


class Echo(Payload):
    text: str = ""
    number: int = 0
    more: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it


@job("web_echo", payload=Echo)
def echo(context: Any, payload: Echo) -> dict[str, Any]:
    """Answer what was sent."""
    return payload.model_dump()


@job("web_secret", payload=Payload, public=False)
def secret(context: Any, payload: Payload) -> None:
    """May not be handed in from outside."""


@pytest.fixture
def client(system: System) -> FlaskClient:
    """A caller with the operator's key."""
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    return client


def submit(client: FlaskClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/api/jobs", json={"type": "web_echo", **body})
    assert answer.status_code == 202, answer.text
    return dict(answer.json)


def claim(conn: psycopg.Connection, job_id: str | UUID) -> Job:
    """Take a job as a worker does."""
    (taken,), _ = claims.claim(conn, [UUID(str(job_id))], uuid4(), 30.0)
    return taken


def finish(
    system: System,
    conn: psycopg.Connection,
    taken: Job,
    outcome: Outcome = "succeeded",
    *,
    result: Any = None,
    error: Any = None,
) -> None:
    """Write its end as a worker does, and tell Redis."""
    assert taken.worker is not None
    texts = (json.dumps(result) if result is not None else None, json.dumps(error) if error is not None else None)
    verdict = Verdict(taken.id, taken.fence, outcome, result=texts[0], error=texts[1])
    settled = settlement.settle(conn, [verdict], taken.worker, lease_s=30.0)
    assert (taken.id, taken.fence) in settled.states
    state = settled.states[taken.id, taken.fence]
    if state in ("succeeded", "failed", "cancelled"):
        system.publisher.finished([Finished(taken.id, taken.queue, taken.type, state, *texts)])


def run(
    system: System, conn: psycopg.Connection, job_id: str | UUID, outcome: Outcome = "succeeded", **end: Any
) -> None:
    finish(system, conn, claim(conn, job_id), outcome, **end)


def problem(answer: Any, status: int) -> dict[str, Any]:
    """The document of an error, which must be one."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "application/problem+json"
    document = json.loads(answer.text)
    assert document["status"] == status and document["title"] and document["type"] == "about:blank"
    return dict(document)


def count(conn: psycopg.Connection, table: str = "jobs") -> int:
    row = conn.execute(f"select count(*) from agentflow.{table}").fetchone()  # noqa: S608
    assert row is not None
    return int(row[0])


class Web:
    """gunicorn as the Procfile starts it."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, headers=AUTH, timeout=30)

    @cached_property
    def worker(self) -> psutil.Process:
        """The one child, which serves. Looked up once: psutil's list of children is not always whole."""
        found: psutil.Process = eventually(lambda: self.process.family()[1:], within_s=5)[0]
        return found

    def rss(self) -> int:
        return int(self.worker.memory_info().rss)


@contextmanager
def gunicorn(environment: dict[str, str], tmp_path: Path, *, app: str = "web.wsgi:app", **more: str) -> Iterator[Web]:
    port = free_port()
    process = Process(
        [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", app],
        {**environment, "PORT": str(port), "PYTHONPATH": ".", **more},
        tmp_path / f"web-{port}.log",
    )
    web = Web(process, port)
    try:

        def answers() -> bool:
            if process.popen.poll() is not None:
                raise AssertionError(f"gunicorn ended with {process.popen.returncode}:\n{process.text()[-4000:]}")
            try:
                return web.http.get("/health/live").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(answers)
        yield web
    finally:
        web.http.close()
        process.kill()
