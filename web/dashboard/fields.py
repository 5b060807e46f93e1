"""What stands in the address or the form of a page, as texts that can be looked for and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from flask import request

from agentflow.jobs.text import is_storable
from web.dashboard.words import say
from web.problems import Refused

_MOST_CHARACTERS: Final = 200


def asked(name: str, most: int = _MOST_CHARACTERS) -> str:
    """Of the address; what cannot be looked for is not asked."""
    text = _stripped(request.args, name, most)
    return text if is_storable(text) else ""


def number_asked(name: str, *, least: int, most: int, default: int) -> int:
    try:
        return min(most, max(least, int(asked(name, 10) or default)))
    except ValueError:
        return default


def id_asked(name: str) -> UUID | None:
    """None where none is; raises Refused where it is no id."""
    text = asked(name)
    try:
        return UUID(text) if text else None
    except ValueError:
        raise Refused(422, say("{field} is not known.", field=name)) from None


def given(name: str, most: int = _MOST_CHARACTERS) -> str | None:
    """Of the form; None where nothing was filled in. What cannot be stored is for the check behind it to refuse."""
    return _stripped(request.form, name, most) or None


def _stripped(values: Mapping[str, str], name: str, most: int) -> str:
    return values.get(name, "").strip()[:most]
