"""What callers carry for us and are not to look into: where a list goes on (`cursor`, `next_cursor`), an OAuth `state`.

All of it is base64 in its form for URLs, without padding ([RFC 4648 §5](https://www.rfc-editor.org/rfc/rfc4648#section-5)).
"""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import UUID

from web.problems import invalid


def cursor_of(last: UUID) -> str:
    return _text(last.bytes)


def read_cursor(cursor: str) -> UUID:
    """Raises the problem that names the field."""
    try:
        return UUID(bytes=_bytes(cursor))
    except ValueError:
        raise invalid("cursor", "is not a next_cursor of ours", "query") from None


def packed(value: object) -> str:
    """Anything that JSON can say."""
    return _text(json.dumps(value).encode())


def unpacked(text: str) -> Any:
    """What was packed, or whatever else a caller has made up. Raises ValueError."""
    try:
        return json.loads(_bytes(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    # Not more padding than is missing: from Python 3.13 on that is an error.
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
