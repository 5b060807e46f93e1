"""Webhooks for people who look through them: pages that cost the same however many there are, and how each endpoint does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from psycopg import sql

from agentflow.database import Connection
from agentflow.webhooks import events, keeping
from agentflow.webhooks.events import Event, Filter

#: For one page so many rows are looked through for those that are asked for.
MOST_LOOKED_AT: Final = 10_000
#: How an endpoint does is said of its last so many webhooks, of a day.
MOST_COUNTED: Final = 100


@dataclass(frozen=True, slots=True)
class Standing:
    """Of an endpoint's last MOST_COUNTED webhooks within a day; `handled_s` is the median from receipt to the end."""

    counted: int
    pending: int
    failed: int
    refused: int
    conflicts: int
    duplicates: int
    handled_s: float | None
    last_at: datetime | None

    @property
    def is_well(self) -> bool:
        return not (self.failed or self.refused or self.conflicts)


def browse(
    conn: Connection, organization_id: int | None, wanted: Filter, *, before: UUID | None = None, limit: int
) -> tuple[list[Event], UUID | None]:
    """The newest first, and before which id to go on; None: there are no more.

    By id, organization and endpoint, which are indexed; of those that follow MOST_LOOKED_AT are held against the rest of the
    filter, so that a page may have few or none and yet be followed by another. `source` is not looked at.
    """
    within: list[sql.Composable] = [
        sql.SQL("(%(organization)s::bigint is null or v.organization_id = %(organization)s)")
    ]
    matching: list[sql.Composable] = [sql.SQL("true")]
    values: dict[str, Any] = {
        "organization": organization_id,
        "before": before,
        "endpoint": wanted.endpoint_id,
        "from": events.first_id_of(wanted.received_from) if wanted.received_from else None,
        "to": events.first_id_of(wanted.received_to) if wanted.received_to else None,
        "type": wanted.type,
        "verdict": wanted.verdict,
        "outcome": wanted.outcome,
        "most": MOST_LOOKED_AT,
        "limit": limit + 1,
    }
    for name, clause, place in (
        ("before", "v.id < %(before)s", within),
        ("endpoint", "v.endpoint_id = %(endpoint)s", within),
        ("from", "v.id >= %(from)s", within),
        ("to", "v.id < %(to)s", within),
        ("type", "v.type = %(type)s", matching),
        ("verdict", "v.verdict = %(verdict)s", matching),
        ("outcome", "coalesce(v.outcome, 'pending') = %(outcome)s", matching),
    ):
        if values[name] is not None:
            place.append(sql.SQL(clause))
    looked_at = sql.SQL("select {} from agentflow.webhook_events v where {} order by v.id desc limit %(most)s").format(
        sql.SQL(events.COLUMNS), sql.SQL(" and ").join(within)
    )
    rows = conn.execute(
        sql.SQL("select {} from ({}) v where {} order by v.id desc limit %(limit)s").format(
            sql.SQL(events.COLUMNS), looked_at, sql.SQL(" and ").join(matching)
        ),
        values,
    ).fetchall()
    found = [Event(*row) for row in rows[:limit]]
    if len(rows) > limit:
        return found, found[-1].id
    last = conn.execute(
        sql.SQL(
            "select v.id from agentflow.webhook_events v where {} order by v.id desc offset %(most)s - 1 limit 1"
        ).format(sql.SQL(" and ").join(within)),
        values,
    ).fetchone()
    return found, last[0] if last else None


def delivered_as(conn: Connection, organization_id: int | None, delivery_id: str) -> Event | None:
    """The newest that its sender calls so."""
    row = conn.execute(
        f"select {events.COLUMNS} from agentflow.webhook_endpoints e"  # noqa: S608 - constants
        " join agentflow.webhook_events v on v.endpoint_id = e.id and v.delivery_key = %(key)s"
        " where (%(organization)s::bigint is null or e.organization_id = %(organization)s) order by v.id desc limit 1",
        {"organization": organization_id, "key": keeping.key_of(delivery_id)},
    ).fetchone()
    return Event(*row) if row else None


def standings(conn: Connection, organization_id: int | None, endpoint_ids: Sequence[UUID]) -> dict[UUID, Standing]:
    """How each of these endpoints does."""
    since = events.first_id_of(datetime.now(UTC) - timedelta(days=1))
    rows = conn.execute(
        "select e.id, s.*, (select v.received_at from agentflow.webhook_events v where v.endpoint_id = e.id"  # noqa: S608
        "   order by v.id desc limit 1)"
        " from agentflow.webhook_endpoints e cross join lateral (select count(*),"
        "   count(*) filter (where v.outcome is null and v.job_id is not null), count(*) filter (where v.outcome = 'failed'),"
        "   count(*) filter (where v.verdict = 'refused'), count(*) filter (where v.verdict = 'conflict'),"
        "   coalesce(sum(v.duplicates), 0)::integer,"
        "   percentile_cont(0.5) within group (order by extract(epoch from v.handled_at - v.received_at)::float8)"
        "     filter (where v.handled_at is not null and v.replays = 0)"
        "  from (select v.outcome, v.job_id, v.verdict, v.duplicates, v.handled_at, v.received_at, v.replays"
        "   from agentflow.webhook_events v where v.endpoint_id = e.id"
        f"   and v.id >= %(since)s order by v.id desc limit {MOST_COUNTED}) v) s"
        " where e.id = any (%(ids)s) and (%(organization)s::bigint is null or e.organization_id = %(organization)s)",
        {"ids": list(endpoint_ids), "organization": organization_id, "since": since},
    ).fetchall()
    return {row[0]: Standing(*row[1:]) for row in rows}
