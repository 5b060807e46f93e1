"""What was sent to the bot, as files of the organization."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from agentflow.comfyui.pictures import HEAD_BYTES, SUFFIXES, media_type
from agentflow.errors import Permanent
from agentflow.telegram.requests import Kept, Request

if TYPE_CHECKING:
    from agentflow.worker.running import JobContext


class NotAPicture(Permanent):
    """The file is none that a renderer reads, whatever it calls itself."""


def fetch(context: JobContext, request: Request, picture: Kept) -> str:
    """Stored under the key that is returned. Raises NotAPicture, Refused `too_large`, and what Telegram.call raises."""
    system = context.system
    with system.telegram.file(context, picture.file_id) as pieces:
        head = b""
        while len(head) < HEAD_BYTES and (piece := next(pieces, None)) is not None:
            head += piece
        kind = media_type(head)
        if kind is None:
            raise NotAPicture("the file is no JPEG, PNG or WebP", code="telegram_not_a_picture")
        key = f"o/{request.organization_id}/telegram/{request.id}/{picture.message_id}{SUFFIXES[kind]}"
        with system.storage.writer(key, content_type=kind) as writer:
            for each in itertools.chain([head], pieces):
                writer.write(each)
    return key
