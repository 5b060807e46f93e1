"""What a CRM's webhooks said has changed. The sync of the account reads those entities again, and takes them out."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from agentflow.database import Connection

Entity = tuple[str, int]  # type (`leads`, `contacts`, `companies`, `tasks`) and id


def touch(conn: Connection, organization_id: int, account_id: UUID, entities: Iterable[Entity]) -> int:
    """Note them, in the caller's transaction. Returns how many they are."""
    wanted = sorted(set(entities))  # one order, so that two at once cannot wait for each other
    conn.execute(
        "insert into agentflow.crm_touched (organization_id, account_id, entity_type, entity_id)"
        " select %s, %s, t.type, t.id from unnest(%s::text[], %s::bigint[]) with ordinality t(type, id, n) order by t.n"
        " on conflict (organization_id, account_id, entity_type, entity_id) do update set touched_at = excluded.touched_at",
        (organization_id, account_id, [type_ for type_, _ in wanted], [id_ for _, id_ in wanted]),
    )
    return len(wanted)
