"""What many threads hand to one loop, which takes it out in batches: whatever came while it was busy goes together."""

from __future__ import annotations

import queue
from collections.abc import Callable
from time import monotonic, sleep
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_BATCH: Final = 100
#: So many in a batch are a load: where fewer come, each goes at once.
_LOADED: Final = 3
_LOOK_S: Final = 0.0005


class Inbox(Generic[T]):
    """Under load it waits up to `linger_s`, which may be changed, for twice as many as the last time: a statement for eight costs
    little more than one for two."""

    def __init__(self, linger_s: float = 0.0) -> None:
        self.linger_s = linger_s
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._last = 0

    def put(self, item: T) -> None:
        self._queue.put(item)

    def wake(self) -> None:
        """End a wait in `take`."""
        self._queue.put(None)

    def take(self, waiting: Callable[[Callable[[], T | None]], T | None]) -> list[T]:
        """At most 100, at least one; none when it was woken. `waiting` is called with what waits for the first."""
        first = waiting(self._queue.get)
        if first is None:
            return []
        self._linger()
        batch = [first]
        while len(batch) < _BATCH:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                batch.append(item)
        self._last = len(batch)
        return batch

    def _linger(self) -> None:
        end = monotonic() + self.linger_s
        while self._last >= _LOADED and self._queue.qsize() < 2 * self._last and monotonic() < end:
            sleep(_LOOK_S)
