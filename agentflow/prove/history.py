"""The recorder: in the private copy every change of a job's row is written down, by a trigger, in the transaction that makes it.

So nothing that was committed can be missing, whoever dies. What the processes say of themselves is not asked. The writer of a
change is told by its connection's application_name, which holds the process number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Final
from uuid import UUID

import psycopg

RECORDER: Final = """
create schema if not exists prove;
create table prove.events (
    n bigserial primary key, at timestamptz not null, writer text not null, job uuid not null,
    was text, now text, fence_was integer, fence integer, attempt_was smallint, attempt smallint,
    crashes_was smallint, crashes smallint, worker_was uuid, worker uuid, lease_was timestamptz, lease timestamptz,
    run_at timestamptz, wake_at timestamptz, sent_was timestamptz, sent timestamptz, reason text, cancel boolean,
    key text, slot smallint, finished boolean
);
create function prove.record() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into prove.events (at, writer, job, now, fence, attempt, crashes, worker, lease, run_at, wake_at, sent, reason,
            cancel, key, slot, finished)
        values (clock_timestamp(), current_setting('application_name'), new.id, new.state, new.fence, new.attempt, new.crashes,
            new.worker, new.lease_until, new.run_at, new.wake_at, new.sent_at, new.wait_reason, new.cancel_requested,
            new.concurrency_key, new.slot, new.finished_at is not null);
    elsif tg_op = 'UPDATE' then
        insert into prove.events (at, writer, job, was, now, fence_was, fence, attempt_was, attempt, crashes_was, crashes,
            worker_was, worker, lease_was, lease, run_at, wake_at, sent_was, sent, reason, cancel, key, slot, finished)
        values (clock_timestamp(), current_setting('application_name'), new.id, old.state, new.state, old.fence, new.fence,
            old.attempt, new.attempt, old.crashes, new.crashes, old.worker, new.worker, old.lease_until, new.lease_until,
            new.run_at, new.wake_at, old.sent_at, new.sent_at, new.wait_reason, new.cancel_requested,
            new.concurrency_key, new.slot, new.finished_at is not null);
    else
        insert into prove.events (at, writer, job, was, fence_was, attempt_was, crashes_was)
        values (clock_timestamp(), current_setting('application_name'), old.id, old.state, old.fence, old.attempt, old.crashes);
    end if;
    return null;
end $$;
create trigger prove after insert or update or delete on agentflow.jobs for each row execute function prove.record();
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a job's row, in the order of `n`; `was` is None where it was made, `now` where it was deleted."""

    n: int
    at: datetime
    writer: str
    job: UUID
    was: str | None
    now: str | None
    fence_was: int | None = None
    fence: int | None = None
    attempt_was: int | None = None
    attempt: int | None = None
    crashes_was: int | None = None
    crashes: int | None = None
    worker_was: UUID | None = None
    worker: UUID | None = None
    lease_was: datetime | None = None
    lease: datetime | None = None
    run_at: datetime | None = None
    wake_at: datetime | None = None
    sent_was: datetime | None = None
    sent: datetime | None = None
    reason: str | None = None
    cancel: bool | None = None
    key: str | None = None
    slot: int | None = None
    finished: bool | None = None

    @property
    def kind(self) -> str:
        """What it looks like from outside."""
        if self.was is None:
            return "submitted"
        if self.now is None:
            return "deleted"
        if (self.was, self.now) == ("queued", "running"):
            return "claimed"
        if (self.was, self.now) == ("running", "running"):
            return "heartbeat"
        if (self.was, self.now) == ("queued", "queued"):
            return "dispatched" if self.sent != self.sent_was and self.sent is not None else "delayed"
        if self.was == "running" and self.crashes != self.crashes_was:
            return "rescued"
        return "waits" if self.now == "queued" else "finished"


@dataclass(frozen=True, slots=True)
class Row:
    """A job as it is at the end."""

    id: UUID
    type: str
    state: str
    attempt: int
    max_attempts: int
    crashes: int
    fence: int
    parent_id: UUID | None
    batch_id: UUID | None
    idempotency_key: str | None
    has_callback: bool
    then_jobs: int
    attempts_recorded: int
    retries: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None


Connection = psycopg.Connection[Any]


def install(conn: Connection) -> None:
    conn.execute(RECORDER)


def by_job(conn: Connection) -> Iterator[list[Event]]:
    """The events of each job, in their order. A server-side cursor: there may be a million."""
    with conn.transaction(), conn.cursor("events") as cursor:
        cursor.itersize = 20_000
        names = ", ".join(Event.__slots__)
        cursor.execute(f"select {names} from prove.events order by job, n".encode())  # noqa: S608 - our own names
        for _, group in groupby((Event(*row) for row in cursor), key=lambda event: event.job):
            yield list(group)


def by_key(conn: Connection) -> Iterator[tuple[str, list[Event]]]:
    """The claims and ends of jobs with a concurrency key, in their order, key by key."""
    with conn.transaction(), conn.cursor("keyed") as cursor:
        names = ", ".join(Event.__slots__)
        cursor.execute(
            f"select {names} from prove.events where key is not null and was is distinct from now order by key, n".encode()  # noqa: S608
        )
        for key, group in groupby((Event(*row) for row in cursor), key=lambda event: event.key or ""):
            yield key, list(group)


def limits(conn: Connection) -> dict[str, int]:
    """How many jobs of a key may run at once."""
    return dict(conn.execute("select key, slots from agentflow.concurrency_keys").fetchall())


def rows(conn: Connection) -> dict[UUID, Row]:
    found = conn.execute(
        "select j.id, j.type, j.state, j.attempt, j.max_attempts, j.crashes, j.fence, j.parent_id, j.batch_id,"
        " j.idempotency_key, j.callback_url is not null, coalesce(jsonb_array_length(j.then_jobs), 0),"
        " (select count(*) from agentflow.job_attempts a where a.job_id = j.id),"
        " (select count(*) from agentflow.attempts a where a.job_id = j.id and a.outcome = 'retry'),"
        " j.created_at, j.started_at, j.finished_at, j.error ->> 'message' from agentflow.jobs j"
    ).fetchall()
    return {row[0]: Row(*row) for row in found}


def batches(conn: Connection) -> list[tuple[UUID, int, int, int, int]]:
    """(id, total, succeeded, failed, cancelled) as the batches' own counts say."""
    return conn.execute("select id, total, succeeded, failed, cancelled from agentflow.batches").fetchall()


def open_jobs(conn: Connection) -> int:
    row = conn.execute("select count(*) from agentflow.jobs where state in ('queued', 'running')").fetchone()
    return int(row[0]) if row else 0


def last_event(conn: Connection) -> int:
    row = conn.execute("select coalesce(max(n), 0) from prove.events").fetchone()
    return int(row[0]) if row else 0


def successes(conn: Connection) -> list[datetime]:
    """When jobs succeeded, the first one first."""
    found = conn.execute(
        "select at from prove.events where now = 'succeeded' and was = 'running' order by n"
    ).fetchall()
    return [row[0] for row in found]
