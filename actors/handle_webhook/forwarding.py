"""An event goes on to another address: its body as it came, signed by the organization's callback secret."""

from __future__ import annotations

import re
import time
from typing import Any, Final
from uuid import UUID

from actors.deliver_callback import LADDER, TIMEOUT_S, refusal_of
from actors.handle_webhook.action import Done, Happened
from agentflow import USER_AGENT, signing
from agentflow.errors import JobError, Permanent, Transient
from agentflow.fetch import Guard, post
from agentflow.jobs.registry import Payload, job
from agentflow.jobs.requests import NewJob
from agentflow.secrets import Unreadable
from agentflow.system import Transaction
from agentflow.webhooks import endpoints, events, order
from agentflow.webhooks.config import ForwardAction
from agentflow.webhooks.events import Event
from agentflow.webhooks.intake import concurrency_key
from agentflow.worker.running import JobContext

JOB_TYPE: Final = "forward_webhook"
_CONTENT_TYPE: Final = re.compile(r"[ -~]{1,200}")
_HEADER_VALUE: Final = re.compile(r"[!-~]([ -~]{0,198}[!-~])?")


class ForwardWebhook(Payload):
    """`replay` and `even_if_stale` as they were asked for."""

    event_id: UUID
    replay: bool = False
    even_if_stale: bool = False


def act(transaction: Transaction, happened: Happened, correlation_id: str | None) -> Done:
    """A job of its own: its ladder takes two days, and it must not hold up whoever handles events."""
    event = happened.event
    new = NewJob(
        JOB_TYPE,
        {"event_id": str(event.id), "replay": happened.replay, "even_if_stale": happened.even_if_stale},
        correlation_id=correlation_id or f"webhook:{event.id}",
        concurrency_key=concurrency_key(event.endpoint_id, event.entity),
    )
    submitted = transaction.submit(event.organization_id, new)
    return Done("done", job_id=submitted.job.id)


@job(JOB_TYPE, payload=ForwardWebhook, retry=LADDER, time_limit_s=60.0, repeatable=False, public=False)
def forward_webhook(context: JobContext, payload: ForwardWebhook) -> dict[str, Any]:
    """POST a webhook's body to the address that its endpoint names, signed as Standard Webhooks has it."""
    system, of = context.system, context.job.organization_id
    with system.database.connection() as conn:
        event = events.get(conn, of, payload.event_id)
        endpoint = endpoints.get(conn, of, event.endpoint_id) if event else None
        if event is None or endpoint is None:
            return {"skipped": "the event was cleaned up"}
        if not isinstance(endpoint.config.action, ForwardAction):
            return {"skipped": "its endpoint forwards no more"}
        if not payload.even_if_stale and order.is_overtaken(conn, event):
            detail = "a newer state of its entity was delivered before"
            events.correct(conn, event, "stale", detail, action_job_id=context.job.id)
            return {"skipped": detail}
        received, body = events.delivered(conn, event)
        try:
            live = signing.live_secrets(conn, of, system.sealer)
        except Unreadable as why:
            raise Transient(f"the signing secret cannot be read: {why}", code="secret_unreadable") from why
    try:
        answer = post(
            endpoint.config.action.url,
            body,
            headers=_headers(event, endpoint.source, received, body, live, replay=payload.replay),
            guard=Guard(allow=system.settings.fetch_allow),
            timeout_s=TIMEOUT_S,
            user_agent=USER_AGENT,
            should_stop=context.check,
        )
        if (error := refusal_of(answer, "the address that it is forwarded to", "forward")) is not None:
            raise error
    except JobError as error:
        if isinstance(error, Permanent) or context.job.attempt >= context.job.max_attempts:
            with system.database.connection() as conn:
                events.correct(conn, event, "failed", str(error), action_job_id=context.job.id)
        raise
    with system.database.connection() as conn:
        order.advance(conn, event)
    return {"status": answer.status}


def _headers(
    event: Event, source: str, received: dict[str, str], body: bytes, live: list[str], *, replay: bool
) -> dict[str, str]:
    """The same `webhook-id` for each attempt and each replay: the receiver may tell it by that."""
    content_type = received.get("content-type", "")
    said = {
        "Content-Type": content_type if _CONTENT_TYPE.fullmatch(content_type) else "application/octet-stream",
        "AgentFlow-Source": source,
        **signing.headers(f"msg_{event.id.hex}", int(time.time()), body, live),
    }
    if event.type is not None and _HEADER_VALUE.fullmatch(event.type):
        said["AgentFlow-Event-Type"] = event.type
    if replay:
        said["AgentFlow-Replay"] = "true"
    return said
