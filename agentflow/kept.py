"""Answers that are costly to find, kept for as long as they cost: what a million waiting jobs are counted for is not asked anew
by each page that somebody has open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, TypeVar, cast

from agentflow import log
from agentflow.database import Connection, Database, Unavailable

T = TypeVar("T")
logger = log.get(__name__)

#: What took less is asked for each time: it is exact, and there is nothing to spare.
QUICK_S: Final = 0.1
#: The share of the time that may go into finding one answer again and again.
_SHARE: Final = 0.05
#: Older than this is not told any more.
_OLDEST_S: Final = 900.0
_MOST: Final = 1000


@dataclass(slots=True)
class _Answer:
    value: Any
    at: float
    took_s: float
    being_found: bool = False

    @property
    def fresh_until(self) -> float:
        return self.at + self.took_s / _SHARE


class Kept:
    """One per process; safe in threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._answers: dict[Hashable, _Answer] = {}

    def get(self, conn: Connection, key: Hashable, find: Callable[[Connection], T]) -> T:
        """What `find` says. Where that took long it is what it said last time, for 20 times as long as it took; when that is over
        it is found anew beside, and meanwhile the old one is given. `key` names the question; of `find` any may be called."""
        now = monotonic()
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None and now - answer.at < _OLDEST_S:
                if now > answer.fresh_until and not answer.being_found:
                    answer.being_found = True
                    threading.Thread(target=self._find_beside, args=(key, find), name="kept", daemon=True).start()
                return cast(T, answer.value)
        return self._find(conn, key, find)

    def _find_beside(self, key: Hashable, find: Callable[[Connection], Any]) -> None:
        try:
            with self._database.connection() as conn:
                self._find(conn, key, find)
        except Unavailable:
            self.forget(lambda known: known == key)
        except Exception:
            logger.exception("a kept answer could not be found anew")
            self.forget(lambda known: known == key)

    def _find(self, conn: Connection, key: Hashable, find: Callable[[Connection], T]) -> T:
        began = monotonic()
        value = find(conn)
        took_s = monotonic() - began
        with self._lock:
            self._answers.pop(key, None)
            if took_s >= QUICK_S:
                self._answers[key] = _Answer(value, monotonic(), took_s)
                while len(self._answers) > _MOST:
                    del self._answers[next(iter(self._answers))]
        return value

    def forget(self, which: Callable[[Hashable], bool]) -> None:
        """Answers that are known to be old: the next who asks waits for a new one."""
        with self._lock:
            for key in [key for key in self._answers if which(key)]:
                del self._answers[key]
