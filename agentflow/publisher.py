"""One thread per process that waits for the broker and for Redis, so that no request and no worker does.

What it could not ring is taken back in Postgres (the relay rings again); what else it could not write is dropped, since
the rows have it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from uuid import UUID

import redis

from agentflow import log
from agentflow.broker import BrokerAway
from agentflow.database import Database, Unavailable
from agentflow.jobs import dispatch
from agentflow.jobs.model import Ring
from agentflow.live import Claim, Finished, Live, Progress

logger = log.get(__name__)

_BATCH: Final = 500
_MOST_WAITING: Final = 50_000
CLOSE_S: Final = 2.0


class Rings(Protocol):
    def ring(self, rings: Sequence[Ring]) -> None: ...

    def tell_cancel(self) -> None: ...


class Publisher:
    """`ring`, `finished`, `progress`, `cancel`: hand over and go on; nothing here raises or blocks."""

    def __init__(self, broker: Rings, live: Live, database: Database) -> None:
        self._broker = broker
        self._live = live
        self._database = database
        #: Who takes rings back later, when the database is away, too. Without one the relay finds them when they are due.
        self.take_back_later: Callable[[Sequence[UUID]], None] = lambda _ids: None
        self._queue: queue.Queue[Ring | Finished | tuple[Claim, Progress] | Callable[[], None]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._failures = 0

    def ring(self, rings: Sequence[Ring]) -> None:
        for ring in rings:
            self._put(ring)

    def finished(self, ends: Sequence[Finished]) -> None:
        for end in ends:
            self._put(end)

    def progress(self, changed: Sequence[tuple[Claim, Progress]]) -> None:
        for item in changed:
            self._put(item)

    def cancel(self) -> None:
        self._put(self._broker.tell_cancel)

    def close(self) -> None:
        """Publish what is waiting, for 2 s at most; the relay finds the rest."""
        if self._thread is not None:
            self._closing.set()
            self._queue.put(lambda: None)
            self._thread.join(CLOSE_S)

    def _put(self, item: Ring | Finished | tuple[Claim, Progress] | Callable[[], None]) -> None:
        if self._queue.qsize() >= _MOST_WAITING:
            return  # Redis is away for long: the rows stay as they are, and the relay rings when it is back
        self._queue.put(item)
        if self._thread is None or not self._thread.is_alive():
            with self._lock:  # started at the first use, so that it belongs to this side of a fork
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            batch = [self._queue.get()]
            while len(batch) < _BATCH:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            self._publish(batch)

    def _publish(self, batch: Sequence[Ring | Finished | tuple[Claim, Progress] | Callable[[], None]]) -> None:
        rings = [item for item in batch if isinstance(item, Ring)]
        ends = [item for item in batch if isinstance(item, Finished)]
        changed = [item for item in batch if isinstance(item, tuple) and not isinstance(item, Finished)]
        calls = [item for item in batch if callable(item)]
        work: list[tuple[str, Callable[[], None]]] = []  # each by itself: the broker may be away while Redis is there
        if rings:
            work.append(("rings", lambda: self._broker.ring(rings)))
        if ends:
            work.append(("results", lambda: self._live.write_finished(ends)))
        if changed:
            work.append(("progress", lambda: self._live.write_progress(changed)))
        work += [("cancel", call) for call in calls]
        failed = 0
        for what, write in work:
            try:
                write()
            except Exception as error:  # noqa: BLE001 - clients raise more than their documented errors; the thread must live
                failed += 1
                self._failed(what, rings if what == "rings" else [], error)
        if not failed:
            self._failures = 0
        elif not self._closing.is_set():
            time.sleep(min(2.0, 0.05 * 2.0 ** min(self._failures, 6)))

    def _failed(self, what: str, rings: Sequence[Ring], error: Exception) -> None:
        """Whether the rings arrived is unknown; ringing again does no harm."""
        self._failures += 1
        log_it = logger.warning if isinstance(error, redis.RedisError | OSError) else logger.exception
        if self._failures == 1:
            log_it("could not publish; the relay will ring again", what=what, error=str(error), rings=len(rings))
        if rings:
            # A broker that is known to be away is waited for by the relay; else the row waits, that it is not tried in vain.
            delay_s = 0.5 if isinstance(error, BrokerAway) else min(30.0, 0.5 * 2.0 ** min(self._failures, 6))
            try:
                with self._database.connection() as conn:
                    dispatch.take_back(conn, [ring.job_id for ring in rings], delay_s)
            except Unavailable:
                self.take_back_later([ring.job_id for ring in rings])
