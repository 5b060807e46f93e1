"""A webhook's body as a value: JSON, or a form whose keys have PHP's brackets (`leads[add][0][id]=7`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import parse_qsl

from pydantic_core import from_json

MAX_FIELDS: Final = 20_000
MAX_DEPTH: Final = 32
#: Where a form gives a place a value of its own and others below it, as Kommo's do, the value of its own goes under this name.
OWN_VALUE: Final = "_value"
_FORM: Final = "application/x-www-form-urlencoded"
_BRACKETS: Final = re.compile(r"\[([^\[\]]*)\]")


def parse(body: bytes, content_type: str) -> Any:
    """None for what is neither JSON nor a form of at most MAX_FIELDS fields. In forms there are objects and texts, no lists."""
    if content_type.partition(";")[0].strip().lower() == _FORM:
        return _form(body)
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="none")
    except (ValueError, RecursionError):
        return None


def _form(body: bytes) -> Any:
    try:
        pairs = parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        return None
    if len(pairs) == 1 and pairs[0][0] == "payload":  # JSON inside a form: GitHub's other content type, Slack's buttons
        return parse(pairs[0][1].encode(errors="replace"), "application/json")
    return nested(pairs)


def nested(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Keys with brackets as objects in objects; `[]` counts up. A key that is nested too deep is one name as it stands."""
    root: dict[str, Any] = {}
    for key, value in pairs:
        node = root
        *above, last = _names(key)
        for name in above:
            name = name or str(len(node))
            below = node.get(name)
            if not isinstance(below, dict):
                below = {} if below is None else {OWN_VALUE: below}
                node[name] = below
            node = below
        last = last or str(len(node))
        if isinstance(node.get(last), dict):
            node[last][OWN_VALUE] = value
        else:
            node[last] = value
    return root


def items(node: Any) -> list[Any]:
    """The values of `[0]`, `[1]` … in their order; nothing for what is no object."""
    if not isinstance(node, dict):
        return []
    return [node[key] for key in sorted((k for k in node if k.isascii() and k.isdecimal()), key=lambda k: (len(k), k))]


def _names(key: str) -> list[str]:
    head, bracket, rest = key.partition("[")
    names = _BRACKETS.findall(bracket + rest)
    if not names or len(names) >= MAX_DEPTH or sum(map(len, names)) + 2 * len(names) != len(bracket + rest):
        return [key or "_"]
    return [head or "_", *names]
