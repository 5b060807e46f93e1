"""`telegram_deliver`: the result takes the place of the message about its request. Handed in by the render's success."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from agentflow import log
from agentflow.errors import Permanent
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.telegram import requests, texts
from agentflow.telegram.client import Refused
from agentflow.telegram.conversation import correlation_of
from agentflow.telegram.delivery import Answer, Output, Unreachable, outputs_of
from agentflow.telegram.requests import Ended, Request
from agentflow.worker.running import JobContext

logger = log.get(__name__)


class Deliver(Payload):
    request_id: UUID


@job("telegram_deliver", payload=Deliver, retry=CRITICAL, priority="critical", time_limit_s=300.0, public=False)
def telegram_deliver(context: JobContext, payload: Deliver) -> dict[str, Any]:
    """Make the message about a request its result. Done twice it is done once: it is an edit."""
    system, of = context.system, context.job.organization_id
    with system.database.connection() as conn:
        request = requests.get(conn, of, payload.request_id)
        if request is None or request.state not in ("rendering", "failed"):
            return {"skipped": "it is over"}
        # Tried again by hand it has no parent.
        render_id = context.job.parent_id or request.render_job_id
        render = records.get(conn, of, render_id) if render_id is not None else None
    answer, outputs = Answer(context, request), outputs_of(_result_of(render, request))
    try:
        state = _delivered(answer, outputs)
    except Unreachable:
        state = "unreachable"
    with system.database.connection() as conn:
        requests.end(conn, request, state)
    return {"state": state}


def _delivered(answer: Answer, outputs: list[Output]) -> Ended:
    try:
        if not outputs:
            raise Permanent("the render made nothing that can be sent", code="telegram_nothing_to_send")
        answer.deliver(outputs[0])
        return "delivered"
    except Permanent as error:
        if isinstance(error, Refused) and error.kind == "gone":
            return "unreachable"
        logger.error("a result could not be delivered", error=str(error), request_id=str(answer.request.id))
        answer.conclude(texts.failure(None, answer.request.language), "again")
        return "failed"


def _result_of(render: Job | None, request: Request) -> Any:
    """That of its own render, or of a later try of it."""
    if render is None or render.correlation_id != correlation_of(request.id):
        raise Permanent("this is not the end of its render", code="telegram_wrong_render")
    return render.result
