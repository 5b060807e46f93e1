"""Where a value stands in a webhook: `/data/id` (a JSON pointer, RFC 6901, into the body), `header:X-Name`, `event:type`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

#: What is known of an event beside its body and headers.
EVENT_FIELDS: Final = ("id", "type", "source", "delivery_id", "received_at")
#: As JSON Schema has it, for the API's document.
PATTERN: Final = rf"^(/[ -~]*|header:[A-Za-z0-9_-]{{1,100}}|event:({'|'.join(EVENT_FIELDS)}))$"
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")

#: Nothing stands there; not the same as null.
MISSING: Final[Any] = object()


def read(place: str, content: Any, headers: Mapping[str, str], event: Mapping[str, Any] | None = None) -> Any:
    """The value, or MISSING. `headers` by lower-case name."""
    kind, _, name = place.partition(":")
    if kind == "header":
        return headers.get(name.lower(), MISSING)
    if kind == "event":
        return (event or {}).get(name, MISSING)
    value = content
    for token in place.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and _INDEX.fullmatch(name) and int(name) < len(value):
            value = value[int(name)]
        else:
            return MISSING
    return value
