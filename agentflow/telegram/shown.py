"""What a request's message shows, and since when: so that nothing is sent again that stands there, nor sooner than people read.

Kept in Redis, with an end. Where it is lost, or where there is no Redis, a message is edited once more, to what it is.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Final
from uuid import UUID

import redis

_KEEP_S: Final = 3600
#: People read no faster, and Telegram counts edits as messages.
EVERY_S: Final = 3.0


class Shown:
    """Safe in threads."""

    def __init__(self, client: redis.Redis | None, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def wait_s(self, request_id: UUID) -> float:
        """Seconds until the message may be edited again."""
        at, _ = self._read(request_id)
        return max(0.0, min(EVERY_S, at + EVERY_S - time.time()))

    def is_shown(self, request_id: UUID, content: str) -> bool:
        return self._read(request_id)[1] == _hash(content)

    def remember(self, request_id: UUID, content: str) -> None:
        if self._client is None:
            return
        try:
            self._client.set(self._key(request_id), f"{time.time():.3f} {_hash(content)}", ex=_KEEP_S)
        except redis.RedisError:
            return  # an edit to what stands there already, at the most

    def _read(self, request_id: UUID) -> tuple[float, str]:
        if self._client is None:
            return 0.0, ""
        try:
            found: Any = self._client.get(self._key(request_id))
        except redis.RedisError:
            found = None
        at, _, content = (found or b"0 ").decode().partition(" ")
        return float(at), content

    def _key(self, request_id: UUID) -> str:
        return f"{self._prefix}:telegram:{request_id}"


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:32]
