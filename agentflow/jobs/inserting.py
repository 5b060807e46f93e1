"""The rows of requests that were checked: of one by a statement of its own, of many by one for all.

What is answered is what was handed in with what the database decided, and is not read again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agentflow import traces
from agentflow.database import Connection
from agentflow.jobs.model import PRIORITIES, Job, Ring
from agentflow.jobs.requests import Prepared

_MANY: Final = """
select j.id, j.sent_at is not null, j.run_at, j.wake_at, j.created_at, j.time_limit_s from agentflow.submit_1(
    p_organization => %(organization)s, p_batch => %(batch)s, p_trace => %(trace)s, p_ring => %(ring)s,
    p_ids => %(ids)s::uuid[], p_types => %(types)s::text[], p_queues => %(queues)s::text[],
    p_priorities => %(priorities)s::smallint[], p_payloads => %(payloads)s::jsonb[],
    p_max_attempts => %(max_attempts)s::smallint[], p_time_limits => %(time_limits)s::real[],
    p_run_ats => %(run_ats)s::timestamptz[], p_keys => %(keys)s::text[], p_thens => %(thens)s::jsonb[],
    p_callbacks => %(callbacks)s::text[], p_correlations => %(correlations)s::text[],
    p_idempotency_keys => %(idempotency_keys)s::text[], p_retries => %(retries)s::uuid[],
    p_head_starts => %(head_starts)s::smallint[]
) j
"""
_ONE: Final = """
select is_sent, due_at, looked_at, made_at, limit_s from agentflow.submit_one_1(
    p_organization => %(organization)s, p_trace => %(trace)s, p_ring => %(ring)s, p_id => %(id)s, p_type => %(type)s,
    p_queue => %(queue)s, p_priority => %(priority)s::smallint, p_payload => %(payload)s::jsonb,
    p_max_attempts => %(max_attempts)s::smallint, p_time_limit => %(time_limit)s::real, p_run_at => %(run_at)s::timestamptz,
    p_key => %(key)s, p_then => %(then)s::jsonb, p_callback => %(callback)s, p_correlation => %(correlation)s,
    p_idempotency_key => %(idempotency_key)s, p_retry => %(retry)s, p_head_start => %(head_start)s::smallint
)
"""
#: A key's number of slots is written where it changed. None: others count them; a key that nobody has counted yet has one.
#: Read first: ON CONFLICT DO UPDATE locks the row even when equal.
_NAME: Final = """
insert into agentflow.concurrency_keys as k (key, slots)
select %(key)s::text, coalesce(%(slots)s::integer, 1) {} where not exists (
    select from agentflow.concurrency_keys n where n.key = %(key)s::text and n.slots = coalesce(%(slots)s::integer, n.slots)
)
on conflict (key) do update set slots = coalesce(%(slots)s::integer, k.slots)
"""
_NAME_KEY: Final = _NAME.format("")
_ONE_KEYED: Final = "with named as (" + _NAME_KEY + ")" + _ONE
_AND_NAMED: Final = ", named as (" + _NAME.format("from stored") + ")"
#: The function is called for the row that `stored` returns, or not at all.
_ONE_OF_STORED: Final = _ONE.replace("%(id)s", "stored.job_id")


def one(conn: Connection, organization_id: int, p: Prepared, ring: bool) -> tuple[Job, list[Ring]]:
    """As `many`, at half the cost; with a concurrency key, too, it is one statement."""
    values = _values(organization_id, p, ring)
    row = conn.execute(_ONE if p.concurrency is None else _ONE_KEYED, values).fetchone()
    assert row is not None  # noqa: S101 - a function with OUT parameters
    is_sent, *decided = row
    return _job(p, organization_id, None, values["trace"], *decided), [_ring(p)] if is_sent else []


def one_of_stored(
    conn: Connection, stored: str, values: Mapping[str, Any], organization_id: int, p: Prepared, ring: bool
) -> list[Ring] | None:
    """A row of the caller's and the job for it in one statement, which needs no transaction around it.

    `stored` is an INSERT with names for `values`, none of them of the job's own, that returns the job's id as `job_id`. Where it
    inserts nothing there is no job either: None. Else whom to ring.
    """
    named = "" if p.concurrency is None else _AND_NAMED
    row = conn.execute(
        f"with stored as ({stored}){named} select s.is_sent from stored cross join lateral ({_ONE_OF_STORED}) s",  # noqa: S608 - constants
        {**values, **_values(organization_id, p, ring)},
    ).fetchone()
    if row is None:
        return None
    return [_ring(p)] if row[0] else []


def _values(organization_id: int, p: Prepared, ring: bool) -> dict[str, Any]:
    key, slots = p.concurrency or (None, None)
    new = p.new
    return {
        "organization": organization_id,
        "trace": traces.carried(),
        "ring": ring,
        "id": p.id,
        "type": new.type,
        "queue": p.queue,
        "priority": p.priority,
        "payload": p.payload,
        "max_attempts": p.max_attempts,
        "time_limit": p.time_limit_s,
        "run_at": new.run_at,
        "key": key,
        "slots": slots,
        "then": p.then_jobs,
        "callback": new.callback_url,
        "correlation": new.correlation_id,
        "idempotency_key": new.idempotency_key,
        "retry": new.retry_of,
        "head_start": p.head_start_s,
    }


def _ring(p: Prepared) -> Ring:
    return Ring(p.id, p.queue, p.new.type, p.priority)


def _job(
    p: Prepared,
    organization_id: int,
    batch_id: UUID | None,
    trace: str | None,
    run_at: datetime,
    wake_at: datetime,
    created_at: datetime,
    time_limit_s: float,
) -> Job:
    """The row that was made of it; the last four are the database's."""
    new = p.new
    return Job(
        id=p.id,
        organization_id=organization_id,
        type=new.type,
        queue=p.queue,
        priority=PRIORITIES[p.priority],
        head_start_s=p.head_start_s,
        state="queued",
        payload=json.loads(p.payload),
        attempt=0,
        max_attempts=p.max_attempts,
        crashes=0,
        fence=0,
        time_limit_s=time_limit_s,
        run_at=run_at,
        wake_at=wake_at,
        wait_reason=None,
        cancel_requested=False,
        progress=None,
        stage=None,
        result=None,
        error=None,
        concurrency_key=p.concurrency[0] if p.concurrency else None,
        slot=None,
        worker=None,
        callback_url=new.callback_url,
        correlation_id=new.correlation_id,
        idempotency_key=new.idempotency_key,
        parent_id=None,
        retry_of=new.retry_of,
        batch_id=batch_id,
        trace=trace,
        created_at=created_at,
        started_at=None,
        finished_at=None,
    )


def many(
    conn: Connection, organization_id: int, prepared: Sequence[Prepared], batch_id: UUID | None, ring: bool
) -> tuple[list[Job], list[Ring]]:
    """The jobs in the order of `prepared`, and whom to ring after the commit. Without `ring` none is stamped as sent."""
    slots = {p.concurrency[0]: p.concurrency[1] for p in prepared if p.concurrency}
    if slots:
        name_slots(conn, slots)
    trace = traces.carried()
    rows = conn.execute(
        _MANY,
        {
            "organization": organization_id,
            "batch": batch_id,
            "trace": trace,
            "ring": ring,
            "ids": [p.id for p in prepared],
            "types": [p.new.type for p in prepared],
            "queues": [p.queue for p in prepared],
            "priorities": [p.priority for p in prepared],
            "payloads": [p.payload for p in prepared],
            "max_attempts": [p.max_attempts for p in prepared],
            "time_limits": [p.time_limit_s for p in prepared],
            "run_ats": [p.new.run_at for p in prepared],
            "keys": [p.concurrency[0] if p.concurrency else None for p in prepared],
            "thens": [p.then_jobs for p in prepared],
            "callbacks": [p.new.callback_url for p in prepared],
            "correlations": [p.new.correlation_id for p in prepared],
            "idempotency_keys": [p.new.idempotency_key for p in prepared],
            "retries": [p.new.retry_of for p in prepared],
            "head_starts": [p.head_start_s for p in prepared],
        },
    ).fetchall()
    decided = {row[0]: row[1:] for row in rows}
    rings = [_ring(p) for p in prepared if decided[p.id][0]]
    return [_job(p, organization_id, batch_id, trace, *decided[p.id][1:]) for p in prepared], rings


def name_slots(conn: Connection, slots: dict[str, int | None]) -> None:
    """Of many keys those that changed are written, one by one: nearly always none."""
    known = dict(
        conn.execute(
            "select key, slots from agentflow.concurrency_keys where key = any (%s)", (list(slots),)
        ).fetchall()
    )
    for key, number in sorted(slots.items()):
        if key not in known or number not in (None, known[key]):
            conn.execute(_NAME_KEY, {"key": key, "slots": number})
