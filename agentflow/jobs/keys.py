"""Concurrency keys whose slots are not for a whole job: left before its end, entered anew, counted by somebody else."""

from __future__ import annotations

from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import Job


def leave(conn: Connection, job: Job) -> list[UUID]:
    """Free the job's slot while it goes on. Returns whom to ring; nobody where the lease was lost."""
    row = conn.execute("select agentflow.leave_key_1(%s, %s, %s)", (job.id, job.fence, job.worker)).fetchone()
    return list(row[0] or ()) if row else []


def enter(conn: Connection, job: Job, key: str) -> bool:
    """Have a running job that left its key wait in the line again: its caller raises `Wait`. False: the lease was lost."""
    row = conn.execute("select agentflow.enter_key_1(%s, %s, %s, %s)", (job.id, job.fence, job.worker, key)).fetchone()
    return bool(row and row[0])
