"""The canary: a ping through each queue, by the way that every job takes, and an alarm when it does not come back.

It is critical, so that it tells of the way and not of the length of the queue.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from agentflow.database import Connection
from agentflow.jobs import rules
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.schedules import canaries
from agentflow.schedules.canaries import Canary
from agentflow.schedules.ticks import Tick
from agentflow.system import Transaction
from scheduler.calendar import Entry, latest

TYPE: Final = "ping"
#: One that is away for so many intervals is an alarm.
LATE_INTERVALS: Final = 2


def entries(known: rules.Known, interval_s: int) -> list[Entry]:
    """None where the interval is 0."""
    if not interval_s:
        return []

    def served(conn: Connection) -> list[str]:
        """Without queues that somebody paused: there nothing is to come back."""
        now = known.now()
        return [q for q in canaries.queues(conn) if now.pause_of(canaries.ORGANIZATION, q, TYPE) is None]

    def due(conn: Connection, now: datetime) -> list[Tick]:
        canaries.measure(conn)
        away = canaries.under_way(conn)  # one in each queue: where nobody takes them they must not pile up
        at = latest(now, interval_s)
        return [Tick("", at, queue, canaries.ORGANIZATION) for queue in served(conn) if queue not in away]

    def watch(conn: Connection) -> dict[str, str]:
        said = ((each.queue, _sentence(each, interval_s)) for each in canaries.states(conn, served(conn)))
        return {queue: sentence for queue, sentence in said if sentence is not None}

    return [Entry(canaries.SCHEDULE, due, submit=_submit, watch=watch, asks=True)]


def _submit(transaction: Transaction, tick: Tick) -> Job:
    prepared = transaction.system.prepare(tick.organization_id, NewJob(TYPE, {}, priority="critical"))
    return transaction.submit_prepared(tick.organization_id, replace(prepared, queue=tick.subject)).job


def _sentence(canary: Canary, interval_s: int) -> str | None:
    if canary.state == "failed":
        return f"the canary of queue {canary.queue} failed"
    if canary.state == "waiting" and canary.age_s > LATE_INTERVALS * interval_s:
        return f"the canary of queue {canary.queue} does not come back"
    return None
