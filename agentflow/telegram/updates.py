"""What somebody did, out of an update: https://core.telegram.org/bots/api#update. Whatever else comes is nothing to us."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

Language = Literal["en", "ru"]

#: `/edit make it snow`, `/edit@TheBot make it snow`.
_COMMAND: Final = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@([A-Za-z0-9_]{1,64}))?(?:\s+|$)")
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_FILE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,300}")
_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")
_DATA: Final = re.compile(r"([a-z]{1,20}):([0-9a-f]{32})")
#: Chats and users have numbers of at most 52 bits.
_MOST_ID: Final = 1 << 52


@dataclass(frozen=True, slots=True)
class Sender:
    """Who, and where. In a private chat the two have one number."""

    chat_id: int
    user_id: int
    language: Language

    @property
    def is_private(self) -> bool:
        return self.chat_id == self.user_id


@dataclass(frozen=True, slots=True)
class Picture:
    """`size_bytes` where Telegram names it."""

    file_id: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """`text` is a message's own or a picture's caption, without the command in front of it; empty: none. `addressee` is the bot
    that the command names, as commands in groups do."""

    sender: Sender
    message_id: int
    text: str
    command: str | None
    addressee: str | None
    picture: Picture | None
    album: str | None


@dataclass(frozen=True, slots=True)
class Press:
    """A button was pressed, under the message `message_id` (None: too old for Telegram to say)."""

    sender: Sender
    query_id: str
    message_id: int | None
    action: str
    request_hex: str


def read(update: Any) -> Message | Press | None:
    """None for what is neither, or is not from a person."""
    if not isinstance(update, dict):
        return None
    if isinstance(message := update.get("message"), dict):
        return _message(message)
    if isinstance(query := update.get("callback_query"), dict):
        return _press(query)
    return None


def _message(message: dict[str, Any]) -> Message | None:
    sender = _sender(message.get("from"), message.get("chat"))
    message_id = _id(message.get("message_id"))
    if sender is None or message_id is None:
        return None
    text = _text(message.get("caption") if "caption" in message else message.get("text"))
    command, addressee = None, None
    if (found := _COMMAND.match(text)) is not None:
        command, addressee = found[1].lower(), found[2]
        text = text[found.end() :].strip()
    album = message.get("media_group_id")
    return Message(
        sender,
        message_id,
        text,
        command,
        addressee,
        _picture(message),
        album if isinstance(album, str) and _WORD.fullmatch(album) else None,
    )


def _picture(message: dict[str, Any]) -> Picture | None:
    """The largest of a photo's sizes, or a document that calls itself an image."""
    photo, document = message.get("photo"), message.get("document")
    if isinstance(photo, list):
        sizes = [each for each in photo if isinstance(each, dict)]
        best = max(sizes, key=lambda each: _number(each.get("width")) * _number(each.get("height")), default=None)
        return _file(best)
    if isinstance(document, dict) and str(document.get("mime_type") or "").lower().startswith("image/"):
        return _file(document)
    return None


def _file(file: dict[str, Any] | None) -> Picture | None:
    file_id = file.get("file_id") if file else None
    if file is None or not isinstance(file_id, str) or not _FILE_ID.fullmatch(file_id):
        return None
    size = file.get("file_size")
    return Picture(file_id, size if type(size) is int and size >= 0 else None)


def _press(query: dict[str, Any]) -> Press | None:
    message = query.get("message")
    message = message if isinstance(message, dict) else {}
    sender = _sender(query.get("from"), message.get("chat"))
    query_id, data = query.get("id"), query.get("data")
    found = _DATA.fullmatch(data) if isinstance(data, str) else None
    if sender is None or found is None or not isinstance(query_id, str) or not _WORD.fullmatch(query_id):
        return None
    return Press(sender, query_id, _id(message.get("message_id")), found[1], found[2])


def _sender(user: Any, chat: Any) -> Sender | None:
    if not isinstance(user, dict) or not isinstance(chat, dict) or user.get("is_bot"):
        return None
    user_id, chat_id = _id(user.get("id")), _id(chat.get("id"))
    if user_id is None or chat_id is None or chat.get("type") == "channel":
        return None
    return Sender(chat_id, user_id, "ru" if str(user.get("language_code") or "").lower().startswith("ru") else "en")


def _id(value: Any) -> int | None:
    return value if type(value) is int and 0 < abs(value) < _MOST_ID else None


def _number(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _text(value: Any) -> str:
    return _UNSTORABLE.sub("\ufffd", value).strip() if isinstance(value, str) else ""
