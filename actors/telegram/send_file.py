"""`telegram_send_file`: what a render made, as a file. One whose answer is lost is not sent again."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

from agentflow.connections import NoAnswer
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.telegram import requests
from agentflow.telegram.client import Refused
from agentflow.telegram.delivery import FILE_BYTES, Output, local
from agentflow.worker.running import JobContext


class SendFile(Payload):
    request_id: UUID
    output: Output


@job(
    "telegram_send_file",
    payload=SendFile,
    retry=CRITICAL,
    priority="critical",
    time_limit_s=300.0,
    repeatable=False,
    public=False,
)
def telegram_send_file(context: JobContext, payload: SendFile) -> dict[str, Any]:
    """Send a result uncompressed, as an answer to the message that shows it."""
    system, output = context.system, payload.output
    with system.database.connection() as conn:
        request = requests.get(conn, context.job.organization_id, payload.request_id)
    if request is None or output.size_bytes > FILE_BYTES:
        return {"skipped": "it is not kept, or larger than Telegram takes"}
    message: dict[str, Any] = {"chat_id": request.chat_id}
    if request.answer_id is not None:
        message["reply_parameters"] = {"message_id": request.answer_id, "allow_sending_without_reply": True}
    try:
        with local(context, output) as path, path.open("rb") as file:
            upload = {"document": (PurePosixPath(output.key).name, file, output.media_type)}
            system.telegram.call(context, "sendDocument", message, files=upload)
    except Refused as refused:
        if refused.kind not in ("blocked", "too_large"):
            raise
        return {"skipped": str(refused)}
    except NoAnswer as error:
        if not error.sent:
            raise
        return {"skipped": "the answer was lost"}
    return {}
