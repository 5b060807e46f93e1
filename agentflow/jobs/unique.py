"""Unique keys: of many requests for the same thing, which become jobs.

`keep`       while a job with the key is queued or running, further requests answer that job
`throttle`   at most one job in `period_s` seconds; further requests answer the last one, whatever became of it
`debounce`   the job starts when no request came for `period_s`; the newest request replaces what waits, and moves `run_at`,
             but never beyond `max_wait_s` after the first

A key belongs to an organization and a type. Its row is locked until the submitting transaction ends: of many at once one
makes the job, and the others, waiting, find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import JOB_COLUMNS, Job, job_from_row

Mode = Literal["keep", "throttle", "debounce"]
#: What became of a request that did not become a job of its own.
Found = Literal["kept", "throttled", "debounced"]

#: Rows are forgotten after a day, and jobs may be.
MAX_PERIOD_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Unique:
    """`period_s` is for throttle and debounce, `max_wait_s` for debounce (None: a day)."""

    key: str
    mode: Mode = "keep"
    period_s: float | None = None
    max_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a key: a job (None: nobody), how long ago its request was taken, and the database's now."""

    job: Job | None
    age_s: float
    now: datetime


Key = tuple[str, str]  # the type, the key


def lock(conn: Connection, organization_id: int, keys: Iterable[Key]) -> dict[Key, Holder]:
    """Lock the keys until the transaction ends, and say who holds them."""
    wanted = sorted(set(keys))  # one order, so that two batches cannot wait for each other
    rows = conn.execute(
        "insert into agentflow.unique_keys as u (organization_id, type, key)"
        " select %s, k.type, k.key from unnest(%s::text[], %s::text[]) with ordinality k(type, key, n) order by k.n"
        " on conflict (organization_id, type, key) do update set job_id = u.job_id"
        " returning type, key, job_id, extract(epoch from clock_timestamp() - accepted_at)::float8, clock_timestamp()",
        (organization_id, [key[0] for key in wanted], [key[1] for key in wanted]),
    ).fetchall()
    # A statement of its own: one that did both would not see a job that was committed while it waited for the lock.
    jobs = {
        job.id: job
        for job in map(
            job_from_row,
            conn.execute(
                f"select {JOB_COLUMNS} from agentflow.jobs j where j.id = any (%s) and j.organization_id = %s",  # noqa: S608
                ([row[2] for row in rows if row[2] is not None], organization_id),
            ).fetchall(),
        )
    }
    return {(row[0], row[1]): Holder(jobs.get(row[2]), row[3], row[4]) for row in rows}


def hold(conn: Connection, organization_id: int, held: Sequence[tuple[Key, UUID]]) -> None:
    """These jobs hold these keys from now on; the keys are locked."""
    conn.execute(
        "update agentflow.unique_keys u set job_id = h.job_id, accepted_at = clock_timestamp()"
        " from unnest(%s::text[], %s::text[], %s::uuid[]) h(type, key, job_id)"
        " where u.organization_id = %s and u.type = h.type and u.key = h.key",
        ([key[0] for key, _ in held], [key[1] for key, _ in held], [job_id for _, job_id in held], organization_id),
    )


def answers(holder: Holder, unique: Unique) -> Found | None:
    """How the job that holds a key answers a request, as far as that is known without a write; None: it does not."""
    if holder.job is None:
        return None
    if unique.mode == "keep":
        return None if holder.job.terminal else "kept"
    if unique.mode == "throttle":
        return "throttled" if holder.age_s < (unique.period_s or 0.0) else None
    return "debounced" if holder.job.state == "queued" and holder.job.fence == 0 else None


def starts_at(holder: Holder, wanted: Unique, *, first: bool) -> datetime:
    """When a debounced job starts if nothing else comes; `first`: this request begins the wait."""
    waited_s = 0.0 if first else holder.age_s
    left_s = max(0.0, (wanted.max_wait_s or MAX_PERIOD_S) - waited_s)
    return holder.now + timedelta(seconds=min(wanted.period_s or 0.0, left_s))
