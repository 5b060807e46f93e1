"""Answers that are costly to find, kept the longer the more they cost: a million waiting jobs are not counted anew for each page
that somebody has open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

from agentflow import log
from agentflow.database import Connection, Database, Unavailable

T = TypeVar("T")
P = ParamSpec("P")
Question = tuple[Callable[..., Any], tuple[Any, ...]]
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
        self._answers: dict[Question, _Answer] = {}
        self._forgotten = 0

    def get(self, conn: Connection, find: Callable[Concatenate[Connection, P], T], *args: P.args, **_: P.kwargs) -> T:
        """What `find(conn, *args)` says. Where that took long it is what it said last time, for 20 times as long as it took; when
        that is over it is found anew beside, and meanwhile the old one is given."""
        question = (find, args)
        now = monotonic()
        with self._lock:
            answer = self._answers.get(question)
            if answer is not None and now - answer.at < _OLDEST_S:
                if now > answer.fresh_until and not answer.being_found:
                    answer.being_found = True
                    threading.Thread(target=self._find_beside, args=question, name="kept", daemon=True).start()
                return cast(T, answer.value)
        return cast(T, self._find(conn, *question))

    def forget(self, *finds: Callable[..., Any]) -> None:
        """What these said is known to be old, also what one of them is about to say: the next who asks waits for a new answer."""
        with self._lock:
            self._forgotten += 1
            for question in [question for question in self._answers if question[0] in finds]:
                del self._answers[question]

    def _find_beside(self, find: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            with self._database.connection() as conn:
                self._find(conn, find, args)
                return
        except Unavailable:
            pass
        except Exception:  # nobody waits here who could be told; the next who asks meets it
            logger.exception("a kept answer could not be found anew", find=find.__name__)
        self.forget(find)

    def _find(self, conn: Connection, find: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        forgotten, began = self._forgotten, monotonic()
        value = find(conn, *args)
        took_s = monotonic() - began
        with self._lock:
            self._answers.pop((find, args), None)
            if took_s >= QUICK_S and forgotten == self._forgotten:
                self._answers[find, args] = _Answer(value, monotonic(), took_s)
                while len(self._answers) > _MOST:
                    del self._answers[next(iter(self._answers))]
        return value
