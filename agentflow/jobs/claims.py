"""Taking jobs: one conditional UPDATE for many, by id."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import JOB_COLUMNS, Job, job_from_row

# The waiting lock is meant: SKIP LOCKED would lose the wake-up of a row that somebody merely looks at. Sorted, so that two
# batches cannot deadlock.
_CLAIM = f"""
with locked as materialized (
    select id from agentflow.jobs
    where id = any (%(ids)s) and state || '' = 'queued' and run_at <= clock_timestamp() and concurrency_key is null
    order by id for update
), claimed as (
    update agentflow.jobs j set state = 'running', attempt = j.attempt + 1, fence = j.fence + 1, worker = %(worker)s,
        lease_until = clock_timestamp() + make_interval(secs => %(lease)s), started_at = clock_timestamp(),
        wake_at = null, sent_at = null, sends = 0, wait_reason = null, progress = null, stage = null
    from locked where j.id = locked.id and j.state || '' = 'queued' and j.attempt < j.max_attempts
    returning {JOB_COLUMNS}
)
select true, c.* from claimed c
union all
select false, {JOB_COLUMNS} from agentflow.jobs j
where j.id = any (%(ids)s) and j.state || '' = 'queued' and j.run_at <= clock_timestamp() and j.concurrency_key is not null
"""  # noqa: S608 - only constants are put in


def claim(conn: Connection, ids: Sequence[UUID], worker: UUID, lease_s: float) -> tuple[list[Job], list[UUID]]:
    """Claim what of `ids` is queued, due and without a concurrency key. Returns the claimed jobs, and the ids with a key."""
    rows = conn.execute(_CLAIM, {"ids": sorted(set(ids)), "worker": worker, "lease": lease_s}).fetchall()
    return [job_from_row(row[1:]) for row in rows if row[0]], [row[1] for row in rows if not row[0]]


def claim_keyed(conn: Connection, ids: Sequence[UUID], worker: UUID, lease_s: float) -> list[Job]:
    """Claim the heads of these jobs' lines while their keys have free slots; park the rest as busy.

    The jobs returned may be others than those named: a message rings for its key.
    """
    rows = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.claim_keyed_2(%s, %s, make_interval(secs => %s)) j",  # noqa: S608
        (sorted(set(ids)), worker, lease_s),
    ).fetchall()
    return [job_from_row(row) for row in rows]


def claimed_by(conn: Connection, ids: Sequence[UUID], worker: UUID) -> list[Job]:
    """Jobs of `ids` that this worker holds: the answer to a claim whose COMMIT was lost."""
    rows = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.jobs j"  # noqa: S608 - constants
        " where j.id = any (%s) and j.worker = %s and j.state || '' = 'running'",
        (list(ids), worker),
    ).fetchall()
    return [job_from_row(row) for row in rows]
