"""Renewing the leases: one statement for all jobs of the process, on a connection and a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from agentflow import log
from agentflow.database import BoundedConnection, Database
from agentflow.jobs import leases
from agentflow.jobs.leases import Held
from agentflow.worker.loops import Loop
from agentflow.worker.running import Running

logger = log.get(__name__)

_SKIPPED_AGAIN_S = 0.5


class Heart(Loop):
    """One step renews all leases, tells the jobs what the database answered, and refreshes the worker's row."""

    def __init__(
        self,
        database: Database,
        worker: UUID,
        *,
        lease_s: float,
        renew_s: float,
        held: Callable[[], Sequence[Running]],
        facts: Callable[[], dict[str, Any]],
        unsure_of: Callable[[UUID], bool],
        hand_back: Callable[[UUID, int], None],
        beat: Callable[[], None],
    ) -> None:
        super().__init__("heart", database, answer_timeout_s=max(2.0, lease_s / 4))
        self._worker = worker
        self._lease_s = lease_s
        self._renew_s = renew_s
        self._held = held
        self._facts = facts
        self._unsure_of = unsure_of
        self._hand_back = hand_back
        self._beat = beat
        self._orphans: set[tuple[UUID, int]] = set()

    def step(self, conn: BoundedConnection) -> float:
        started = time.monotonic()
        running = {r.key: r for r in self._held()}
        answers = leases.renew(conn, self._worker, [self._as_held(r) for r in running.values()], self._lease_s)
        leases.announce_worker(conn, self._worker, self._facts(), lease_s=self._lease_s)
        skipped = False
        orphans = set()
        for key, answer in answers.items():
            job = running.get(key)
            if answer == "orphan" or job is None:
                if not self._unsure_of(key[0]):
                    orphans.add(key)
            elif answer == "lost":
                if not job.settling:
                    logger.warning("lease lost: the job is stopped here", job_id=str(key[0]))
                    job.stop("lost")
            else:
                skipped = skipped or answer == "skipped"
                if answer != "skipped":
                    job.lease_ends = started + self._lease_s
                if answer == "cancel":
                    job.stop("cancelled")
        for job_id, fence in orphans & self._orphans:  # seen twice: nobody here is about to run it
            if (job_id, fence) not in {r.key for r in self._held()}:
                logger.warning("a job claimed without our hearing of it is handed back", job_id=str(job_id))
                self._hand_back(job_id, fence)
        self._orphans = orphans
        self._beat()
        return _SKIPPED_AGAIN_S if skipped else self._renew_s

    def _as_held(self, running: Running) -> Held:
        news = running.news("postgres")
        return Held(*running.key, *(news or (None, None)))
