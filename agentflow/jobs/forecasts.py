"""What estimates learn from: how long jobs take, how many threads are in use, and what became of earlier forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.estimates import Estimate, Outcome

Kind = Literal["waiting", "later", "running"]

#: Of each type so many durations are kept, and of each queue so many forecasts.
_DURATIONS: Final = 200
_KEPT: Final = 600
#: No more forecasts than this are waited for at a time: those that are kept reach back for many times what the longest one takes.
#: Of the last few minutes alone all would share one mood of the load, and a range made from them would be too narrow.
MOST_OPEN: Final = 60
_OLDEST_S: Final = 7 * 86_400
#: How fast the threads in use are followed: a fifth of each look.
_FOLLOW: Final = 0.2


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was said of a job: seconds from then on. `kind`: it was due, was to wait for a time, or ran."""

    job_id: UUID
    organization_id: int
    queue: str
    type: str
    kind: Kind
    fence: int
    start: Estimate | None
    end: Estimate | None


def note_durations(conn: Connection, seconds: Mapping[str, Sequence[float]]) -> None:
    """What jobs took that succeeded, by type."""
    for type_ in sorted(seconds):
        conn.execute(
            "insert into agentflow.durations as d (type, seconds) values (%(type)s, %(seconds)s)"
            " on conflict (type) do update set updated_at = clock_timestamp(), seconds = (d.seconds || excluded.seconds)"
            "[greatest(1, cardinality(d.seconds) + cardinality(excluded.seconds) - %(most)s + 1):]",
            {"type": type_, "seconds": list(seconds[type_])[-_DURATIONS:], "most": _DURATIONS},
        )


def durations(conn: Connection) -> dict[str, list[float]]:
    """Seconds that jobs of each type took, the newest last."""
    return dict(conn.execute("select type, seconds from agentflow.durations").fetchall())


def my_turn(conn: Connection, queue: str, every_s: float) -> bool:
    """Whether it is time to look at a queue, and this process's turn: its row stays locked until the transaction ends."""
    return (
        conn.execute(
            "insert into agentflow.paces as p (queue) values (%(queue)s)"
            " on conflict (queue) do update set looked_at = clock_timestamp()"
            " where p.looked_at < clock_timestamp() - make_interval(secs => %(every)s)",
            {"queue": queue, "every": every_s},
        ).rowcount
        > 0
    )


def note_in_use(conn: Connection, queue: str, share: float) -> None:
    """The share of a queue's threads that ran jobs, seen once while more jobs waited."""
    conn.execute(
        "update agentflow.paces set in_use = coalesce(in_use + (%(share)s - in_use) * %(follow)s, %(share)s)"
        " where queue = %(queue)s",
        {"queue": queue, "share": share, "follow": _FOLLOW},
    )


def record(conn: Connection, forecasts: Sequence[Forecast]) -> None:
    for f in forecasts:
        start, end = f.start or _NOTHING, f.end or _NOTHING
        conn.execute(
            "insert into agentflow.forecasts (job_id, organization_id, queue, type, kind, fence, start_s, start_low_s,"
            " start_high_s, end_s, end_low_s, end_high_s) values (%(job)s, %(organization)s, %(queue)s, %(type)s, %(kind)s,"
            " %(fence)s, %(start)s, %(start_low)s, %(start_high)s, %(end)s, %(end_low)s, %(end_high)s) on conflict do nothing",
            {
                "job": f.job_id,
                "organization": f.organization_id,
                "queue": f.queue,
                "type": f.type,
                "kind": f.kind,
                "fence": f.fence,
                "start": start.expected if f.start else None,
                "start_low": start.low,
                "start_high": start.high,
                "end": end.expected if f.end else None,
                "end_low": end.low,
                "end_high": end.high,
            },
        )


_NOTHING: Final = Estimate(0.0, 0.0)


def open_ones(conn: Connection, queue: str) -> int:
    row = conn.execute("select count(*) from agentflow.forecasts where queue = %s and not closed", (queue,)).fetchone()
    return int(row[0]) if row else 0


def close(conn: Connection, queue: str) -> None:
    """Write down what has happened to the jobs of open forecasts; forget those whose job took another way: it was parked,
    failed, was cancelled or is gone."""
    conn.execute(
        """
        with open as materialized (
            select f.job_id, f.made_at, f.kind, f.fence as then, j.fence, j.state, j.started_at, j.finished_at
            from agentflow.forecasts f left join agentflow.jobs j on j.id = f.job_id where f.queue = %s and not f.closed
        ), otherwise as (
            delete from agentflow.forecasts f using open o where f.job_id = o.job_id and f.made_at = o.made_at and (
                o.state is null or o.state in ('failed', 'cancelled')
                or o.fence > o.then + (o.kind <> 'running')::integer or o.fence > o.then and o.state = 'queued'
                or o.state = 'queued' and o.kind = 'running')
        )
        update agentflow.forecasts f set
            started_s = case when o.kind <> 'running' then extract(epoch from o.started_at - o.made_at) end,
            ended_s = extract(epoch from o.finished_at - o.made_at),
            closed = o.state = 'succeeded'
        from open o where f.job_id = o.job_id and f.made_at = o.made_at and (o.state = 'succeeded'
            or o.state = 'running' and o.kind <> 'running' and o.fence = o.then + 1 and f.started_s is null)
        """,
        (queue,),
    )
    conn.execute(
        "delete from agentflow.forecasts where queue = %(queue)s"
        " and (made_at < clock_timestamp() - make_interval(secs => %(oldest)s) or made_at < ("
        "select made_at from agentflow.forecasts where queue = %(queue)s order by made_at desc offset %(kept)s limit 1))",
        {"queue": queue, "oldest": _OLDEST_S, "kept": _KEPT},
    )


def outcomes(conn: Connection, queue: str) -> dict[tuple[Kind, Literal["start", "end"]], list[Outcome]]:
    """What became of the last forecasts, the oldest first. Of those that are open the time since then, where that is longer than
    what was expected."""
    rows = conn.execute(
        "select kind, type, extract(epoch from clock_timestamp() - made_at)::float8, start_s, start_low_s, start_high_s,"
        " started_s, end_s, end_low_s, end_high_s, ended_s from agentflow.forecasts where queue = %s order by made_at",
        (queue,),
    ).fetchall()
    found: dict[tuple[Kind, Literal["start", "end"]], list[Outcome]] = {}
    for kind, type_, age_s, *figures in rows:
        for name, (expected_s, low_s, high_s, happened_s) in (("start", figures[:4]), ("end", figures[4:])):
            if expected_s is None:
                continue
            over = happened_s is not None
            passed_s = happened_s if over else age_s
            inside = low_s <= passed_s <= high_s if low_s is not None else None
            if not over and (low_s is None or passed_s <= high_s):
                inside = None  # it may still come into the range
            found.setdefault((kind, name), []).append(Outcome(expected_s, passed_s, type_, inside, over))  # type: ignore[arg-type]
    return found
