"""What was sent to the bot, as files of the organization."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from agentflow.errors import Permanent
from agentflow.telegram.requests import Kept, Request

if TYPE_CHECKING:
    from agentflow.worker.running import JobContext

#: Enough to tell what a file is.
_HEAD_BYTES: Final = 16


class NotAPicture(Permanent):
    """The file is none that a renderer reads, whatever it calls itself."""


def fetch(context: JobContext, request: Request, picture: Kept) -> str:
    """Stored under the key that is returned. Raises NotAPicture, Refused `too_large`, and what Telegram.call raises."""
    system = context.system
    with system.telegram.file(context, picture.file_id) as pieces:
        head = b""
        while len(head) < _HEAD_BYTES and (piece := next(pieces, None)) is not None:
            head += piece
        suffix, media_type = _what(head)
        key = f"o/{request.organization_id}/telegram/{request.id}/{picture.message_id}.{suffix}"
        with system.storage.writer(key, content_type=media_type) as writer:
            for each in itertools.chain([head], pieces):
                writer.write(each)
    return key


def _what(head: bytes) -> tuple[str, str]:
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg", "image/jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", "image/png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp", "image/webp"
    raise NotAPicture("the file is no JPEG, PNG or WebP", code="telegram_not_a_picture")
