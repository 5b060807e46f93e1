"""What an organization may use up in a day of UTC, by measure: `usd`, `tokens`, `gpu_s`, `video_min`, `crm_calls`, and whatever
else jobs say that they spent (agentflow/jobs/usage.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from agentflow.database import Connection

#: As the table's CHECK has it.
MEASURE: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
MOST: Final = 1e15


@dataclass(frozen=True, slots=True)
class Budget:
    """`used` is today's, of the organization (0 for the budget that each one has, as there is no one to ask about). `own`: the
    organization has set it itself."""

    organization_id: int
    measure: str
    per_day: float
    used: float
    own: bool


@dataclass(frozen=True, slots=True)
class Reached:
    """A budget that is used up; the day's last second is `resets_in_s` from now."""

    measure: str
    resets_in_s: float


def every(conn: Connection) -> list[Budget]:
    rows = conn.execute(
        "select b.organization_id, b.measure, b.per_day::float8, coalesce(d.amount, 0)::float8, b.own from agentflow.budgets b"
        " left join agentflow.usage_days d on d.day = (now() at time zone 'UTC')::date"
        " and d.organization_id = b.organization_id and d.measure = b.measure order by 1, 2"
    ).fetchall()
    return [Budget(*row) for row in rows]


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


def delete_old_days(conn: Connection, *, days: int, limit: int = 1000) -> int:
    """Forget one batch of days' totals older than that. Returns how many; fewer than `limit`: done."""
    return conn.execute(
        "with old as materialized (select day, organization_id, measure from agentflow.usage_days"
        " where day < (now() at time zone 'UTC')::date - %s::integer limit %s for update skip locked)"
        " delete from agentflow.usage_days d using old"
        " where d.day = old.day and d.organization_id = old.organization_id and d.measure = old.measure",
        (days, limit),
    ).rowcount
