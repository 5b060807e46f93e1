"""One thread per process that waits for the broker and for Redis, so that no request and no worker does.

What it could not ring is taken back in Postgres (the relay rings again); what else it could not write is dropped, since
the rows have it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from uuid import UUID

import redis

from agentflow import log
from agentflow.database import Database, Unavailable
from agentflow.jobs import dispatch
from agentflow.jobs.model import Ring
from agentflow.live import Claim, Finished, Live, Progress

logger = log.get(__name__)

_BATCH: Final = 500
_MOST_WAITING: Final = 50_000
CLOSE_S: Final = 2.0
#: Results and progress are not written for so long after Redis failed: each try costs its time-out, and rings wait behind it.
_LIVE_PAUSE_S: Final = 5.0


class Rings(Protocol):
    on_unrung: Callable[[], None]

    def can_publish(self) -> bool: ...

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
        self._queue: queue.SimpleQueue[Ring | Finished | tuple[Claim, Progress] | Callable[[], None]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._failures: Counter[str] = Counter()
        self._live_again_at = 0.0

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
        if rings and self._broker.can_publish():
            work.append(("rings", lambda: self._broker.ring(rings)))
        elif rings:
            self._take_back(rings, 0.0)
        if time.monotonic() >= self._live_again_at:
            if ends:
                work.append(("results", lambda: self._live.write_finished(ends)))
            if changed:
                work.append(("progress", lambda: self._live.write_progress(changed)))
        work += [("cancel", call) for call in calls]
        slept_for = 0
        for what, write in work:
            kind = "redis" if what in ("results", "progress") else "broker"
            try:
                write()
                self._failures[kind] = 0
            except Exception as error:  # noqa: BLE001 - clients raise more than their documented errors; the thread must live
                self._failures[kind] += 1
                slept_for = max(slept_for, self._failures[kind])
                self._failed(what, self._failures[kind], rings if what == "rings" else [], error)
        if slept_for and not self._closing.is_set():
            time.sleep(min(2.0, 0.05 * 2.0 ** min(slept_for, 6)))

    def _failed(self, what: str, times: int, rings: Sequence[Ring], error: Exception) -> None:
        """Whether the rings arrived is unknown; ringing again does no harm."""
        log_it = logger.warning if isinstance(error, redis.RedisError | OSError) else logger.exception
        if times == 1:
            log_it("could not publish; the relay will ring again", what=what, error=str(error), rings=len(rings))
        if what in ("results", "progress"):
            self._live_again_at = time.monotonic() + _LIVE_PAUSE_S
        if rings:
            # Those that wait are found at once by whoever can ring, or run them; later, so as not to be tried in vain, where
            # the broker is not known to be away.
            self._take_back(rings, 0.5 if self._broker.can_publish() else 0.0)

    def _take_back(self, rings: Sequence[Ring], delay_s: float) -> None:
        try:
            with self._database.connection() as conn:
                dispatch.take_back(conn, [ring.job_id for ring in rings], delay_s)
        except Unavailable:
            self.take_back_later([ring.job_id for ring in rings])
        self._broker.on_unrung()
