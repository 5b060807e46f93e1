"""What a webhook or an event named, to be read again by its id: the payload itself is only a hint."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.intake import Submitted
from agentflow.jobs.requests import NewJob
from agentflow.jobs.unique import Unique
from agentflow.system import Transaction

#: A change in Kommo makes several webhooks within a second or two; under a flood the sync still starts.
QUIET_S: Final = 2.0
LONGEST_WAIT_S: Final = 15.0


def read_again(
    transaction: Transaction, organization_id: int, account_id: UUID, named: Iterable[tuple[str, int]]
) -> Submitted:
    """Note them, and have the sync read them when it is quiet for a moment.

    The sync takes what was noted out of the table, so that nothing is lost with a request that a newer one replaces.
    """
    note(transaction.conn, organization_id, account_id, named)
    soon = Unique(f"{account_id}:touched", "debounce", QUIET_S, LONGEST_WAIT_S)
    payload = {"account_id": str(account_id), "touched": True}
    return transaction.submit(organization_id, NewJob("sync_crm", payload, unique=soon))


def note(conn: Connection, organization_id: int, account_id: UUID, named: Iterable[tuple[str, int]]) -> None:
    """`named` are kinds with ids. Named again while it is being read, it is read again."""
    each = sorted(set(named))
    conn.execute(
        "insert into agentflow.crm_touched (organization_id, account_id, entity_type, entity_id)"
        " select %s, %s, type, id from unnest(%s::text[], %s::bigint[]) t (type, id)"
        " on conflict (account_id, entity_type, entity_id) do update set touched_at = clock_timestamp()",
        (organization_id, account_id, [type_ for type_, _ in each], [id_ for _, id_ in each]),
    )


def waiting(conn: Connection, organization_id: int, account_id: UUID, *, limit: int) -> dict[str, dict[int, datetime]]:
    """Those that wait longest: by kind, the ids with when they were named."""
    rows = conn.execute(
        "select entity_type, entity_id, touched_at from agentflow.crm_touched where organization_id = %s"
        " and account_id = %s order by touched_at limit %s",
        (organization_id, account_id, limit),
    ).fetchall()
    found: dict[str, dict[int, datetime]] = {}
    for entity_type, entity_id, at in rows:
        found.setdefault(entity_type, {})[entity_id] = at
    return found


def forget(
    conn: Connection, organization_id: int, account_id: UUID, entity_type: str, read: dict[int, datetime]
) -> None:
    """Those that were read; not what was named again since."""
    ids = list(read)
    conn.execute(
        "delete from agentflow.crm_touched t using unnest(%s::bigint[], %s::timestamptz[]) r (id, at)"
        " where t.organization_id = %s and t.account_id = %s and t.entity_type = %s and t.entity_id = r.id"
        " and t.touched_at <= r.at",
        (ids, [read[id_] for id_ in ids], organization_id, account_id, entity_type),
    )
