"""Text that Postgres can store: it takes neither NUL nor half of a surrogate pair, plain or escaped inside JSON."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")


def is_storable(text: str) -> bool:
    """Whether a plain text, or a JSON text with what its escapes stand for, can be stored."""
    if _UNSTORABLE.search(text):
        return False
    return ("\\u0000" not in text and "\\ud" not in text.lower()) or not storable_json(text)[1]


def storable(text: str) -> str:
    """A plain text with U+FFFD in place of what cannot be stored."""
    return _UNSTORABLE.sub("\ufffd", text)


def storable_json(text: str) -> tuple[str, bool]:
    """A JSON text with U+FFFD in place of what cannot be stored, and whether anything was replaced."""
    if "\\u0000" not in text and "\\ud" not in text.lower() and not _UNSTORABLE.search(text):
        return text, False
    try:
        value = json.loads(text)
    except ValueError:
        return text, False
    cleaned = _cleaned(value)
    return (json.dumps(cleaned), True) if cleaned != value else (text, False)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value
