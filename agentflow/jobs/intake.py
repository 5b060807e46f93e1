"""Taking work in: a job is checked, then inserted in the caller's transaction.

Where the organization's window has room the row is stamped as sent in the same INSERT, and the caller rings the broker after
the commit (`agentflow.system.System.transaction` does both). A ring that is lost between the two is found by the relay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pydantic import ValidationError
from uuid6 import uuid7

from agentflow import traces
from agentflow.database import Connection
from agentflow.jobs import inserting, registry, unique
from agentflow.jobs.model import HEAD_STARTS, JOB_COLUMNS, PRIORITIES, HeadStart, Job, Priority, Ring, job_from_row
from agentflow.jobs.text import is_storable
from agentflow.jobs.unique import Found, Holder, Unique

MAX_THEN_DEPTH: Final = 8
MAX_THEN_JOBS: Final = 50
MAX_KEY_BYTES: Final = 1000


class InvalidJob(ValueError):
    """What was asked for cannot be a job. `field` is a path (`payload.sleep_ms`), `problem` says what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class IdempotencyConflict(Exception):
    """The key was used before for another request."""

    def __init__(self, key: str, job_id: UUID) -> None:
        super().__init__(f"idempotency key {key!r} was used for another request (job {job_id})")
        self.job_id = job_id


@dataclass(frozen=True, slots=True)
class NewJob:
    """A request for a job; what is None comes from its type. `then` are requests for jobs to run after its success."""

    type: str
    payload: dict[str, Any]
    priority: Priority | None = None
    head_start_s: HeadStart | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    time_limit_s: float | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    concurrency_limit: int | None = None
    correlation_id: str | None = None
    callback_url: str | None = None
    then: tuple[NewJob, ...] = ()
    retry_of: UUID | None = None
    unique: Unique | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, as columns. Made without the database."""

    id: UUID
    new: NewJob
    queue: str
    priority: int
    payload: str
    max_attempts: int
    time_limit_s: float
    concurrency: tuple[str, int | None] | None
    then_jobs: str | None
    unique: Unique | None = None
    head_start_s: HeadStart = 0
    known_by: bytes | None = None

    @property
    def request_hash(self) -> bytes:
        """`known_by`; else of the request as checked, so that leaving a default out and naming it are the same one."""
        if self.known_by is not None:
            return self.known_by
        request = json.dumps({**dataclasses.asdict(self.new), "payload": self.payload}, sort_keys=True, default=str)
        return hashlib.sha256(request.encode()).digest()


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is in the database (once the caller commits). `created` is False for a repeated idempotency key, and where
    another job answers for a unique key; `found` says how it does."""

    job: Job
    created: bool
    rings: tuple[Ring, ...] = ()
    found: Found | None = None


def prepare(
    new: NewJob, *, organization_id: int, max_payload_bytes: int, public_only: bool = True, depth: int = 0
) -> Prepared:
    """Check a request against its type. Raises InvalidJob, UnknownType."""
    job_type = registry.get(new.type)
    if public_only and not job_type.public:
        raise registry.UnknownType(new.type)
    checked = _checked(job_type, new.payload)
    payload = _as_text(checked, max_payload_bytes)
    for name in ("idempotency_key", "correlation_id", "concurrency_key", "callback_url"):
        _storable(name, getattr(new, name))
        if name != "callback_url":
            _short(name, getattr(new, name))
    head_start_s = job_type.head_start_s if new.head_start_s is None else new.head_start_s
    if head_start_s not in HEAD_STARTS:
        raise InvalidJob("head_start_s", f"must be one of {', '.join(map(str, HEAD_STARTS))}")
    concurrency = job_type.concurrency(checked)
    if new.concurrency_key is not None:
        # A caller's keys are the organization's own; those of a type (a GPU, an account) are the system's.
        concurrency = (f"{organization_id}:{new.concurrency_key}", new.concurrency_limit or 1)
    wanted = new.unique or job_type.unique(checked)
    if wanted is not None:
        _check_unique(wanted, new)
    children = _children(new, organization_id, max_payload_bytes, public_only, depth)
    return Prepared(
        id=uuid7(),
        new=new,
        queue=job_type.queue,
        priority=PRIORITIES.index(new.priority or job_type.priority),
        payload=payload,
        max_attempts=new.max_attempts or job_type.retry.max_attempts,
        time_limit_s=min(new.time_limit_s or job_type.time_limit_s, job_type.time_limit_s),
        concurrency=concurrency,
        then_jobs=json.dumps(children) if children else None,
        unique=wanted,
        head_start_s=head_start_s,
    )


def _check_unique(wanted: Unique, new: NewJob) -> None:
    _storable("unique.key", wanted.key)
    _short("unique.key", wanted.key)
    if not wanted.key:
        raise InvalidJob("unique.key", "is empty")
    if (wanted.mode == "keep") != (wanted.period_s is None):
        raise InvalidJob("unique.period_s", "belongs to throttle and debounce, which need it")
    for name, seconds in (("period_s", wanted.period_s), ("max_wait_s", wanted.max_wait_s)):
        if seconds is not None and not 0 < seconds <= unique.MAX_PERIOD_S:
            raise InvalidJob(f"unique.{name}", f"must be more than 0 and at most {unique.MAX_PERIOD_S:g} seconds")
    if wanted.max_wait_s is not None and wanted.mode != "debounce":
        raise InvalidJob("unique.max_wait_s", "belongs to debounce")
    if wanted.mode == "debounce" and new.run_at is not None:
        raise InvalidJob("run_at", "is what debounce sets: leave it out")


def _checked(job_type: registry.JobType, payload: dict[str, Any]) -> registry.Payload:
    try:
        return job_type.payload.model_validate_json(json.dumps(payload))
    except (TypeError, RecursionError) as error:
        raise InvalidJob("payload", f"is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidJob(".".join(["payload", *map(str, first["loc"])]), first["msg"]) from None


def _as_text(checked: registry.Payload, max_bytes: int) -> str:
    text = checked.model_dump_json()
    _storable("payload", text)
    if len(text.encode()) > max_bytes:
        raise InvalidJob("payload", f"is larger than {max_bytes} bytes; put large things in storage and send their key")
    return text


def _short(field: str, text: str | None) -> None:
    """What stands in an index: Postgres takes no entry beyond a third of a page."""
    if text is not None and len(text.encode(errors="replace")) > MAX_KEY_BYTES:
        raise InvalidJob(field, f"is longer than {MAX_KEY_BYTES} bytes")


def _storable(field: str, text: str | None) -> None:
    """Postgres stores no NUL and no lone surrogate, neither as text nor escaped inside JSON."""
    if text is not None and not is_storable(text):
        raise InvalidJob(field, "holds a NUL character or half of a surrogate pair, which cannot be stored")


def _children(
    new: NewJob, organization_id: int, max_payload_bytes: int, public_only: bool, depth: int
) -> list[dict[str, Any]]:
    """The `then` jobs as they will be inserted, with ids fixed now, so that a repeated finish cannot insert them twice."""
    if not new.then:
        return []
    if depth >= MAX_THEN_DEPTH:
        raise InvalidJob("then", f"is nested deeper than {MAX_THEN_DEPTH}")
    if len(new.then) > MAX_THEN_JOBS:
        raise InvalidJob("then", f"has more than {MAX_THEN_JOBS} jobs")
    children = []
    for index, child in enumerate(new.then):
        try:
            p = prepare(
                child,
                organization_id=organization_id,
                max_payload_bytes=max_payload_bytes,
                public_only=public_only,
                depth=depth + 1,
            )
        except InvalidJob as error:
            raise InvalidJob(f"then.{index}.{error.field}", error.problem) from None
        except registry.UnknownType as error:
            raise InvalidJob(f"then.{index}.type", str(error)) from None
        if child.run_at or child.idempotency_key or p.concurrency or p.unique or child.head_start_s:
            raise InvalidJob(
                f"then.{index}",
                "may not have run_at, a head start, an idempotency key, a concurrency key or a unique key",
            )
        children.append(
            {
                "id": str(p.id),
                "type": child.type,
                "queue": p.queue,
                "priority": p.priority,
                "payload": json.loads(p.payload),
                "max_attempts": p.max_attempts,
                "time_limit_s": p.time_limit_s,
                "callback_url": child.callback_url,
                "then": json.loads(p.then_jobs) if p.then_jobs else None,
            }
        )
    return children


def is_one_statement(prepared: Prepared) -> bool:
    """Whether `submit` does it in one: nothing is looked up, and nothing written beside the row."""
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
