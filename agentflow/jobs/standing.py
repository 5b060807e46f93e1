"""Where a queue and a waiting job stand: who is before it and what runs. Every count is bounded, so that a million waiting jobs
cost what ten thousand do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs import forecasts
from agentflow.jobs.model import PRIORITIES, Job
from agentflow.jobs.statistics import id_floor

#: Of the jobs before one so many are counted; beyond that it is "more than".
MOST_AHEAD: Final = 10_000
#: Of the first of them the types are looked at, for how long they will take.
_MIX: Final = 500
_MOST_OF_A_LANE: Final = 1000
_MOST_LANES: Final = 500
_MOST_RUNNING: Final = 5000
_WORKER_SILENT_S: Final = 60
#: Over so long it is counted how many jobs come, of the newest ones of all queues.
LATELY_S: Final = 10.0
_MOST_ARRIVALS: Final = 2000
#: The lanes (class and organization) in which jobs of the queue wait, by skip scan.
_LANES: Final = """
with recursive lanes as (
    (select j.priority, j.organization_id, 1 as n from agentflow.jobs j
        where j.queue = %(queue)s and j.state = 'queued' order by j.priority, j.organization_id limit 1)
    union all
    select x.priority, x.organization_id, l.n + 1 from lanes l cross join lateral (
        select j.priority, j.organization_id from agentflow.jobs j
        where j.queue = %(queue)s and j.state = 'queued'
            and (j.priority, j.organization_id) > (l.priority, l.organization_id)
        order by j.priority, j.organization_id limit 1
    ) x where l.n < %(lanes)s
)
"""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """One that runs, for `elapsed_s` so far. `here`: on a worker that serves the queue that was asked for."""

    organization_id: int
    type: str
    concurrency_key: str | None
    elapsed_s: float
    progress: float | None
    here: bool


@dataclass(frozen=True, slots=True)
class WaitingLane:
    """Due jobs of an organization and class that were not rung for; `cost_s` of one as measured lately, where it is known;
    `per_s`: how many were handed in a second lately."""

    priority: int
    organization_id: int
    jobs: int
    cost_s: float | None
    virtual_s: float
    weight: float
    per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A queue at one moment. `threads` by class: one in four is for critical jobs alone; `workers` that serve the queue.
    `share`: of them for one organization at the most. `sent`: jobs on their way to a thread, by type. `durations`: seconds that
    jobs of a type took, the newest last."""

    threads: Mapping[int, int]
    workers: int
    share: float
    in_use: float | None
    running: Sequence[RunningJob]
    lanes: Sequence[WaitingLane]
    sent: Mapping[str, int]
    durations: Mapping[str, Sequence[float]]


def picture(conn: Connection, queue: str) -> Picture:
    staff = conn.execute(
        "select coalesce(sum(threads), 0), coalesce(sum(threads - threads / 4), 0), count(*), agentflow.share_1()"
        " from agentflow.workers"
        " where %s = any (queues) and stopped_at is null and seen_at > clock_timestamp() - make_interval(secs => %s)",
        (queue, _WORKER_SILENT_S),
    ).fetchone()
    assert staff is not None  # noqa: S101 - an aggregate is one row
    running = conn.execute(
        "select j.organization_id, j.type, j.concurrency_key,"
        " extract(epoch from clock_timestamp() - j.started_at)::float8, j.progress, coalesce(%s = any (w.queues), false)"
        " from agentflow.jobs j left join agentflow.workers w on w.id = j.worker where j.state = 'running' limit %s",
        (queue, _MOST_RUNNING),
    ).fetchall()
    lanes = conn.execute(
        _LANES  # noqa: S608 - constants
        + """, newest as materialized (                   -- ids begin with their time
            select j.queue, j.priority, j.organization_id, j.created_at, j.run_at from agentflow.jobs j
            where j.id >= %(since)s order by j.id desc limit %(arrivals)s
        ), span as (
            select case when count(*) < %(arrivals)s then %(lately)s
                else greatest(0.5, extract(epoch from clock_timestamp() - min(created_at)))::float8 end as seconds from newest
        ), arrived as (
            select priority, organization_id, count(*) as jobs from newest
            where queue = %(queue)s and run_at <= clock_timestamp() group by 1, 2
        ), every as (
            select priority, organization_id from lanes union select priority, organization_id from arrived
        )
        select l.priority, l.organization_id, due.jobs, v.cost_s, greatest(coalesce(v.virtual_s, 0), coalesce(c.virtual_s, 0)),
            coalesce(o.weight, 1), coalesce(a.jobs, 0) / span.seconds
        from every l cross join span cross join lateral (
            select count(*) as jobs from (
                select from agentflow.jobs j where j.queue = %(queue)s and j.priority = l.priority
                and j.organization_id = l.organization_id and j.state = 'queued' and j.wake_at <= clock_timestamp() limit %(most)s
            ) x
        ) due
        left join agentflow.lanes v on v.queue = %(queue)s and v.organization_id = l.organization_id
        left join agentflow.lanes c on c.queue = %(queue)s and c.organization_id = 0
        left join agentflow.organizations o on o.id = l.organization_id
        left join arrived a on a.priority = l.priority and a.organization_id = l.organization_id
        where due.jobs > 0 or a.jobs > 0
        """,
        {
            "queue": queue,
            "lanes": _MOST_LANES,
            "most": _MOST_OF_A_LANE,
            "arrivals": _MOST_ARRIVALS,
            "lately": LATELY_S,
            "since": id_floor(time.time() - LATELY_S),
        },
    ).fetchall()
    sent = conn.execute(
        "select type, count(*) from (select j.type from agentflow.jobs j where j.queue = %s and j.state = 'queued'"
        " and j.sent_at is not null and j.wake_at > clock_timestamp() limit %s) x group by 1",
        (queue, _MOST_OF_A_LANE),
    ).fetchall()
    pace = conn.execute("select in_use from agentflow.paces where queue = %s", (queue,)).fetchone()
    return Picture(
        threads={0: int(staff[0]), 1: int(staff[1]), 2: int(staff[1])},
        workers=staff[2],
        share=staff[3],
        in_use=pace[0] if pace else None,
        running=[RunningJob(*row) for row in running],
        lanes=[WaitingLane(*row) for row in lanes],
        sent=dict(sent),
        durations=forecasts.durations(conn),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Of a waiting job in its own line, at the moment `at`. `ahead` is at most MOST_AHEAD, `types` are those of the first of
    them; `sent`: a message for it is on its way. Seconds from then: `due_in_s` until it may start, `rung_in_s` until it is
    looked at again."""

    at: datetime
    ahead: int
    types: Mapping[str, int]
    sent: bool
    due_in_s: float
    rung_in_s: float


def place(conn: Connection, job: Job) -> Place | None:
    """In the line of its organization and class; of those that were sent, before all that were not. None: it waits no more."""
    me = conn.execute(
        "select clock_timestamp(), j.sent_at, j.wake_at, j.sent_at is not null and j.wake_at > clock_timestamp(),"
        " extract(epoch from j.run_at - clock_timestamp())::float8, extract(epoch from j.wake_at - clock_timestamp())::float8"
        " from agentflow.jobs j where j.id = %s and j.organization_id = %s and j.state = 'queued'",
        (job.id, job.organization_id),
    ).fetchone()
    if me is None:
        return None
    at, sent_at, wake_at, sent, due_in_s, rung_in_s = me
    types = _sent_before(conn, job.queue, sent_at) if sent else _first_of_lane(conn, job, wake_at)
    ahead = sum(types.values())
    if not sent and ahead == _MIX:
        ahead = _ahead_in_lane(conn, job, wake_at)
    return Place(at, ahead, types, sent, due_in_s, rung_in_s)


def _sent_before(conn: Connection, queue: str, sent_at: datetime) -> dict[str, int]:
    rows = conn.execute(
        "select x.type, count(*) from (select j.type from agentflow.jobs j where j.queue = %s and j.state = 'queued'"
        " and j.sent_at < %s and j.wake_at > clock_timestamp() limit %s) x group by 1",
        (queue, sent_at, _MOST_OF_A_LANE),
    ).fetchall()
    return dict(rows)


def _first_of_lane(conn: Connection, job: Job, wake_at: datetime) -> dict[str, int]:
    rows = conn.execute(
        "select x.type, count(*) from (select j.type from agentflow.jobs j where j.queue = %(queue)s"
        " and j.priority = %(priority)s and j.organization_id = %(organization)s and j.state = 'queued'"
        " and j.wake_at < %(wake_at)s and j.wake_at <= clock_timestamp() order by j.wake_at limit %(most)s) x group by 1",
        _lane(job, wake_at, _MIX),
    ).fetchall()
    return dict(rows)


def _ahead_in_lane(conn: Connection, job: Job, wake_at: datetime) -> int:
    row = conn.execute(
        "select count(*) from (select from agentflow.jobs j where j.queue = %(queue)s"
        " and j.priority = %(priority)s and j.organization_id = %(organization)s and j.state = 'queued'"
        " and j.wake_at < %(wake_at)s and j.wake_at <= clock_timestamp() limit %(most)s) x",
        _lane(job, wake_at, MOST_AHEAD),
    ).fetchone()
    return int(row[0]) if row else 0


def _lane(job: Job, wake_at: datetime, most: int) -> dict[str, Any]:
    return {
        "queue": job.queue,
        "priority": PRIORITIES.index(job.priority),
        "organization": job.organization_id,
        "wake_at": wake_at,
        "most": most,
    }


def running_for(conn: Connection, job: Job) -> tuple[datetime, float] | None:
    """Now, and for how many seconds the job has run. None: it does not."""
    row = conn.execute(
        "select clock_timestamp(), extract(epoch from clock_timestamp() - j.started_at)::float8 from agentflow.jobs j"
        " where j.id = %s and j.organization_id = %s and j.fence = %s and j.state = 'running'",
        (job.id, job.organization_id, job.fence),
    ).fetchone()
    return (row[0], row[1]) if row else None


@dataclass(frozen=True, slots=True)
class KeyLine:
    """The line of a concurrency key before one job: `ahead` is at most MOST_AHEAD, by type those of the first."""

    slots: int
    ahead: int
    types: Mapping[str, int]


def key_line(conn: Connection, job: Job) -> KeyLine:
    """A key may be shared by organizations: a type's own key names a scarce thing of all."""
    rows = conn.execute(
        "select x.type, count(*) from (select j.type from agentflow.jobs j where j.concurrency_key = %s and j.state = 'queued'"
        " and j.run_at <= clock_timestamp() and (j.run_at, j.id) < (%s, %s) order by j.run_at, j.id limit %s) x group by 1",
        (job.concurrency_key, job.run_at, job.id, MOST_AHEAD),
    ).fetchall()
    row = conn.execute("select slots from agentflow.concurrency_keys where key = %s", (job.concurrency_key,)).fetchone()
    return KeyLine(row[0] if row else 1, sum(n for _, n in rows), dict(rows))


def sample(conn: Connection, queue: str, *, waiting: int, running: int) -> list[UUID]:
    """Some jobs of a queue, by chance: due ones of lanes by chance, parked ones, and running ones."""
    rows = conn.execute(
        _LANES  # noqa: S608 - constants
        + """, tries as (
            select l.priority, l.organization_id from lanes l cross join generate_series(1, %(waiting)s)
            order by random() limit %(waiting)s
        )
        (select w.id from tries t cross join lateral (
            select c.id from (
                select j.id from agentflow.jobs j where j.queue = %(queue)s and j.priority = t.priority
                and j.organization_id = t.organization_id and j.state = 'queued' order by j.wake_at limit %(most)s
            ) c order by random() limit 1
        ) w)
        union
        (select j.id from agentflow.jobs j where j.state = 'running' and j.queue = %(queue)s order by random() limit %(running)s)
        """,
        {
            "queue": queue,
            "lanes": _MOST_LANES,
            "most": _MOST_OF_A_LANE,
            "waiting": waiting,
            "running": running,
        },
    ).fetchall()
    return [row[0] for row in rows]
