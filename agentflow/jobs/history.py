"""How it went, by the minute: made from the rows of jobs by the scheduler, so that no job pays for it and nothing is lost with a
process.

A minute is computed whole, as often as one likes: it is looked at again while rows of it may still be committed. What was counted
once stays when retention takes its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from agentflow.database import Connection
from agentflow.jobs.statistics import id_floor

Window = Literal["1h", "24h", "7d"]

#: Of each window how long a bucket is, and how many there are.
WINDOWS: Final[dict[Window, tuple[int, int]]] = {"1h": (60, 60), "24h": (600, 144), "7d": (3600, 168)}
#: Seconds from due to claim: the upper bounds of the counts, the last of which is open.
PICKUP_BOUNDS: Final = (0.005, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
#: A row may be committed so long after the moment that it names: no statement takes longer.
LATE_S: Final = 120.0
#: Ids are made by the clocks of who submits.
_CLOCKS_S: Final = 600.0
_CHUNK: Final = timedelta(minutes=30)
_MARK: Final = "history"
_KEPT: Final = {60: timedelta(hours=25), 600: timedelta(days=8), 3600: timedelta(days=8)}
_LARGEST: Final = 3600


@dataclass(frozen=True, slots=True)
class Point:
    """What happened from `at` (unix seconds) on, for a bucket. Depths are the most that was seen, None: nobody looked."""

    at: int
    submitted: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    pickup_median_s: float | None = None
    pickup_p95_s: float | None = None
    run_mean_s: float | None = None
    due: int | None = None
    parked: int | None = None
    running: int | None = None
    oldest_due_s: float | None = None


# ---- writing ----


def roll_up(conn: Connection) -> int:
    """Bring the history up to now, in transactions of half an hour. Returns how many buckets were written."""
    written = 0
    while True:
        with conn.transaction():
            now = _now(conn)
            since = _since(conn, now)
            until = min(since + _CHUNK, now)
            written += _count(conn, since, until)
            for seconds, finer in ((600, 60), (3600, 600)):
                written += _fold(conn, seconds, finer, _floor(since, seconds), until)
            _remember(conn, until)
        if until >= now:
            return written


def sample_depths(conn: Connection) -> None:
    """How much waits and runs now, by organization and queue."""
    with conn.transaction():
        conn.execute(_SAMPLE)
        now = _now(conn)
        for seconds, finer in ((600, 60), (3600, 600)):
            conn.execute(
                "insert into agentflow.depth_history as h (seconds, at, organization_id, queue, due, parked, running,"
                " oldest_due_s)"
                " select %(seconds)s, %(at)s, d.organization_id, d.queue, max(d.due), max(d.parked), max(d.running),"
                " max(d.oldest_due_s) from agentflow.depth_history d where d.seconds = %(finer)s and d.at >= %(at)s"
                " group by d.organization_id, d.queue on conflict (organization_id, seconds, at, queue) do update set"
                " due = greatest(h.due, excluded.due), parked = greatest(h.parked, excluded.parked),"
                " running = greatest(h.running, excluded.running),"
                " oldest_due_s = greatest(h.oldest_due_s, excluded.oldest_due_s)",
                {"seconds": seconds, "finer": finer, "at": _floor(now, seconds)},
            )


def delete_old(conn: Connection, *, limit: int) -> int:
    """A batch of what is older than its kind is kept, counted from the last minute that was written: what is made up for after a
    long stop is folded first."""
    deleted = 0
    for table in ("job_history", "depth_history"):
        for seconds, kept in _KEPT.items():
            deleted += conn.execute(
                f"delete from agentflow.{table} where ctid = any (array(select ctid from agentflow.{table}"  # noqa: S608 - constants
                " where seconds = %s and at < %s limit %s))",
                (seconds, _since(conn, _now(conn)) - kept, limit - deleted),
            ).rowcount
    return deleted


def _now(conn: Connection) -> datetime:
    row = conn.execute("select clock_timestamp()").fetchone()
    assert row is not None  # noqa: S101 - a select of one row
    found: datetime = row[0]
    return found.astimezone(UTC)


def _since(conn: Connection, now: datetime) -> datetime:
    """The first minute that may have changed since the last time."""
    oldest = now - _KEPT[_LARGEST]
    mark = _marked(conn) or _first_job(conn) or now
    return _floor(max(oldest, min(mark, now) - timedelta(seconds=LATE_S)), 60)


def _first_job(conn: Connection) -> datetime | None:
    """When the oldest id was made, as it says itself."""
    row = conn.execute("select j.id from agentflow.jobs j order by j.id limit 1").fetchone()
    return datetime.fromtimestamp((row[0].int >> 80) / 1000, UTC) if row else None


def _marked(conn: Connection) -> datetime | None:
    row = conn.execute("select value from agentflow.installation where name = %s", (_MARK,)).fetchone()
    return datetime.fromisoformat(row[0]) if row else None


def _remember(conn: Connection, until: datetime) -> None:
    conn.execute(
        "insert into agentflow.installation (name, value) values (%s, %s)"
        " on conflict (name) do update set value = excluded.value",
        (_MARK, until.isoformat()),
    )


def _floor(at: datetime, seconds: int) -> datetime:
    return datetime.fromtimestamp(at.timestamp() // seconds * seconds, UTC)


def _counts(bucket: str) -> str:
    """SQL: an array of counts by the bounds."""
    return (
        "array["
        + ", ".join(f"count(*) filter (where {bucket} = {n})" for n in range(len(PICKUP_BOUNDS) + 1))
        + "]::integer[]"
    )


def _sums(column: str) -> str:
    """SQL: arrays added up."""
    return "array[" + ", ".join(f"sum({column}[{n + 1}])" for n in range(len(PICKUP_BOUNDS) + 1)) + "]::integer[]"


_MINUTE: Final = "date_bin('1 min', {}, 'epoch')"

# `then` jobs have the ids that their chain was submitted with, which may be long ago: they are found by the end that made them.
_COUNT: Final = f"""
with ended as (
    select {_MINUTE.format("j.finished_at")} as at, j.organization_id, j.type, j.queue,
        count(*) filter (where j.state = 'succeeded') as succeeded, count(*) filter (where j.state = 'failed') as failed,
        count(*) filter (where j.state = 'cancelled') as cancelled,
        {_counts("width_bucket(extract(epoch from j.started_at - j.run_at)::float8, %(bounds)s::float8[])")} as pickups,
        coalesce(sum(greatest(0, extract(epoch from j.started_at - j.run_at))), 0) as pickup_s,
        coalesce(sum(extract(epoch from j.finished_at - j.started_at)), 0) as run_s
    from agentflow.jobs j where j.finished_at >= %(since)s and j.finished_at < %(until)s group by 1, 2, 3, 4
), handed_in as (
    select {_MINUTE.format("s.created_at")} as at, s.organization_id, s.type, s.queue, count(*) as submitted from (
        select j.organization_id, j.type, j.queue, j.created_at from agentflow.jobs j where j.id >= %(first)s and j.id < %(last)s
        union all
        select c.organization_id, c.type, c.queue, c.created_at from agentflow.jobs p join agentflow.jobs c on c.parent_id = p.id
        where p.finished_at >= %(since)s::timestamptz - interval '1 min' and p.finished_at < %(until)s
            and p.then_jobs is not null and c.id < %(first)s
    ) s where s.created_at >= %(since)s and s.created_at < %(until)s group by 1, 2, 3, 4
)
insert into agentflow.job_history as h (seconds, at, organization_id, type, queue, submitted, succeeded, failed, cancelled,
    pickups, pickup_s, run_s)
select 60, at, organization_id, type, queue, coalesce(submitted, 0), coalesce(succeeded, 0), coalesce(failed, 0),
    coalesce(cancelled, 0), coalesce(pickups, array_fill(0, array[{len(PICKUP_BOUNDS) + 1}])),
    coalesce(pickup_s, 0), coalesce(run_s, 0)
from ended full join handed_in using (at, organization_id, type, queue)
on conflict (organization_id, seconds, at, type, queue) do update set
    submitted = greatest(h.submitted, excluded.submitted),
    (succeeded, failed, cancelled, pickups, pickup_s, run_s) = (
        select m.succeeded, m.failed, m.cancelled, m.pickups, m.pickup_s, m.run_s from (values
            (excluded.succeeded, excluded.failed, excluded.cancelled, excluded.pickups, excluded.pickup_s, excluded.run_s),
            (h.succeeded, h.failed, h.cancelled, h.pickups, h.pickup_s, h.run_s)
        ) m(succeeded, failed, cancelled, pickups, pickup_s, run_s)
        order by m.succeeded + m.failed + m.cancelled desc limit 1
    )
"""  # noqa: S608 - only constants are put in

_FOLD: Final = f"""
insert into agentflow.job_history (seconds, at, organization_id, type, queue, submitted, succeeded, failed, cancelled, pickups,
    pickup_s, run_s)
select %(seconds)s, date_bin(make_interval(secs => %(seconds)s), f.at, 'epoch'), f.organization_id, f.type, f.queue,
    sum(f.submitted), sum(f.succeeded), sum(f.failed), sum(f.cancelled), {_sums("f.pickups")}, sum(f.pickup_s), sum(f.run_s)
from agentflow.job_history f where f.seconds = %(finer)s and f.at >= %(since)s and f.at < %(until)s group by 1, 2, 3, 4, 5
on conflict (organization_id, seconds, at, type, queue) do update set submitted = excluded.submitted,
    succeeded = excluded.succeeded, failed = excluded.failed, cancelled = excluded.cancelled, pickups = excluded.pickups,
    pickup_s = excluded.pickup_s, run_s = excluded.run_s
"""  # noqa: S608 - only constants are put in

# Two halves, each with the condition of a partial index.
_SAMPLE: Final = """
insert into agentflow.depth_history as h (seconds, at, organization_id, queue, due, parked, running, oldest_due_s)
select 60, date_bin('1 min', statement_timestamp(), 'epoch'), organization_id, queue, sum(due), sum(parked), sum(running),
    max(oldest)
from (
    select organization_id, queue, count(*) filter (where d.is_due) as due, count(*) filter (where not d.is_due) as parked,
        0 as running, coalesce(extract(epoch from statement_timestamp() - min(j.run_at) filter (where d.is_due)), 0) as oldest
    from agentflow.jobs j cross join lateral (
        select j.run_at <= statement_timestamp() and j.wait_reason is distinct from 'busy' as is_due
    ) d where j.state = 'queued' group by 1, 2
    union all
    select organization_id, queue, 0, 0, count(*), 0 from agentflow.jobs where state = 'running' group by 1, 2
) x group by 3, 4
on conflict (organization_id, seconds, at, queue) do update set due = greatest(h.due, excluded.due),
    parked = greatest(h.parked, excluded.parked), running = greatest(h.running, excluded.running),
    oldest_due_s = greatest(h.oldest_due_s, excluded.oldest_due_s)
"""


def _count(conn: Connection, since: datetime, until: datetime) -> int:
    return conn.execute(
        _COUNT,
        {
            "since": since,
            "until": until,
            "first": id_floor(since.timestamp() - _CLOCKS_S),
            "last": id_floor(until.timestamp() + _CLOCKS_S),
            "bounds": list(PICKUP_BOUNDS),
        },
    ).rowcount


def _fold(conn: Connection, seconds: int, finer: int, since: datetime, until: datetime) -> int:
    return conn.execute(
        _FOLD, {"seconds": seconds, "finer": finer, "since": since, "until": until + timedelta(seconds=seconds)}
    ).rowcount


# ---- reading ----


def read(conn: Connection, organization_id: int | None, window: Window) -> list[Point]:
    """The buckets of a window that ends now, the oldest first and without gaps; of one organization, or (None) of all."""
    seconds, number = WINDOWS[window]
    last = _floor(_now(conn), seconds)
    first = last - timedelta(seconds=seconds * (number - 1))
    values = {"seconds": seconds, "first": first, "organization": organization_id}
    counted = {
        row[0]: row
        for row in conn.execute(
            "select extract(epoch from h.at)::bigint, sum(h.submitted)::bigint, sum(h.succeeded)::bigint,"  # noqa: S608 - constants
            f" sum(h.failed)::bigint, sum(h.cancelled)::bigint, sum(h.run_s), {_sums('h.pickups')}"
            " from agentflow.job_history h where h.seconds = %(seconds)s and h.at >= %(first)s"
            " and (%(organization)s::bigint is null or h.organization_id = %(organization)s) group by 1",
            values,
        ).fetchall()
    }
    deep = {
        row[0]: row[1:]
        for row in conn.execute(
            "select extract(epoch from d.at)::bigint, sum(d.due)::bigint, sum(d.parked)::bigint, sum(d.running)::bigint,"
            " max(d.oldest_due_s) from agentflow.depth_history d where d.seconds = %(seconds)s and d.at >= %(first)s"
            " and (%(organization)s::bigint is null or d.organization_id = %(organization)s) group by 1",
            values,
        ).fetchall()
    }
    start, looked_until = int(first.timestamp()), _marked(conn)
    return [
        _point(at, counted, deep.get(at, _EMPTY if looked_until and at < looked_until.timestamp() else _UNKNOWN))
        for at in range(start, start + number * seconds, seconds)
    ]


def behind_s(conn: Connection) -> float | None:
    """Since the history was brought up to date. None: it never was."""
    mark = _marked(conn)
    return max(0.0, (_now(conn) - mark).total_seconds()) if mark else None


_EMPTY: Final = (0, 0, 0, 0.0)
_UNKNOWN: Final = (None, None, None, None)


def _point(at: int, counted: dict[int, Any], depths: tuple[Any, ...]) -> Point:
    due, parked, running, oldest = depths
    if at not in counted:
        return Point(at, due=due, parked=parked, running=running, oldest_due_s=oldest)
    _, submitted, succeeded, failed, cancelled, run_s, pickups = counted[at]
    started = sum(pickups)
    return Point(
        at,
        submitted,
        succeeded,
        failed,
        cancelled,
        quantile(pickups, 0.5),
        quantile(pickups, 0.95),
        run_s / started if started else None,
        due,
        parked,
        running,
        oldest,
    )


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Seconds, by straight lines within the counts' bounds; what lies beyond the last bound is taken for it. None: no counts."""
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for n, count in enumerate(counts):
        if count and below + count >= wanted:
            low = PICKUP_BOUNDS[n - 1] if n else 0.0
            high = PICKUP_BOUNDS[n] if n < len(PICKUP_BOUNDS) else low
            return low + (high - low) * (wanted - below) / count
        below += count
    return PICKUP_BOUNDS[-1]
