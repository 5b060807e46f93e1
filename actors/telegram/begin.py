"""`telegram_begin`: the pictures of a request are fetched, and its render is handed in."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from agentflow import log
from agentflow.jobs.registry import CRITICAL, Payload, UnknownType, job
from agentflow.jobs.requests import InvalidJob, NewJob
from agentflow.system import Transaction
from agentflow.telegram import pictures, requests, texts
from agentflow.telegram.client import Refused
from agentflow.telegram.conversation import correlation_of
from agentflow.telegram.pictures import NotAPicture
from agentflow.telegram.requests import Request
from agentflow.telegram.workflow import places, render_of
from agentflow.worker.running import JobContext

logger = log.get(__name__)


class Begin(Payload):
    request_id: UUID


@job("telegram_begin", payload=Begin, retry=CRITICAL, priority="critical", time_limit_s=300.0, public=False)
def telegram_begin(context: JobContext, payload: Begin) -> dict[str, Any]:
    """Fetch what was sent to the bot, and hand in the render that was asked for."""
    system, of = context.system, context.job.organization_id
    with system.database.connection() as conn:
        request = requests.get(conn, of, payload.request_id)
    if request is None or request.state != "collecting":
        return {"skipped": "it is in work, or over"}
    if request.prompt is None:
        with system.transaction() as transaction:
            return _ask(transaction, of, payload.request_id)
    while not (done := _handed_in(context, request)):
        try:
            _fetch(context, request)
        except (NotAPicture, Refused) as error:
            if isinstance(error, Refused) and error.kind != "too_large":
                raise
            with system.transaction() as transaction:
                name = "too_large" if isinstance(error, Refused) else "not_a_picture"
                return _refuse(transaction, request, name)
    return done


def _fetch(context: JobContext, request: Request) -> None:
    with context.system.database.connection() as conn:
        missing = [each for each in requests.pictures(conn, request) if each.storage_key is None]
    for each in missing:
        context.check()
        key = pictures.fetch(context, request, each)
        with context.system.database.connection() as conn:
            requests.fetched(conn, request, each, key)


def _handed_in(context: JobContext, request: Request) -> dict[str, Any] | None:
    """None: a picture is still to be fetched; one more may have come meanwhile."""
    with context.system.transaction() as transaction:
        locked = requests.get(transaction.conn, request.organization_id, request.id, lock=True)
        if locked is None or locked.state != "collecting" or locked.prompt is None:
            return {"skipped": "it is in work, or over"}
        found = requests.pictures(transaction.conn, locked)
        keys = [each.storage_key for each in found if each.storage_key is not None]
        if len(keys) < len(found):
            return None
        payload = {"request_id": str(locked.id)}
        correlation = correlation_of(locked.id)
        workflow = transaction.system.settings.telegram_workflow
        names = places(transaction.conn, locked.organization_id, workflow)
        render = NewJob(
            "comfy_render",
            render_of(workflow, locked.prompt, names, keys),
            correlation_id=correlation,
            then=(NewJob("telegram_deliver", payload),),
        )
        try:
            job_id = transaction.submit(locked.organization_id, render).job.id
        except (InvalidJob, UnknownType) as error:
            logger.error("the bot's render cannot be handed in: see TELEGRAM_WORKFLOW", error=str(error))
            return _refuse(transaction, locked, "failed_refused")
        requests.renders(transaction.conn, locked, job_id)
        if len(keys) > len(names):
            _say(transaction, locked, "too_many", n=len(names))
        transaction.submit(locked.organization_id, NewJob("telegram_follow", payload, correlation_id=correlation))
        return {"render_job_id": str(job_id)}


def _ask(transaction: Transaction, organization_id: int, request_id: UUID) -> dict[str, Any]:
    """No part of the album had a caption."""
    request = requests.get(transaction.conn, organization_id, request_id, lock=True)
    if request is None or request.state != "collecting" or request.prompt is not None:
        return {"skipped": "a text has come"}  # whoever brought it has handed this in once more
    requests.change(transaction.conn, request, state="asking")
    _say(transaction, request, "ask")
    return {"asked": True}


def _refuse(transaction: Transaction, request: Request, name: str) -> dict[str, Any]:
    if requests.end(transaction.conn, request, "failed"):
        _say(transaction, request, name)
    return {"refused": name}


def _say(transaction: Transaction, request: Request, name: str, **values: object) -> None:
    said = {
        "chat_id": request.chat_id,
        "text": texts.say(name, request.language, **values),
        "reply_to": request.message_id,
    }
    transaction.submit(request.organization_id, NewJob("telegram_say", said))
