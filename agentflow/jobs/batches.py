"""Many jobs in one transaction, counted together, under one idempotency key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs.intake import IdempotencyConflict, submit_many
from agentflow.jobs.model import Ring
from agentflow.jobs.requests import Prepared


@dataclass(frozen=True, slots=True)
class SubmittedBatch:
    """`ids` in the order of the request; of a repeated key without those that were cleaned up since, and only the batch's own.

    `total` counts its own jobs: one that answers for a unique key belongs to whoever handed it in first.
    """

    id: UUID
    total: int
    ids: list[UUID]
    created: bool
    rings: tuple[Ring, ...] = ()


def submit(
    conn: Connection,
    organization_id: int,
    prepared: Sequence[Prepared],
    *,
    idempotency_key: str | None = None,
    idempotency_hours: float = 24.0,
    callback_url: str | None = None,
) -> SubmittedBatch:
    """Insert a batch in the caller's transaction. Raises IdempotencyConflict for a key of another request."""
    batch_id = new_id()
    if idempotency_key is not None:
        known = _remember(
            conn, organization_id, _hash(prepared, callback_url), batch_id, idempotency_key, idempotency_hours
        )
        if known is not None:
            return known
    jobs, rings = submit_many(conn, organization_id, prepared, batch_id=batch_id, callback_url=callback_url)
    total = sum(job.batch_id == batch_id for job in {job.id: job for job in jobs}.values())
    return SubmittedBatch(batch_id, total, [job.id for job in jobs], created=True, rings=tuple(rings))


def _hash(prepared: Sequence[Prepared], callback_url: str | None) -> bytes:
    url = f"callback {callback_url}".encode() if callback_url is not None else b""
    return hashlib.sha256(b"batch" + url + b"".join(p.request_hash for p in prepared)).digest()


def _remember(
    conn: Connection, organization_id: int, request_hash: bytes, batch_id: UUID, key: str, hours: float
) -> SubmittedBatch | None:
    """None for a key that is new, and now ours; as `intake` does it for one job, in the same table."""
    for _ in range(10):  # the other one may be rolled back, or cleaned up, between the two statements
        row = conn.execute(
            "insert into agentflow.idempotency_keys as k (organization_id, key, request_hash, job_id)"
            " values (%s, %s, %s, %s) on conflict (organization_id, key) do update"
            " set request_hash = excluded.request_hash, job_id = excluded.job_id, created_at = excluded.created_at"
            " where k.created_at < clock_timestamp() - make_interval(hours => 1) * %s returning 1",
            (organization_id, key, request_hash, batch_id, hours),
        ).fetchone()
        if row is not None:
            return None
        found = conn.execute(
            "select k.request_hash, k.job_id, b.total from agentflow.idempotency_keys k"
            " left join agentflow.batches b on b.id = k.job_id and b.organization_id = k.organization_id"
            " where k.organization_id = %s and k.key = %s",
            (organization_id, key),
        ).fetchone()
        if found is None:
            continue
        if bytes(found[0]) != request_hash or found[2] is None:
            raise IdempotencyConflict(key, found[1])
        return SubmittedBatch(found[1], found[2], _ids(conn, organization_id, found[1], found[2]), created=False)
    raise IdempotencyConflict(key, batch_id)


def _ids(conn: Connection, organization_id: int, batch_id: UUID, total: int) -> list[UUID]:
    """The jobs' ids were made in the seconds before the batch's: a range of the primary key, not a search."""
    minute = 60_000 << 80  # the first 48 bits of a UUIDv7 are milliseconds
    rows = conn.execute(
        "select id from agentflow.jobs where organization_id = %s and batch_id = %s and id between %s and %s"
        " order by id limit %s",
        (organization_id, batch_id, UUID(int=batch_id.int - 10 * minute), UUID(int=batch_id.int + minute), total),
    ).fetchall()
    return [row[0] for row in rows]
