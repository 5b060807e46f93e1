"""Whether a claimed job may run now. The relay holds back what may not; a message may be older than the rule, though."""

from __future__ import annotations

import math
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agentflow.calls import Calls
from agentflow.database import Database
from agentflow.errors import Wait
from agentflow.jobs import callbacks, rules
from agentflow.jobs.model import Job
from agentflow.worker.threads import regular

#: Of a process's threads that are not kept for critical jobs, where several organizations share them: no organization has all.
SHARE: Final = 0.8
#: Whoever waits for a thread waits no longer than this where jobs are shorter: they are not counted.
_SHORT_S: Final = 0.5
_PAUSED_S: Final = 3600.0


class Admission:
    """One per worker process. `work_done` is what the relay charges."""

    def __init__(self, database: Database, known: rules.Known, calls: Calls, threads: int) -> None:
        self._database = database
        self._known = known
        self._calls = calls
        self._share = max(1, math.ceil(regular(threads) * SHARE))
        self._lock = threading.Lock()
        self._began: defaultdict[int, list[float]] = defaultdict(list)  # those that run now, but for critical ones
        self._long: set[int] = set()  # whose last job was no short one
        self._done: dict[tuple[str, int], tuple[int, float]] = {}

    @contextmanager
    def admitted(self, job: Job) -> Iterator[None]:
        """Raises Wait when the job has to wait; no attempt is spent by that."""
        now = self._known.now()
        with self._counted(now, job):
            self._ask(now, job)
            yield

    @contextmanager
    def _counted(self, now: rules.Rules, job: Job) -> Iterator[None]:
        if job.priority == "critical":
            yield
            return
        began, organization_id = time.monotonic(), job.organization_id
        with self._lock:
            if now.shared and self._has_its_share(organization_id, began):
                raise Wait(random.uniform(0.2, 1.0), "busy", message="the organization has its share of the threads")
            self._began[organization_id].append(began)
        has_ended = False
        try:
            yield
            has_ended = True
        finally:
            with self._lock:
                self._began[organization_id].remove(began)
                if not self._began[organization_id]:
                    del self._began[organization_id]
                # Now: when its verdict is written, the next ones have taken all threads that became free with this one.
                if time.monotonic() - began > _SHORT_S:
                    self._long.add(organization_id)
                elif has_ended:  # one that has to wait says nothing
                    self._long.discard(organization_id)

    def _has_its_share(self, organization_id: int, now: float) -> bool:
        """Where its jobs are long. The relay rings for no more, but learns only from those that end how long they are."""
        began = self._began.get(organization_id, ())
        if len(began) < self._share:
            return False
        return organization_id in self._long or now - statistics.fmean(began) > _SHORT_S

    def _ask(self, now: rules.Rules, job: Job) -> None:
        if now.pause_of(job.organization_id, job.queue, job.type) and (
            pause := self._known.anew().pause_of(job.organization_id, job.queue, job.type)
        ):
            raise Wait(_later(_PAUSED_S), "paused", message=f"the {pause.kind} is paused")
        if job.type != callbacks.TYPE:  # who is told of an end waits for no budget
            self._calls.within_budget(job.organization_id)
        for type_ in (job.type, ""):
            cap = now.cap_of(job.organization_id, type_)
            if cap is not None:
                with self._database.connection() as conn:
                    before = rules.running_before(conn, job.organization_id, type_, job.id)
                if before >= cap:
                    raise Wait(0.0 if type_ else _later(1.0), "busy", message="as many run as may run at once")

    def done(self, job: Job, seconds: float) -> None:
        with self._lock:
            key = (job.queue, job.organization_id)
            jobs, before = self._done.get(key, (0, 0.0))
            self._done[key] = (jobs + 1, before + seconds)

    def work_done(self) -> dict[tuple[str, int], tuple[int, float]]:
        """Since it was asked last; nothing where one organization has all to itself."""
        with self._lock:
            done, self._done = self._done, {}
        return done if self._known.now().shared else {}


def _later(seconds: float) -> float:
    return seconds * random.uniform(1.0, 1.1)


__all__ = ["Admission"]
