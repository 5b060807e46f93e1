"""What follows from what somebody wrote, sent or pressed: rows and jobs, in the caller's transaction. Nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.jobs.unique import Unique
from agentflow.system import Transaction
from agentflow.telegram import requests, texts
from agentflow.telegram.bots import Bot
from agentflow.telegram.client import MAX_FILE_BYTES
from agentflow.telegram.requests import Request
from agentflow.telegram.updates import Message, Picture, Press, Sender

#: Nothing says that an album is complete: its parts come one by one, in any order, within a second or so.
ALBUM_QUIET_S: Final = 1.5
ALBUM_LONGEST_S: Final = 10.0
#: How it works is said once in so long to somebody who goes on writing.
_HELP_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Heard:
    """`job` does what follows; None: nothing does, and `why` says so."""

    job: Job | None = None
    why: str | None = None


def hear(transaction: Transaction, bot: Bot, said: Message | Press) -> Heard:
    """Safe to repeat with the same update."""
    conversation = _Conversation(transaction, bot, said.sender)
    requests.lock_user(transaction.conn, bot.bot_id, said.sender.user_id)
    if isinstance(said, Press):
        return conversation.pressed(said)
    if said.addressee is not None and said.addressee.lower() != bot.username.lower():
        return Heard(why="it is for another bot")
    if not said.sender.is_private and (said.picture is None or said.command is None):
        return Heard(why="in groups the bot hears pictures with a command alone")
    if said.picture is not None:
        return conversation.sent(said, said.picture)
    return conversation.wrote(said)


class _Conversation:
    def __init__(self, transaction: Transaction, bot: Bot, sender: Sender) -> None:
        self._transaction = transaction
        self._conn = transaction.conn
        self._bot = bot
        self._sender = sender
        self._of = bot.organization_id, bot.bot_id

    def pressed(self, press: Press) -> Heard:
        payload = {
            "request_id": str(UUID(press.request_hex)),
            "action": press.action,
            "query_id": press.query_id,
            "chat_id": press.sender.chat_id,
            "user_id": press.sender.user_id,
            "language": press.sender.language,
            "message_id": press.message_id,
        }
        return self._submit(NewJob("telegram_press", payload))

    def sent(self, message: Message, picture: Picture) -> Heard:
        origin = f"album:{message.album}" if message.album else f"message:{message.message_id}"
        if message.album is not None:
            known = requests.of_origin(self._conn, *self._of, self._sender.chat_id, origin)
            if known is not None:
                return self._more(known, message, picture)
        if picture.size_bytes is not None and picture.size_bytes > MAX_FILE_BYTES:
            return self._say("too_large", message.message_id, once=origin)
        limit = self._transaction.system.settings.telegram_user_limit
        if requests.in_work(self._conn, *self._of, self._sender.user_id) >= limit:
            return self._say("limit", message.message_id, once=origin, n=limit)
        requests.drop_asking(self._conn, *self._of, self._sender)
        request = requests.make(
            self._conn,
            *self._of,
            self._sender,
            origin=origin,
            message_id=message.message_id,
            prompt=message.text or None,
            state="collecting" if message.text or message.album else "asking",
        )
        if request is None:
            return Heard(why="this picture came before")
        requests.add_picture(self._conn, request, message.message_id, picture.file_id)
        if request.state == "asking":
            return self._say("ask", message.message_id)
        return self._begin(request, album=message.album is not None)

    def wrote(self, message: Message) -> Heard:
        if message.command == "cancel":
            dropped = requests.drop_asking(self._conn, *self._of, self._sender)
            return self._say("dropped" if dropped else "nothing_to_drop", message.message_id)
        if message.text and message.command in (None, "edit"):
            request = requests.awaiting_text(self._conn, *self._of, self._sender)
            if request is not None:
                album = request.state == "collecting"
                requests.change(self._conn, request, state="collecting", prompt=message.text)
                return self._begin(request, album=album)
        return self._say("help", None, once="help")

    def _more(self, request: Request, message: Message, picture: Picture) -> Heard:
        """Another part of an album, whose other parts were here first."""
        if request.state not in ("collecting", "asking") or request.user_id != self._sender.user_id:
            return Heard(why="its album is in work, or over")
        if picture.size_bytes is not None and picture.size_bytes > MAX_FILE_BYTES:
            return self._say("too_large", message.message_id)
        requests.add_picture(self._conn, request, message.message_id, picture.file_id)
        if message.text and request.prompt is None:
            requests.change(self._conn, request, state="collecting", prompt=message.text)
        elif request.state == "asking":
            return Heard(why="what to do with its album is awaited")
        return self._begin(request, album=True)

    def _begin(self, request: Request, *, album: bool) -> Heard:
        """An album is begun when nothing of it came for a moment."""
        quiet = Unique(str(request.id), "debounce", ALBUM_QUIET_S, ALBUM_LONGEST_S) if album else None
        return self._submit(begin(request, unique=quiet))

    def _say(self, name: str, reply_to: int | None, *, once: str | None = None, **values: object) -> Heard:
        """`once`: to this person not again within some seconds, such as for each part of an album."""
        payload = {
            "chat_id": self._sender.chat_id,
            "text": texts.say(name, self._sender.language, **values),
            "reply_to": reply_to,
        }
        unique = None
        if once is not None:
            unique = Unique(f"{self._bot.bot_id}:{self._sender.chat_id}:{name}:{once}", "throttle", _HELP_EVERY_S)
        return self._submit(NewJob("telegram_say", payload, unique=unique))

    def _submit(self, new: NewJob) -> Heard:
        return Heard(self._transaction.submit(self._bot.organization_id, new).job)


def begin(request: Request, *, unique: Unique | None = None) -> NewJob:
    """The job that fetches the pictures of a request and hands in its render. Safe to be handed in twice."""
    return NewJob(
        "telegram_begin", {"request_id": str(request.id)}, correlation_id=correlation_of(request.id), unique=unique
    )


def correlation_of(request_id: UUID) -> str:
    """By which the jobs of a request are found."""
    return f"telegram:{request_id}"
