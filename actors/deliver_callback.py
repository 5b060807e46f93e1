"""Tells a caller's URL that a job or a batch has ended. Written in the transaction that ends it; delivered at least once."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any, Final, Self
from uuid import UUID

from pydantic import model_validator

from agentflow import USER_AGENT, signing
from agentflow.errors import JobError, Permanent, Transient
from agentflow.fetch import Guard, Posted, post
from agentflow.jobs import callbacks, records
from agentflow.jobs.callbacks import DeliveryAttempt
from agentflow.jobs.registry import Payload, RetryClass, job
from agentflow.secrets import Unreadable
from agentflow.worker.running import JobContext

#: Standard Webhooks' ladder up to its 10 h, about two days in all: a receiver that is down over a night loses nothing.
LADDER: Final = RetryClass("callback", 10, ladder_s=(5, 300, 1800, 7200, 18_000, 36_000, 36_000, 36_000, 36_000))
#: Standard Webhooks lets a receiver take 15 to 30 s. Whoever needs longer should answer first and work then.
TIMEOUT_S: Final = 20.0


class DeliverCallback(Payload):
    """`job_id` or `batch_id`; `message_id` in a replay."""

    job_id: UUID | None = None
    batch_id: UUID | None = None
    url: str
    message_id: str | None = None

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.job_id is None) == (self.batch_id is None):
            raise ValueError("names a job or a batch")
        return self


# Not repeatable: a worker that wakes after its lease must not tell a caller what somebody else has told by then.
@job(
    "deliver_callback",
    payload=DeliverCallback,
    retry=LADDER,
    priority="critical",
    time_limit_s=60.0,
    repeatable=False,
    public=False,
)
def deliver_callback(context: JobContext, payload: DeliverCallback) -> dict[str, Any]:
    """POST what became of a job or batch to its callback URL, signed as Standard Webhooks has it."""
    system, organization_id = context.system, context.job.organization_id
    with system.database.connection() as conn:
        event = _event_of(payload, conn, organization_id)
        if event is None:
            return {"skipped": "it was cleaned up before its callback could be delivered"}
        try:
            live = signing.live_secrets(conn, organization_id, system.sealer)
        except Unreadable as why:  # ours to repair: sent without a signature it would be taken for a forgery
            raise Transient(f"the signing secret cannot be read: {why}", code="secret_unreadable") from why
    body = json.dumps(event, separators=(",", ":")).encode()
    headers = {
        "Content-Type": "application/json",
        **signing.headers(callbacks.message_id(context.job), int(time.time()), body, live),
    }
    began = time.monotonic()
    answer: Posted | None = None
    error: JobError | None
    try:
        answer = post(
            payload.url,
            body,
            headers=headers,
            guard=Guard(allow=system.settings.fetch_allow),
            timeout_s=TIMEOUT_S,
            user_agent=USER_AGENT,
            should_stop=context.check,
        )
        error = refusal_of(answer, "the callback URL", "callback")
    except JobError as failed:
        error = failed
    said = DeliveryAttempt(
        attempt=context.job.attempt,
        at=datetime.now(UTC),
        duration_ms=int((time.monotonic() - began) * 1000),
        status=answer.status if answer else None,
        error=str(error) if error else None,
        response=answer.text(callbacks.RESPONSE_CHARACTERS) if answer else None,
    )
    with system.database.connection() as conn:
        callbacks.log_attempt(conn, context.job, said)
    if error is not None:
        raise error
    return {"status": said.status}


def refusal_of(answer: Posted, who: str, code: str) -> JobError | None:
    """Standard Webhooks: 2xx is received, 410 asks for no more, everything else (a redirect, too) is tried again."""
    if 200 <= answer.status < 300:
        return None
    if answer.status == 410:
        return Permanent(f"{who} answered 410: it wants no more", code=f"{code}_gone")
    return Transient(f"{who} answered {answer.status}", code=f"{code}_refused", retry_after_s=answer.retry_after_s)


def _event_of(payload: DeliverCallback, conn: Any, organization_id: int) -> dict[str, Any] | None:
    if payload.batch_id is not None:
        batch = records.get_batch(conn, organization_id, payload.batch_id)
        if batch is None or batch.finished_at is None:
            return None
        counts = {name: getattr(batch, name) for name in ("total", "succeeded", "failed", "cancelled")}
        return {
            "type": "batch.finished",
            "timestamp": batch.finished_at.isoformat(),
            "data": {"id": str(batch.id), **counts, "created_at": batch.created_at.isoformat()},
        }
    assert payload.job_id is not None  # noqa: S101 - the payload's own check
    job = records.get(conn, organization_id, payload.job_id)
    if job is None or job.finished_at is None:
        return None
    return {
        "type": f"job.{job.state}",
        "timestamp": job.finished_at.isoformat(),
        "data": {
            "id": str(job.id),
            "type": job.type,
            "state": job.state,
            "result": job.result,
            "error": {k: v for k, v in job.error.items() if k != "traceback"} if job.error else None,
            "finished_at": job.finished_at.isoformat(),
            "correlation_id": job.correlation_id,
            "batch_id": str(job.batch_id) if job.batch_id else None,
        },
    }
