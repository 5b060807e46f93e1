"""The one message about a request: sent, edited while the render goes on, and made the result.

Only its sending cannot be repeated, so that is written down before and after (`requests.may_send`). Everything else is an edit
of a message whose number is known: done twice it is done once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agentflow import log
from agentflow.connections import NoAnswer
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.telegram import requests, texts
from agentflow.telegram.client import Refused
from agentflow.telegram.requests import Request

if TYPE_CHECKING:
    from agentflow.worker.running import JobContext

logger = log.get(__name__)

#: While a render goes on, a message whose answer was lost is sent once more at the most: one stray, and no more.
_SENDS_OF_PROGRESS: Final = 2
#: The result needs a message to stand in. Attempts bound it as well.
_SENDS_OF_RESULT: Final = 10
_SENDER_S: Final = 1.0
#: Telegram's limits of what bots upload.
_PHOTO_BYTES: Final = 10 << 20
_PHOTO_EDGES: Final = 10_000
_PHOTO_RATIO: Final = 20
FILE_BYTES: Final = 50 << 20


class Unreachable(Exception):
    """Nothing can be written to the chat any more: the bot was blocked, or put out of the group."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a render made: one of the outputs in its job's result."""

    key: str
    kind: str
    media_type: str
    width: int | None
    height: int | None
    size_bytes: int

    @property
    def as_media(self) -> str:
        """The kind of message that shows it: `photo` where Telegram takes it as one."""
        if self.kind == "image":
            edges = (self.width or 0, self.height or 0)
            fits = sum(edges) <= _PHOTO_EDGES and max(edges) <= _PHOTO_RATIO * max(1, min(edges))
            small = self.size_bytes <= _PHOTO_BYTES and self.media_type in ("image/png", "image/jpeg", "image/webp")
            return "photo" if small and fits and min(edges) > 0 else "document"
        playable = {"video/mp4": "video", "audio/mpeg": "audio", "audio/mp4": "audio"}
        return playable.get(self.media_type, "document")


def outputs_of(result: Any) -> list[Output]:
    """Of a render's result, the pictures first."""
    listed = result.get("outputs") if isinstance(result, dict) else None
    found = [
        Output(
            each["key"],
            str(each.get("kind")),
            str(each.get("media_type") or "application/octet-stream"),
            each.get("width"),
            each.get("height"),
            int(each.get("bytes") or 0),
        )
        for each in listed or ()
        if isinstance(each, dict) and isinstance(each.get("key"), str)
    ]
    return sorted(found, key=lambda each: each.kind != "image")


class Answer:
    """The message about one request, for one job. Raises Unreachable, Wait, Transient, Refused `other`."""

    def __init__(self, context: JobContext, request: Request) -> None:
        self._context = context
        self._telegram = context.system.telegram
        self.request = request

    def show(self, text: str, *actions: str) -> None:
        """Say it there: sent where nothing was, else edited, unless it stands there already."""
        markup = texts.buttons(self.request.id, self.request.language, *actions)
        content = texts.as_shown(text, markup)
        shown = self._telegram.shown
        if self.request.answer_id is None:
            if self._send(text, markup, most=_SENDS_OF_PROGRESS):
                shown.remember(self.request.id, content)
            return
        if shown.is_shown(self.request.id, content):
            return
        if (seconds := shown.wait_s(self.request.id)) > 0:
            raise Wait(seconds, "telegram_progress")
        try:
            self._edit_text(text, markup)
        except Refused as refused:
            if refused.kind != "no_text":  # it is the result by now
                raise
        shown.remember(self.request.id, content)

    def conclude(self, text: str, *actions: str) -> None:
        """The last word: said also where its progress was lost on the way."""
        self._ensure(text)
        self.show(text, *actions)

    def deliver(self, output: Output) -> None:
        """Make the message the result."""
        language = self.request.language
        self._ensure(texts.say("sending", language))
        markup = texts.buttons(self.request.id, language, "again", "file")
        if output.size_bytes > FILE_BYTES:
            text = texts.say("too_large_to_send", language, n=round(output.size_bytes / 1e6))
            self._edit_text(text, markup)
            return
        with local(self._context, output) as path:
            kinds = [output.as_media] if output.as_media == "document" else [output.as_media, "document"]
            for kind in kinds:
                try:
                    self._put(kind, path, output, markup)
                    return
                except Refused as refused:
                    if kind == kinds[-1] or refused.kind not in ("picture", "too_large", "other"):
                        raise
                    logger.info("Telegram takes a result as a file alone", kind=kind, why=str(refused))

    def _put(self, kind: str, path: Path, output: Output, markup: dict[str, Any]) -> None:
        media = {"type": kind, "media": "attach://result", "caption": texts.say("done", self.request.language)}

        def put(params: Mapping[str, Any]) -> None:
            with path.open("rb") as file:  # anew each time: a second try has to send it from its beginning
                upload = {"result": (Path(output.key).name, file, output.media_type)}
                self._call("editMessageMedia", params, files=upload)

        self._edit(put, {"media": media, "reply_markup": markup}, texts.say("sending", self.request.language))

    # ---- sending ----

    def _ensure(self, text: str) -> None:
        """See that there is a message to edit."""
        if self.request.answer_id is not None:
            return
        self._send(text, texts.buttons(self.request.id, self.request.language), most=_SENDS_OF_RESULT)
        if self.request.answer_id is None:
            if self.request.answer_sends >= _SENDS_OF_RESULT:
                raise Permanent("Telegram never said which message it sent", code="telegram_no_message")
            raise Wait(_SENDER_S, "telegram_sending", message="another job is sending the message")

    def _send(self, text: str, markup: dict[str, Any], *, most: int) -> bool:
        """Whether it was sent now, and its number is known."""
        job_id = self._context.job.id
        with self._context.system.database.connection() as conn:
            mine = requests.may_send(conn, self.request, job_id, most=most)
        if mine:
            message = {
                "text": text,
                "reply_markup": markup,
                "reply_parameters": {"message_id": self.request.message_id, "allow_sending_without_reply": True},
            }
            try:
                sent = self._call("sendMessage", message)
            except (JobError, Unreachable) as error:
                with self._context.system.database.connection() as conn:
                    requests.not_sent(conn, self.request, job_id, certain=not _may_be_sent(error))
                raise
            with self._context.system.database.connection() as conn:
                requests.sent(conn, self.request, job_id, sent["message_id"])
        self._read_again()
        return mine

    # ---- editing ----

    def _edit_text(self, text: str, markup: dict[str, Any]) -> None:
        self._edit(lambda whole: self._call("editMessageText", whole), {"text": text, "reply_markup": markup}, text)

    def _edit(self, edit: Callable[[Mapping[str, Any]], Any], params: Mapping[str, Any], instead: str) -> None:
        """Where the message is gone, once another one is sent, with the text `instead`, and edited in its place."""
        for _ in range(2):
            try:
                edit({**params, "message_id": self.request.answer_id})
                return
            except Refused as refused:
                if refused.kind == "not_modified":
                    return
                if refused.kind != "gone" or self.request.answers_lost:
                    raise
            with self._context.system.database.connection() as conn:
                requests.answer_gone(conn, self.request)
            self._read_again()
            self._ensure(instead)

    def _call(self, method: str, params: Mapping[str, Any], **more: Any) -> Any:
        try:
            return self._telegram.call(self._context, method, {"chat_id": self.request.chat_id, **params}, **more)
        except Refused as refused:
            if refused.kind == "blocked":
                raise Unreachable from refused
            if refused.kind == "moved" and refused.moved_to is not None:
                with self._context.system.database.connection() as conn:
                    requests.move(conn, self.request, refused.moved_to)
                raise Wait(0.0, "telegram_moved") from refused
            raise

    def _read_again(self) -> None:
        with self._context.system.database.connection() as conn:
            found = requests.get(conn, self.request.organization_id, self.request.id)
        if found is not None:
            self.request = found


@contextmanager
def local(context: JobContext, output: Output) -> Iterator[Path]:
    """A stored file as one of this machine. Raises Permanent where it is not kept any more."""
    storage = context.system.storage
    if storage.stat(output.key) is None:
        raise Permanent("the result is not kept any more", code="telegram_result_gone")
    if (path := storage.local_path(output.key)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="agentflow-telegram-") as folder:
        path = Path(folder, "result")
        storage.fetch_to(output.key, path)
        yield path


def _may_be_sent(error: Exception) -> bool:
    """Whether a message may stand there although its sending failed."""
    if isinstance(error, NoAnswer):
        return error.sent
    return isinstance(error, Transient) and error.code == "telegram_busy"
