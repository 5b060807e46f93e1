"""Tells a caller's URL that a job has ended. Written in the transaction that ends the job; delivered at least once."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from agentflow import USER_AGENT
from agentflow.errors import Permanent, Transient
from agentflow.fetch import Guard, post
from agentflow.jobs import records
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.worker.running import JobContext


class DeliverCallback(Payload):
    job_id: UUID
    url: str


# Not repeatable: a worker that wakes after its lease must not tell a caller what somebody else has told by then.
@job(
    "deliver_callback",
    payload=DeliverCallback,
    retry=CRITICAL,
    priority="critical",
    time_limit_s=60.0,
    repeatable=False,
    public=False,
)
def deliver_callback(context: JobContext, payload: DeliverCallback) -> dict[str, Any]:
    """POST the job's id, state, result and error to its callback URL. The `Idempotency-Key` header is the same each time."""
    with context.system.database.connection() as conn:
        job = records.get(conn, context.job.organization_id, payload.job_id)
    if job is None:
        return {"skipped": "the job was cleaned up before its callback could be delivered"}
    body = {
        "id": str(job.id),
        "type": job.type,
        "state": job.state,
        "result": job.result,
        "error": {k: v for k, v in job.error.items() if k != "traceback"} if job.error else None,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
        "correlation_id": job.correlation_id,
    }
    status = post(
        payload.url,
        json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": str(context.job.id)},
        guard=Guard(allow=context.system.settings.fetch_allow),
        timeout_s=30.0,
        user_agent=USER_AGENT,
        should_stop=context.check,
    )
    if status >= 500 or status in (408, 425, 429):
        raise Transient(f"the callback URL answered {status}", code="callback_refused")
    if status >= 300:
        raise Permanent(f"the callback URL answered {status}", code="callback_refused")
    return {"status": status}
