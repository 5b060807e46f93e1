"""The threads of a process: who is in them, for whom there is room, and who waits here for the next one. One in four is kept for
critical jobs."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from agentflow.broker import DeliveredMessage, PolledMessage
from agentflow.jobs import registry
from agentflow.jobs.model import Ring
from agentflow.settings import Settings
from agentflow.worker.chores import NO_ROOM, Room

#: What will be begun within so long waits here for its thread; given back it would be away for a second.
_ASIDE_S: Final = 0.25
#: Threads that take more than one job in so long have the next ones here: twice a window, or what the relay picks for this
#: process would go by the broker, with what is on its way to a thread and not yet claimed.
_AHEAD_S: Final = 0.2
#: What will be begun within so long is claimed already: so much too early do its row and its lease say that it runs.
_SOON_S: Final = 0.025


def regular(threads: int) -> int:
    """How many of them any job may have."""
    return threads - threads // 4


class Threads:
    """Safe in threads. `ready`: they have started; `draining`: nothing is taken any more; `trip_s`: to Postgres and back."""

    def __init__(
        self,
        settings: Settings,
        count: int,
        *,
        ready: Callable[[], bool],
        draining: Callable[[], bool],
        trip_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.count: Final = count
        self._settings = settings
        self._ready = ready
        self._draining = draining
        self._trip_s = trip_s
        self._lock = threading.Lock()
        self._busy: Counter[str] = Counter()
        self._busy_regular = 0
        self._polled: Counter[str] = Counter()  # given to the threads, not taken up yet
        self._polled_regular = 0
        self._aside: deque[DeliveredMessage] = deque()  # met a thread that is kept for critical jobs
        self._claims = 0
        self._rate = 0.0
        self._rated_at = time.monotonic()

    @property
    def busy(self) -> int:
        return self._busy.total()

    # ---- how much ----

    def allowance(self) -> int:
        """Messages that this process may hold unclaimed: its free threads, what 200 ms of measured work use up beyond one for
        each thread, and what is on the way; of long jobs others may have the next ones."""
        if self._draining():
            return 0
        ahead = max(0, int(self.claims_per_s() * _AHEAD_S) - self.count)
        return max(0, self.count - self.busy) + ahead + self.on_the_way() + self._set_aside()

    def on_the_way(self) -> int:
        """Jobs that the threads take until the next ones come: a look for them is a trip to Postgres, and may begin one late."""
        return int(self.claims_per_s() * 2 * self._trip_s())

    def soon(self) -> tuple[int, int]:
        """How many jobs that are no critical ones threads take up at once, and how many more until 25 ms after their claim."""
        if self._draining():
            return 0, 0
        more = int(self.claims_per_s() * (self._trip_s() + _SOON_S))
        return max(0, regular(self.count) - self._busy_regular), more

    def reserved(self) -> int:
        """Of those, how many only critical jobs may have: what was set aside stands in the way of others, not of them."""
        return max(0, self.count // 4 - (self.busy - self._busy_regular)) + self._set_aside()

    def room(self) -> Room:
        """What may be picked for this process's threads now: as many as are free, and of no type that has its limit."""
        with self._lock:
            if self._draining() or not self._ready():
                return NO_ROOM
            taken = self._busy + self._polled
            for_any = regular(self.count) - self._busy_regular - self._polled_regular
            free = self.count - taken.total()
        types = [
            t.name
            for t in registry.every()
            if t.process_limit is None or taken[t.name] < t.process_limit(self._settings)
        ]
        return Room(free, free - min(free, max(0, for_any)), types)

    @staticmethod
    def takes(name: str) -> bool:
        """Whether any free thread may run this type: not where a process runs no more than so many of it."""
        return registry.known(name) and registry.get(name).process_limit is None

    def claimed(self) -> None:
        self._claims += 1

    def claims_per_s(self) -> float:
        """A moving average over about a second, which follows a rise at once: what is measured decides how much is fetched."""
        now = time.monotonic()
        if (elapsed := now - self._rated_at) > 0.2:
            weight, rate = min(1.0, elapsed), self._claims / elapsed
            self._rate = max(rate, (1 - weight) * self._rate + weight * rate)
            self._claims, self._rated_at = 0, now
        return self._rate

    # ---- who ----

    def expect(self, rings: Sequence[Ring]) -> None:
        """Of jobs that were picked here, and come as PolledMessage."""
        with self._lock:
            for ring in rings:
                self._polled[ring.type] += 1
                self._polled_regular += ring.priority != 0

    def enter(self, message: DeliveredMessage) -> bool:
        """Whether there is room for one more of its type and class; then it is in."""
        name, critical = message.actor_name, message.options.get("priority") == 0
        limit = registry.get(name).process_limit if registry.known(name) else None
        with self._lock:
            if isinstance(message, PolledMessage):
                self._polled[name] -= 1
                self._polled_regular -= not critical
            if self._draining() or (limit is not None and self._busy[name] >= limit(self._settings)):
                return False
            if not critical and not self._regular_room():
                return False
            self._busy[name] += 1
            self._busy_regular += not critical
            return True

    def set_aside(self, message: DeliveredMessage) -> bool:
        """Keep what only lacks a thread that is not kept for critical jobs, while such threads soon become free. The next job
        that leaves one brings it up again; its consumer gives it back after a second, as any message that nobody claims."""
        if isinstance(message, PolledMessage):
            return False
        with self._lock:
            self._forget_given_back()
            most = max(self.count // 4, int(self._rate * _ASIDE_S))
            if self._draining() or self._regular_room() or len(self._aside) >= most:
                return False
            self._aside.append(message)
            return True

    def leave(self, message: DeliveredMessage) -> DeliveredMessage | None:
        """Returns one that was set aside, whose turn it is now."""
        with self._lock:
            self._busy[message.actor_name] -= 1
            self._busy_regular -= message.options.get("priority") != 0
            while self._aside and self._regular_room():
                if not (next_one := self._aside.popleft()).given_back:
                    return next_one
        return None

    def take_aside(self) -> list[DeliveredMessage]:
        """All that waits here; nothing does any more."""
        with self._lock:
            messages = [message for message in self._aside if not message.given_back]
            self._aside.clear()
        return messages

    def _set_aside(self) -> int:
        with self._lock:
            self._forget_given_back()
            return len(self._aside)

    def _forget_given_back(self) -> None:
        while self._aside and self._aside[0].given_back:  # the first to wait are the first to be given back
            self._aside.popleft()

    def _regular_room(self) -> bool:
        return self._busy_regular < regular(self.count)
