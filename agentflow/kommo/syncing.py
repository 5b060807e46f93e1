"""When accounts are synced: which are due, how far behind their mirrors are, and the jobs that sync them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.intake import Submitted
from agentflow.jobs.model import Priority
from agentflow.jobs.requests import NewJob
from agentflow.jobs.unique import Unique
from agentflow.kommo.accounts import Account

if TYPE_CHECKING:
    from agentflow.system import Transaction

#: Around the interval, so that accounts that were connected together do not come together for ever.
_JITTER: Final = 0.1


@dataclass(frozen=True, slots=True)
class Due:
    account_id: UUID
    organization_id: int
    mode: Literal["incremental", "reconcile"]
    at: datetime


def due(conn: Connection, *, limit: int = 1000) -> list[Due]:
    """Accounts whose sync is due, those that wait longest first. For the scheduler, with `submit_due`."""
    rows = conn.execute(
        "select id, organization_id, case when state = 'connected' and next_reconcile_at <= clock_timestamp()"
        " then 'reconcile' else 'incremental' end, next_sync_at"
        " from agentflow.crm_accounts where state in ('connecting', 'connected')"
        " and next_sync_at <= clock_timestamp() order by next_sync_at limit %s",
        (limit,),
    ).fetchall()
    return [Due(*row) for row in rows]


def lags(conn: Connection, *, limit: int) -> dict[int, float]:
    """By organization: seconds by which its oldest mirror is older than that account's interval allows. The largest ones."""
    rows = conn.execute(
        "select a.organization_id, max(greatest(0, extract(epoch from clock_timestamp() - coalesce(r.started_at, a.created_at))"
        " - a.sync_every_s * %s))::float8 from agentflow.crm_accounts a left join lateral (select r.started_at"
        " from agentflow.sync_runs r where r.account_id = a.id and r.state = 'succeeded' and not r.plan"
        " and r.mode in ('incremental', 'reconcile') order by r.id desc limit 1) r on true"
        " where a.state <> 'removed' group by 1 order by 2 desc limit %s",
        (1 + _JITTER, limit),
    ).fetchall()
    return dict(rows)


def behind_s(account: Account, read_at: datetime | None, now: datetime) -> float:
    """The same of one account, of which everything up to `read_at` is in the mirror."""
    return max(0.0, (now - (read_at or account.created_at)).total_seconds() - account.sync_every_s * (1 + _JITTER))


def submit_due(transaction: Transaction, which: Due) -> Submitted:
    """Hand in the sync of a due account, and say when the next one is. In the caller's transaction."""
    factor = random.uniform(1 - _JITTER, 1 + _JITTER)
    transaction.conn.execute(
        "update agentflow.crm_accounts set next_sync_at = clock_timestamp() + make_interval(secs => sync_every_s * %s),"
        " next_reconcile_at = case when %s then clock_timestamp() + make_interval(secs => reconcile_every_s * %s)"
        " else next_reconcile_at end where organization_id = %s and id = %s",
        (factor, which.mode == "reconcile", factor, which.organization_id, which.account_id),
    )
    return submit(transaction, which.organization_id, which.account_id, which.mode)


def submit(
    transaction: Transaction,
    organization_id: int,
    account_id: UUID,
    mode: Literal["incremental", "backfill", "reconcile"],
    *,
    plan: bool = False,
) -> Submitted:
    """A sync; where one of this mode waits or runs already, that one. Walks over everything let the others go first."""
    payload = {"account_id": str(account_id), "mode": mode, "plan": plan}
    unique = Unique(f"{account_id}:{mode}:{'plan' if plan else 'run'}", "keep")
    priority: Priority = "default" if mode == "incremental" or plan else "low"
    return transaction.submit(organization_id, NewJob("sync_crm", payload, priority=priority, unique=unique))
