"""Connected accounts in tests, and their jobs run in this process as a worker does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

import actors  # noqa: F401 - declares the product's types
from agentflow import settings
from agentflow.errors import JobError, Permanent, Wait
from agentflow.jobs import registry, settlement
from agentflow.jobs.model import Job, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.kommo import accounts, entities
from agentflow.kommo.accounts import Account, Credentials
from agentflow.system import System
from tests.core_support import ORGANIZATION, claim, rows
from tests.kommo_server import PATHS, kommo
from tests.kommo_server import Account as Server

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def server(environment: dict[str, str]) -> Iterator[Server]:
    """An account at Kommo that the system may call as fast as it likes."""
    with kommo() as server:
        environment |= {
            "FETCH_ALLOW": server.host,
            "KOMMO_CALLS_PER_SECOND": "1000",
            "ENCRYPTION_KEY": KEY,
            **{f"KOMMO_{name.upper()}": value for name, value in server.client.items()},
        }
        yield server


@pytest.fixture
def linked(server: Server, environment: dict[str, str]) -> Iterator[System]:
    """A system that may call the server."""
    system = System(settings.load(environment), "test")
    yield system
    system.close()


def connect(system: System, server: Server, **credentials: Any) -> Account:
    given = Credentials(**(credentials or {"token": server.token}))
    with system.database.transaction() as conn:
        return accounts.create(
            conn, ORGANIZATION, system.sealer, name="Test", base_url=f"http://{server.host}", credentials=given
        )


def account_of(system: System, account: Account) -> Account:
    with system.database.connection() as conn:
        found = accounts.get(conn, None, account.id)
    assert found is not None
    return found


def sync(system: System, conn: psycopg.Connection, account: Account, **payload: Any) -> dict[str, Any]:
    """Hand in a sync and run it to its end."""
    job = system.submit(ORGANIZATION, NewJob("sync_crm", {"account_id": str(account.id), **payload})).job
    return run(system, conn, job)


def write(system: System, conn: psycopg.Connection, account: Account, kind: str, *items: Any) -> dict[str, Any]:
    payload = {"account_id": str(account.id), "kind": kind, "items": list(items)}
    return run(system, conn, system.submit(ORGANIZATION, NewJob("write_crm", payload)).job)


def run(system: System, conn: psycopg.Connection, job: Job) -> dict[str, Any]:
    """The job's result. Raises what it raises, but for the end of a slice. What was parked is due at once."""
    for _ in range(1000):
        try:
            return attempt(system, conn, job)
        except Wait as wait:
            if wait.reason != "slice":
                raise
    raise AssertionError("a run without an end")


def attempt(system: System, conn: psycopg.Connection, job: Job) -> dict[str, Any]:
    """One attempt: claimed, run, its end written."""
    # Jobs of an account stand in one line: this one is to be its head.
    conn.execute("delete from agentflow.jobs where state = 'queued' and type = 'sync_crm' and id <> %s", (job.id,))
    conn.execute("update agentflow.jobs set run_at = now(), wake_at = now() where id = %s", (job.id,))
    (running,) = claim(conn, uuid4(), job)
    assert running.worker is not None
    spent: dict[str, float] = {}

    def spend(**measures: float) -> None:
        spent.update({name: spent.get(name, 0) + value for name, value in measures.items()})

    context: Any = SimpleNamespace(
        job=running, system=system, check=lambda: None, progress=lambda *_: None, spent=spend, sleep=lambda _: None
    )
    type_ = registry.get(job.type)
    end: dict[str, Any] = {"outcome": "succeeded"}
    try:
        result: dict[str, Any] = type_.function(context, type_.payload.model_validate_json(json.dumps(running.payload)))
        return result
    except JobError as error:
        outcome = {Wait: "wait"}.get(type(error), "retry")
        end = {"outcome": "failed" if isinstance(error, Permanent) else outcome, "reason": outcome, "error": "{}"}
        raise
    finally:
        settlement.settle(conn, [Verdict(running.id, running.fence, **end)], running.worker, lease_s=30.0)


STREAM_PATHS = {stream.name: stream.path for stream in entities.STREAMS}


def differences(conn: psycopg.Connection, account_id: UUID, server: Server) -> list[str]:
    """Where the mirror is not what the server has, row for row."""
    found = []
    for name, path in STREAM_PATHS.items():
        there = server.shown(path)
        if name == "events":
            here = {row.event_id: row.data for row in rows(conn, "select event_id, data from agentflow.crm_events")}
        else:
            query = (
                "select entity_id, data from agentflow.crm_entities"
                " where account_id = %s and entity_type = %s and deleted_at is null"
            )
            here = {row.entity_id: row.data for row in rows(conn, query, account_id, name)}
        found += [f"{name} {id_}: missing" for id_ in there.keys() - here.keys()]
        found += [f"{name} {id_}: should be gone" for id_ in here.keys() - there.keys()]
        found += [
            f"{name} {id_}: {here[id_]} for {there[id_]}"
            for id_ in here.keys() & there.keys()
            if here[id_] != there[id_]
        ]
    assert set(STREAM_PATHS.values()) == set(PATHS)
    return found
