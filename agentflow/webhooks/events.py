"""Deliveries that were kept, as rows: how they are found, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from agentflow.database import Connection

Verdict = Literal["verified", "by_token", "conflict", "refused"]
Outcome = Literal["done", "stale", "ignored", "failed"]

VERDICTS: Final[tuple[Verdict, ...]] = ("verified", "by_token", "conflict", "refused")
OUTCOMES: Final[tuple[Outcome, ...]] = ("done", "stale", "ignored", "failed")


@dataclass(frozen=True, slots=True)
class Event:
    """Everything but headers and body. `job_id` is the job that handles it, `action_job_id` the one that was made of it."""

    id: UUID
    organization_id: int
    endpoint_id: UUID
    received_at: datetime
    verdict: Verdict
    reason: str | None
    delivery_id: str | None
    type: str | None
    entity: str | None
    version: datetime | None
    size_bytes: int
    duplicates: int
    replays: int
    job_id: UUID | None
    outcome: Outcome | None
    detail: str | None
    action_job_id: UUID | None
    handled_by: UUID | None
    handled_at: datetime | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events; None: all. `pending`: those that were not handled."""

    endpoint_id: UUID | None = None
    source: str | None = None
    type: str | None = None
    verdict: Verdict | None = None
    outcome: Outcome | Literal["pending"] | None = None
    received_from: datetime | None = None
    received_to: datetime | None = None


COLUMNS: Final = ", ".join(f"v.{name}" for name in Event.__dataclass_fields__)


def get(conn: Connection, organization_id: int | None, event_id: UUID) -> Event | None:
    row = conn.execute(
        f"select {COLUMNS} from agentflow.webhook_events v where v.id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or v.organization_id = %(organization)s)",
        {"id": event_id, "organization": organization_id},
    ).fetchone()
    return Event(*row) if row else None


def lock(conn: Connection, organization_id: int, event_id: UUID) -> Event | None:
    """The same, and nobody else handles it until the transaction ends."""
    row = conn.execute(
        f"select {COLUMNS} from agentflow.webhook_events v where v.id = %s and v.organization_id = %s"  # noqa: S608 - constants
        " for no key update",
        (event_id, organization_id),
    ).fetchone()
    return Event(*row) if row else None


def delivered(conn: Connection, event: Event) -> tuple[dict[str, str], bytes]:
    """Its headers, redacted, and its body. For a row that was read in this transaction."""
    row = conn.execute(
        "select headers, body from agentflow.webhook_events where id = %s and organization_id = %s",
        (event.id, event.organization_id),
    ).fetchone()
    return (row[0], bytes(row[1])) if row else ({}, b"")


def search(
    conn: Connection, organization_id: int | None, wanted: Filter, *, before: UUID | None = None, limit: int
) -> list[Event]:
    """The newest first."""
    rows = conn.execute(
        f"select {COLUMNS} from agentflow.webhook_events v where {_MATCHES}"  # noqa: S608 - constants
        " and (%(before)s::uuid is null or v.id < %(before)s) order by v.id desc limit %(limit)s",
        {**_values(organization_id, wanted), "before": before, "limit": limit},
    ).fetchall()
    return [Event(*row) for row in rows]


def matching(conn: Connection, organization_id: int, wanted: Filter, *, limit: int) -> tuple[int, list[Event]]:
    """How many there are, and the oldest of them. Not those that were refused: nobody knows who sent them."""
    values = {**_values(organization_id, wanted), "limit": limit}
    let_in = "v.verdict <> 'refused'"
    row = conn.execute(
        f"select count(*) from agentflow.webhook_events v where {_MATCHES} and {let_in}",  # noqa: S608 - constants
        values,
    ).fetchone()
    found = conn.execute(
        f"select {COLUMNS} from agentflow.webhook_events v where {_MATCHES} and {let_in}"  # noqa: S608 - constants
        " order by v.id limit %(limit)s",
        values,
    ).fetchall()
    return (row[0] if row else 0), [Event(*each) for each in found]


def count_replays(conn: Connection, organization_id: int, event_ids: list[UUID]) -> None:
    conn.execute(
        "update agentflow.webhook_events set replays = replays + 1 where id = any (%s) and organization_id = %s",
        (event_ids, organization_id),
    )


def settle(
    conn: Connection,
    event: Event,
    outcome: Outcome,
    *,
    by: UUID,
    detail: str | None = None,
    action_job_id: UUID | None = None,
) -> None:
    """Write what became of it, and which handle_webhook job said so."""
    conn.execute(
        "update agentflow.webhook_events set outcome = %s, detail = %s, action_job_id = %s, handled_by = %s,"
        " handled_at = clock_timestamp() where id = %s and organization_id = %s",
        (outcome, detail, action_job_id, by, event.id, event.organization_id),
    )


def correct(conn: Connection, event: Event, outcome: Outcome, detail: str | None, *, action_job_id: UUID) -> None:
    """What its action came to in the end, as long as that action is still the last one."""
    conn.execute(
        "update agentflow.webhook_events set outcome = %s, detail = %s where id = %s and organization_id = %s"
        " and action_job_id = %s",
        (outcome, detail, event.id, event.organization_id, action_job_id),
    )


def first_id_of(moment: datetime) -> UUID:
    """The least id of what was received then or later: a UUIDv7 begins with its time in ms (RFC 9562, 5.7)."""
    ms = min(max(int(moment.timestamp() * 1000), 0), (1 << 48) - 1)
    return UUID(int=ms << 80)


_MATCHES: Final = (
    "(%(organization)s::bigint is null or v.organization_id = %(organization)s)"
    " and (%(endpoint)s::uuid is null or v.endpoint_id = %(endpoint)s)"
    " and (%(source)s::text is null or v.endpoint_id in (select e.id from agentflow.webhook_endpoints e"
    " where e.source = %(source)s and (%(organization)s::bigint is null or e.organization_id = %(organization)s)))"
    " and (%(type)s::text is null or v.type = %(type)s) and (%(verdict)s::text is null or v.verdict = %(verdict)s)"
    " and (%(outcome)s::text is null or coalesce(v.outcome, 'pending') = %(outcome)s)"
    " and (%(from)s::uuid is null or v.id >= %(from)s) and (%(to)s::uuid is null or v.id < %(to)s)"
)


def _values(organization_id: int | None, wanted: Filter) -> dict[str, Any]:
    return {
        "organization": organization_id,
        "endpoint": wanted.endpoint_id,
        "source": wanted.source,
        "type": wanted.type,
        "verdict": wanted.verdict,
        "outcome": wanted.outcome,
        "from": first_id_of(wanted.received_from) if wanted.received_from else None,
        "to": first_id_of(wanted.received_to) if wanted.received_to else None,
    }
