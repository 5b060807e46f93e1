"""A job that this process holds: its lease, its progress, and the ways to stop it."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

from agentflow import container, log
from agentflow.calls import Service
from agentflow.database import Unavailable
from agentflow.jobs import usage
from agentflow.jobs.model import Job
from agentflow.jobs.usage import Usage
from agentflow.limits import Bucket
from agentflow.live import Claim, Progress

if TYPE_CHECKING:
    from agentflow.sentry import Attempt
    from agentflow.system import System
    from agentflow.worker.lines import Lines
    from agentflow.worker.memory import Memory
    from agentflow.worker.work import Work

logger = log.get(__name__)

StopReason = Literal["cancelled", "time_limit", "shutdown", "lost"]


class Stopped(BaseException):
    """Raised inside a job's function when it has to end now. Not an Exception, so that handlers of errors let it pass.

    `note`: what whoever asked for the end should know of it.
    """

    def __init__(self, reason: StopReason | None = None, note: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.note = note


class Running:
    """One claimed job. `stop` may be called from any thread, more than once: the first reason counts."""

    def __init__(self, job: Job, lease_ends: float, *, repeatable: bool = True) -> None:
        self.job: Final = job
        self.repeatable: Final = repeatable
        self.lease_ends = lease_ends  # by time.monotonic(), counted from before the renewing statement was sent
        self.began: float | None = None  # when a thread took it up, by time.monotonic()
        self._limit_s: float | None = None  # where it is shorter than its type's
        self.deadline: float | None = None
        self.stop_reason: StopReason | None = None
        self.stopped_at: float | None = None
        self.abandoned = False  # settled by somebody else than its thread, which is not to be waited for
        self.settling = False
        self._progress: Progress | None = None
        self._told: dict[str, Progress | None] = {}
        self._lock = threading.Lock()
        self._stop_event = threading.Event()
        self._thread: int | None = None
        self._interrupted = False
        self.work: Work | None = None
        self._killers: list[Callable[[], None]] = []
        self._spent: dict[str, float] = {}
        self._spent_saved: dict[str, float] = {}
        self.lines: Lines | None = None  # made by the first one that its code logs
        #: For Sentry: why the last attempt failed, and where that stands in its trace.
        self.cause: BaseException | None = None
        self.seen: Attempt | None = None

    @property
    def limit_s(self) -> float:
        """Of this attempt."""
        return self.job.time_limit_s if self._limit_s is None else self._limit_s

    @property
    def key(self) -> Claim:
        return self.job.id, self.job.fence

    def shorten(self, limit_s: float) -> None:
        if self.deadline is not None and limit_s < self.limit_s:
            self.deadline -= self.limit_s - limit_s
            self._limit_s = limit_s

    def report(self, fraction: float, stage: str | None) -> None:
        self._progress = Progress(min(1.0, max(0.0, fraction)), stage)

    def news(self, listener: str) -> Progress | None:
        """The progress, if it changed since this listener asked last."""
        now = self._progress
        if now is None or now == self._told.get(listener):
            return None
        self._told[listener] = now
        return now

    def spend(self, measures: Mapping[str, float]) -> None:
        """Add to the totals of this attempt. Raises ValueError for what is no amount."""
        if not all(math.isfinite(value) and value >= 0 for value in measures.values()):
            raise ValueError(f"not amounts: {dict(measures)}")
        with self._lock:
            self._spent = {
                **self._spent,
                **{name: self._spent.get(name, 0) + value for name, value in measures.items()},
            }

    def unsaved_usage(self) -> Usage | None:
        """The totals, where not all of them are known to be written."""
        with self._lock:
            return None if self._spent == self._spent_saved else Usage(*self.key, self._spent)

    def usage_saved(self, written: Usage) -> None:
        with self._lock:
            self._spent_saved = dict(written.measures)

    def stop(self, reason: StopReason) -> None:
        """Kill the children, and raise Stopped in the job's thread as soon as Python lets it."""
        with self._lock:
            if self.stop_reason is None:
                self.stop_reason = reason
                self.stopped_at = time.monotonic()
            self._stop_event.set()
            for kill in self._killers:
                kill()
            if self._thread is not None and not self._interrupted:
                self._interrupted = True
                _raise_in_thread(self._thread, Stopped)

    def check(self) -> None:
        """Raise Stopped if the job has to end.

        Work that must not be done twice looks at its lease itself: a process that was frozen may get here before anybody in
        it has noticed.
        """
        if self.stop_reason is None and not self.repeatable and time.monotonic() >= self.lease_ends:
            self.stop_reason, self.stopped_at = "lost", time.monotonic()
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)

    def wait(self, seconds: float) -> None:
        """Sleep, but not past a stop."""
        self._stop_event.wait(seconds)
        self.check()

    @contextmanager
    def killer(self, kill: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `stop` calls `kill`."""
        with self._lock:
            self.check()
            self._killers.append(kill)
        try:
            yield
        finally:
            with self._lock:
                self._killers.remove(kill)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """While the block runs, `stop` calls the killers and raises nothing in it. Raises Stopped at the block's end."""
        with self._lock:
            self.check()
            thread, self._thread = self._thread, None
        try:
            yield
        finally:
            with self._lock:
                self._thread = thread
        self.check()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in this thread, open to interruption. Raises Stopped, or what it raises.

        An interruption that arrives after the function's end is thrown away: what was done is done.
        """
        outcome: Any = None
        error: BaseException | None = None
        ended = False
        try:
            with self._lock:
                self.check()
                self._thread = threading.get_ident()
            outcome = function()
            ended = True
        except Stopped as stopped:
            if not ended:
                error = stopped
        except BaseException as raised:  # noqa: BLE001 - re-raised below, when no interruption can come between
            error = raised
        while not self._close():
            pass
        if error is not None:
            raise Stopped(self.stop_reason, error.note) if isinstance(error, Stopped) else error
        return outcome

    def _close(self) -> bool:
        try:
            with self._lock:
                self._thread = None
                if self._interrupted:
                    _raise_in_thread(threading.get_ident(), None)
            return True
        except Stopped:
            return False


def _raise_in_thread(thread: int, exception: type[BaseException] | None) -> None:
    """Raise in another thread at its next bytecode; None takes back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(exception) if exception else None
    )


class JobContext:
    """What a job's function receives beside its payload."""

    def __init__(self, running: Running, system: System, memory: Memory | None = None) -> None:
        self._running = running
        self._memory = memory
        self.system: Final = system

    @property
    def job(self) -> Job:
        return self._running.job

    def progress(self, fraction: float, stage: str | None = None) -> None:
        """Say how far the work is, 0 to 1. Cheap: call it as often as you like. Raises Stopped if the job has to end."""
        self._running.report(fraction, stage)
        self._running.check()

    def check(self) -> None:
        """Raises Stopped if the job has to end: cancelled, out of time, shut down."""
        self._running.check()

    def spent(self, **measures: float) -> None:
        """Add to what this attempt has used up, by name with its unit: `usd`, `tokens_in`, `gpu_s`, `crm_calls`.

        Written at once and kept however the attempt ends, a kill included; while the database is away, with its end.
        """
        self._running.spend(measures)
        unsaved = self._running.unsaved_usage()
        if unsaved is None:
            return
        try:
            with self.system.database.connection() as conn:
                over_budget = usage.record(conn, [unsaved])
        except Unavailable:
            logger.debug("what was spent is written with the job's end: the database is away")
        else:
            self._running.usage_saved(unsaved)
            self.system.rules.budget_reached(over_budget)

    def permit(self, service: Service, about: str = "", within: Sequence[Bucket] = ()) -> None:
        """Take a place for one call to a service, over all workers. Raises Wait: over a limit or the day's budget.

        `about` tells calls of one job apart: each keeps a place in the line of its own. `within`: buckets of this call alone.
        """
        self._running.check()
        self.system.calls.permit(service, self.job.organization_id, f"{self.job.id}:{about}", within)

    def refused(self, service: Service, retry_after_s: float | None = None) -> None:
        """The service answered 429: nobody calls it with this credential until then."""
        self.system.calls.refused(service, self.job.organization_id, retry_after_s)

    def exhausted(self, service: Service, for_s: float) -> None:
        """The service answered well, and said that its credential has no call left for so long."""
        self.system.calls.exhausted(service, for_s)

    def limit(self, seconds: float) -> None:
        """Have this attempt end by its time limit after so long, where that is sooner than its type's limit."""
        self._running.shorten(seconds)

    def sleep(self, seconds: float) -> None:
        """Sleep at most so long; raises Stopped when the job has to end."""
        self._running.wait(seconds)

    def sized(self, input_bytes: int) -> None:
        """Say how large the input is, once it is here: from that follows how much memory the job is taken to need.

        Raises Wait while there is not so much, Permanent where there never will be.
        """
        if self._memory is not None:
            with self._running.shielded():
                self._memory.sized(self._running, input_bytes)

    def memory_done(self) -> None:
        """Say that the heavy part is over, such as before models are asked: others may have the memory."""
        if self._memory is not None:
            with self._running.shielded():
                self._memory.done(self._running)

    def joined_by(self, pid: int | None) -> None:
        """Say that a process that others start and use, too, works for this job."""
        if pid is not None and (work := self._running.work) is not None:
            with self._running.shielded():
                work.memory.began(self._running, pid)
                work.had(container.peak_bytes(pid) or 0)

    def shielded(self) -> AbstractContextManager[None]:
        """For work that must know where it stopped: inside, the job's end is heard of from `check` and `progress` alone."""
        return self._running.shielded()

    def run_child(self, target: str, /, *, on_note: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """Run `module:function(report=…, **arguments)` in a child process that dies with this job; returns its result.

        With `on_note` the function gets an argument `note`, and what it calls that with (JSON) arrives here.
        """
        from agentflow.worker import child  # the child itself imports this package: keep it light there

        return child.run(self._running, target, arguments, on_note)
