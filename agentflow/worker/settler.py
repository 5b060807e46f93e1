"""Writing how jobs ended: whatever ends while a write is under way goes into the next one together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple
from uuid import UUID

import psycopg

from agentflow import log
from agentflow.database import BoundedConnection, Database, Unavailable
from agentflow.jobs import settlement, usage
from agentflow.jobs.model import Settled, State, Verdict
from agentflow.worker.inbox import Inbox
from agentflow.worker.loops import Loop
from agentflow.worker.running import Running

logger = log.get(__name__)

_LINGER_S: Final = 0.005


class Ended(NamedTuple):
    """A verdict and the job it is about; `running` is None for an orphan that is handed back."""

    verdict: Verdict
    running: Running | None


class Settler(Loop):
    """`put` hands over and returns; the job stays held, and its lease renewed, until `settled` was called for it."""

    def __init__(
        self,
        database: Database,
        worker: UUID,
        lease_s: float,
        max_crashes: int,
        settled: Callable[[Ended, State | None], None],
        after: Callable[[Settled, Sequence[Ended]], None],
    ) -> None:
        super().__init__("settler", database)
        self._worker = worker
        self._lease_s = lease_s
        self._max_crashes = max_crashes
        self._settled = settled
        self._after = after
        self._ended: Inbox[Ended] = Inbox(_LINGER_S)
        self._batch: list[Ended] = []
        self._unsure = False
        self._open = 0
        self._idle = threading.Condition()

    def put(self, ended: Ended) -> None:
        with self._idle:
            self._open += 1
        self._ended.put(ended)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything put so far is written. False when that took too long."""
        with self._idle:
            return self._idle.wait_for(lambda: self._open == 0, timeout_s)

    def wake(self) -> None:
        self._ended.wake()
        super().wake()

    def step(self, conn: BoundedConnection) -> float:
        if not self._batch:
            self._batch = self._ended.take(self.waiting)
        if self._batch and self._unsure:  # the last COMMIT was not heard: what of it is written?
            written = settlement.already_written(conn, [e.verdict for e in self._batch], self._worker)
            self._unsure = False
            for ended in [e for e in self._batch if (e.verdict.job_id, e.verdict.fence) in written]:
                self._done(ended, "succeeded" if ended.verdict.outcome == "succeeded" else "queued")
        if self._batch:
            self._save_usage(conn, self._batch)
            self._write(conn, list(self._batch))
        return 0.0

    @staticmethod
    def _save_usage(conn: BoundedConnection, batch: Sequence[Ended]) -> None:
        """What could not be written when it was spent."""
        unsaved = {e.running: u for e in batch if e.running is not None and (u := e.running.unsaved_usage())}
        if not unsaved:
            return
        try:
            usage.record(conn, list(unsaved.values()))
        except Unavailable:
            raise
        except psycopg.Error:
            logger.exception("what was spent could not be stored")  # a job's end does not wait for that
        for running, written in unsaved.items():
            running.usage_saved(written)

    def _write(self, conn: BoundedConnection, batch: Sequence[Ended]) -> None:
        try:
            self._unsure = True
            settled = settlement.settle(
                conn, [e.verdict for e in batch], self._worker, lease_s=self._lease_s, max_crashes=self._max_crashes
            )
            self._unsure = False
        except Unavailable:
            raise
        except psycopg.Error as error:  # refused, so nothing of it is written: find the one it does not take
            self._unsure = False
            if len(batch) > 1:
                for ended in batch:
                    self._write(conn, [ended])
                return
            self._write_unrecordable(conn, batch[0], error)
            return
        for ended in batch:
            self._done(ended, settled.states.get((ended.verdict.job_id, ended.verdict.fence)))
        self._after(settled, batch)

    def _write_unrecordable(self, conn: BoundedConnection, ended: Ended, error: psycopg.Error) -> None:
        verdict = ended.verdict
        if verdict.reason == "unrecordable":
            logger.error("a verdict could not be written at all", job_id=str(verdict.job_id), error=str(error))
            self._done(ended, None)
            return
        said = {"code": "unrecordable", "message": f"The outcome could not be stored: {str(error).splitlines()[0]}"}
        replaced = Verdict(verdict.job_id, verdict.fence, "failed", reason="unrecordable", error=json.dumps(said))
        self._batch[self._batch.index(ended)] = replacement = Ended(replaced, ended.running)
        self._write(conn, [replacement])

    def _done(self, ended: Ended, state: State | None) -> None:
        self._batch.remove(ended)
        self._settled(ended, state)
        with self._idle:
            self._open -= 1
            self._idle.notify_all()
