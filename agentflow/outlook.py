"""What may be said of a job that has not ended: why it waits, where it stands, when it will start and end."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from agentflow.database import Connection, Database
from agentflow.jobs import forecasts, rules, standing
from agentflow.jobs.estimates import Calibration, Durations, Estimate
from agentflow.jobs.forecasts import Forecast, Kind
from agentflow.jobs.model import Job
from agentflow.jobs.standing import Picture
from agentflow.jobs.waits import Waits, reason_of
from agentflow.settings import Settings

#: A queue is looked at once in so long for all who ask, and not more than a twentieth of the time.
_FRESH_S: Final = 1.0
_LOOKING_SHARE: Final = 0.05
#: What is said is compared with what happens: so often, of each queue and process.
_REMEMBER_EVERY_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Outlook:
    """At the moment `at`. Of a waiting job `reason`, and `position` from 1 in its line (None: its time has not come), `beyond`
    when that is the bound of counting; `before` is how many of all organizations are thought to go first. Estimates are None
    where nothing can be said: what is paused, or served by nobody, or of a type that never ran."""

    at: datetime
    reason: str | None = None
    position: int | None = None
    beyond: bool = False
    before: int | None = None
    start: Estimate | None = None
    end: Estimate | None = None


@dataclass(slots=True)
class _Queue:
    picture: Picture
    calibrations: dict[tuple[Kind, str], Calibration]
    read_at: float
    fresh_s: float
    remembered_at: float = 0.0
    open: int = 0
    durations: dict[str, Durations] = field(default_factory=dict)


class Outlooks:
    """One in each process. What a queue looks like is kept for a moment; a job's own place is always asked for."""

    def __init__(self, database: Database, known: rules.Known, settings: Settings) -> None:
        self._database = database
        self._known = known
        self._settings = settings
        self._queues: dict[str, _Queue] = {}
        self._lock = threading.Lock()

    def of(self, job: Job, progress: float | None = None) -> Outlook | None:
        """None: it has ended, or changed this moment. `progress` where it is known better than the row has it."""
        if job.terminal:
            return None
        now = self._known.now()
        with self._database.connection() as conn:
            queue = self._queue(conn, job.queue)
            found = self._look(conn, job, now, queue, job.progress if progress is None else progress)
            if found is not None and self._worth_remembering(queue):
                forecasts.record(conn, [found[1]])
        return found[0] if found else None

    def forecast(self, conn: Connection, job: Job, now: rules.Rules) -> Forecast | None:
        """What would be said of it, to be remembered."""
        found = self._look(conn, job, now, self._queue(conn, job.queue), job.progress)
        return found[1] if found else None

    def picture(self, conn: Connection, queue: str) -> Picture:
        """A new one."""
        with self._lock:
            self._queues.pop(queue, None)
        return self._queue(conn, queue).picture

    def _queue(self, conn: Connection, name: str) -> _Queue:
        with self._lock:
            known = self._queues.get(name)
        began = time.monotonic()
        if known is not None and began - known.read_at < known.fresh_s:
            return known
        picture = standing.picture(conn, name)
        outcomes = forecasts.outcomes(conn, name)
        made = _Queue(
            picture,
            {key: Calibration(each) for key, each in outcomes.items()},
            time.monotonic(),
            max(_FRESH_S, (time.monotonic() - began) / _LOOKING_SHARE),
            known.remembered_at if known else 0.0,
            sum(not o.over for each in outcomes.values() for o in each),
            {type_: Durations(seconds) for type_, seconds in picture.durations.items()},
        )
        with self._lock:
            self._queues[name] = made
        return made

    def _worth_remembering(self, queue: _Queue) -> bool:
        with self._lock:
            if queue.open >= forecasts.MOST_OPEN or time.monotonic() - queue.remembered_at < _REMEMBER_EVERY_S:
                return False
            queue.remembered_at = time.monotonic()
            return True

    def _look(
        self, conn: Connection, job: Job, now: rules.Rules, queue: _Queue, progress: float | None
    ) -> tuple[Outlook, Forecast] | None:
        if job.state == "running":
            return self._of_running(conn, job, queue, progress)
        place = standing.place(conn, job)
        if place is None:
            return None
        waits = Waits(queue.picture, queue.durations, job, place)
        waits.for_share()
        waits.for_rules(now)
        waits.for_budget(now)
        waits.for_processes(self._settings)
        line = standing.key_line(conn, job) if job.concurrency_key is not None else None
        if line is not None:
            waits.for_key(line)
        reason = reason_of(job, now, place, queue.picture, busy=waits.busy)
        later = place.due_in_s > 0
        kind: Kind = "later" if later else "waiting"
        start_s = waits.start_s() if reason != "paused" else None
        start = self._around(queue, kind, "start", start_s, job.type) if start_s is not None else None
        known = queue.durations.get(job.type)
        end = None
        if start_s is not None and known is not None:
            end = self._around(queue, kind, "end", start_s + known.median, job.type)
        ahead = line.ahead if line is not None and waits.busy else place.ahead
        outlook = Outlook(
            place.at,
            reason,
            position=None if later else ahead + 1,
            beyond=ahead >= standing.MOST_AHEAD,
            before=None if later or waits.before is None else round(waits.before),
            start=_not_after(start, end),
            end=end,
        )
        return outlook, _forecast(job, kind, start, end)

    def _of_running(
        self, conn: Connection, job: Job, queue: _Queue, progress: float | None
    ) -> tuple[Outlook, Forecast] | None:
        found = standing.running_for(conn, job)
        if found is None:
            return None
        at, elapsed_s = found
        known = queue.durations.get(job.type)
        if known is None and not progress:
            return Outlook(at), _forecast(job, "running", None, None)
        left_s = (known or Durations([elapsed_s / (progress or 1.0)])).left(elapsed_s, progress)
        left_s = max(0.0, min(left_s, job.time_limit_s - elapsed_s))
        end = self._around(queue, "running", "end", left_s, job.type)
        return Outlook(at, end=end), _forecast(job, "running", None, end)

    @staticmethod
    def _around(queue: _Queue, kind: Kind, what: str, expected_s: float, type_: str) -> Estimate:
        known = queue.calibrations.get((kind, what))
        return known.around(expected_s, type_) if known is not None else Estimate(expected_s, expected_s)


def _forecast(job: Job, kind: Kind, start: Estimate | None, end: Estimate | None) -> Forecast:
    return Forecast(job.id, job.organization_id, job.queue, job.type, kind, job.fence, start, end)


def _not_after(start: Estimate | None, end: Estimate | None) -> Estimate | None:
    """They are corrected each by what became of its own kind: nothing starts after it has ended. The end is what is left as it
    is: the start's range is by far the wider one, for its size, and the end's would no longer be the one that is learned from."""
    if start is None or end is None:
        return start
    low = start.low if start.low is None or end.low is None else min(start.low, end.low)
    high = start.high if start.high is None or end.high is None else min(start.high, end.high)
    return Estimate(start.expected, min(start.middle, end.middle), low, high)
