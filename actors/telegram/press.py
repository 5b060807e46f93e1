"""`telegram_press`: a button was pressed: once more, cancel, the result as a file."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal
from uuid import UUID

from agentflow.jobs import records
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.jobs.requests import NewJob
from agentflow.system import Transaction
from agentflow.telegram import requests, texts
from agentflow.telegram.client import Refused
from agentflow.telegram.conversation import begin
from agentflow.telegram.delivery import outputs_of
from agentflow.telegram.requests import Request
from agentflow.telegram.updates import Language, Sender
from agentflow.worker.running import JobContext

#: Of what one render made.
_MOST_FILES: Final = 10


class Press(Payload):
    """`message_id` is the message that the button stands under, where Telegram says."""

    request_id: UUID
    action: str
    query_id: str
    chat_id: int
    user_id: int
    language: Literal["en", "ru"]
    message_id: int | None


@job("telegram_press", payload=Press, retry=CRITICAL, priority="critical", time_limit_s=300.0, public=False)
def telegram_press(context: JobContext, payload: Press) -> dict[str, Any]:
    """Do what a button under the bot's message says."""
    pressed = _Pressed(context, payload)
    with context.system.database.connection() as conn:
        request = requests.get(conn, context.job.organization_id, payload.request_id)
    if request is None or request.chat_id != payload.chat_id:
        return pressed.answer("forgotten")
    if request.user_id != payload.user_id:
        return pressed.answer("not_yours")
    does = {"again": pressed.again, "cancel": pressed.cancel, "file": pressed.file}
    return does[payload.action](request) if payload.action in does else pressed.answer("forgotten")


class _Pressed:
    def __init__(self, context: JobContext, payload: Press) -> None:
        self._context = context
        self._system = context.system
        self._press = payload
        self._language: Language = payload.language

    def answer(self, name: str, **values: object) -> dict[str, Any]:
        """End the button's waiting, with a text. Who comes too late for that has done what was asked for."""
        text = texts.say(name, self._language, **values)[:200]
        try:
            query = {"callback_query_id": self._press.query_id, "text": text}
            self._system.telegram.call(self._context, "answerCallbackQuery", query)
        except Refused as refused:
            if refused.kind not in ("expired", "blocked"):
                raise
        return {"said": name}

    def again(self, request: Request) -> dict[str, Any]:
        """The same pictures and the same words; without a seed, the render draws another one."""
        limit = self._system.settings.telegram_user_limit
        with self._system.transaction() as transaction:
            allowed = self._once_more(transaction, request, limit)
        return self.answer("again_taken") if allowed else self.answer("limit", n=limit)

    def _once_more(self, transaction: Transaction, request: Request, limit: int) -> bool:
        """A request of its own, once for this press. Whether the person may have one."""
        conn, of = transaction.conn, (request.organization_id, request.bot_id)
        origin = f"press:{self._press.query_id}"
        requests.lock_user(conn, request.bot_id, request.user_id)
        if requests.of_origin(conn, *of, request.chat_id, origin) is not None:
            return True
        if requests.in_work(conn, *of, request.user_id) >= limit:
            return False
        made = requests.make(
            conn,
            *of,
            Sender(request.chat_id, request.user_id, self._language),
            origin=origin,
            message_id=self._press.message_id or request.message_id,
            prompt=request.prompt,
            state="collecting",
        )
        assert made is not None  # noqa: S101 - looked for above, under the person's lock
        for each in requests.pictures(conn, request):
            requests.add_picture(conn, made, each.message_id, each.file_id, each.storage_key)
        transaction.submit(request.organization_id, begin(made))
        return True

    def cancel(self, request: Request) -> dict[str, Any]:
        if not request.is_open:
            return self.answer("too_late")
        if request.render_job_id is None:
            with self._system.database.connection() as conn:
                requests.end(conn, request, "cancelled")
            return self.answer("cancelled")
        state = self._system.cancel(request.organization_id, request.render_job_id)
        if state == "succeeded":
            return self.answer("too_late")
        if state == "cancelled":  # who follows it may look in a minute: this one says so at once
            said = {"request_id": str(request.id)}
            self._system.submit(request.organization_id, NewJob("telegram_follow", said))
        return self.answer("cancelled")

    def file(self, request: Request) -> dict[str, Any]:
        """What the render made, uncompressed: a job for each file, so that none waits for the limits of a chat with others."""
        render = None
        if request.render_job_id is not None:
            with self._system.database.connection() as conn:
                render = records.get(conn, request.organization_id, request.render_job_id)
        outputs = outputs_of(render.result if render else None)[:_MOST_FILES]
        if not any(self._system.storage.stat(each.key) for each in outputs):
            return self.answer("forgotten")
        with self._system.transaction() as transaction:
            for number, each in enumerate(outputs):
                said = {"request_id": str(request.id), "output": dataclasses.asdict(each)}
                once = f"telegram:{self._press.query_id}:{number}"
                transaction.submit(request.organization_id, NewJob("telegram_send_file", said, idempotency_key=once))
        return self.answer("file_coming")
