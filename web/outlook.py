"""Why a job waits and when it will start and end, as it is answered."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from pydantic import Field

from agentflow.jobs.estimates import Estimate
from agentflow.jobs.model import Job
from web.api import Call, View

#: Beyond it a moment says nothing, and calendars end.
_FARTHEST_S: Final = 10 * 365 * 86_400.0


class WaitingView(View):
    reason: str = Field(
        description="`due`: it is next when its turn comes; `busy`: as many run as may at once (of its concurrency key, its"
        " organization or its type); `memory`: no worker has as much memory free as it needs; it is woken when one has;"
        " `scheduled`, `retry`, `limit`, `budget` and others: until `until`; `paused`: until somebody resumes it;"
        " `unserved`: no worker serves its queue"
    )
    position: int | None = Field(
        description="In its line, from 1: that of its organization and class, or of its concurrency key; null before `until`"
    )
    position_exact: bool = Field(description="False: so many were counted, and there are more")
    before: int | None = Field(
        description="How many jobs of all organizations are expected to go first; null where `position` is, or nobody knows"
    )
    until: datetime | None = Field(description="It does not start before, where that is not over yet")


class RangeView(View):
    earliest: datetime
    latest: datetime


class EstimateView(View):
    """Nine in ten times it happens within the range. Null where too little was measured so far, and while nothing can be said: of
    a paused job, for one."""

    start: datetime | None = Field(description="Null for a job that runs")
    start_range: RangeView | None
    end: datetime | None = Field(description="If no attempt fails")
    end_range: RangeView | None


def of(call: Call, job: Job, progress: float | None) -> tuple[WaitingView | None, EstimateView | None]:
    """Both None for a job that has ended."""
    found = call.system.outlooks.of(job, progress)
    if found is None:
        return None, None
    waiting = None
    if found.reason is not None:
        waiting = WaitingView(
            reason=found.reason,
            position=found.position,
            position_exact=not found.beyond,
            before=found.before,
            until=job.run_at if job.run_at > found.at else None,
        )
    return waiting, EstimateView(
        start=_moment(found.at, found.start.middle) if found.start else None,
        start_range=_range(found.at, found.start),
        end=_moment(found.at, found.end.middle) if found.end else None,
        end_range=_range(found.at, found.end),
    )


def _range(at: datetime, estimate: Estimate | None) -> RangeView | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return RangeView(earliest=_moment(at, estimate.low), latest=_moment(at, estimate.high))


def _moment(at: datetime, seconds: float) -> datetime:
    return at + timedelta(seconds=min(seconds, _FARTHEST_S))
