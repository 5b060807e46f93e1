"""`telegram_say`: a message that nothing depends on. One whose answer is lost is not said twice."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agentflow.connections import NoAnswer
from agentflow.jobs.registry import QUICK, Payload, job
from agentflow.telegram.client import Refused
from agentflow.worker.running import JobContext


class Say(Payload):
    """`reply_to` is the message that it answers, if that is still there."""

    chat_id: int
    text: Annotated[str, Field(min_length=1, max_length=4096)]
    reply_to: int | None = None


@job("telegram_say", payload=Say, retry=QUICK, priority="critical", time_limit_s=60.0, repeatable=False, public=False)
def telegram_say(context: JobContext, payload: Say) -> dict[str, Any]:
    """Send a text to a chat."""
    message: dict[str, Any] = {"chat_id": payload.chat_id, "text": payload.text}
    if payload.reply_to is not None:
        message["reply_parameters"] = {"message_id": payload.reply_to, "allow_sending_without_reply": True}
    try:
        context.system.telegram.call(context, "sendMessage", message)
    except Refused as refused:
        if refused.kind == "blocked":
            return {"skipped": str(refused)}
        raise
    except NoAnswer as error:
        if not error.sent:
            raise
        return {"skipped": "the answer was lost"}
    return {}
