"""What the calendar is asked by others: accounts of Kommo whose sync is due, and webhooks that have stopped coming."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from flask.testing import FlaskClient

from agentflow.kommo.accounts import Account
from agentflow.system import System
from scheduler import calendar as looking
from scheduler import schedule
from scheduler.calendar import Calendar
from tests.calendar_support import Connection, calendar, looked, ticks_of
from tests.core_support import rows, value
from tests.kommo_support import connect, linked, server
from tests.test_calendar import at_once, systems
from tests.web_support import client
from tests.webhook_support import make

__all__ = ["client", "linked", "server", "systems"]


@pytest.fixture(autouse=True)
def asked_at_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "ASK_EVERY_S", 0.0)


def only(system: System, *names: str) -> Calendar:
    """The calendar as the scheduler has it, as far as these entries go."""
    found = [entry for entry in schedule.entries(system) if entry.name in names]
    assert len(found) == len(names)
    return calendar(system, found)


# ---- Kommo ----


def kommo(system: System) -> Calendar:
    return only(system, "kommo.incremental", "kommo.reconcile")


def due(conn: Connection, *accounts: Account, **more: str) -> None:
    for account in accounts:
        for column in ("next_sync_at", *more):
            conn.execute(
                f"update agentflow.crm_accounts set {column} = clock_timestamp() - interval '1 s' where id = %s",  # noqa: S608
                (account.id,),
            )


def syncs(conn: Connection) -> list[tuple[Any, ...]]:
    """Account and mode of each."""
    query = "select payload->>'account_id', payload->>'mode' from agentflow.jobs where type = 'sync_crm' order by id"
    return conn.execute(query.encode()).fetchall()


def test_a_sync_that_is_due_is_handed_in_once_by_two_schedulers(
    systems: list[System], linked: System, server: Any, conn: Connection
) -> None:
    one, other = (connect(linked, server) for _ in range(2))
    gone = connect(linked, server)
    conn.execute("update agentflow.crm_accounts set state = 'needs_reauth' where id = %s", (gone.id,))
    conn.execute("update agentflow.crm_accounts set next_sync_at = clock_timestamp() + interval '1 h'")
    conn.execute("delete from agentflow.jobs where type = 'sync_crm'")
    due(conn, one, gone)
    both = [kommo(system) for system in systems]

    for _ in range(3):
        at_once(*(partial(looked, each) for each in both))

    assert syncs(conn) == [(str(one.id), "incremental")]
    ((subject, _, outcome, _, job_id),) = ticks_of(conn, "kommo.incremental")
    assert (subject, outcome) == (str(one.id), "submitted")
    assert value(conn, "select id from agentflow.jobs where type = 'sync_crm'") == job_id
    (row,) = rows(conn, "select next_sync_at > now() as later from agentflow.crm_accounts where id = %s", one.id)
    assert row.later

    # Due again while that one still waits: it is the same. The other account's is its own.
    due(conn, one, other)
    at_once(*(partial(looked, each) for each in both))

    assert syncs(conn) == [(str(one.id), "incremental"), (str(other.id), "incremental")]
    assert [tick[4] == job_id for tick in ticks_of(conn, "kommo.incremental") if tick[0] == str(one.id)] == [True, True]


def test_a_reconciliation_takes_the_place_of_the_sync_that_is_due(
    linked: System, server: Any, conn: Connection
) -> None:
    account = connect(linked, server)
    conn.execute("delete from agentflow.jobs where type = 'sync_crm'")
    conn.execute("update agentflow.crm_accounts set state = 'connected'")
    due(conn, account, next_reconcile_at="too")
    looker = kommo(linked)

    looked(looker)
    looked(looker)

    assert syncs(conn) == [(str(account.id), "reconcile")]
    assert ticks_of(conn, "kommo.incremental") == [] and len(ticks_of(conn, "kommo.reconcile")) == 1
    due(conn, account)
    looked(looker)
    assert syncs(conn)[1:] == [(str(account.id), "incremental")]


# ---- webhooks ----


def test_webhooks_that_stop_coming_are_an_alarm_until_one_comes(
    client: FlaskClient, system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(looking.logger, "error", lambda text, **_: logged.append(text))
    endpoint = make(client, "github", silence_after_s=600)
    make(client, "stripe")
    looker = only(system, "webhooks")
    looked(looker)
    assert looker.alarms() == []
    conn.execute("update agentflow.webhook_endpoints set watched_since = watched_since - interval '601 s'")

    looked(looker)
    looked(looker)

    assert looker.alarms() == ["no webhook has come to github github for longer than it allows"] == logged
    assert endpoint.send({"action": "opened"}).status_code == 200
    looked(looker)
    assert looker.alarms() == []


def test_the_schedulers_health_says_which_webhooks_are_silent(
    client: FlaskClient, system: System, conn: Connection
) -> None:
    make(client, "github", silence_after_s=600)
    conn.execute("update agentflow.webhook_endpoints set watched_since = watched_since - interval '601 s'")
    listed = [entry for entry in schedule.entries(system) if entry.name == "webhooks"]
    running = schedule.Running(system, listed)

    looked(running.calendar)

    assert list(running.degraded()) == ["no webhook has come to github github for longer than it allows"]
