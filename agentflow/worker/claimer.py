"""Taking jobs for the free threads: whatever they ask for while a claim is under way goes into the next statement together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from agentflow.database import BoundedConnection, Database
from agentflow.jobs import claims, registry
from agentflow.jobs.model import Job
from agentflow.worker.inbox import Inbox
from agentflow.worker.loops import Loop
from agentflow.worker.running import Running

#: Where a trip to Postgres and back takes longer, who comes just after a claim is waited for: a fourth of what is beyond that.
_NEAR_S: Final = 0.005
_TRIES: Final = 3


class Claim:
    """`answer` is called once. The lock is an event that costs a tenth of threading's: one for each job.

    Whoever has no use for it any more sets `unwanted`, and then looks whether `running` is there already.
    """

    __slots__ = ("_unanswered", "job_id", "running", "unwanted")

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self.running: Running | None = None
        self.unwanted: Callable[[Running], None] | None = None
        self._unanswered = threading.Lock()
        self._unanswered.acquire()

    def answer(self) -> None:
        self._unanswered.release()

    def wait(self, seconds: float) -> bool:
        return self._unanswered.acquire(timeout=seconds)


class ClaimAbandoned(Exception):
    """The process is stopping, or the database did not answer until it did: the message is to be given back."""


class Claimer(Loop):
    """`answer_to` blocks the calling thread until the answer is known, however long the database is away."""

    def __init__(self, database: Database, worker: UUID, lease_s: float, hold: Callable[[Running], None]) -> None:
        super().__init__("claimer", database)
        self._worker = worker
        self._lease_s = lease_s
        self._hold = hold
        self._requests: Inbox[Claim] = Inbox()  # near Postgres no lingering: threads wait for the answer
        #: To Postgres and back, as it was when the connection was made.
        self.trip_s = 0.0
        self._measured: BoundedConnection | None = None
        self._batch: list[Claim] = []
        self._unsure = False

    def ask(self, job_id: UUID) -> Claim:
        """Have it claimed with what others ask for meanwhile."""
        request = Claim(job_id)
        self._requests.put(request)
        return request

    def answer_to(self, request: Claim) -> Running | None:
        """The job, now running here and registered for heartbeats; None when it is not to be had. Raises ClaimAbandoned.

        With a concurrency key it may be another job than was asked for: the head of the line.
        """
        while not request.wait(1.0):
            if not self._thread.is_alive():
                raise ClaimAbandoned
        if request.running is None and self.stopping:
            raise ClaimAbandoned
        return request.running

    def wake(self) -> None:
        self._requests.wake()
        super().wake()

    def unsure_of(self, job_id: UUID) -> bool:
        """Whether a claim of this job is under way: its row may say that it is ours before we know."""
        return any(request.job_id == job_id for request in self._batch) or self._unsure

    def step(self, conn: BoundedConnection) -> float:
        if conn is not self._measured:
            self._measure(conn)
        if not self._batch:
            self._batch = self._requests.take(self.waiting)
        if self._batch:
            wanted = [request.job_id for request in self._batch]
            started = time.monotonic()
            if self._unsure:  # the last claim's COMMIT was not heard: what is ours already?
                found = claims.claimed_by(conn, wanted, self._worker)
                self._unsure = False
                self._answer(found, started, rest=False)
                wanted = [request.job_id for request in self._batch]
            if wanted:
                self._unsure = True
                found, keyed = claims.claim(conn, wanted, self._worker, self._lease_s)
                self._unsure = False
                if keyed:
                    self._answer(found, started, rest=False)
                    # In a transaction of their own, so that a hot key does not stall the others.
                    self._claim_keyed(conn, keyed, started)
                else:
                    self._answer(found, started, rest=True)
        return 0.0

    def _measure(self, conn: BoundedConnection) -> None:
        self.trip_s = min(_seconds(conn) for _ in range(_TRIES))
        self._requests.linger_s = max(0.0, self.trip_s - _NEAR_S) / 4
        self._measured = conn

    def _claim_keyed(self, conn: BoundedConnection, keyed: Sequence[UUID], started: float) -> None:
        for request in [r for r in self._batch if r.job_id not in set(keyed)]:
            self._batch.remove(request)
            request.answer()
        self._unsure = True
        found = claims.claim_keyed(conn, keyed, self._worker, self._lease_s)
        self._unsure = False
        self._answer(found, started, rest=True)

    def _answer(self, jobs: Sequence[Job], started: float, *, rest: bool) -> None:
        """Give the jobs to those who asked for them, heads of lines to anybody; `rest`: tell the others that there is none."""
        by_id = {job.id: job for job in jobs}
        for request in list(self._batch):
            job = by_id.pop(request.job_id, None)
            if job is not None:
                self._deliver(request, job, started)
        for job in by_id.values():
            if self._batch:
                self._deliver(self._batch[0], job, started)
            # else: nobody is left to run it; the heartbeat finds it as an orphan and hands it back
        if rest:
            for request in self._batch:
                request.answer()
            self._batch = []

    def _deliver(self, request: Claim, job: Job, started: float) -> None:
        repeatable = not registry.known(job.type) or registry.get(job.type).repeatable
        request.running = Running(job, started + self._lease_s, repeatable=repeatable)
        self._hold(request.running)  # before its thread knows: the next heartbeat names it
        self._batch.remove(request)
        request.answer()
        if request.unwanted is not None:
            request.unwanted(request.running)


def _seconds(conn: BoundedConnection) -> float:
    began = time.monotonic()
    conn.execute("select 1")
    return time.monotonic() - began
