"""What is mirrored of an account, how the API gives it, and what one thing looks like in the mirror."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from agentflow.errors import Transient

#: `changes`: filtered by when they were changed; `log`: by when they were made, and never changed; `whole`: read as a whole.
How = Literal["changes", "log", "whole"]

_PERSONAL: Final = "id created_by updated_by created_at updated_at responsible_user_id group_id account_id"


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of thing. `name` is its `entity_type` in the mirror; `ordered`: the API sorts it by the time of the change.

    `known` are the fields that are expected; others are kept as well, and said once.
    """

    name: str
    path: str
    embedded: str
    how: How
    known: frozenset[str]
    ordered: bool = False
    more: str | None = None


def _stream(name: str, path: str, how: How, known: str, **more: Any) -> Stream:
    return Stream(name, path, path.rpartition("/")[2], how, frozenset(known.split()), **more)


_NOTE: Final = f"{_PERSONAL} entity_id note_type params"
_FIELD: Final = (
    "id name type account_id code sort is_api_only enums group_id required_statuses is_deletable is_predefined"
    " entity_type remind currency hidden_statuses chained_lists tracking_callback search_in triggers settings"
)
_PERSON: Final = f"{_PERSONAL} name closest_task_at is_deleted is_unsorted custom_fields_values _embedded"

#: In the order in which they are read: what things point to before the things.
STREAMS: Final[tuple[Stream, ...]] = (
    _stream(
        "pipelines",
        "leads/pipelines",
        "whole",
        "id name sort is_main is_unsorted_on is_archive account_id _embedded",
    ),
    _stream("users", "users", "whole", "id name email lang rights _embedded", more="role,group"),
    _stream("lead_fields", "leads/custom_fields", "whole", _FIELD),
    _stream("contact_fields", "contacts/custom_fields", "whole", _FIELD),
    _stream("company_fields", "companies/custom_fields", "whole", _FIELD),
    _stream(
        "events",
        "events",
        "log",
        "id type entity_id entity_type created_by created_at value_after value_before account_id _embedded",
    ),
    _stream(
        "leads",
        "leads",
        "changes",
        f"{_PERSONAL} name price status_id pipeline_id loss_reason_id closed_at closest_task_at is_deleted"
        " custom_fields_values score labor_cost is_price_computed is_price_modified_by_robot source_id _embedded",
        ordered=True,
        more="contacts,loss_reason",
    ),
    _stream("contacts", "contacts", "changes", f"{_PERSON} first_name last_name", ordered=True),
    _stream("companies", "companies", "changes", _PERSON, ordered=True),
    # Tasks can be filtered by their change and not sorted by it.
    _stream(
        "tasks",
        "tasks",
        "changes",
        f"{_PERSONAL} entity_id entity_type duration is_completed task_type_id text result complete_till",
    ),
    _stream("lead_notes", "leads/notes", "changes", _NOTE, ordered=True),
    _stream("contact_notes", "contacts/notes", "changes", _NOTE, ordered=True),
    _stream("company_notes", "companies/notes", "changes", _NOTE, ordered=True),
)
BY_NAME: Final[Mapping[str, Stream]] = {stream.name: stream for stream in STREAMS}
ENTITY_TYPES: Final = tuple(stream.name for stream in STREAMS if stream.how != "log")
#: What a webhook or an event may name, in its words and in ours.
TOUCHABLE: Final[Mapping[str, str]] = {
    word: name
    for name, words in {
        "leads": ("lead", "leads"),
        "contacts": ("contact", "contacts"),
        "companies": ("company", "companies"),
        "tasks": ("task", "tasks"),
    }.items()
    for word in words
}


#: Of the same data always the same text, whose hash tells what has changed.
_AS_TEXT: Final = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing as it goes into the mirror. `updated_at` in Unix seconds, 0 where the CRM names none; `gone`: in its trash."""

    id: int
    updated_at: int
    data: dict[str, Any]
    text: str
    hash: bytes
    gone: bool


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the CRM's own log. `touched`: what it says is gone or back, as stream and id."""

    id: str
    created_at: int
    text: str
    touched: tuple[str, int] | None


def thing(document: Any) -> Thing:
    """Raises Transient for what is none: nothing is guessed."""
    data = _plain(document)
    if not isinstance(data, dict) or not _is_number(data.get("id")):
        raise Transient("Kommo sent a thing without a number", code="crm_bad_answer")
    updated_at: Any = data.get("updated_at")
    text = _AS_TEXT.encode(data)
    return Thing(
        id=data["id"],
        updated_at=updated_at if _is_number(updated_at) else 0,
        data=data,
        text=text,
        hash=hashlib.sha256(text.encode()).digest()[:16],
        gone=data.get("is_deleted") is True,
    )


def event(document: Any) -> Event:
    """Raises Transient for what is none."""
    data = _plain(document)
    if not isinstance(data, dict) or "id" not in data or not _is_number(data.get("created_at")):
        raise Transient("Kommo sent an event without an id or a time", code="crm_bad_answer")
    name = TOUCHABLE.get(str(data.get("entity_type")))
    ended = str(data.get("type")).endswith(("_deleted", "_restored")) or data.get("type") == "entity_merged"
    touched = (name, data["entity_id"]) if ended and name and _is_number(data.get("entity_id")) else None
    return Event(str(data["id"]), data["created_at"], json.dumps(data, ensure_ascii=False), touched)


def drift(stream: Stream, things: Iterable[Thing]) -> set[tuple[str, str]]:
    """Fields that are not expected there, each with the kind of its value."""
    found = set()
    for each in things:
        for name in each.data.keys() - stream.known:
            found.add((name[:200], _kind(each.data[name])))
    return found


def _plain(value: Any) -> Any:
    """Without links, whose addresses name the page they were read from; and with texts that Postgres stores."""
    if isinstance(value, str):
        return _stored(value)
    if isinstance(value, dict):
        return {_stored(name): _plain(each) for name, each in value.items() if name != "_links"}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def _stored(text: str) -> str:
    """Without NUL, and with a question mark for each half of a surrogate pair."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    return text if text.isascii() else text.encode(errors="replace").decode()


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return kinds.get(type(value), "null")
