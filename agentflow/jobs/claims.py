"""Taking jobs: one conditional UPDATE for many, by id."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import JOB_COLUMNS, Job, job_from_row


def claim(conn: Connection, ids: Sequence[UUID], worker: UUID, lease_s: float) -> tuple[list[Job], list[UUID]]:
    """Claim what of `ids` is queued, due and without a concurrency key. Returns the claimed jobs, and the ids with a key."""
    rows = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.claim_1(%s, %s, make_interval(secs => %s)) j",  # noqa: S608 - constants
        (sorted(set(ids)), worker, lease_s),
    ).fetchall()
    jobs = [job_from_row(row) for row in rows]
    return [job for job in jobs if job.state == "running"], [job.id for job in jobs if job.state == "queued"]


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
