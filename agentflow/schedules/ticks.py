"""Ticks: each time that something was due, as a row that one process inserts. Whoever did does what is to be done.

The row and its job are of one transaction, so that a process that dies in between leaves neither, and the next one makes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection

#: The schedule of all ticks of schedules that organizations made; the subject is the schedule's id.
USER: Final = "user"
#: Of each schedule and subject so many ticks are kept.
KEPT: Final = 100
#: The installation itself, in a tick that is no organization's.
NOBODY: Final = 0

Outcome = Literal["submitted", "refused", "done", "behind", "failed"]


@dataclass(frozen=True, slots=True)
class Tick:
    """`at` is when it was due. `subject` tells apart what one schedule ticks for: a queue, an account."""

    schedule: str
    at: datetime
    subject: str = ""
    organization_id: int = NOBODY
    missed: int = 0
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class Ticked:
    """A tick that was claimed, as its schedule's history shows it. `outcome` None: its work is not over, or was cut off."""

    at: datetime
    claimed_at: datetime
    missed: int
    by_hand: bool
    job_id: UUID | None
    outcome: Outcome | None
    facts: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Latest:
    """How an entry of the calendar does. `behind_s`: since its last run that did all there was to do; 0: that was the last."""

    schedule: str
    at: datetime
    claimed_at: datetime
    outcome: Outcome | None
    age_s: float
    behind_s: float


_TICKED: Final = "at, claimed_at, missed, by_hand, job_id, outcome, facts"


def claim(conn: Connection, tick: Tick) -> bool:
    """Whether this transaction is the one that does it. Of ticks before it the newest are kept."""
    claimed = (
        conn.execute(
            "insert into agentflow.ticks (schedule, subject, at, organization_id, missed, by_hand)"
            " values (%s, %s, %s, %s, %s, %s) on conflict do nothing",
            (tick.schedule, tick.subject, tick.at, tick.organization_id, tick.missed, tick.by_hand),
        ).rowcount
        > 0
    )
    if claimed:
        conn.execute(
            "delete from agentflow.ticks t where t.schedule = %(schedule)s and t.subject = %(subject)s"
            " and t.organization_id = %(organization)s and t.at < (select k.at from agentflow.ticks k"
            " where k.schedule = %(schedule)s and k.subject = %(subject)s order by k.at desc offset %(kept)s - 1 limit 1)",
            {
                "schedule": tick.schedule,
                "subject": tick.subject,
                "organization": tick.organization_id,
                "kept": KEPT,
            },
        )
    return claimed


def end(
    conn: Connection,
    tick: Tick,
    outcome: Outcome,
    *,
    job_id: UUID | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """What became of a claimed tick."""
    conn.execute(
        "update agentflow.ticks set outcome = %s, job_id = %s, facts = %s, ended_at = clock_timestamp()"
        " where schedule = %s and subject = %s and at = %s and organization_id = %s",
        (
            outcome,
            job_id,
            Jsonb(facts) if facts is not None else None,
            tick.schedule,
            tick.subject,
            tick.at,
            tick.organization_id,
        ),
    )


def history(
    conn: Connection, organization_id: int, schedule_id: UUID, *, before: datetime | None = None, limit: int = KEPT
) -> list[Ticked]:
    """The ticks of a user-defined schedule, the newest first."""
    rows = conn.execute(
        f"select {_TICKED} from agentflow.ticks where schedule = 'user' and subject = %(subject)s"  # noqa: S608 - constants
        " and organization_id = %(organization)s and (%(before)s::timestamptz is null or at < %(before)s)"
        " order by at desc limit %(limit)s",
        {"subject": str(schedule_id), "organization": organization_id, "before": before, "limit": limit},
    ).fetchall()
    return [Ticked(*row) for row in rows]


def last(conn: Connection, organization_id: int | None, schedule_ids: Sequence[UUID]) -> dict[UUID, Ticked]:
    """The newest tick of each of these user-defined schedules that has ticked; of one organization, or (None) of all."""
    rows = conn.execute(
        f"select s.id, {_TICKED} from unnest(%(ids)s::uuid[]) s(id) cross join lateral (select * from agentflow.ticks t"  # noqa: S608
        " where t.schedule = 'user' and t.subject = s.id::text"
        " and (%(organization)s::bigint is null or t.organization_id = %(organization)s)"
        " order by t.at desc limit 1) l",
        {"ids": list(schedule_ids), "organization": organization_id},
    ).fetchall()
    return {row[0]: Ticked(*row[1:]) for row in rows}


def forget(conn: Connection, organization_id: int, schedule_id: UUID) -> None:
    """Delete the history of a schedule that is deleted."""
    conn.execute(
        "delete from agentflow.ticks where schedule = 'user' and subject = %s and organization_id = %s",
        (str(schedule_id), organization_id),
    )


def delete_old(conn: Connection, *, days: float, limit: int = 1000) -> int:
    """Forget one batch of ticks of subjects that tick no more. Returns how many; fewer than `limit`: done.

    The newest tick of an entry stays: it says that what is done once a month was done.
    """
    return conn.execute(
        "with old as materialized (select t.schedule, t.subject, t.at from agentflow.ticks t"
        " where t.claimed_at < clock_timestamp() - make_interval(secs => %s * 86400)"
        " and exists (select from agentflow.ticks n where n.schedule = t.schedule and n.at > t.at)"
        " limit %s for update skip locked)"
        " delete from agentflow.ticks t using old"
        " where t.schedule = old.schedule and t.subject = old.subject and t.at = old.at",
        (days, limit),
    ).rowcount


def latest(conn: Connection) -> list[Latest]:
    """The last tick of each entry of the calendar, and of all user-defined schedules together."""
    rows = conn.execute(
        """
        with recursive schedules as (          -- by skip scan
            (select schedule from agentflow.ticks order by schedule limit 1)
            union all
            select n.schedule from schedules s cross join lateral (
                select t.schedule from agentflow.ticks t where t.schedule > s.schedule order by t.schedule limit 1
            ) n
        )
        select s.schedule, l.at, l.claimed_at, l.outcome, extract(epoch from clock_timestamp() - l.claimed_at)::float8,
            case when l.outcome in ('behind', 'failed') then
                extract(epoch from clock_timestamp() - coalesce(w.ended_at, f.at))::float8 else 0 end
        from schedules s
        cross join lateral (
            select t.* from agentflow.ticks t where t.schedule = s.schedule and not t.by_hand order by t.at desc limit 1
        ) l
        cross join lateral (
            select t.at from agentflow.ticks t where t.schedule = s.schedule order by t.at limit 1
        ) f
        left join lateral (
            select t.ended_at from agentflow.ticks t where t.schedule = s.schedule and t.outcome = 'done'
            order by t.at desc limit 1
        ) w on true
        """
    ).fetchall()
    return [Latest(*row) for row in rows]


def unclaimed(conn: Connection, found: Sequence[Tick]) -> list[Tick]:
    """Those that nobody has claimed yet. Saves a write for each that somebody has."""
    if not found:
        return []
    known = {
        tuple(row)
        for row in conn.execute(
            "select schedule, subject, at from agentflow.ticks"
            " where (schedule, subject, at) in (select * from unnest(%s::text[], %s::text[], %s::timestamptz[]))",
            ([t.schedule for t in found], [t.subject for t in found], [t.at for t in found]),
        ).fetchall()
    }
    return [tick for tick in found if (tick.schedule, tick.subject, tick.at) not in known]
