"""The mirror of an account: its things, tombstones of those that are gone, and its events.

Who writes holds the account's row (`begin`), so that writers follow one another and a reader who pages by `version` misses
nothing. What was read first never overwrites what was read later: a page may be older than the re-read of one thing that
came while the page was on its way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.kommo.cursors import Sweep
from agentflow.kommo.entities import Event, Thing


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A row as readers see it. `updated_at` in Unix seconds by the CRM's clock."""

    entity_type: str
    entity_id: int
    updated_at: int
    version: int
    deleted_at: datetime | None
    data: dict[str, Any]


def clock(conn: Connection) -> datetime:
    """By which reads are ordered, whichever worker makes them."""
    row = conn.execute("select clock_timestamp()").fetchone()
    assert row is not None  # noqa: S101 - a select without a table
    return row[0]  # type: ignore[no-any-return]


def begin(conn: Connection, organization_id: int, account_id: UUID) -> int | None:
    """Lock the account until the transaction ends; the version of what is written in it. None: the account is gone."""
    row = conn.execute(
        "update agentflow.crm_accounts set version = version + 1 where organization_id = %s and id = %s"
        " and state <> 'removed' returning version",
        (organization_id, account_id),
    ).fetchone()
    return row[0] if row else None


# Of two states of a live thing the one with the later change counts, and of the same second the one that was read later. A
# tombstone has no time of change: whatever was read later is right.
# Each thing is looked up by its own key, and met again by its place: since `begin` nobody else writes here. Of an account that is
# just being filled in statistics know nothing, and the planner would read all of it for each page: `limit` keeps it from joining,
# and the order, which only the primary key has (of an equality there were none), from the other index.
# Texts go as they are (`%b`): in an array's text form each quotation mark of theirs is escaped, which took longer than all else.
_JUDGED: Final = """
with given as (
    select entity_id, updated_at, hash, text::jsonb as data
    from unnest(%(ids)s::bigint[], %(updated)s::bigint[], %(hashes)b::bytea[], %(texts)b::text[])
        g (entity_id, updated_at, hash, text)
), judged as (
    select g.*, k.place, case
        when k.entity_id is null then 'created'
        when k.deleted_at is not null then case when k.read_at < %(read_at)s then 'created' else 'stale' end
        when (g.updated_at, %(read_at)s) < (k.updated_at, k.read_at) then 'stale'
        when k.hash = g.hash then 'unchanged'
        else 'updated' end as verdict
    from given g left join lateral (
        select ctid as place, entity_id, updated_at, read_at, deleted_at, hash from agentflow.crm_entities e
        where e.organization_id = %(organization)s and e.account_id = %(account)s and e.entity_type = %(type)s
            and e.entity_id between g.entity_id and g.entity_id order by e.entity_id limit 1
    ) k on true
)"""

_WRITE: Final = (
    _JUDGED  # noqa: S608 - constants
    + """, written as (
    insert into agentflow.crm_entities as e (account_id, organization_id, entity_type, entity_id, updated_at, read_at, seen_at,
        hash, version, data)
    select %(account)s, %(organization)s, %(type)s, entity_id, updated_at, %(read_at)s, %(read_at)s, hash, %(version)s, data
    from judged where verdict in ('created', 'updated')
    on conflict (account_id, entity_type, entity_id) do update set updated_at = excluded.updated_at,
        read_at = excluded.read_at, seen_at = excluded.seen_at, hash = excluded.hash, version = excluded.version,
        data = excluded.data, deleted_at = null
), met as (
    update agentflow.crm_entities e set seen_at = %(read_at)s from judged j
    where %(sweeping)s and j.verdict in ('unchanged', 'stale') and e.organization_id = %(organization)s
        and e.ctid = j.place and e.deleted_at is null
)
select entity_id, verdict from judged"""
)


def write(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    entity_type: str,
    things: Sequence[Thing],
    *,
    read_at: datetime,
    version: int,
    sweeping: bool = False,
) -> Counter[str]:
    """What became of them: created, updated, unchanged, stale. After `begin`. `sweeping` notes that they were met."""
    rows = conn.execute(
        _WRITE,
        {
            **_given(organization_id, account_id, entity_type, things, read_at),
            "version": version,
            "sweeping": sweeping,
        },
    ).fetchall()
    return Counter(row[1] for row in rows)


def compare(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    entity_type: str,
    things: Sequence[Thing],
    *,
    read_at: datetime,
) -> dict[int, str]:
    """What `write` would make of each, by id; nothing is written."""
    rows = conn.execute(
        _JUDGED + " select entity_id, verdict from judged",  # noqa: S608 - constants
        _given(organization_id, account_id, entity_type, things, read_at),
    ).fetchall()
    return dict(rows)


def _given(
    organization_id: int, account_id: UUID, entity_type: str, things: Sequence[Thing], read_at: datetime
) -> dict[str, Any]:
    # A set that moves may show a thing twice on one page; the statement takes it once.
    latest = {each.id: each for each in sorted(things, key=lambda each: each.updated_at)}.values()
    return {
        "organization": organization_id,
        "account": account_id,
        "type": entity_type,
        "read_at": read_at,
        "ids": [each.id for each in latest],
        "updated": [each.updated_at for each in latest],
        "hashes": [each.hash for each in latest],
        "texts": [each.text for each in latest],
    }


_GONE: Final = (
    " from agentflow.crm_entities where organization_id = %(organization)s and account_id = %(account)s"
    " and entity_type = %(type)s and entity_id = any (%(ids)s) and deleted_at is null and read_at < %(read_at)s"
)


def living(
    conn: Connection, organization_id: int, account_id: UUID, entity_type: str, ids: Sequence[int], read_at: datetime
) -> list[int]:
    """Which of these the mirror holds for alive, from an earlier read than this one."""
    rows = conn.execute(
        "select entity_id" + _GONE,
        {
            "organization": organization_id,
            "account": account_id,
            "type": entity_type,
            "ids": list(ids),
            "read_at": read_at,
        },
    ).fetchall()
    return [row[0] for row in rows]


def bury(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    entity_type: str,
    ids: Sequence[int],
    *,
    read_at: datetime,
    version: int,
) -> int:
    """Make tombstones of what a read that began at `read_at` did not find. After `begin`. Returns how many were alive."""
    return conn.execute(
        "update agentflow.crm_entities set deleted_at = clock_timestamp(), read_at = %(read_at)s, version = %(version)s"
        " where organization_id = %(organization)s and account_id = %(account)s and entity_type = %(type)s"
        " and entity_id = any (%(ids)s) and deleted_at is null and read_at < %(read_at)s",
        {
            "organization": organization_id,
            "account": account_id,
            "type": entity_type,
            "ids": list(ids),
            "read_at": read_at,
            "version": version,
        },
    ).rowcount


def unmet(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    entity_type: str,
    sweep: Sweep,
    *,
    after: int,
    limit: int,
) -> list[int]:
    """Ids beyond `after` of living things that a sweep has not met, in their order: gone, or changed since."""
    rows = conn.execute(
        "select entity_id from agentflow.crm_entities where organization_id = %s and account_id = %s"
        " and entity_type = %s and entity_id > %s and deleted_at is null and seen_at < %s order by entity_id limit %s",
        (organization_id, account_id, entity_type, after, sweep.started_at, limit),
    ).fetchall()
    return [row[0] for row in rows]


def count_living(conn: Connection, organization_id: int, account_id: UUID) -> dict[str, int]:
    rows = conn.execute(
        "select entity_type, count(*) from agentflow.crm_entities where organization_id = %s and account_id = %s"
        " and deleted_at is null group by entity_type",
        (organization_id, account_id),
    ).fetchall()
    return dict(rows)


def write_events(
    conn: Connection, organization_id: int, account_id: UUID, events: Sequence[Event], *, version: int
) -> int:
    """Returns how many were new."""
    return conn.execute(
        "insert into agentflow.crm_events (account_id, organization_id, event_id, created_at, version, data)"
        " select %s, %s, id, created_at, %s, text::jsonb from unnest(%s::text[], %s::bigint[], %b::text[])"
        " e (id, created_at, text) on conflict do nothing",
        (
            account_id,
            organization_id,
            version,
            [each.id for each in events],
            [each.created_at for each in events],
            [each.text for each in events],
        ),
    ).rowcount


def known_events(conn: Connection, organization_id: int, account_id: UUID, ids: Sequence[str]) -> set[str]:
    rows = conn.execute(
        "select event_id from agentflow.crm_events where organization_id = %s and account_id = %s and event_id = any (%s)",
        (organization_id, account_id, list(ids)),
    ).fetchall()
    return {row[0] for row in rows}


def note_drift(
    conn: Connection, organization_id: int, account_id: UUID, entity_type: str, found: set[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Remember unexpected fields (name, kind of value); those that are new."""
    if not found:
        return []
    return conn.execute(
        "insert into agentflow.crm_drift (account_id, organization_id, entity_type, field, kind)"
        " select %s, %s, %s, field, kind from unnest(%s::text[], %s::text[]) d (field, kind)"
        " on conflict do nothing returning field, kind",
        (account_id, organization_id, entity_type, *map(list, zip(*sorted(found), strict=True))),
    ).fetchall()


def drift_of(conn: Connection, organization_id: int, account_id: UUID) -> list[tuple[str, str, str, datetime]]:
    """Kind of thing, field, kind of value, since when."""
    return conn.execute(
        "select entity_type, field, kind, first_seen_at from agentflow.crm_drift"
        " where organization_id = %s and account_id = %s order by first_seen_at, entity_type, field, kind limit 1000",
        (organization_id, account_id),
    ).fetchall()


def page(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    entity_type: str,
    *,
    after: tuple[int, int],
    limit: int,
) -> list[Mirrored]:
    """Rows by (version, id), tombstones among them: who has read up to the end finds later changes beyond it."""
    rows = conn.execute(
        "select entity_type, entity_id, updated_at, version, deleted_at, data from agentflow.crm_entities"
        " where organization_id = %s and account_id = %s and entity_type = %s and (version, entity_id) > (%s, %s)"
        " order by version, entity_id limit %s",
        (organization_id, account_id, entity_type, *after, limit),
    ).fetchall()
    return [Mirrored(*row) for row in rows]


def page_of_events(
    conn: Connection, organization_id: int, account_id: UUID, *, after: tuple[int, str], limit: int
) -> list[tuple[int, str, dict[str, Any]]]:
    """Version, id and the event itself, by (version, id)."""
    return conn.execute(
        "select version, event_id, data from agentflow.crm_events where organization_id = %s and account_id = %s"
        " and (version, event_id) > (%s, %s) order by version, event_id limit %s",
        (organization_id, account_id, *after, limit),
    ).fetchall()
