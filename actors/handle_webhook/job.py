"""Handles an event that came by webhook: once, in one transaction with what it leads to."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from actors.handle_webhook import forwarding, kommo, mapped, telegram
from actors.handle_webhook.action import Done, Happened
from agentflow import metrics
from agentflow.errors import Permanent
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.system import Transaction
from agentflow.webhooks import content, endpoints, events, order
from agentflow.webhooks.config import ForwardAction, JobAction
from agentflow.webhooks.endpoints import Endpoint
from agentflow.webhooks.events import Event
from agentflow.webhooks.intake import JOB_TYPE
from agentflow.worker.running import JobContext


class HandleWebhook(Payload):
    """`replay`: handle it although it was; `even_if_stale`: although a newer state of its entity was."""

    event_id: UUID
    replay: bool = False
    even_if_stale: bool = False


@job(JOB_TYPE, payload=HandleWebhook, retry=CRITICAL, time_limit_s=60.0, public=False)
def handle_webhook(context: JobContext, payload: HandleWebhook) -> dict[str, Any]:
    """Do what the endpoint says with an event: read its entities again, hand in a job, forward it, or keep it."""
    system, of = context.system, context.job.organization_id
    try:
        with system.transaction() as transaction:
            event = events.lock(transaction.conn, of, payload.event_id)
            if event is None:
                return {"skipped": "the event was cleaned up"}
            endpoint = endpoints.get(transaction.conn, of, event.endpoint_id)
            if endpoint is None or _was_handled(event, context, payload):
                return {"outcome": event.outcome}
            done = _act(transaction, endpoint, event, context, payload)
            events.settle(
                transaction.conn,
                event,
                done.outcome,
                by=context.job.id,
                detail=done.detail,
                action_job_id=done.job_id,
            )
    except Permanent as error:
        with system.database.transaction() as conn:
            failed = events.lock(conn, of, payload.event_id)
            if failed is not None:
                events.settle(conn, failed, "failed", by=context.job.id, detail=str(error))
        metrics.webhook_handled(endpoint.source if endpoint else "unknown", "failed")
        raise
    metrics.webhook_handled(endpoint.source, done.outcome)
    return {"outcome": done.outcome, "job_id": str(done.job_id) if done.job_id else None}


def _was_handled(event: Event, context: JobContext, payload: HandleWebhook) -> bool:
    """By this very job, whose finish was lost; or at all, where nobody asked for it again."""
    return event.handled_by == context.job.id or (event.handled_at is not None and not payload.replay)


def _act(
    transaction: Transaction, endpoint: Endpoint, event: Event, context: JobContext, payload: HandleWebhook
) -> Done:
    config = endpoint.config
    if config.only is not None and event.type not in config.only:
        return Done("ignored", "the endpoint does nothing with events of this type")
    if not payload.even_if_stale and order.is_overtaken(transaction.conn, event):
        return Done("stale", "a newer state of its entity was handled before")
    headers, body = events.delivered(transaction.conn, event)
    parsed = content.parse(body, headers.get("content-type", ""))
    happened = Happened(event, endpoint, headers, parsed, payload.replay, payload.even_if_stale)
    if endpoint.source == "kommo":
        return kommo.act(transaction, happened)
    if endpoint.source == "telegram" and (done := telegram.act(transaction, happened)) is not None:
        return done
    if isinstance(config.action, JobAction):
        return mapped.act(transaction, happened, config.action, context.job.correlation_id)
    if isinstance(config.action, ForwardAction):
        return forwarding.act(transaction, happened, context.job.correlation_id)
    return Done("done")
