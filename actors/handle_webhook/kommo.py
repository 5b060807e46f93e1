"""Kommo's events: a hint of what has changed. The entities are noted, and the sync of the account, held back until it is quiet
for a moment, reads them again.

Shapes: https://developers.kommo.com/reference/webhook-events. Companies come under `contacts`, too; a note names what it is at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from actors.handle_webhook.action import Done, Happened
from agentflow.errors import Permanent
from agentflow.kommo import touched
from agentflow.system import Transaction
from agentflow.webhooks import content

Entity = tuple[str, int]  # type (`leads`, `contacts`, `companies`, `tasks`) and id

_GROUPS: Final = {"leads": "leads", "contacts": "contacts", "companies": "companies", "task": "tasks", "tasks": "tasks"}
#: What notes, tasks and messages call the thing that they are at.
_ELEMENTS: Final = {
    "1": "contacts", "contact": "contacts", "contacts": "contacts",
    "2": "leads", "lead": "leads", "leads": "leads",
    "3": "companies", "company": "companies", "companies": "companies",
}  # fmt: skip
_MOST_ID: Final = 1 << 62


def act(transaction: Transaction, happened: Happened) -> Done:
    """Raises Permanent with code webhook_unreadable for what is no form."""
    account_id, of = happened.endpoint.config.account_id, happened.event.organization_id
    if not isinstance(happened.content, dict) or account_id is None:
        raise Permanent("the body is not a form that can be read", code="webhook_unreadable")
    entities = sorted(set(entities_of(happened.content)))
    if not entities:
        return Done("ignored", "it names no lead, contact, company or task")
    submitted = touched.read_again(transaction, of, account_id, entities)
    return Done("done", job_id=submitted.job.id)


def entities_of(form: dict[str, Any]) -> Iterator[Entity]:
    """What a delivery names, by our types."""
    for group, actions in form.items():
        if not isinstance(actions, dict):
            continue
        for action, entries in actions.items():
            for entry in content.items(entries):
                if isinstance(entry, dict):
                    yield from _named(group, action, entry)


def _named(group: str, action: str, entry: dict[str, Any]) -> Iterator[Entity]:
    if action == "note":
        note = entry.get("note", entry)
        if isinstance(note, dict):
            yield from _at(note.get("element_type"), note.get("element_id"))
    elif group in _GROUPS:
        is_company = group == "contacts" and _scalar(entry.get("type")) == "company"
        yield from _entity("companies" if is_company else _GROUPS[group], entry.get("id"))
    elif group in ("message", "outgoing_message", "talk", "unsorted"):
        yield from _entity("contacts", entry.get("contact_id"))
        yield from _entity("leads", entry.get("lead_id"))
        yield from _at(
            entry.get("entity_type", entry.get("element_type")), entry.get("entity_id", entry.get("element_id"))
        )
        for accepted in content.items(_below(entry, "accept_result", "leads")):
            yield from _entity("leads", accepted)


def _at(kind: Any, id_: Any) -> Iterator[Entity]:
    if (type_ := _ELEMENTS.get(_scalar(kind))) is not None:
        yield from _entity(type_, id_)


def _entity(type_: str, id_: Any) -> Iterator[Entity]:
    text = _scalar(id_)
    if text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) < _MOST_ID:
        yield type_, int(text)


def _below(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _scalar(value: Any) -> str:
    """A text, also where others lie below it (`[type]=3` and `[type][message_uuid]=…`)."""
    if isinstance(value, dict):
        value = value.get(content.OWN_VALUE)
    return value if isinstance(value, str) else ""
