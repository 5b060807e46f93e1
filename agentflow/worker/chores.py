"""What any worker process does for all: ring for due jobs (one leads per queue), and take what the dead left behind.

Where no broker brings this process anything, it looks for due jobs itself, for its own free threads.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from agentflow import log
from agentflow.database import BoundedConnection, Database, Unavailable
from agentflow.jobs import dispatch, leases
from agentflow.jobs.model import Ring, Settled
from agentflow.worker.loops import Loop

logger = log.get(__name__)

_RESCUE_BATCH: Final = 200
_SOONEST_S: Final = 0.005
#: Between two looks to ring, however often claims and ends wake it: a window is 100 ms of measured work.
_APART_S: Final = 0.02
_MOST_OWED: Final = 10_000
_CHARGE_S: Final = 0.5


class Room(NamedTuple):
    """What a process has room for: threads, of which some for critical jobs only, and the types that may run here now."""

    threads: int
    reserved: int
    types: Sequence[str]


NO_ROOM: Final = Room(0, 0, ())


class Relay(Loop):
    """Rings for due rows. Looks again soon while it finds some, and when a queue's window may have room (`room_in`).

    While the broker takes nothing it rings for nobody; while it brings nothing, or there is none, rows are picked for the free
    threads of this process and handed over by `deliver`: again at once while there are some, and when a thread becomes free.
    """

    def __init__(
        self,
        database: Database,
        queues: Sequence[str],
        *,
        poll_s: float,
        publish: Callable[[Sequence[Ring]], None],
        can_publish: Callable[[], bool] = lambda: True,
        can_hear: Callable[[], bool] = lambda: True,
        room: Callable[[], Room] = lambda: NO_ROOM,
        deliver: Callable[[Sequence[Ring]], None] = lambda _rings: None,
        draining: Callable[[], bool] = lambda: False,
        work_done: Callable[[], Mapping[tuple[str, int], tuple[int, float]]] = dict,
    ) -> None:
        super().__init__("relay", database)
        self._work_done = work_done
        self._charged_at = 0.0
        self._can_publish = can_publish
        self._can_hear = can_hear
        self._room = room
        self._deliver = deliver
        self._draining = draining
        self._queues = queues
        self._poll_s = poll_s
        self._publish = publish
        self._owed: list[UUID] = []
        self._lock = threading.Lock()
        self._turn = 0
        self._rung_at = 0.0
        self._next_look = dict.fromkeys(queues, 0.0)
        self._called_for: set[str] = set()  # written by any thread: one operation at a time

    @property
    def polling(self) -> bool:
        return not self._can_hear()

    def owe(self, ids: Sequence[UUID]) -> None:
        """Rings that were to be taken back while the database was away: done first when it is there again."""
        with self._lock:
            self._owed = (self._owed + list(ids))[-_MOST_OWED:]

    def wake(self) -> None:
        """There may be something due in any queue."""
        self._called_for.update(self._queues)
        super().wake()

    def room_in(self, queue: str) -> None:
        """The queue's window may have room."""
        if not self.polling:
            self._called_for.add(queue)
            super().wake()

    def room_made(self) -> None:
        """A thread is free again: there may be work for it that was left for want of room."""
        if self.polling:
            self.wake()

    def step(self, conn: BoundedConnection) -> float:
        self._take_back_owed(conn)
        self._charge(conn)
        pause_s = self._poll_s * random.uniform(0.8, 1.2)  # so that the processes do not ask in step
        if self._draining():
            return pause_s  # others ring: this process may be the last one to know this broker
        if not self.polling and (early_s := self._rung_at + _APART_S - time.monotonic()) > 0:
            time.sleep(early_s)
        if self._can_publish():  # else rows stay due, and are rung at once when it is back; stamped ones would wait
            self._ring(conn, pause_s)
            pause_s = max(0.0, min(self._next_look.values()) - time.monotonic())
        if self.polling:
            pause_s = min(pause_s, self._poll(conn))
        return pause_s

    def _ring(self, conn: BoundedConnection, pause_s: float) -> None:
        """In each queue that it is time for: within `pause_s` it is so again."""
        for queue in self._queues:
            if queue not in self._called_for and time.monotonic() < self._next_look[queue]:
                continue
            self._called_for.discard(queue)  # before the look: a call that comes during it is one for another
            self._next_look[queue] = 0.0  # and one that fails is still to be done
            rings, due_in_s = dispatch.pick_due(conn, queue)  # committed: no lock is held while publishing
            self._publish(rings)
            self._rung_at = time.monotonic()
            self._next_look[queue] = self._rung_at + min(pause_s, _pause_s(rings, due_in_s))

    def _poll(self, conn: BoundedConnection) -> float:
        pause_s = math.inf
        self._turn += 1  # each queue is the first one now and then: they share the room
        for n in range(len(self._queues)):
            room = self._room()
            if room.threads <= 0:
                break  # until `room_made`
            queue = self._queues[(self._turn + n) % len(self._queues)]
            rings, due_in_s = dispatch.poll(conn, queue, room.threads, room.reserved, room.types)
            self._deliver(rings)
            pause_s = min(pause_s, _pause_s(rings, due_in_s))
        return pause_s

    def _charge(self, conn: BoundedConnection) -> None:
        """Now and then, since each organization's turn is one row for all workers. What is lost with an error is an estimate."""
        if time.monotonic() - self._charged_at > _CHARGE_S:
            self._charged_at = time.monotonic()
            dispatch.charge(conn, self._work_done())

    def _take_back_owed(self, conn: BoundedConnection) -> None:
        with self._lock:
            owed, self._owed = self._owed, []
        if owed:
            try:
                dispatch.take_back(conn, owed, 0.0)
            except Unavailable:
                self.owe(owed)
                raise


def _pause_s(rings: Sequence[Ring], due_in_s: float | None) -> float:
    if rings:
        return _SOONEST_S
    return max(_SOONEST_S, due_in_s + 0.001) if due_in_s is not None and due_in_s >= 0 else math.inf


class Rescue(Loop):
    """Takes jobs whose leases ran out. agentflow.rescue_2 says who may. `besides`: what else has time until the next round."""

    def __init__(
        self,
        database: Database,
        worker: UUID,
        *,
        lease_s: float,
        max_crashes: int,
        after: Callable[[Settled], None],
        besides: Callable[[BoundedConnection], None] = lambda _conn: None,
    ) -> None:
        super().__init__("rescue", database)
        self._besides = besides
        self._lease_s = lease_s
        self._max_crashes = max_crashes
        self._worker = worker
        self._after = after

    def step(self, conn: BoundedConnection) -> float:
        pause_s = min(5.0, self._lease_s / 6) * random.uniform(0.8, 1.2)
        settled = leases.rescue(
            conn, self._worker, limit=_RESCUE_BATCH, lease_s=self._lease_s, max_crashes=self._max_crashes
        )
        if settled.states:
            logger.warning(
                "rescued jobs of a worker that fell silent",
                jobs=len(settled.states),
                failed=sum(state == "failed" for state in settled.states.values()),
            )
            self._after(settled)
        if len(settled.states) == _RESCUE_BATCH:
            return 0.0
        self._besides(conn)
        return pause_s
