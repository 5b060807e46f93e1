"""Telegram's Bot API on this machine: messages with their edit history, files, updates by webhook or long poll, and faults on order.

    with telegram() as bot:
        ann = bot.user(111, language_code="ru")
        ann.photo(jpeg, caption="make it snow")          # an update: to the webhook if one is set, else to getUpdates
        bot.fault("lose_answer", path="sendPhoto", times=1)
        assert [message.text for message in bot.chat(111)] == [...]

Faults (`path`: the method's name): `lose_request`, `fail_request` (500, nothing done), `lose_answer`, `answer_500` (both after it took effect),
`too_many` (429 with `seconds` as retry_after), `stall` (answered after `seconds`, done at once).
Texts and limits after https://core.telegram.org/bots/api.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image, UnidentifiedImageError
from werkzeug.formparser import parse_form_data

from tests.faults import Fault, Faults
from tests.http_server import Reply, Request, Server, serve
from tests.telegram_updates import Refused, Updates, User

TOKEN = "123456789:AAF0123456789abcdef0123456789abcdef"
BOT = {"id": 123456789, "is_bot": True, "first_name": "Test Bot", "username": "test_bot"}
MOST_PHOTO_BYTES = 10 << 20
MOST_FILE_BYTES = 50 << 20
MOST_DOWNLOAD_BYTES = 20 << 20
TAGS = {"b", "strong", "i", "em", "u", "s", "a", "code", "pre", "tg-spoiler", "blockquote"}


@dataclass
class Message:
    """A message of the bot as it stands, and every state before, the first one first."""

    now: dict[str, Any]
    content: bytes | None = None  # of its photo or document
    before: list[dict[str, Any]] = field(default_factory=list)
    edited_at: list[float] = field(default_factory=list)
    deleted: bool = False

    @property
    def id(self) -> int:
        return int(self.now["message_id"])

    @property
    def text(self) -> str:
        return str(self.now.get("text", self.now.get("caption", "")))

    @property
    def kind(self) -> str:
        return next(kind for kind in ("photo", "document", "text") if kind in self.now)

    @property
    def buttons(self) -> list[str]:
        """The callback data of its buttons, row after row."""
        rows = self.now.get("reply_markup", {}).get("inline_keyboard", [])
        return [button["callback_data"] for row in rows for button in row if "callback_data" in button]


@dataclass(frozen=True)
class Call:
    method: str
    parameters: dict[str, Any]
    at: float


@dataclass(frozen=True)
class StoredFile:
    id: str
    content: bytes
    path: str
    size: int  # what Telegram says; a test may claim more than there is


class BotApi:
    """`queries_live_s`: how long a press of a button can be answered. `blocked`: users who blocked the bot."""

    def __init__(self, server: Server, token: str = TOKEN, seed: int = 0) -> None:
        self.server = server
        self.token = token
        self.calls: list[Call] = []
        self.messages: dict[int, dict[int, Message]] = {}  # per chat and id
        self.files: dict[str, StoredFile] = {}
        self.blocked: set[int] = set()
        self.queries: dict[str, float] = {}  # presses of buttons and when
        self.answered: list[dict[str, Any]] = []
        self.queries_live_s = 900.0
        self.lock = threading.RLock()
        self.ids = itertools.count(1000)
        self._faults = Faults(seed)
        self.updates = Updates(self)
        server.on("/", self.answer)

    @property
    def url(self) -> str:
        return self.server.url("").rstrip("/")

    def user(self, id_: int, **about: Any) -> User:
        """Somebody who has started a private chat with the bot."""
        with self.lock:
            self.messages.setdefault(id_, {})
        return User(self, id_, about)

    def chat(self, id_: int) -> list[Message]:
        """What the bot has sent there and not deleted, the oldest first."""
        with self.lock:
            return [message for message in self.messages[id_].values() if not message.deleted]

    def called(self, method: str) -> list[Call]:
        return [call for call in list(self.calls) if call.method == method]

    def expire_queries(self) -> None:
        self.queries.clear()

    def store(self, content: bytes, folder: str, suffix: str, *, size: int | None = None) -> StoredFile:
        number = next(self.ids)
        stored = StoredFile(
            f"AgAC{number}", content, f"{folder}/file_{number}{suffix}", len(content) if size is None else size
        )
        self.files[stored.id] = stored
        return stored

    def fault(self, kind: str, **how: Any) -> Fault:
        return self._faults.order(kind, **how)

    def heal(self) -> None:
        self._faults.heal()

    # ---- the wire ----

    def answer(self, request: Request) -> Reply:
        match request.path.strip("/").split("/", 2):
            case "file", token, path if token == f"bot{self.token}":
                stored = next((each for each in self.files.values() if each.path == path), None)
                return Reply(404) if stored is None else Reply(200, stored.content)
            case token, method if token == f"bot{self.token}":
                return self._faulty(method, request)
            case _:
                return _refusal(Refused(401, "Unauthorized"))

    def _faulty(self, method: str, request: Request) -> Reply:
        strike = self._faults.strike
        if strike("lose_request", request, method):
            return Reply(raw=[])
        if strike("fail_request", request, method):
            return _refusal(Refused(500, "Internal Server Error"))
        if fault := strike("too_many", request, method):
            wait = max(1, round(fault.seconds))
            return _refusal(Refused(429, f"Too Many Requests: retry after {wait}", retry_after=wait))
        reply = self._done(method, request)
        if strike("lose_answer", request, method):
            return Reply(raw=[])
        if strike("answer_500", request, method):
            return _refusal(Refused(502, "Bad Gateway"))
        if fault := strike("stall", request, method):
            self.server.stopping.wait(fault.seconds)
        return reply

    def _done(self, method: str, request: Request) -> Reply:
        known: Callable[..., Any] | None = METHODS.get(method.lower())
        if known is None:
            return _refusal(Refused(404, "Not Found"))
        parameters, files = _read(request)
        with self.lock:
            self.calls.append(Call(method, parameters, time.monotonic()))
        try:
            result = known(self, parameters, files)
        except Refused as refused:
            return _refusal(refused)
        return Reply(200, json.dumps({"ok": True, "result": result}).encode(), _JSON)

    # ---- sending ----

    def send_message(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        return self._sent(asked, {"text": _text(asked, "text", 4096)}, None)

    def send_photo(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        content, shown = self._media("photo", asked.get("photo", "attach://photo"), files)
        return self._sent(asked, {**shown, **_caption(asked)}, content)

    def send_document(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        content, shown = self._media("document", asked.get("document", "attach://document"), files)
        return self._sent(asked, {**shown, **_caption(asked)}, content)

    def _sent(self, asked: dict[str, Any], shown: dict[str, Any], content: bytes | None) -> dict[str, Any]:
        with self.lock:
            chat_id = self._chat(asked)
            if (reply := asked.get("reply_parameters")) and not reply.get("allow_sending_without_reply"):
                if reply["message_id"] not in self.updates.seen.get(chat_id, set()) | set(self.messages[chat_id]):
                    raise Refused(400, "Bad Request: message to be replied not found")
            id_ = next(self.ids)
            about = {"message_id": id_, "date": int(time.time()), "from": BOT, "chat": {"id": chat_id, "type": "private"}}
            message = Message({**about, **shown, **_markup(asked)}, content)
            self.messages[chat_id][id_] = message
            return message.now

    def _chat(self, asked: dict[str, Any]) -> int:
        chat_id = int(asked.get("chat_id") or 0)
        if chat_id not in self.messages:
            raise Refused(400, "Bad Request: chat not found")
        if chat_id in self.blocked:
            raise Refused(403, "Forbidden: bot was blocked by the user")
        return chat_id

    def _media(self, kind: str, named: str, files: dict[str, bytes]) -> tuple[bytes, dict[str, Any]]:
        """A file of this request, or one that Telegram has."""
        name = named.removeprefix("attach://")
        if named in self.files:
            stored = self.files[named]
        elif name in files:
            if len(files[name]) > (MOST_PHOTO_BYTES if kind == "photo" else MOST_FILE_BYTES):
                raise Refused(413, "Request Entity Too Large")
            stored = self.store(files[name], f"{kind}s", ".jpg" if kind == "photo" else ".bin")
        elif named.startswith("http"):
            raise Refused(400, "Bad Request: wrong type of the web page content")
        else:
            raise Refused(400, "Bad Request: wrong file identifier/HTTP URL specified")
        ids = {"file_id": stored.id, "file_unique_id": f"AQ{stored.id}", "file_size": stored.size}
        if kind == "document":
            return stored.content, {"document": {**ids, "file_name": "file", "mime_type": "application/octet-stream"}}
        return stored.content, {"photo": [{**ids, **_size(stored.content)}]}

    # ---- editing ----

    def edit_text(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        message = self._own(asked)
        if message.kind != "text":
            raise Refused(400, "Bad Request: there is no text in the message to edit")
        return self._edited(message, asked, {"text": _text(asked, "text", 4096)}, message.content)

    def edit_caption(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        message = self._own(asked)
        if message.kind == "text":
            raise Refused(400, "Bad Request: there is no caption in the message to edit")
        shown = {message.kind: message.now[message.kind], **_caption(asked)}
        return self._edited(message, asked, shown, message.content)

    def edit_media(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        message = self._own(asked)
        media = asked["media"]
        if media["type"] not in ("photo", "document"):
            raise Refused(400, "Bad Request: wrong media type")
        content, shown = self._media(media["type"], media["media"], files)
        return self._edited(message, asked, {**shown, **_caption(media)}, content)

    def edit_markup(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        message = self._own(asked)
        shown = {name: message.now[name] for name in (message.kind, "caption") if name in message.now}
        return self._edited(message, asked, shown, message.content)

    def delete_message(self, asked: dict[str, Any], files: dict[str, bytes]) -> bool:
        self._own(asked).deleted = True
        return True

    def _own(self, asked: dict[str, Any]) -> Message:
        with self.lock:
            found = self.messages[self._chat(asked)].get(int(asked.get("message_id") or 0))
            if found is None or found.deleted:
                raise Refused(400, "Bad Request: message to edit not found")
            return found

    def _edited(
        self, message: Message, asked: dict[str, Any], shown: dict[str, Any], content: bytes | None
    ) -> dict[str, Any]:
        """Without a `reply_markup` the buttons are gone, as there."""
        with self.lock:
            kept = {name: message.now[name] for name in ("message_id", "date", "from", "chat")}
            new = {**kept, **shown, **_markup(asked)}
            if new == {name: value for name, value in message.now.items() if name != "edit_date"}:
                told = "specified new message content and reply markup are exactly the same as a current content"
                raise Refused(400, f"Bad Request: message is not modified: {told} and reply markup of the message")
            message.before.append(message.now)
            message.edited_at.append(time.monotonic())
            message.now = {**new, "edit_date": int(time.time())}
            message.content = content
            return message.now

    # ---- the rest ----

    def answer_query(self, asked: dict[str, Any], files: dict[str, bytes]) -> bool:
        pressed = self.queries.pop(str(asked.get("callback_query_id")), None)
        if pressed is None or time.monotonic() - pressed > self.queries_live_s:
            told = "query is too old and response timeout expired or query ID is invalid"
            raise Refused(400, f"Bad Request: {told}")
        self.answered.append(asked)
        return True

    def get_file(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        stored = self.files.get(str(asked.get("file_id")))
        if stored is None:
            raise Refused(400, "Bad Request: wrong file_id or the file is temporarily unavailable")
        if stored.size > MOST_DOWNLOAD_BYTES:
            raise Refused(400, "Bad Request: file is too big")
        about = {"file_id": stored.id, "file_unique_id": f"AQ{stored.id}", "file_size": stored.size}
        return {**about, "file_path": stored.path}

    def chat_action(self, asked: dict[str, Any], files: dict[str, bytes]) -> bool:
        self._chat(asked)
        return True


METHODS: dict[str, Callable[..., Any]] = {
    "getme": lambda bot, asked, files: BOT,
    "setmycommands": lambda bot, asked, files: True,
    "sendmessage": BotApi.send_message,
    "sendphoto": BotApi.send_photo,
    "senddocument": BotApi.send_document,
    "editmessagetext": BotApi.edit_text,
    "editmessagecaption": BotApi.edit_caption,
    "editmessagemedia": BotApi.edit_media,
    "editmessagereplymarkup": BotApi.edit_markup,
    "deletemessage": BotApi.delete_message,
    "answercallbackquery": BotApi.answer_query,
    "sendchataction": BotApi.chat_action,
    "getfile": BotApi.get_file,
    "setwebhook": lambda bot, asked, files: bot.updates.set_webhook(asked),
    "deletewebhook": lambda bot, asked, files: bot.updates.set_webhook({**asked, "url": ""}),
    "getwebhookinfo": lambda bot, asked, files: bot.updates.webhook_info(),
    "getupdates": lambda bot, asked, files: bot.updates.poll(asked),
}


@contextmanager
def telegram(*, token: str = TOKEN, seed: int = 0) -> Iterator[BotApi]:
    with serve() as server:
        bot = BotApi(server, token, seed)
        try:
            yield bot
        finally:
            bot.updates.close()


_JSON = {"Content-Type": "application/json"}


def _refusal(refused: Refused) -> Reply:
    document: dict[str, Any] = {"ok": False, "error_code": refused.code, "description": str(refused)}
    headers = dict(_JSON)
    if refused.parameters:
        document["parameters"] = refused.parameters
        headers |= {"Retry-After": str(refused.parameters["retry_after"])} if "retry_after" in refused.parameters else {}
    return Reply(refused.code, json.dumps(document).encode(), headers)


def _read(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The parameters, wherever they stand, with nested ones read; and the files by the names of their parts."""
    asked: dict[str, Any] = dict(request.query)
    kind = request.headers.get("content-type", "").partition(";")[0]
    files: dict[str, bytes] = {}
    if kind == "application/json":
        asked |= json.loads(request.body or b"{}")
    elif kind == "application/x-www-form-urlencoded":
        asked |= dict(parse_qsl(request.body.decode(), keep_blank_values=True))
    elif kind == "multipart/form-data":
        body = {"wsgi.input": io.BytesIO(request.body), "CONTENT_LENGTH": str(len(request.body))}
        environ = {"REQUEST_METHOD": "POST", "CONTENT_TYPE": request.headers["content-type"], **body}
        _, form, parts = parse_form_data(environ)
        asked |= dict(form.items())
        files = {name: part.read() for name, part in parts.items()}
    for name in ("reply_markup", "reply_parameters", "media", "allowed_updates", "link_preview_options"):
        if isinstance(asked.get(name), str):
            asked[name] = json.loads(asked[name])
    return asked, files


def _text(asked: dict[str, Any], name: str, most: int) -> str:
    text = str(asked.get(name, ""))
    if str(asked.get("parse_mode", "")).upper() == "HTML":
        text = _plain(text)
    if not text.strip() and name == "text":
        raise Refused(400, "Bad Request: message text is empty")
    if len(text) > most:
        raise Refused(400, f"Bad Request: message {'is' if name == 'text' else 'caption is'} too long")
    return text


def _caption(asked: dict[str, Any]) -> dict[str, str]:
    caption = _text(asked, "caption", 1024)
    return {"caption": caption} if caption else {}


def _plain(text: str) -> str:
    """Its tags must be Telegram's, closed in order; anything else that begins with < is refused."""
    open_tags: list[str] = []
    for found in re.finditer(r"<(/?)([a-zA-Z-]*)[^>]*>?", text):
        closing, tag = found.groups()
        at = f"at byte offset {len(text[: found.start()].encode())}"
        if tag not in TAGS:
            raise Refused(400, f'Bad Request: can\'t parse entities: Unsupported start tag "{tag}" {at}')
        if not closing:
            open_tags.append(tag)
        elif not open_tags or open_tags.pop() != tag:
            raise Refused(400, f"Bad Request: can't parse entities: Unexpected end tag {at}")
    if open_tags:
        raise Refused(400, f"Bad Request: can't parse entities: Can't find end tag corresponding to start tag {open_tags[-1]}")
    bare = re.sub(r"<[^>]*>", "", text)
    return bare.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")


def _markup(asked: dict[str, Any]) -> dict[str, Any]:
    markup = asked.get("reply_markup")
    if not markup or not markup.get("inline_keyboard"):
        return {}
    for button in (button for row in markup["inline_keyboard"] for button in row):
        if "callback_data" in button and not 1 <= len(button["callback_data"].encode()) <= 64:
            raise Refused(400, "Bad Request: BUTTON_DATA_INVALID")
    return {"reply_markup": markup}


def _size(content: bytes) -> dict[str, int]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError):
        raise Refused(400, "Bad Request: IMAGE_PROCESS_FAILED") from None
    if width + height > 10_000 or max(width, height) > 20 * min(width, height):
        raise Refused(400, "Bad Request: PHOTO_INVALID_DIMENSIONS")
    return {"width": width, "height": height}
