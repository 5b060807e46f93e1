"""The queue `large`: jobs that need more memory than the containers of the others have. Workers serve it that are told to."""

from __future__ import annotations

from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import LARGE, Job

_WORKER_SILENT_S = 60.0


def move(conn: Connection, job: Job) -> bool:
    """Put a running job there for when it is handed back. False: nobody serves that queue, it is there already, or the job is no
    longer this worker's."""
    return (
        conn.execute(
            "update agentflow.jobs j set queue = %(large)s where j.organization_id = %(organization)s and j.id = %(id)s"
            " and j.fence = %(fence)s and j.worker = %(worker)s and j.state || '' = 'running' and j.queue <> %(large)s"
            " and exists (select from agentflow.workers w where w.stopped_at is null and %(large)s = any (w.queues)"
            " and w.seen_at > clock_timestamp() - make_interval(secs => %(silent)s))",
            {
                "large": LARGE,
                "organization": job.organization_id,
                "id": job.id,
                "fence": job.fence,
                "worker": job.worker,
                "silent": _WORKER_SILENT_S,
            },
        ).rowcount
        > 0
    )


def tries_ended(conn: Connection, job_id: UUID, code: str) -> int:
    """How many attempts of a job were to be made again for an error of this code. Parking may show it, too, and is none."""
    row = conn.execute(
        "select count(*) from agentflow.attempts where job_id = %s and outcome = 'retry' and error ->> 'code' = %s",
        (job_id, code),
    ).fetchone()
    return int(row[0]) if row else 0
