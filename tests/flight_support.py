"""A flight in tests: a webhook that became a job, which made a file; and what retention does to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
from flask.testing import FlaskClient

from actors.handle_webhook import job as actor
from agentflow import traces
from agentflow.jobs import records, retention
from agentflow.jobs.retention import Keep
from agentflow.system import System
from agentflow.webhooks.retention import delete_events
from tests import web_support
from tests.webhook_support import Made, make

Connection = psycopg.Connection
ECHO = {"kind": "job", "type": "web_echo", "payload": {"text": {"$from": "/name"}}}


@dataclass(frozen=True)
class Flown:
    endpoint: Made
    event_id: UUID
    handle_id: UUID
    action_id: UUID


def endpoint(client: FlaskClient, name: str = "orders", source: str = "github", **config: Any) -> Made:
    return make(client, source, name=name, config={"action": ECHO, **config})


def fly(client: FlaskClient, system: System, conn: Connection, to: Made, body: Any = None, **result: Any) -> Flown:
    """A webhook comes, is handled, and the job that is made of it succeeds."""
    answer = to.send(body if body is not None else {"name": "Ada"})
    assert answer.status_code == 200, answer.text
    event_id = UUID(answer.json["event_id"])
    row = conn.execute("select job_id from agentflow.webhook_events where id = %s", (event_id,)).fetchone()
    assert row is not None
    action_id = handle(system, conn, row[0])
    assert action_id is not None
    web_support.finish(system, conn, web_support.claim(conn, action_id), result=result or {"text": "Ada"})
    return Flown(to, event_id, row[0], action_id)


def handle(system: System, conn: Connection, job_id: UUID) -> UUID | None:
    """What a worker does with a handle_webhook job. Returns the job that was made of the event."""
    job = web_support.claim(conn, job_id)
    context: Any = SimpleNamespace(job=job, system=system, check=lambda: None)
    with traces.following(traces.of_job(job.id, job.trace)):
        done = actor.handle_webhook(context, actor.HandleWebhook.model_validate_json(json.dumps(job.payload)))
    web_support.finish(system, conn, job, result=done)
    return UUID(done["job_id"]) if done["job_id"] else None


def forget_jobs(conn: Connection) -> None:
    """As if they had ended so long ago that retention takes them all."""
    conn.execute("update agentflow.jobs set finished_at = finished_at - interval '1 d' where finished_at is not null")
    for succeeded in (True, False):
        while retention.delete_jobs(conn, succeeded=succeeded, keep=Keep(hours=0, count=0)):
            pass


def forget_events(conn: Connection) -> None:
    while delete_events(conn, days=-1):
        pass


def count_jobs(conn: Connection) -> int:
    return len(records.search(conn, None, records.Filter()))
