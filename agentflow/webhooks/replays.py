"""Handling events once more: one, or all that a filter finds, the oldest first and not faster than asked for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from agentflow.ids import new_id
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.system import Transaction
from agentflow.webhooks import events
from agentflow.webhooks.events import Event, Filter
from agentflow.webhooks.intake import JOB_TYPE, concurrency_key

#: In one call; what is left matches the next one.
MOST: Final = 5000
PER_MINUTE: Final = 600
_AT_ONCE: Final = 500


class NotReplayable(Exception):
    """The event was refused: nobody knows who sent it."""


@dataclass(frozen=True, slots=True)
class Replay:
    """`correlation_id` is that of all its jobs; `matched` may be more than were `submitted`, the oldest ones."""

    correlation_id: str
    matched: int
    submitted: int
    ends_at: datetime | None


def one(transaction: Transaction, event: Event, *, even_if_stale: bool = False) -> Job:
    """The job that handles it, due now. Raises NotReplayable."""
    if event.verdict == "refused":
        raise NotReplayable
    events.count_replays(transaction.conn, event.organization_id, [event.id])
    return transaction.submit(event.organization_id, _job(event, even_if_stale, _correlation())).job


def many(
    transaction: Transaction,
    organization_id: int,
    wanted: Filter,
    *,
    per_minute: float = PER_MINUTE,
    most: int = MOST,
    even_if_stale: bool = False,
    preview: bool = False,
) -> Replay:
    """Jobs for the oldest `most` of the events, spread over the time that they take at that pace. `preview`: only count."""
    correlation_id = _correlation()
    matched, found = events.matching(transaction.conn, organization_id, wanted, limit=most)
    if preview or not found:
        return Replay(correlation_id, matched, 0, None)
    began, pace = datetime.now(UTC), timedelta(seconds=60.0 / per_minute)
    for first in range(0, len(found), _AT_ONCE):
        part = found[first : first + _AT_ONCE]
        jobs = [
            _job(event, even_if_stale, correlation_id, run_at=began + number * pace)
            for number, event in enumerate(part, first)
        ]
        prepare = transaction.system.prepare
        transaction.submit_many(organization_id, [prepare(organization_id, each, public_only=False) for each in jobs])
        events.count_replays(transaction.conn, organization_id, [event.id for event in part])
    return Replay(correlation_id, matched, len(found), began + (len(found) - 1) * pace)


def _job(event: Event, even_if_stale: bool, correlation_id: str, *, run_at: datetime | None = None) -> NewJob:
    return NewJob(
        JOB_TYPE,
        {"event_id": str(event.id), "replay": True, "even_if_stale": even_if_stale},
        priority="low",
        run_at=run_at,
        correlation_id=correlation_id,
        concurrency_key=concurrency_key(event.endpoint_id, event.entity),
        retry_of=event.job_id,
    )


def _correlation() -> str:
    return f"replay:{new_id()}"
