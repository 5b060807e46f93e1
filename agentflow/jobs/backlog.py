"""What waits and what runs, by queue and organization, and what goes wrong with it: for metrics and alerts.

Reads the partial indexes of queued, running and failed rows, never all the finished ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from agentflow.database import Connection
from agentflow.jobs.rules import Rules
from agentflow.jobs.statistics import Worker

#: A rescue comes within a few seconds of a lease's end, and a time limit is enforced by the worker itself.
_STUCK_S: Final = 60.0
FAILED_LATELY_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Share:
    """An organization's part of a queue. `unrung_s`: how long the oldest due one has
    been waiting for the relay, where nothing of the organization was rung or runs (else 0: it may have as much as it may)."""

    queue: str
    organization_id: int
    due: int
    running: int
    unrung_s: float


def shares(conn: Connection) -> list[Share]:
    rows = conn.execute(
        """
        select queue, organization_id, sum(due)::bigint, sum(running)::bigint,
            case when sum(running) + sum(sent) = 0 then coalesce(max(unrung_s), 0) else 0 end::float8
        from (
            select queue, organization_id, count(*) filter (where due) as due, 0 as running, count(sent_at) as sent,
                extract(epoch from statement_timestamp() - min(greatest(run_at, wake_at)) filter (where due)) as unrung_s
            from (
                select queue, organization_id, run_at, wake_at, sent_at,
                    run_at <= statement_timestamp() and wait_reason is distinct from 'busy' as due
                from agentflow.jobs where state = 'queued'
            ) queued group by 1, 2
            union all
            select queue, organization_id, 0, count(*), 0, null from agentflow.jobs where state = 'running' group by 1, 2
        ) parts group by 1, 2
        """
    ).fetchall()
    return [Share(*row) for row in rows]


def dispatch_lag(found: Collection[Share], rules: Rules, workers: Collection[Worker]) -> dict[str, float]:
    """Seconds, by queue: how long something has been waiting for its ring that nothing holds back, with threads free."""
    free: dict[str, int] = {}
    for worker in workers:
        for queue in worker.queues:
            free[queue] = free.get(queue, 0) + max(0, worker.threads - worker.busy)
    held = {(kind, name, organization) for kind, name, organization in rules.pauses}
    paused = {name for kind, name, _ in held if kind == "queue"}
    organizations = {organization for kind, _, organization in held if kind != "queue"} | rules.over_budget
    lags = dict.fromkeys(free, 0.0)
    for share in found:
        is_held = share.queue in paused or share.organization_id in organizations or 0 in organizations
        if free.get(share.queue) and not is_held:
            lags[share.queue] = max(lags[share.queue], share.unrung_s)
    return lags


def stuck(conn: Connection) -> dict[str, int]:
    """Running jobs by queue that nobody ends: over their time limit, or without a worker, for a minute."""
    return dict(
        conn.execute(
            "select queue, count(*) from agentflow.jobs where state = 'running' and statement_timestamp()"
            " - make_interval(secs => %s) > least(lease_until, started_at + make_interval(secs => time_limit_s)) group by 1",
            (_STUCK_S,),
        ).fetchall()
    )


def failed_lately(conn: Connection) -> dict[str, int]:
    """Jobs by queue that ended as failed within FAILED_LATELY_S, so far as they are kept."""
    return dict(
        conn.execute(
            "select queue, count(*) from agentflow.jobs where state = 'failed'"
            " and finished_at > statement_timestamp() - make_interval(secs => %s) group by 1",
            (FAILED_LATELY_S,),
        ).fetchall()
    )
