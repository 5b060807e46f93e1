"""What was sent to an account to be written, one row for each thing, made before the request.

Kommo repeats a `request_id` in its answer and does not keep it, and has no idempotency keys. So where the answer to a creation is
lost, what was made has to be looked for: among what was created since, the same in everything that was sent, and not the answer
to another write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection

WriteState = Literal["sent", "done", "refused"]


@dataclass(frozen=True, slots=True)
class Write:
    """`sent`: it was, and no answer is known; `sent_s` by the CRM's clock, `age_s` ago."""

    item: int
    state: WriteState
    sent_s: int
    age_s: float
    entity_id: int | None
    errors: Any


def of_job(conn: Connection, organization_id: int, job_id: UUID) -> dict[int, Write]:
    rows = conn.execute(
        "select item, state, sent_s, extract(epoch from clock_timestamp() - sent_at)::float8, entity_id, errors"
        " from agentflow.crm_writes where organization_id = %s and job_id = %s",
        (organization_id, job_id),
    ).fetchall()
    return {row[0]: Write(*row) for row in rows}


def intend(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    job_id: UUID,
    entity_type: str,
    items: Sequence[int],
    sent_s: int,
) -> None:
    """To be committed before the request is sent."""
    conn.execute(
        "insert into agentflow.crm_writes as w (job_id, item, organization_id, account_id, entity_type, sent_s)"
        " select %s, item, %s, %s, %s, %s from unnest(%s::integer[]) item"
        " on conflict (job_id, item) do update set sent_at = clock_timestamp(), sent_s = excluded.sent_s"
        " where w.state = 'sent'",
        (job_id, organization_id, account_id, entity_type, sent_s, list(items)),
    )


def assume_sent(conn: Connection, since: datetime) -> None:
    """Whatever open jobs are to create may have been created after `since`, by a system that is gone: it is looked for first.

    Clocks of servers may differ by a minute. To be called before anybody else works on this database.
    """
    conn.execute(
        "insert into agentflow.crm_writes (job_id, item, organization_id, account_id, entity_type, sent_at, sent_s)"
        " select j.id, i.n - 1, j.organization_id, a.id, j.payload ->> 'kind', %s, extract(epoch from %s)::bigint - 60"
        " from agentflow.jobs j join agentflow.crm_accounts a"
        " on a.organization_id = j.organization_id and a.id::text = j.payload ->> 'account_id'"
        " cross join jsonb_array_elements(j.payload -> 'items') with ordinality i (item, n)"
        " where j.type = 'write_crm' and j.state in ('queued', 'running') and not i.item ? 'id' on conflict do nothing",
        (since, since),
    )


def take_back(conn: Connection, organization_id: int, job_id: UUID, items: Sequence[int]) -> None:
    """It is certain that nothing was done."""
    conn.execute(
        "delete from agentflow.crm_writes where organization_id = %s and job_id = %s and item = any (%s) and state = 'sent'",
        (organization_id, job_id, list(items)),
    )


def done(conn: Connection, organization_id: int, job_id: UUID, made: Mapping[int, int]) -> None:
    """`made`: the id of each item."""
    conn.execute(
        "update agentflow.crm_writes w set state = 'done', entity_id = m.id from unnest(%s::integer[], %s::bigint[]) m (item, id)"
        " where w.organization_id = %s and w.job_id = %s and w.item = m.item",
        (list(made), list(made.values()), organization_id, job_id),
    )


def changed(conn: Connection, organization_id: int, job_id: UUID, items: Sequence[int]) -> None:
    """Changes may be sent again: they hold no id that a creation could claim."""
    conn.execute(
        "update agentflow.crm_writes set state = 'done' where organization_id = %s and job_id = %s and item = any (%s)",
        (organization_id, job_id, list(items)),
    )


def refused(conn: Connection, organization_id: int, job_id: UUID, errors: Mapping[int, Any]) -> None:
    """`errors` of each item, as the CRM names them."""
    conn.execute(
        "update agentflow.crm_writes w set state = 'refused', errors = r.errors"
        " from unnest(%s::integer[], %s::jsonb[]) r (item, errors)"
        " where w.organization_id = %s and w.job_id = %s and w.item = r.item",
        (list(errors), [Jsonb(each) for each in errors.values()], organization_id, job_id),
    )


def taken(conn: Connection, organization_id: int, account_id: UUID, entity_type: str, ids: Sequence[int]) -> set[int]:
    """Which of these answer for a write already."""
    rows = conn.execute(
        "select entity_id from agentflow.crm_writes where organization_id = %s and account_id = %s"
        " and entity_type = %s and entity_id = any (%s)",
        (organization_id, account_id, entity_type, list(ids)),
    ).fetchall()
    return {row[0] for row in rows}


#: What is compared, where it was sent. Not tags and links, which are written under another form than they are read in.
_COMPARED: Final = (
    *("name", "first_name", "last_name", "price", "status_id", "pipeline_id", "responsible_user_id"),
    *("text", "complete_till", "entity_id", "entity_type", "task_type_id", "note_type", "loss_reason_id"),
)


def is_made_from(document: Any, item: Mapping[str, Any]) -> bool:
    """Whether a thing of the CRM is what this item asked for."""
    if not isinstance(document, dict):
        return False
    if any(str(document.get(name)) != str(item[name]) for name in _COMPARED if item.get(name) is not None):
        return False
    params, had = item.get("params") or {}, document.get("params") or {}
    if any(str(had.get(name)) != str(value) for name, value in params.items()):
        return False
    fields = document.get("custom_fields_values") or []
    return all(
        any(_is_field(each, wanted) for each in fields) for wanted in item.get("custom_fields_values") or [] if wanted
    )


def _is_field(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    name = "field_id" if "field_id" in wanted else "field_code"
    if there.get(name) != wanted.get(name):
        return False
    return all(
        any(all(str(value.get(key)) == str(each[key]) for key in each) for value in there.get("values") or [])
        for each in wanted.get("values") or []
    )
