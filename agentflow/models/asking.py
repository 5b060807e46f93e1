"""Many questions to models in one job: several at once, none paid twice, and no one's failure another's."""

from __future__ import annotations

import contextvars
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.models import Models, answers
from agentflow.models.failures import OF_THE_ACCOUNT

if TYPE_CHECKING:
    from agentflow.worker.running import JobContext

T = TypeVar("T")

AT_ONCE: Final = 4
#: So many refusals of the account one after the other, and the rest is not asked any more.
_REFUSALS: Final = 3


@dataclass(frozen=True)
class Answer:
    """What came of one question: JSON, or why there is none."""

    value: Any = None
    error: JobError | None = None

    @property
    def failed(self) -> dict[str, Any]:
        assert self.error is not None  # noqa: S101 - asked for failed ones alone
        return {"status": "failed", "reason": str(self.error), "code": self.error.code}


class Asking:
    """The questions of one job. Its methods may be called from several threads."""

    def __init__(self, context: JobContext, models: Models) -> None:
        self.context: Final = context
        self.models: Final = models
        self._lock = threading.Lock()
        self._refusals: list[Permanent] = []
        self._transients: list[Transient] = []
        self._one_at_a_time: defaultdict[bytes, threading.Lock] = defaultdict(threading.Lock)

    def one(self, key: bytes, ask: Callable[[], Any]) -> Answer:
        """The kept answer to the question of this key, or else `ask()`'s, which is kept. Raises Wait."""
        with self._lock:
            turn = self._one_at_a_time[key]
        with turn:  # two keyframes alike are one question
            return self._one(key, ask)

    def _one(self, key: bytes, ask: Callable[[], Any]) -> Answer:
        organization = self.context.job.organization_id
        with self.context.system.database.connection() as conn:
            found = answers.find(conn, organization, key)
        if found is not None:
            return Answer(found)
        with self._lock:
            if len(self._refusals) >= _REFUSALS:
                return Answer(error=self._refusals[-1])
        try:
            value = ask()
        except Permanent as error:
            self._refused(error)
            return Answer(error=error)
        except Transient as error:
            with self._lock:
                self._transients.append(error)
            return Answer(error=error)
        with self._lock:
            self._refusals.clear()
        with self.context.system.database.connection() as conn:
            answers.keep(conn, organization, key, value)
        return Answer(value)

    def _refused(self, error: Permanent) -> None:
        with self._lock:
            if error.code in OF_THE_ACCOUNT:
                self._refusals.append(error)
            else:
                self._refusals.clear()

    def each(self, items: Sequence[T], ask: Callable[[T], Answer], report: Callable[[float], None]) -> list[Answer]:
        """`ask` for each item, `AT_ONCE` at a time; the answers in order.

        After a Wait nothing new is begun, what is under way is let finish (it is paid), and the longest Wait is raised.
        """
        results: dict[int, Answer] = {}
        waits: list[Wait] = []
        under_way: dict[Future[Answer], int] = {}
        left = iter(enumerate(items))
        report(0.0)
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="asking") as pool:
            while True:
                while len(under_way) < AT_ONCE and not waits and (following := next(left, None)) is not None:
                    number, item = following
                    # The threads know whose job it is: their log lines carry its id.
                    under_way[pool.submit(contextvars.copy_context().run, ask, item)] = number
                if not under_way:
                    break
                # In slices, so that a stop of the job is raised here; the threads see it by themselves.
                done, _ = wait(under_way, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    number = under_way.pop(future)
                    try:
                        results[number] = future.result()
                    except Wait as error:
                        waits.append(error)
                report(len(results) / max(1, len(items)))
        if waits:
            raise max(waits, key=lambda each: each.seconds)
        return [results[number] for number in range(len(items))]

    def try_again_if_it_may_help(self) -> None:
        """Raises Transient when questions failed that may succeed later, and the job has another attempt for them."""
        job = self.context.job
        if self._transients and job.attempt < job.max_attempts:
            first = self._transients[0]
            raise Transient(
                f"{len(self._transients)} questions to models failed; the first: {first}",
                code=first.code,
                retry_after_s=max(error.retry_after_s or 0.0 for error in self._transients),
            )


def status_of(items: Sequence[Answer]) -> str:
    failed = sum(item.error is not None for item in items)
    return "done" if not failed else "failed" if failed == len(items) else "partial"
