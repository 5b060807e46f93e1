"""What the tests of the calendar share: entries, ticks and schedules looked at and run by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

import actors  # noqa: F401 - makes ping and analyze_video known
from agentflow.schedules import records
from agentflow.schedules.records import Schedule, Wanted
from agentflow.schedules.when import When
from agentflow.system import System
from scheduler import schedule
from scheduler.calendar import Calendar, Entry
from tests.processes import eventually

Connection = psycopg.Connection


def cleaned_up(system: System) -> dict[str, int]:
    """Run every clean-up once, as the calendar does; what each deleted."""
    done = {entry.name: entry.work(system) for entry in schedule.entries(system) if entry.work is not None}
    return {name: each.facts.get("deleted", 0) for name, each in done.items()}


def calendar(system: System, entries: Sequence[Entry] = ()) -> Calendar:
    """One that does at once, in the looking thread, what is to be done."""

    def at_once(function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    return Calendar(system, entries, at_once)


def looked(looking: Calendar) -> None:
    """Look until the database answers: on a busy machine a connection may come too late."""
    eventually(looking.look)


def made(
    conn: Connection, when: When, *, name: str = "mine", payload: dict[str, Any] | None = None, **more: Any
) -> Schedule:
    organization_id = more.pop("organization_id", 1)
    return records.create(conn, organization_id, Wanted(name, when, "ping", payload or {}, **more), most=100)


def overdue(conn: Connection, schedule_id: UUID, seconds: float) -> datetime:
    """Let a schedule's next tick lie so far in the past. Returns when it was due."""
    row = conn.execute(
        "update agentflow.schedules set next_at = x.at, wake_at = x.at, "
        " starts_at = coalesce(x.at - make_interval(secs => every_s), starts_at)"
        " from (select clock_timestamp() - make_interval(secs => %s) as at) x where id = %s returning next_at",
        (seconds, schedule_id),
    ).fetchone()
    assert row is not None
    due: datetime = row[0]
    return due


def jobs_of(conn: Connection, schedule_id: UUID) -> list[UUID]:
    """The jobs that a schedule made, the first one first."""
    query = "select id from agentflow.jobs where correlation_id = %s order by created_at, id"
    return [row[0] for row in conn.execute(query, (f"schedule:{schedule_id}",)).fetchall()]


def ticks_of(conn: Connection, name: str) -> list[tuple[Any, ...]]:
    """(subject, at, outcome, missed, job) of an entry, in order."""
    query = "select subject, at, outcome, missed, job_id from agentflow.ticks where schedule = %s order by at, subject"
    return conn.execute(query, (name,)).fetchall()
