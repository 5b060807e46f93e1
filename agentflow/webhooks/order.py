"""Which state of an entity was acted upon last: an older one that comes late is discarded."""

from __future__ import annotations

from agentflow.database import Connection
from agentflow.jobs.retention import BATCH
from agentflow.webhooks.events import Event


def is_overtaken(conn: Connection, event: Event) -> bool:
    """Whether a newer state of its entity was acted upon already. Equal times are not older: senders' clocks tick in seconds."""
    if event.entity is None or event.version is None:
        return False
    row = conn.execute(
        "select version > %s from agentflow.webhook_entities where endpoint_id = %s and entity = %s"
        " and organization_id = %s",
        (event.version, event.endpoint_id, event.entity, event.organization_id),
    ).fetchone()
    return row is not None and bool(row[0])


def advance(conn: Connection, event: Event) -> None:
    """This state of its entity is acted upon: in the transaction that does it, or after it was done."""
    if event.entity is None or event.version is None:
        return
    conn.execute(
        "insert into agentflow.webhook_entities as w (organization_id, endpoint_id, entity, version) values (%s, %s, %s, %s)"
        " on conflict (endpoint_id, entity) do update set version = greatest(w.version, excluded.version),"
        " seen_at = excluded.seen_at",
        (event.organization_id, event.endpoint_id, event.entity, event.version),
    )


def delete_old(conn: Connection, *, days: float, limit: int = BATCH) -> int:
    """Entities of which nothing was heard for so long."""
    return conn.execute(
        "with old as materialized (select endpoint_id, entity from agentflow.webhook_entities"
        " where seen_at < clock_timestamp() - make_interval(secs => %s * 86400) limit %s for update skip locked)"
        " delete from agentflow.webhook_entities w using old"
        " where w.endpoint_id = old.endpoint_id and w.entity = old.entity",
        (days, limit),
    ).rowcount
