"""Taking work in: a request that was checked becomes a job in the caller's transaction, unless a key says that it is there.

Where the organization's window has room the row is stamped as sent in the same INSERT, and the caller rings the broker after
the commit (`agentflow.system.System.transaction` does both). A ring that is lost between the two is found by the relay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from agentflow import traces
from agentflow.database import Connection
from agentflow.jobs import inserting, unique
from agentflow.jobs.model import JOB_COLUMNS, Job, Ring, job_from_row
from agentflow.jobs.requests import Prepared
from agentflow.jobs.unique import Found, Holder


class IdempotencyConflict(Exception):
    """The key was used before for another request."""

    def __init__(self, key: str, job_id: UUID) -> None:
        super().__init__(f"idempotency key {key!r} was used for another request (job {job_id})")
        self.job_id = job_id


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is in the database (once the caller commits). `created` is False for a repeated idempotency key, and where
    another job answers for a unique key; `found` says how it does."""

    job: Job
    created: bool
    rings: tuple[Ring, ...] = ()
    found: Found | None = None


def is_one_statement(prepared: Prepared) -> bool:
    """Whether `submit` does it in one: nothing has to be looked up first."""
    return prepared.new.idempotency_key is None and prepared.unique is None


def submit(
    conn: Connection, organization_id: int, prepared: Prepared, *, idempotency_hours: float = 24.0, ring: bool = True
) -> Submitted:
    """Insert one job in the caller's transaction. Raises IdempotencyConflict.

    With an idempotency key that is known already the job it was used for is returned, and nothing is inserted; where another
    job answers for a unique key, that one. Without `ring` it is not stamped as sent: there is nobody to be rung, and whoever
    looks for due jobs finds it at once.
    """
    if prepared.new.idempotency_key is not None:
        known = _remember(conn, organization_id, prepared, idempotency_hours)
        if known is not None:
            return Submitted(known, created=False)
    placed = _place(conn, organization_id, [prepared])
    if placed.new:
        job, rings = inserting.one(conn, organization_id, placed.new[0], ring)
        return Submitted(job, created=True, rings=tuple(rings))
    job = placed.known[prepared.id]
    if prepared.new.idempotency_key is not None:
        conn.execute(
            "update agentflow.idempotency_keys set job_id = %s where organization_id = %s and key = %s",
            (job.id, organization_id, prepared.new.idempotency_key),
        )
    return Submitted(job, created=False, found=placed.found[prepared.id])


def submit_many(
    conn: Connection,
    organization_id: int,
    prepared: Sequence[Prepared],
    *,
    batch_id: UUID | None = None,
    callback_url: str | None = None,
    ring: bool = True,
) -> tuple[list[Job], list[Ring]]:
    """Insert many jobs in the caller's transaction, in one statement; with `batch_id` they are counted as a batch.

    The jobs come in the order of `prepared`. A job that answers for a unique key stands in the place of a new one, and is not
    counted in the batch. Idempotency keys are not looked at here: `submit` does that, one by one.
    """
    placed = _place(conn, organization_id, prepared)
    if batch_id is not None:
        conn.execute(
            "insert into agentflow.batches (id, organization_id, total, callback_url, finished_at)"
            " values (%(id)s, %(organization)s, %(total)s, %(url)s, case when %(total)s = 0 then clock_timestamp() end)",
            {"id": batch_id, "organization": organization_id, "total": len(placed.new), "url": callback_url},
        )
    jobs, rings = inserting.many(conn, organization_id, placed.new, batch_id, ring) if placed.new else ([], [])
    made = {job.id: job for job in jobs}
    return [placed.known.get(p.id) or made[placed.same.get(p.id, p.id)] for p in prepared], rings


@dataclass(slots=True)
class _Placed:
    """What becomes of requests: those to insert; by the id of the others, the job that is there, or the id of the one that is
    to be inserted in its place."""

    new: list[Prepared]
    known: dict[UUID, Job] = field(default_factory=dict)
    same: dict[UUID, UUID] = field(default_factory=dict)
    found: dict[UUID, Found] = field(default_factory=dict)


def _place(conn: Connection, organization_id: int, prepared: Sequence[Prepared]) -> _Placed:
    keys = [(p.new.type, p.unique.key) for p in prepared if p.unique is not None]
    if not keys:
        return _Placed(list(prepared))
    holders = unique.lock(conn, organization_id, keys)
    placed = _Placed([])
    mine: dict[unique.Key, int] = {}  # where in `new` the job stands that is to hold the key
    for p in prepared:
        if p.unique is None:
            placed.new.append(p)
            continue
        key = (p.new.type, p.unique.key)
        if key in mine:
            first = placed.new[mine[key]]
            if p.unique.mode == "debounce":
                placed.new[mine[key]] = dataclasses.replace(_starting(p, holders[key], first=True), id=first.id)
            placed.same[p.id] = first.id
            continue
        holder = holders[key]
        found = unique.answers(holder, p.unique)
        job = holder.job
        if found == "debounced" and job is not None:
            job = _replace(conn, organization_id, job.id, _starting(p, holder, first=False))
        if found is not None and job is not None:
            placed.known[p.id], placed.found[p.id] = job, found
            holders[key] = dataclasses.replace(holder, job=job)
            continue
        mine[key] = len(placed.new)
        placed.new.append(_starting(p, holder, first=True))
    if mine:
        unique.hold(conn, organization_id, [(key, placed.new[index].id) for key, index in mine.items()])
    return placed


def _starting(p: Prepared, holder: Holder, *, first: bool) -> Prepared:
    if p.unique is None or p.unique.mode != "debounce":
        return p
    run_at = unique.starts_at(holder, p.unique, first=first)
    return dataclasses.replace(p, new=dataclasses.replace(p.new, run_at=run_at))


def _replace(conn: Connection, organization_id: int, job_id: UUID, p: Prepared) -> Job | None:
    """Put the newest request in the place of one that waits. None: it was claimed or cancelled meanwhile."""
    if p.concurrency is not None:
        inserting.name_slots(conn, {p.concurrency[0]: p.concurrency[1]})
    row = conn.execute(
        "update agentflow.jobs j set payload = %(payload)s, priority = %(priority)s, head_start_s = %(head_start)s,"  # noqa: S608 - constants
        " max_attempts = %(max_attempts)s,"
        " time_limit_s = %(time_limit)s, run_at = %(run_at)s, wake_at = %(run_at)s, sent_at = null, sends = 0,"
        " wait_reason = null, concurrency_key = %(key)s, then_jobs = %(then)s, callback_url = %(callback)s,"
        " correlation_id = %(correlation)s, trace = %(trace)s"
        " where j.id = %(id)s and j.organization_id = %(organization)s and j.state || '' = 'queued' and j.fence = 0"
        f" returning {JOB_COLUMNS}",
        {
            "id": job_id,
            "organization": organization_id,
            "payload": p.payload,
            "priority": p.priority,
            "head_start": p.head_start_s,
            "max_attempts": p.max_attempts,
            "time_limit": p.time_limit_s,
            "run_at": p.new.run_at,
            "key": p.concurrency[0] if p.concurrency else None,
            "then": p.then_jobs,
            "callback": p.new.callback_url,
            "correlation": p.new.correlation_id,
            "trace": traces.carried(),
        },
    ).fetchone()
    return job_from_row(row) if row else None


def _remember(conn: Connection, organization_id: int, prepared: Prepared, hours: float) -> Job | None:
    key = prepared.new.idempotency_key
    for _ in range(10):  # the other one may be rolled back, or cleaned up, between the two statements
        row = conn.execute(
            "insert into agentflow.idempotency_keys as k (organization_id, key, request_hash, job_id)"
            " values (%s, %s, %s, %s) on conflict (organization_id, key) do update"
            " set request_hash = excluded.request_hash, job_id = excluded.job_id, created_at = excluded.created_at"
            " where k.created_at < clock_timestamp() - make_interval(hours => 1) * %s returning 1",
            (organization_id, key, prepared.request_hash, prepared.id, hours),
        ).fetchone()
        if row is not None:
            return None
        # A statement of its own: one that did both would not see a row that was committed after it began.
        found = conn.execute(
            f"select k.request_hash, k.job_id, {JOB_COLUMNS} from agentflow.idempotency_keys k"  # noqa: S608 - constants
            " left join agentflow.jobs j on j.id = k.job_id and j.organization_id = k.organization_id"
            " where k.organization_id = %s and k.key = %s",
            (organization_id, key),
        ).fetchone()
        if found is None:
            continue
        request_hash, job_id, *columns = found
        if bytes(request_hash) != prepared.request_hash or columns[0] is None:
            raise IdempotencyConflict(str(key), job_id)
        return job_from_row(tuple(columns))
    raise IdempotencyConflict(str(key), prepared.id)
