"""What an organization may use up in a day of UTC, by measure: `usd`, `tokens`, `gpu_s`, `video_min`, `crm_calls`, and whatever
else jobs say that they spent (agentflow/jobs/usage.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agentflow.database import Connection

#: As the table's CHECK has it.
MEASURE: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
MOST: Final = 1e15


@dataclass(frozen=True, slots=True)
class Reached:
    """A budget that is used up; the day's last second is `resets_in_s` from now."""

    measure: str
    resets_in_s: float


def used_today(conn: Connection, organization_id: int, measure: str) -> float:
    row = conn.execute(
        "select amount::float8 from agentflow.usage_days"
        " where day = (now() at time zone 'UTC')::date and organization_id = %s and measure = %s",
        (organization_id, measure),
    ).fetchone()
    return float(row[0]) if row else 0.0


def used_by_measure(conn: Connection, organization_id: int) -> dict[str, float]:
    """All that an organization has used up today, also of what has no budget."""
    rows = conn.execute(
        "select measure, amount::float8 from agentflow.usage_days"
        " where day = (now() at time zone 'UTC')::date and organization_id = %s order by 1",
        (organization_id,),
    ).fetchall()
    return dict(rows)


def over(conn: Connection) -> frozenset[int]:
    """The organizations that have used up a budget today."""
    rows = conn.execute("select distinct organization_id from agentflow.budgets_reached order by 1").fetchall()
    return frozenset(row[0] for row in rows)


def reached(conn: Connection, organization_id: int) -> Reached | None:
    """A budget of the organization that is used up at this moment."""
    row = conn.execute(
        "select measure, extract(epoch from date_trunc('day', now() at time zone 'UTC') + interval '1 day'"
        " - now() at time zone 'UTC')::float8 from agentflow.budgets_reached where organization_id = %s order by 1 limit 1",
        (organization_id,),
    ).fetchone()
    return Reached(*row) if row else None


@dataclass(frozen=True, slots=True)
class Used:
    """How much of a day's budget is used up: 1.0 and more is all of it."""

    organization_id: int
    measure: str
    share: float


def nearest(conn: Connection, *, limit: int, among: Sequence[int] | None = None) -> list[Used]:
    """The budgets of which most is used up today, of all organizations or some."""
    rows = conn.execute(
        "select organization_id, measure, (amount / per_day)::float8 from (select d.organization_id, d.measure, d.amount,"
        " case when mine.own then least(mine.per_day, each.per_day) else coalesce(mine.per_day, each.per_day) end as per_day"
        " from agentflow.usage_days d left join agentflow.budgets mine on mine.organization_id = d.organization_id"
        " and mine.measure = d.measure left join agentflow.budgets each on each.organization_id = 0 and each.measure = d.measure"
        " where d.day = (now() at time zone 'UTC')::date"
        " and (%(among)s::bigint[] is null or d.organization_id = any (%(among)s)))"
        " days where per_day is not null order by 3 desc limit %(limit)s",
        {"among": list(among) if among is not None else None, "limit": limit},
    ).fetchall()
    return [Used(*row) for row in rows]


def delete_old_days(conn: Connection, *, days: int, limit: int = 1000) -> int:
    """Forget one batch of days' totals older than that. Returns how many; fewer than `limit`: done."""
    return conn.execute(
        "with old as materialized (select day, organization_id, measure from agentflow.usage_days"
        " where day < (now() at time zone 'UTC')::date - %s::integer limit %s for update skip locked)"
        " delete from agentflow.usage_days d using old"
        " where d.day = old.day and d.organization_id = old.organization_id and d.measure = old.measure",
        (days, limit),
    ).rowcount
