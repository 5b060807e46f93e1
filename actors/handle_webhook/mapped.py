"""An event becomes a job of a type that the endpoint names, its payload made by the endpoint's template."""

from __future__ import annotations

from actors.handle_webhook.action import Done, Happened
from agentflow.errors import Permanent
from agentflow.jobs import registry
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob, NewJob
from agentflow.system import Transaction
from agentflow.webhooks import mapping, order
from agentflow.webhooks.config import JobAction
from agentflow.webhooks.intake import concurrency_key


def act(transaction: Transaction, happened: Happened, action: JobAction, correlation_id: str | None) -> Done:
    """Raises Permanent with code webhook_mapping where the event does not fit."""
    event = happened.event
    try:
        payload = mapping.fill(action.payload, happened.read)
        new = NewJob(
            action.type,
            payload,
            correlation_id=correlation_id or f"webhook:{event.id}",
            concurrency_key=_own_line(happened, action),
        )
        submitted = transaction.submit(event.organization_id, new, public_only=True)
    except mapping.Unmappable as error:
        raise Permanent(f"payload.{error}", code="webhook_mapping") from None
    except InvalidJob as error:
        raise Permanent(f"the job that the event would make is wrong: {error}", code="webhook_mapping") from None
    except UnknownType as error:
        raise Permanent(str(error), code="webhook_mapping") from None
    except ValueError as error:  # a number in the event that Python does not print
        raise Permanent(f"the payload is not JSON: {error}", code="webhook_mapping") from None
    order.advance(transaction.conn, event)
    return Done("done", job_id=submitted.job.id)


def _own_line(happened: Happened, action: JobAction) -> str | None:
    """Jobs of one entity run in order as well, unless their type has a line of its own."""
    key = concurrency_key(happened.endpoint.id, happened.event.entity)
    if key is None or not registry.known(action.type):
        return None
    return key if registry.get(action.type).concurrency is registry.no_concurrency else None
