"""Deliveries as rows: kept as they came, once; what became of them; and how they are told apart."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb
from uuid6 import uuid7

from agentflow.database import Connection
from agentflow.jobs import inserting
from agentflow.jobs.intake import Prepared
from agentflow.jobs.model import Ring
from agentflow.webhooks.endpoints import Endpoint

Verdict = Literal["verified", "by_token", "conflict", "refused"]
Outcome = Literal["done", "stale", "ignored", "failed"]

VERDICTS: Final[tuple[Verdict, ...]] = ("verified", "by_token", "conflict", "refused")
OUTCOMES: Final[tuple[Outcome, ...]] = ("done", "stale", "ignored", "failed")

#: Without an id the body is what must not come twice. Not for ever: a lead that is deleted, restored and deleted again makes
#: two bodies that are equal. Senders that repeat themselves have given up by then (Kommo's last try is after two hours).
BODY_REMEMBERED_S: Final = 6 * 3600.0
#: Of what was refused so many are kept for an endpoint and hour, and so much of each: enough to see what is wrong.
REFUSED_PER_HOUR: Final = 100
REFUSED_BODY_BYTES: Final = 16 << 10
#: A header of such a name holds what opens something.
_SECRET_HEADER: Final = re.compile(r"auth|cookie|secret|token|signature|password|credential|(^|-)key($|-)|api-?key")
REDACTED: Final = "[redacted]"


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
#: The names differ from those of a job's columns: the two go in one statement.
_INSERT: Final = (
    "insert into agentflow.webhook_events (id, organization_id, endpoint_id, verdict, delivery_id, delivery_key,"
    " body_hash, type, entity, version, headers, body, size_bytes, job_id)"
    " values (%(event)s, %(event_of)s, %(endpoint)s, %(verdict)s, %(delivery_id)s, %(delivery_key)s, %(body_hash)s,"
    " %(event_type)s, %(entity)s, %(version)s, %(headers)s, %(body)s, %(size_bytes)s, %(event_job)s)"
    " on conflict (endpoint_id, delivery_key) do nothing"
)


def store_new(
    conn: Connection, endpoint: Endpoint, arrived: Arrived, event_id: UUID, prepared: Prepared, *, ring: bool
) -> list[Ring] | None:
    """Insert it and its job, and return whom to ring. None: there is one of that key, and nothing was inserted.

    One statement, since senders wait: each further one holds a connection of the few for another trip.
    """
    key, body_hash = _key_and_hash(arrived)
    values = _row(endpoint, arrived, event_id, key, body_hash, prepared.id)
    return inserting.one_of_stored(
        conn, f"{_INSERT} returning job_id", values, endpoint.organization_id, prepared, ring
    )


def store(conn: Connection, endpoint: Endpoint, arrived: Arrived, event_id: UUID, job_id: UUID) -> Stored:
    """Insert it, unless it is there: then that one is counted. In the transaction that inserts `job_id`, for a new one."""
    key, body_hash = _key_and_hash(arrived)
    for _ in range(10):  # the other one may be cleaned up between the two statements
        if _insert(conn, endpoint, arrived, event_id, key, body_hash, job_id):
            return Stored(event_id, new=True)
        known = conn.execute(
            "select id, body_hash, received_at < clock_timestamp() - make_interval(secs => %s)"
            " from agentflow.webhook_events where endpoint_id = %s and delivery_key = %s and organization_id = %s",
            (BODY_REMEMBERED_S, endpoint.id, key, endpoint.organization_id),
        ).fetchone()
        if known is None:
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
        return _store_conflict(conn, endpoint, arrived, event_id, key, body_hash)
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
            "id": UUID(int=uuid7().int),
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


def _insert(
    conn: Connection,
    endpoint: Endpoint,
    arrived: Arrived,
    event_id: UUID,
    key: bytes,
    body_hash: bytes,
    job_id: UUID | None,
) -> bool:
    """Whether it was inserted: nothing of this key is there."""
    return conn.execute(_INSERT, _row(endpoint, arrived, event_id, key, body_hash, job_id)).rowcount > 0


def _row(
    endpoint: Endpoint, arrived: Arrived, event_id: UUID, key: bytes, body_hash: bytes, job_id: UUID | None
) -> dict[str, Any]:
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


def _store_conflict(
    conn: Connection, endpoint: Endpoint, arrived: Arrived, event_id: UUID, key: bytes, body_hash: bytes
) -> Stored:
    """Which of the two is right nobody here can know: kept, and left alone."""
    both = hashlib.sha256(b"conflict:" + key + body_hash).digest()
    flagged = dataclasses.replace(arrived, verdict="conflict")
    if _insert(conn, endpoint, flagged, event_id, both, body_hash, None):
        return Stored(event_id, new=False, conflict=True)
    row = conn.execute(
        "select id from agentflow.webhook_events where endpoint_id = %s and delivery_key = %s and organization_id = %s",
        (endpoint.id, both, endpoint.organization_id),
    ).fetchone()
    assert row is not None  # noqa: S101 - what stood in the way of the INSERT; retention takes none that is new
    _count_duplicate(conn, endpoint, row[0])
    return Stored(row[0], new=False)


def _count_duplicate(conn: Connection, endpoint: Endpoint, event_id: UUID) -> None:
    conn.execute(
        "update agentflow.webhook_events set duplicates = duplicates + 1 where id = %s and organization_id = %s",
        (event_id, endpoint.organization_id),
    )


def _storable(text: str | None) -> Any:
    return re.sub("[\x00\ud800-\udfff]", "\ufffd", text) if text is not None else None
