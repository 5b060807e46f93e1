"""Canaries: pings that the scheduler sends through every queue, to see that what is handed in comes back, and how soon.

A canary is a tick with a job. When the job has ended its tick keeps how long that took, and the job goes: nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from agentflow.database import Connection

SCHEDULE: Final = "canary"
#: The one that an installation starts with. Canaries have to belong to somebody.
ORGANIZATION: Final = 1
#: A queue that has always to be served, also when nobody was ever seen to.
ALWAYS: Final = "default"

State = Literal["well", "waiting", "failed"]


@dataclass(frozen=True, slots=True)
class Canary:
    """The last one of a queue. `waiting`: it has not come back for `age_s`. `round_trip_s`: from handing in to the end, of the
    last one that came back."""

    queue: str
    at: datetime
    state: State
    age_s: float
    round_trip_s: float | None


def queues(conn: Connection) -> list[str]:
    """Those that workers serve, or served until they vanished without a word less than a day ago."""
    rows = conn.execute(
        "select q from agentflow.workers w cross join lateral unnest(w.queues) q where w.stopped_at is null"
        " union select %s order by 1",
        (ALWAYS,),
    ).fetchall()
    return [row[0] for row in rows]


def measure(conn: Connection) -> int:
    """Take in those that came back. Returns how many."""
    return conn.execute(
        "with back as (delete from agentflow.jobs j using agentflow.ticks t"
        " where t.schedule = %(schedule)s and t.facts is null and t.organization_id = %(organization)s"
        " and j.id = t.job_id and j.organization_id = %(organization)s and j.state in ('succeeded', 'failed', 'cancelled')"
        " returning t.schedule, t.subject, t.at, j.state, extract(epoch from j.finished_at - j.created_at)::float8 as seconds)"
        " update agentflow.ticks t set facts = jsonb_build_object('state', back.state, 'round_trip_s', back.seconds)"
        " from back where t.schedule = back.schedule and t.subject = back.subject and t.at = back.at",
        {"schedule": SCHEDULE, "organization": ORGANIZATION},
    ).rowcount


def under_way(conn: Connection) -> set[str]:
    """Queues whose last canary is still in its job."""
    rows = conn.execute(
        "select t.subject from agentflow.ticks t join agentflow.jobs j on j.id = t.job_id"
        " where t.schedule = %s and t.facts is null and t.organization_id = %s and j.organization_id = t.organization_id",
        (SCHEDULE, ORGANIZATION),
    ).fetchall()
    return {row[0] for row in rows}


def states(conn: Connection, of: Sequence[str] | None = None) -> list[Canary]:
    """The last canary of each queue that has one; `of` these queues, or of those that `queues` names."""
    rows = conn.execute(
        "select n.subject, n.at, extract(epoch from clock_timestamp() - n.claimed_at)::float8, n.facts->>'state',"
        " (b.facts->>'round_trip_s')::float8 from unnest(%(queues)s::text[]) q cross join lateral ("
        " select t.subject, t.at, t.claimed_at, t.facts from agentflow.ticks t where t.schedule = %(schedule)s"
        " and t.subject = q and t.organization_id = %(organization)s order by t.at desc limit 1) n"
        " left join lateral (select t.facts from agentflow.ticks t where t.schedule = %(schedule)s and t.subject = q"
        " and t.organization_id = %(organization)s and t.facts is not null order by t.at desc limit 1) b on true",
        {
            "queues": list(queues(conn) if of is None else of),
            "schedule": SCHEDULE,
            "organization": ORGANIZATION,
        },
    ).fetchall()
    return [
        Canary(queue, at, "waiting" if end is None else "well" if end == "succeeded" else "failed", age_s, round_trip_s)
        for queue, at, age_s, end, round_trip_s in rows
    ]
