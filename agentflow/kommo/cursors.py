"""How far each kind of thing of an account was read, and the walk over everything (a sweep).

A position is a Unix second: everything that was changed before it is in the mirror. It only moves forward, so that a worker
that wakes late with an old page takes nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.kommo.entities import STREAMS


@dataclass(frozen=True, slots=True)
class Cursor:
    """`sweep_position` is None where no sweep of this stream is under way; `read_at`: when it was last read as a whole."""

    stream: str
    position: int
    sweep_position: int | None
    read_at: datetime | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """A walk over everything that was changed up to `until`. What it has not met since `started_at` may be gone."""

    started_at: datetime
    until: int


_ACCOUNT: Final = "organization_id = %(organization)s and account_id = %(account)s"


def start(conn: Connection, organization_id: int, account_id: UUID, now_s: int) -> bool:
    """From here on changes are followed; what was before is the first sweep's. False: they are followed already."""
    inserted = conn.execute(
        "insert into agentflow.crm_streams (account_id, organization_id, entity_type, position)"
        " select %s, %s, name, %s from unnest(%s::text[]) name on conflict do nothing",
        (account_id, organization_id, now_s, [stream.name for stream in STREAMS]),
    )
    return inserted.rowcount > 0


def read(conn: Connection, organization_id: int, account_id: UUID) -> dict[str, Cursor]:
    rows = conn.execute(
        f"select entity_type, position, sweep_position, read_at from agentflow.crm_streams where {_ACCOUNT}",  # noqa: S608
        {"organization": organization_id, "account": account_id},
    ).fetchall()
    return {row[0]: Cursor(*row) for row in rows}


def advance(conn: Connection, organization_id: int, account_id: UUID, stream: str, position: int) -> None:
    conn.execute(
        f"update agentflow.crm_streams set position = greatest(position, %(position)s) where {_ACCOUNT}"  # noqa: S608
        " and entity_type = %(stream)s",
        {"organization": organization_id, "account": account_id, "stream": stream, "position": position},
    )


def whole_read(conn: Connection, organization_id: int, account_id: UUID, stream: str) -> None:
    conn.execute(
        f"update agentflow.crm_streams set read_at = clock_timestamp() where {_ACCOUNT}"  # noqa: S608 - constants
        " and entity_type = %(stream)s",
        {"organization": organization_id, "account": account_id, "stream": stream},
    )


def begin_sweep(conn: Connection, organization_id: int, account_id: UUID, *, until: int, events_from: int) -> Sweep:
    """The sweep that is under way, or a new one over everything but old events."""
    row = conn.execute(
        "update agentflow.crm_accounts set sweep_started_at = clock_timestamp(), sweep_until = %s"
        " where organization_id = %s and id = %s and sweep_started_at is null",
        (until, organization_id, account_id),
    )
    if row.rowcount:
        conn.execute(
            "update agentflow.crm_streams"  # noqa: S608 - constants
            f" set sweep_position = case entity_type when 'events' then %(events)s::bigint else 0 end where {_ACCOUNT}"
            " and entity_type = any (%(swept)s)",
            {
                "organization": organization_id,
                "account": account_id,
                "events": events_from,
                "swept": [stream.name for stream in STREAMS if stream.how != "whole"],
            },
        )
    found = conn.execute(
        "select sweep_started_at, sweep_until from agentflow.crm_accounts where organization_id = %s and id = %s",
        (organization_id, account_id),
    ).fetchone()
    assert found is not None  # noqa: S101 - rows of accounts go after their jobs
    return Sweep(*found)


def advance_sweep(
    conn: Connection, organization_id: int, account_id: UUID, stream: str, sweep: Sweep, position: int | None
) -> None:
    """None: this stream's part has ended. Nothing happens where another sweep has begun meanwhile."""
    conn.execute(
        "update agentflow.crm_streams s set sweep_position ="
        " case when %(position)s::bigint is null then null else greatest(s.sweep_position, %(position)s::bigint) end"
        " from agentflow.crm_accounts a where a.id = s.account_id and a.sweep_started_at = %(started)s"
        " and s.organization_id = %(organization)s and s.account_id = %(account)s and s.entity_type = %(stream)s"
        " and s.sweep_position is not null",
        {
            "organization": organization_id,
            "account": account_id,
            "stream": stream,
            "started": sweep.started_at,
            "position": position,
        },
    )


def end_sweep(conn: Connection, organization_id: int, account_id: UUID, sweep: Sweep) -> None:
    conn.execute(
        "update agentflow.crm_accounts set sweep_started_at = null, sweep_until = null"
        " where organization_id = %s and id = %s and sweep_started_at = %s",
        (organization_id, account_id, sweep.started_at),
    )
