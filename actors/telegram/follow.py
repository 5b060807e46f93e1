"""`telegram_follow`: while a render waits and runs, its request's message says how far it is. Parked in between."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import redis

from agentflow.errors import Wait
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.outlook import Outlook
from agentflow.telegram import requests, texts
from agentflow.telegram.client import Refused
from agentflow.telegram.delivery import Answer, Unreachable
from agentflow.telegram.requests import Ended, Request
from agentflow.telegram.shown import EVERY_S
from agentflow.telegram.updates import Language
from agentflow.worker.running import JobContext

#: A render that waits is looked at after a twentieth of the time that it has waited, up to so long: people look less often, too.
_SELDOM_S: Final = 60.0
_SHARE: Final = 0.05
#: What is said of a render's attempt, or of why it waits, where there is nobody to render it.
_AWAY: Final = frozenset({"comfyui_unreachable", "comfyui_stuck", "unserved"})
_PERCENT_STEP: Final = 5


class Follow(Payload):
    request_id: UUID


@job("telegram_follow", payload=Follow, retry=CRITICAL, priority="critical", time_limit_s=120.0, public=False)
def telegram_follow(context: JobContext, payload: Follow) -> dict[str, Any]:
    """Say how far a render is in the message about it, until it has ended."""
    system, of = context.system, context.job.organization_id
    with system.database.connection() as conn:
        request = requests.get(conn, of, payload.request_id)
        if request is None or request.state != "rendering" or request.render_job_id is None:
            return {"skipped": "it is over"}
        render = records.get(conn, of, request.render_job_id)
    if render is not None and render.state == "succeeded":
        return {"state": "succeeded"}  # the rest is done by telegram_deliver, which was handed in with its end
    answer = Answer(context, request)
    try:
        if render is None or render.terminal:
            return _last_word(context, answer, render)
        answer.show(_said_of(context, render, request.language), "cancel")
    except Unreachable:
        return _give_up(context, request)
    except Refused as refused:
        if refused.kind != "gone":
            raise
        return _give_up(context, request)
    waited_s = (datetime.now(UTC) - render.created_at).total_seconds()
    seldom_s = min(_SELDOM_S, waited_s * _SHARE) if render.state == "queued" else 0.0
    raise Wait(max(EVERY_S, seldom_s), "telegram_progress")


def _last_word(context: JobContext, answer: Answer, render: Job | None) -> dict[str, Any]:
    request = answer.request
    state: Ended = "cancelled" if render is not None and render.state == "cancelled" else "failed"
    error = render.error if render is not None else None
    said = texts.say("cancelled", request.language) if state == "cancelled" else texts.failure(error, request.language)
    answer.conclude(said, "again")
    with context.system.database.connection() as conn:
        requests.end(conn, request, state)
    return {"state": state}


def _said_of(context: JobContext, render: Job, language: Language) -> str:
    if render.state == "running":
        percent = round(100 * _progress(context, render) / _PERCENT_STEP) * _PERCENT_STEP
        return texts.say("rendering_at", language, n=percent) if percent else texts.say("rendering", language)
    outlook = context.system.outlooks.of(render)
    why = {render.wait_reason, (render.error or {}).get("code"), outlook.reason if outlook else None}
    if why & _AWAY:
        return texts.say("away", language)
    return texts.say("queued_at", language, n=_place(context, render, outlook))


def _place(context: JobContext, render: Job, outlook: Outlook | None) -> int:
    """In its line; while it is parked for a server, which is in no line, among the organization's own renders."""
    if outlook is not None and outlook.position is not None:
        return outlook.position
    with context.system.database.connection() as conn:
        return records.older(conn, render) + 1


def _progress(context: JobContext, render: Job) -> float:
    with suppress(redis.RedisError):
        if (found := context.system.live.progress(render)) is not None:
            return found.fraction
    return render.progress or 0.0


def _give_up(context: JobContext, request: Request) -> dict[str, Any]:
    """Nobody is there to see the result: the render is not worth its time."""
    with context.system.database.connection() as conn:
        requests.end(conn, request, "unreachable")
    if request.render_job_id is not None:
        context.system.cancel(request.organization_id, request.render_job_id)
    return {"state": "unreachable"}
