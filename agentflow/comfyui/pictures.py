"""What kind of picture a file is, by its first bytes: those that ComfyUI's LoadImage reads and browsers show."""

from __future__ import annotations

from typing import Final, Literal

HEAD_BYTES: Final = 16
SUFFIXES: Final = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}

MediaType = Literal["image/png", "image/jpeg", "image/webp"]


def media_type(head: bytes) -> MediaType | None:
    """By the first HEAD_BYTES of a file. None: it is no PNG, JPEG or WebP."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return None
