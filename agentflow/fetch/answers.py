"""What an answer's status and headers say."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore2

from agentflow.errors import Permanent, Transient
from agentflow.fetch.urls import Place

MAX_RETRY_AFTER_S = 3600.0
POST_ANSWER_BYTES = 2048

_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+")


@dataclass(frozen=True)
class Fetched:
    url: str  # after redirects; may hold a secret in its query, like the one given
    size: int
    content_type: str | None  # `video/mp4`, without parameters
    filename: str | None  # as named by the server or the URL, safe as a name but not unique


@dataclass(frozen=True)
class Posted:
    """An answer to a POST: its status, the seconds that it asked to be left alone for, and the beginning of its body."""

    status: int
    retry_after_s: float | None
    body: bytes

    def text(self, most: int) -> str:
        """The body as text that can be stored."""
        return self.body.decode(errors="replace").replace("\x00", "\ufffd")[:most]


def headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): _text(value) for name, value in raw}


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def accepted(place: Place, status: int, answer: dict[str, str], max_bytes: int) -> int | None:
    """The size of the file that follows, where it is told. Raises what the answer means when no usable file follows."""
    if status not in (200, 203):
        raise _refusal(place, status, answer)
    if answer.get("content-encoding", "").lower() not in ("", "identity"):
        raise Permanent(f"{place.netloc} sends the file only compressed", code="url_rejected")
    total = int(answer["content-length"]) if "content-length" in answer else None
    if total is not None and total > max_bytes:
        raise too_large(place, max_bytes)
    return total


def _refusal(place: Place, status: int, answer: dict[str, str]) -> Permanent | Transient:
    if status in (408, 425, 429) or status >= 500:
        return Transient(
            f"{place.netloc} answered {status}", code="url_busy", retry_after_s=retry_after(answer.get("retry-after"))
        )
    if status in (404, 410):
        return Permanent(f"there is no such file at {place.netloc} ({status})", code="url_not_found")
    if status in (401, 403):
        return Permanent(f"{place.netloc} does not let us have the file ({status})", code="url_forbidden")
    return Permanent(f"{place.netloc} answered {status} instead of the file", code="url_rejected")


def retry_after(value: str | None) -> float | None:
    """Seconds or a date (RFC 9110, 10.2.3); None for what is neither."""
    if not value:
        return None
    if value.isdecimal() and value.isascii():
        return min(float(value[:12]), MAX_RETRY_AFTER_S)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def content_type(answer: dict[str, str]) -> str | None:
    kind = answer.get("content-type", "").partition(";")[0].strip().lower()
    return kind if _MEDIA_TYPE.fullmatch(kind) else None


def filename(answer: dict[str, str], url: str) -> str | None:
    header = Message()
    # The header may hold anything: the parser of the standard library takes it all, and knows RFC 5987's filename*.
    header["Content-Disposition"] = "".join(c for c in answer.get("content-disposition", "") if c.isprintable())
    try:
        named = header.get_filename()
    except (ValueError, LookupError):  # an encoding that is none
        named = None
    for name in (named, unquote(urlsplit(url).path)):
        last = re.split(r"[/\\]", name or "")[-1]
        safe = "".join(c for c in last if c.isprintable()).strip(". ")
        if safe:
            return safe.encode()[-150:].decode(errors="ignore").strip(". ")  # the end, for the sake of the suffix
    return None


def too_large(place: Place, max_bytes: int) -> Permanent:
    return Permanent(f"the file at {place.netloc} is larger than {max_bytes} bytes", code="too_large")


def beginning(response: Any) -> bytes:
    """What comes of the body, for the log: a receiver that trickles it, or cuts it, has answered all the same."""
    body = b""
    try:
        for piece in response.iter_stream():
            body += piece
            if len(body) >= POST_ANSWER_BYTES:
                break
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        return body[:POST_ANSWER_BYTES]
    return body[:POST_ANSWER_BYTES]
