"""What estimates learn from, gathered where jobs end and written now and then: nothing of it is in the way of a job."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import psycopg

from agentflow import log
from agentflow.database import BoundedConnection, Unavailable
from agentflow.jobs import forecasts, records, rules, standing
from agentflow.jobs.standing import Picture
from agentflow.outlook import Outlooks

logger = log.get(__name__)

#: One worker looks at a queue in so long.
EVERY_S: Final = 4.0
_MOST_OF_A_TYPE: Final = 50
_WAITING, _RUNNING = 6, 4


class Observer:
    """One per worker process. `ended` for each job that succeeded; `step` in a loop that has time."""

    def __init__(
        self, outlooks: Outlooks, known: rules.Known, queues: Sequence[str], busy: Callable[[], bool] = lambda: True
    ) -> None:
        self._outlooks = outlooks
        self._known = known
        self._queues = queues
        self._busy = busy
        self._lock = threading.Lock()
        self._seconds: dict[str, deque[float]] = {}

    def ended(self, type_: str, seconds: float) -> None:
        with self._lock:
            self._seconds.setdefault(type_, deque(maxlen=_MOST_OF_A_TYPE)).append(seconds)

    def step(self, conn: BoundedConnection) -> None:
        """Where nothing runs and nothing ended, nothing is asked."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        if not seconds and not self._busy():
            return
        try:
            now = self._known.now()
            if seconds:
                forecasts.note_durations(conn, seconds)
            for queue in self._queues:
                with conn.transaction():
                    if forecasts.my_turn(conn, queue, EVERY_S):
                        self._look(conn, queue, now)
        except Unavailable:
            raise
        except psycopg.Error:
            logger.exception("estimates could not be compared with what happened")  # nothing else waits for that

    def _look(self, conn: BoundedConnection, queue: str, now: rules.Rules) -> None:
        forecasts.close(conn, queue)
        picture = self._outlooks.picture(conn, queue)
        if (share := share_in_use(picture)) is not None:
            forecasts.note_in_use(conn, queue, share)
        if forecasts.open_ones(conn, queue) >= forecasts.MOST_OPEN:
            return
        found = []
        for job_id in standing.sample(conn, queue, waiting=_WAITING, running=_RUNNING):
            job = records.get(conn, records.EVERY_ORGANIZATION, job_id)
            if job is not None and not job.terminal and (said := self._outlooks.forecast(conn, job, now)) is not None:
                found.append(said)
        forecasts.record(conn, [said for said in found if said.end is not None])


def share_in_use(picture: Picture) -> float | None:
    """Of the threads that could run what waits. None: too little waits to say."""
    threads = picture.threads[1]
    waiting = sum(picture.sent.values()) + sum(lane.jobs for lane in picture.lanes)
    if not threads or waiting < threads:
        return None
    running = sum(r.here for r in picture.running)
    organizations = {lane.organization_id for lane in picture.lanes}
    if picture.share < 1 and organizations:
        allowed = len(organizations) * max(1, math.floor(picture.share * picture.threads[1]))
        others = sum(r.here and r.organization_id not in organizations for r in picture.running)
        threads = min(threads, allowed + others)
    return min(1.0, running / threads)
