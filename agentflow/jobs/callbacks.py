"""Callbacks as their receivers' owners see them: what was told, how each attempt went, and telling it once more.

A callback is a job of type `deliver_callback` whose parent is the job (or the batch) that ended; this module owns the log of its
attempts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs.model import JOB_COLUMNS, Job, Ring, State, job_from_row

TYPE: Final = "deliver_callback"
#: Of an answer's body so much is kept: enough to find the line in the receiver's log.
RESPONSE_CHARACTERS: Final = 500
MOST_SHOWN: Final = 100


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """`status` is None where there was no answer, `error` None where it was delivered."""

    attempt: int
    at: datetime
    duration_ms: int
    status: int | None
    error: str | None
    response: str | None


@dataclass(frozen=True, slots=True)
class Callback:
    """`next_at`: when it is tried (again), while it is queued. `replay_of` is the callback that this one repeats."""

    id: UUID
    url: str
    state: State
    replay_of: UUID | None
    created_at: datetime
    next_at: datetime | None
    finished_at: datetime | None
    attempts: list[DeliveryAttempt] = field(default_factory=list)


def log_attempt(conn: Connection, job: Job, said: DeliveryAttempt) -> None:
    """`job` is the callback's own. `at` is the database's now, whatever `said` says."""
    conn.execute(
        "insert into agentflow.callback_attempts (id, organization_id, callback_id, attempt, duration_ms, status, error,"
        " response) values (%s, %s, %s, %s, %s, %s, %s, %s)",
        (
            new_id(),
            job.organization_id,
            job.id,
            said.attempt,
            said.duration_ms,
            said.status,
            said.error,
            said.response,
        ),
    )


def of(conn: Connection, organization_id: int | None, subject_id: UUID) -> list[Callback]:
    """The callbacks of a job or of a batch with their attempts, the first one first; at most MOST_SHOWN of them."""
    rows = conn.execute(
        "select id, payload ->> 'url', state, retry_of, created_at, case when state = 'queued' then run_at end, finished_at"
        " from agentflow.jobs where parent_id = %(subject)s and type = %(type)s"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s) order by id limit %(limit)s",
        {"subject": subject_id, "type": TYPE, "organization": organization_id, "limit": MOST_SHOWN},
    ).fetchall()
    found = {row[0]: Callback(*row) for row in rows}
    for callback_id, *columns in conn.execute(
        "select callback_id, attempt, at, duration_ms, status, error, response from agentflow.callback_attempts"
        " where callback_id = any (%(ids)s) and (%(organization)s::bigint is null or organization_id = %(organization)s)"
        " order by id",
        {"ids": list(found), "organization": organization_id},
    ).fetchall():
        found[callback_id].attempts.append(DeliveryAttempt(*columns))
    return list(found.values())


def replay(conn: Connection, organization_id: int | None, subject_id: UUID | None, callback_id: UUID) -> Job | None:
    """A new callback that says the same under the same `webhook-id`, due now; the one before goes on as it did.

    None when `subject_id` (None: whichever) has no such callback.
    """
    row = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.jobs j where j.id = %(id)s and j.type = %(type)s"  # noqa: S608 - constants
        " and (%(subject)s::uuid is null or j.parent_id = %(subject)s)"
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)",
        {"id": callback_id, "type": TYPE, "subject": subject_id, "organization": organization_id},
    ).fetchone()
    if row is None:
        return None
    old = job_from_row(row)
    made = conn.execute(
        "insert into agentflow.jobs as j (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s,"  # noqa: S608 - constants
        " correlation_id, parent_id, retry_of, trace, wake_at, sent_at, sends)"
        " select %(new)s, o.organization_id, o.type, o.queue, o.priority, o.payload || %(more)s, o.max_attempts, o.time_limit_s,"
        " o.correlation_id, o.parent_id, o.id, o.trace, clock_timestamp() + interval '30 s', clock_timestamp(), 1"
        " from agentflow.jobs o where o.id = %(old)s and o.organization_id = %(organization)s"
        f" returning {JOB_COLUMNS}",
        {
            "new": new_id(),
            "old": old.id,
            "organization": old.organization_id,
            "more": Jsonb({"message_id": message_id(old)}),
        },
    ).fetchone()
    return job_from_row(made) if made else None


def message_id(callback: Job) -> str:
    """What the receiver knows the message by: the same for each attempt and each replay."""
    return str(callback.payload.get("message_id") or f"msg_{(callback.retry_of or callback.id).hex}")


def ring_for(callback: Job) -> Ring:
    return Ring(callback.id, callback.queue, callback.type, 0)
