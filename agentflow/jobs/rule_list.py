"""Rules as they are shown: pauses, caps, limits and budgets in one list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentflow.database import Connection

RuleKind = Literal["budget", "cap", "limit", "pause"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as it is shown. `name` is a measure, a type ('': all), a provider, or what is paused; `says` the rest by kind:
    `per_day` and `used_today`; `running`; `windows` of `amount` and `per_s`; `paused` (a Kind), `reason` and `created_at`."""

    kind: RuleKind
    organization_id: int
    name: str
    own: bool
    says: Mapping[str, Any]


def search(
    conn: Connection,
    organization_id: int | None,
    *,
    after: tuple[str, int, str] = ("", 0, ""),
    limit: int | None = None,
) -> list[Rule]:
    """What holds for an organization (None: all rules), by kind, organization and name; `after` is the last of the page before.

    What is used today is the organization's, or that of the one which has the budget (null for the budget of each).
    """
    rows = conn.execute(
        "select r.kind, r.organization_id, r.name, r.own, r.says from ("
        " select 'cap' as kind, organization_id, type as name, own, jsonb_build_object('running', running) as says"
        " from agentflow.caps"
        " union all select 'limit', organization_id, provider, bool_and(own), jsonb_build_object('windows',"
        " jsonb_agg(jsonb_build_object('amount', amount, 'per_s', per_s) order by per_s))"
        " from agentflow.rate_limits group by 2, 3"
        # Two rules may have one name: a type and a queue.
        " union all select 'pause', organization_id, rtrim(kind || ' ' || name), own,"
        " jsonb_build_object('paused', kind, 'name', name, 'reason', reason, 'created_at', created_at) from agentflow.pauses"
        " union all select 'budget', b.organization_id, b.measure, b.own, jsonb_build_object('per_day', b.per_day,"
        " 'used_today', case when w.id > 0 then coalesce(d.amount, 0) end)"
        " from agentflow.budgets b cross join lateral (select coalesce(%(organization)s, b.organization_id) as id) w"
        " left join agentflow.usage_days d on d.day = (now() at time zone 'UTC')::date"
        " and d.organization_id = w.id and d.measure = b.measure"
        ") r where (%(organization)s::bigint is null or r.organization_id = 0 or r.organization_id = %(organization)s)"
        ' and (r.kind, r.organization_id, r.name collate "C") > (%(kind)s, %(after)s, %(name)s)'
        ' order by r.kind, r.organization_id, r.name collate "C" limit %(limit)s',
        {"organization": organization_id, "kind": after[0], "after": after[1], "name": after[2], "limit": limit},
    ).fetchall()
    return [Rule(*row) for row in rows]
