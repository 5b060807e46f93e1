"""Deliveries become rows: kept as they came, once; told from what came before; of those that were refused enough to see why."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.webhooks.endpoints import Endpoint
from agentflow.webhooks.events import Verdict

#: Without an id the body is what must not come twice. Not for ever: a lead that is deleted, restored and deleted again makes
#: two bodies that are equal. Senders that repeat themselves have given up by then (Kommo's last try is after two hours).
BODY_REMEMBERED_S: Final = 6 * 3600.0
#: Of what was refused so many are kept for an endpoint and hour, and so much of each: enough to see what is wrong.
REFUSED_PER_HOUR: Final = 100
REFUSED_BODY_BYTES: Final = 16 << 10
#: A header of such a name holds what opens something.
_SECRET_HEADER: Final = re.compile(r"auth|cookie|secret|token|signature|password|credential|(^|-)key($|-)|api-?key")
REDACTED: Final = "[redacted]"
#: The names differ from those of a job's columns: the two go in one statement.
INSERT: Final = (
    "insert into agentflow.webhook_events (id, organization_id, endpoint_id, verdict, delivery_id, delivery_key,"
    " body_hash, type, entity, version, headers, body, size_bytes, job_id)"
    " values (%(event)s, %(event_of)s, %(endpoint)s, %(verdict)s, %(delivery_id)s, %(delivery_key)s, %(body_hash)s,"
    " %(event_type)s, %(entity)s, %(version)s, %(headers)s, %(body)s, %(size_bytes)s, %(event_job)s)"
    " on conflict (endpoint_id, delivery_key) do nothing returning job_id"
)


@dataclass(frozen=True, slots=True)
class Arrived:
    """What is stored of a delivery that was let in."""

    verdict: Verdict
    headers: Mapping[str, str]
    body: bytes
    delivery_id: str | None = None
    type: str | None = None
    entity: str | None = None
    version: datetime | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """`new`: there was none of that id or body. `conflict`: there was one of that id with another body; this one is kept too."""

    id: UUID
    new: bool
    conflict: bool = False


def row_of(endpoint: Endpoint, arrived: Arrived, event_id: UUID, job_id: UUID | None) -> dict[str, Any]:
    """What `INSERT` wants."""
    key, body_hash = _key_and_hash(arrived)
    return {
        "event": event_id,
        "event_of": endpoint.organization_id,
        "endpoint": endpoint.id,
        "verdict": arrived.verdict,
        "delivery_id": _storable(arrived.delivery_id),
        "delivery_key": key,
        "body_hash": body_hash,
        "event_type": _storable(arrived.type),
        "entity": _storable(arrived.entity),
        "version": arrived.version,
        "headers": Jsonb(dict(arrived.headers)),
        "body": arrived.body,
        "size_bytes": len(arrived.body),
        "event_job": job_id,
    }


def store_known(conn: Connection, endpoint: Endpoint, arrived: Arrived, event_id: UUID, job_id: UUID) -> Stored:
    """One that `INSERT` found to be there: that one is counted. Where it has gone meanwhile, or is too old to count, this one is
    inserted, in the transaction that inserts `job_id`."""
    key, body_hash = _key_and_hash(arrived)
    for _ in range(10):  # the other one may be cleaned up, or come, between the two statements
        known = conn.execute(
            "select id, body_hash, received_at < clock_timestamp() - make_interval(secs => %s)"
            " from agentflow.webhook_events where endpoint_id = %s and delivery_key = %s and organization_id = %s",
            (BODY_REMEMBERED_S, endpoint.id, key, endpoint.organization_id),
        ).fetchone()
        if known is None:
            if conn.execute(INSERT, row_of(endpoint, arrived, event_id, job_id)).rowcount:
                return Stored(event_id, new=True)
            continue
        known_id, known_hash, is_old = known
        if arrived.delivery_id is None and is_old:
            conn.execute(
                "update agentflow.webhook_events set delivery_key = null where id = %s and organization_id = %s"
                " and delivery_key = %s",
                (known_id, endpoint.organization_id, key),
            )
            continue
        if bytes(known_hash) == body_hash:
            _count_duplicate(conn, endpoint, known_id)
            return Stored(known_id, new=False)
        return _store_conflict(conn, endpoint, arrived, event_id)
    raise RuntimeError("an event was neither new nor known")


def _key_and_hash(arrived: Arrived) -> tuple[bytes, bytes]:
    """What must not come twice, and the body's own."""
    body_hash = hashlib.sha256(arrived.body).digest()
    if arrived.delivery_id is not None:
        return key_of(arrived.delivery_id), body_hash
    return hashlib.sha256(b"body:" + body_hash).digest(), body_hash


def key_of(delivery_id: str) -> bytes:
    return hashlib.sha256(b"id:" + delivery_id.encode(errors="replace")).digest()


def refuse(conn: Connection, endpoint: Endpoint, headers: Mapping[str, str], body: bytes, reason: str) -> bool:
    """Remember a delivery that was not let in: its beginning, and not more of them than are of use. Whether it was kept."""
    kept = conn.execute(
        "insert into agentflow.webhook_events (id, organization_id, endpoint_id, verdict, reason, body_hash, headers, body,"
        " size_bytes) select %(id)s, %(organization)s, %(endpoint)s, 'refused', %(reason)s, %(hash)s, %(headers)s, %(body)s,"
        " %(size)s where (select count(*) from (select from agentflow.webhook_events r where r.endpoint_id = %(endpoint)s"
        " and r.organization_id = %(organization)s and r.verdict = 'refused'"
        " and r.received_at > clock_timestamp() - interval '1 h' limit %(most)s) x) < %(most)s",
        {
            "id": new_id(),
            "organization": endpoint.organization_id,
            "endpoint": endpoint.id,
            "reason": reason,
            "hash": hashlib.sha256(body).digest(),
            "headers": Jsonb(dict(headers)),
            "body": body[:REFUSED_BODY_BYTES],
            "size": len(body),
            "most": REFUSED_PER_HOUR,
        },
    ).rowcount
    return kept > 0


def redacted(headers: Mapping[str, str], hidden: tuple[str, ...]) -> dict[str, str]:
    """What is kept of the headers: by lower-case name, without what opens anything."""
    return {
        name: REDACTED if name in hidden or _SECRET_HEADER.search(name) else _storable(value)
        for name, value in headers.items()
    }


def _store_conflict(conn: Connection, endpoint: Endpoint, arrived: Arrived, event_id: UUID) -> Stored:
    """Which of the two is right nobody here can know: kept, and left alone."""
    row = row_of(endpoint, dataclasses.replace(arrived, verdict="conflict"), event_id, None)
    both = hashlib.sha256(b"conflict:" + row["delivery_key"] + row["body_hash"]).digest()
    if conn.execute(INSERT, {**row, "delivery_key": both}).rowcount:
        return Stored(event_id, new=False, conflict=True)
    known = conn.execute(
        "select id from agentflow.webhook_events where endpoint_id = %s and delivery_key = %s and organization_id = %s",
        (endpoint.id, both, endpoint.organization_id),
    ).fetchone()
    assert known is not None  # noqa: S101 - what stood in the way of the INSERT; retention takes none that is new
    _count_duplicate(conn, endpoint, known[0])
    return Stored(known[0], new=False)


def _count_duplicate(conn: Connection, endpoint: Endpoint, event_id: UUID) -> None:
    conn.execute(
        "update agentflow.webhook_events set duplicates = duplicates + 1 where id = %s and organization_id = %s",
        (event_id, endpoint.organization_id),
    )


def _storable(text: str | None) -> Any:
    return re.sub("[\x00\ud800-\udfff]", "\ufffd", text) if text is not None else None
