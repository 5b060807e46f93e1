"""Calls of the Bot API (https://core.telegram.org/bots/api), as one bot.

The token is a part of every address, by Telegram's design: no address goes into a text, an error or a log here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, Final, Literal

from agentflow.calls import Service, fingerprint
from agentflow.connections import Connections
from agentflow.errors import Permanent, Transient, Wait
from agentflow.limits import Bucket, Window
from agentflow.telegram.shown import Shown

if TYPE_CHECKING:
    from agentflow.system import System
    from agentflow.worker.running import JobContext

#: getFile gives nothing larger, and nothing larger is taken from a user.
MAX_FILE_BYTES: Final = 20 << 20
#: https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this
_OVERALL: Final = (Window(30, 1.0),)
_IN_A_CHAT: Final = (Window(1, 1.0),)
_IN_A_GROUP: Final = (Window(1, 1.0), Window(20, 60.0))
_ANSWER_S: Final = 30.0
_UPLOAD_S: Final = 120.0
_MOST_WAIT_S: Final = 3600.0
_FILE_PATH: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9_./-]{0,500}")

#: What a refusal means to whoever asked; `other` is a mistake of ours.
Kind = Literal[
    "blocked", "gone", "no_text", "not_modified", "too_large", "expired", "moved", "picture", "conflict", "other"
]
Upload = tuple[str, IO[bytes], str]  # name, content, media type


class Refused(Permanent):
    """Telegram will not do it, however often it is asked. `moved_to`: the chat's number now."""

    def __init__(self, kind: Kind, message: str, moved_to: int | None = None) -> None:
        super().__init__(message, code=f"telegram_{kind}")
        self.kind = kind
        self.moved_to = moved_to


class Telegram:
    """The installation's bot. Safe in threads; connects to nothing until it is used."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._connections = Connections("Telegram", "telegram")

    @property
    def bot_id(self) -> int:
        return int(self._token.partition(":")[0])

    @cached_property
    def shown(self) -> Shown:
        settings = self._system.settings
        client = None
        if settings.uses_redis:
            client = self._system.redis_client(answer_timeout_s=2.0, connect_timeout_s=2.0)
        return Shown(client, settings.job_queue_name)

    def call(
        self,
        context: JobContext,
        method: str,
        params: Mapping[str, Any],
        *,
        files: Mapping[str, Upload] | None = None,
    ) -> Any:
        """One call by a job, within Telegram's limits; those of `chat_id`, too, where it writes there.

        Raises Refused, Wait, Transient; NoAnswer with `sent` where it may have been done.
        """
        chat_id = params.get("chat_id")
        within = [self._bucket_of_chat(chat_id)] if chat_id is not None else []
        service = Service("telegram", fingerprint("telegram", self._token), _OVERALL)
        context.permit(service, f"{method}:{chat_id}", within)
        try:
            return self.ask(method, params, files=files, check=context.check)
        except Wait as wait:
            context.refused(service, wait.seconds)
            raise

    def ask(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        files: Mapping[str, Upload] | None = None,
        check: Callable[[], None] = lambda: None,
        total_s: float | None = None,
    ) -> Any:
        """The same past the limits: for commands and for getUpdates."""
        content: dict[str, Any] = {"json": dict(params)}
        if files:
            texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
            content = {"data": texts, "files": dict(files)}
        with self._connections.send(
            "POST",
            f"{self._base}/bot{self._token}/{method}",
            total_s=total_s or (_UPLOAD_S if files else _ANSWER_S),
            check=check,
            headers={},
            **content,
        ) as head:
            status, text = head.status, head.read()
        return _understood(method, status, text)

    @contextmanager
    def file(self, context: JobContext, file_id: str) -> Iterator[Iterator[bytes]]:
        """What a user sent, piece by piece. Raises Refused `too_large`, and what `call` raises."""
        found = self.call(context, "getFile", {"file_id": file_id})
        path = found.get("file_path") if isinstance(found, dict) else None
        if not isinstance(path, str) or not _FILE_PATH.fullmatch(path):
            raise Transient("Telegram names no file to fetch", code="telegram_bad_answer")
        with self._connections.send(
            "GET",
            f"{self._base}/file/bot{self._token}/{path}",
            total_s=_UPLOAD_S,
            check=context.check,
            headers={"Accept-Encoding": "identity"},
        ) as head:
            if head.status != 200:  # the address is good for an hour: the next attempt asks for a new one
                raise Transient(f"Telegram answered {head.status} for a file", code="telegram_busy")
            yield _at_most(head.pieces, MAX_FILE_BYTES)

    def close(self) -> None:
        self._connections.close()

    @property
    def _base(self) -> str:
        return self._system.settings.telegram_api_url.rstrip("/")

    @property
    def _token(self) -> str:
        token = self._system.settings.telegram_bot_token
        if token is None:
            raise Permanent("TELEGRAM_BOT_TOKEN is not set", code="telegram_no_token")
        return token.get_secret_value()

    def _bucket_of_chat(self, chat_id: int) -> Bucket:
        return Bucket(f"telegram:{self.bot_id}:{chat_id}", _IN_A_GROUP if chat_id < 0 else _IN_A_CHAT)


def _understood(method: str, status: int, text: bytes) -> Any:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or type(answer.get("ok")) is not bool:
        if status == 413:
            raise Refused("too_large", "Telegram takes no file of this size")
        raise Transient(f"Telegram answered {status}, and not as its API does", code="telegram_busy")
    if answer["ok"]:
        return answer.get("result")
    code, said = answer.get("error_code", status), str(answer.get("description") or "")[:300]
    parameters = answer.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    if code == 429:
        seconds = min(max(_number(parameters.get("retry_after"), 1.0), 1.0), _MOST_WAIT_S)
        raise Wait(seconds, "rate_limit", message=f"Telegram asks to wait {seconds:g} s")
    if code == 401 or (code == 404 and said == "Not Found"):
        raise Transient("Telegram does not know TELEGRAM_BOT_TOKEN", code="telegram_unauthorized")
    if not isinstance(code, int) or code >= 500:
        raise Transient(f"Telegram answered {code}", code="telegram_busy")
    moved_to = parameters.get("migrate_to_chat_id")
    if type(moved_to) is int:
        raise Refused("moved", "the group has another number now", moved_to)
    raise Refused(_kind(code, said.lower()), f"Telegram refused {method}: {said}")


#: By what the descriptions hold; they are for people, and have changed in case and in their beginnings only.
_KINDS: Final[tuple[tuple[str, Kind], ...]] = (
    ("message is not modified", "not_modified"),
    ("message to edit not found", "gone"),
    ("message can't be edited", "gone"),
    ("message_id_invalid", "gone"),
    ("there is no text in the message", "no_text"),
    ("file is too big", "too_large"),
    ("too large", "too_large"),
    ("query is too old", "expired"),
    ("query id is invalid", "expired"),
    ("query_id_invalid", "expired"),
    ("chat not found", "blocked"),
    ("photo_", "picture"),
    ("image_process_failed", "picture"),
    ("wrong type of", "picture"),
)


def _kind(code: int, said: str) -> Kind:
    of_codes: dict[int, Kind] = {403: "blocked", 409: "conflict", 413: "too_large"}
    if code in of_codes:
        return of_codes[code]
    return next((kind for words, kind in _KINDS if words in said), "other")


def _at_most(pieces: Iterator[bytes], most: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise Refused("too_large", "the file is larger than Telegram said")
        yield piece


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise
