"""What reaches a bot: users who write and press buttons, and the updates on their way by webhook or long poll."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
from PIL import Image

if TYPE_CHECKING:
    from tests.telegram_server import BotApi

Update = dict[str, Any]


class Refused(Exception):
    """`ok: false`. The text is the description."""

    def __init__(self, code: int, description: str, **parameters: Any) -> None:
        super().__init__(description)
        self.code = code
        self.parameters = parameters


@dataclass(frozen=True)
class User:
    """A person in a private chat with the bot. Everything that they do makes an update, which is returned too."""

    bot: BotApi
    id: int
    about: dict[str, Any]

    @property
    def shown(self) -> dict[str, Any]:
        return {"id": self.id, "is_bot": False, "first_name": "Ann", "language_code": "en", **self.about}

    def text(self, text: str) -> Update:
        entities = [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}] if text.startswith("/") else []
        return self._message({"text": text, **({"entities": entities} if entities else {})})

    def photo(self, content: bytes, *, caption: str = "", size: int | None = None, **more: Any) -> Update:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        sizes = []
        for part in (0.1, 1.0):
            stored = self.bot.store(content, "photos", ".jpg", size=size)
            ids = {"file_id": stored.id, "file_unique_id": f"AQ{stored.id}", "file_size": round(stored.size * part)}
            sizes.append({**ids, "width": max(1, round(width * part)), "height": max(1, round(height * part))})
        return self._message({"photo": sizes, **({"caption": caption} if caption else {}), **more})

    def album(self, pictures: Sequence[bytes], *, caption: str = "") -> list[Update]:
        """One update for each picture; the caption stands on the first only, and nothing says where the album ends."""
        group = str(next(self.bot.ids) * 10**9)
        return [
            self.photo(content, caption="" if n else caption, media_group_id=group)
            for n, content in enumerate(pictures)
        ]

    def document(
        self, content: bytes, *, name: str = "in.png", type_: str = "image/png", caption: str = "", size: int | None = None
    ) -> Update:
        stored = self.bot.store(content, "documents", f".{name.rpartition('.')[2]}", size=size)
        ids = {"file_id": stored.id, "file_unique_id": f"AQ{stored.id}", "file_size": stored.size}
        document = {**ids, "file_name": name, "mime_type": type_}
        return self._message({"document": document, **({"caption": caption} if caption else {})})

    def press(self, message_id: int, data: str) -> Update:
        """A button under a message of the bot."""
        bot = self.bot
        with bot.lock:
            query_id = str(next(bot.ids) * 10**12)
            bot.queries[query_id] = time.monotonic()
            message = bot.messages[self.id][message_id].now
            query = {"id": query_id, "from": self.shown, "message": message, "chat_instance": "1", "data": data}
            return bot.updates.add({"callback_query": query})

    def _message(self, content: dict[str, Any]) -> Update:
        bot = self.bot
        with bot.lock:
            id_ = next(bot.ids)
            bot.updates.seen.setdefault(self.id, set()).add(id_)
            chat = {"id": self.id, "type": "private", "first_name": self.shown["first_name"]}
            about = {"message_id": id_, "date": int(time.time()), "from": self.shown, "chat": chat}
            return bot.updates.add({"message": {**about, **content}})


class Updates:
    """Pending updates. With a webhook they go there by themselves, one after the other, until each was answered 2xx.

    `times`: how often each is delivered, for bots that must bear a redelivery. `backwards`: the newest first.
    """

    def __init__(self, bot: BotApi) -> None:
        self.bot = bot
        self.pending: list[Update] = []
        self.seen: dict[int, set[int]] = {}  # messages of users, per chat
        self.webhook: dict[str, Any] = {}
        self.times = 1
        self.backwards = False
        self.retry_s = 0.2
        self.delivered: list[tuple[int, int]] = []  # update id and the status that the webhook answered
        self._last_error: dict[str, Any] = {}
        self._next = 10_000
        self._pollers = 0
        self._closed = False
        self._changed = threading.Condition()
        self._sender: threading.Thread | None = None

    def add(self, content: dict[str, Any]) -> Update:
        with self._changed:
            self._next += 1
            update = {"update_id": self._next, **content}
            allowed = self.webhook.get("allowed_updates")
            if not allowed or next(iter(content)) in allowed:
                self.pending.append(update)
            self._changed.notify_all()
            return update

    # ---- webhook ----

    def set_webhook(self, asked: dict[str, Any]) -> bool:
        url = str(asked.get("url", ""))
        secret = str(asked.get("secret_token", ""))
        if url and urlsplit(url).scheme not in ("https", "http"):  # http: what a local Bot API server lets through
            raise Refused(400, "Bad Request: bad webhook: An HTTPS URL must be provided for webhook")
        if any(not (each.isalnum() or each in "_-") for each in secret) or len(secret) > 256:
            raise Refused(400, "Bad Request: secret token contains unallowed characters")
        with self._changed:
            kept = {"allowed_updates": self.webhook["allowed_updates"]} if "allowed_updates" in self.webhook else {}
            self.webhook = {**kept, **asked, "url": url} if url else kept
            if str(asked.get("drop_pending_updates", "")).lower() == "true":
                self.pending.clear()
            if url and self._sender is None:
                self._sender = threading.Thread(target=self._send_all, daemon=True)
                self._sender.start()
            self._changed.notify_all()
        return True

    def webhook_info(self) -> dict[str, Any]:
        about = {"url": self.webhook.get("url", ""), "has_custom_certificate": False, **self._last_error}
        optional = {name: self.webhook[name] for name in ("max_connections", "allowed_updates") if name in self.webhook}
        return {**about, "pending_update_count": len(self.pending), **optional}

    def post(self, update: Update) -> int:
        """Deliver this one now, whatever was delivered before; the status of the answer, 0 for none."""
        headers = {"X-Telegram-Bot-Api-Secret-Token": self.webhook["secret_token"]} if self.webhook.get("secret_token") else {}
        try:
            status = httpx2.post(self.webhook["url"], json=update, headers=headers, timeout=60).status_code
        except httpx2.HTTPError:
            status = 0
        self.delivered.append((update["update_id"], status))
        return status

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (self.pending and self.webhook.get("url")):
                    self._changed.wait()
                if self._closed:
                    return
                update = self.pending[-1 if self.backwards else 0]
            statuses = [self.post(update) for _ in range(self.times)]
            with self._changed:
                if all(200 <= status < 300 for status in statuses):
                    with suppress(ValueError):
                        self.pending.remove(update)
                else:
                    told = f"Wrong response from the webhook: {statuses[-1]}"
                    self._last_error = {"last_error_date": int(time.time()), "last_error_message": told}
                    self._changed.wait(self.retry_s)

    # ---- long poll ----

    def poll(self, asked: dict[str, Any]) -> list[Update]:
        offset, limit = int(asked.get("offset", 0)), int(asked.get("limit", 100))
        end = time.monotonic() + min(50.0, float(asked.get("timeout", 0)))
        with self._changed:
            if self.webhook.get("url"):
                active = "can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
                raise Refused(409, f"Conflict: {active}")
            self._pollers += 1
            mine = self._pollers
            self._changed.notify_all()
            if offset > 0:
                self.pending = [update for update in self.pending if update["update_id"] >= offset]
            elif offset < 0:
                self.pending = self.pending[offset:]
            while not self.pending and not self._closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
                if self._pollers != mine:
                    only = "terminated by other getUpdates request; make sure that only one bot instance is running"
                    raise Refused(409, f"Conflict: {only}")
            return self.pending[:limit]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
