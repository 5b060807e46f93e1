"""A job that this process holds: its lease, its progress, and the ways to stop it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

from agentflow.jobs.model import Job
from agentflow.live import Claim, Progress

if TYPE_CHECKING:
    from agentflow.system import System

StopReason = Literal["cancelled", "time_limit", "shutdown", "lost"]


class Stopped(BaseException):
    """Raised inside a job's function when it has to end now. Not an Exception, so that handlers of errors let it pass."""

    def __init__(self, reason: StopReason | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


class Running:
    """One claimed job. `stop` may be called from any thread, more than once: the first reason counts."""

    def __init__(self, job: Job, lease_ends: float) -> None:
        self.job: Final = job
        self.lease_ends = lease_ends  # by time.monotonic(), counted from before the renewing statement was sent
        self.started: Final = time.monotonic()
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
        self._killers: list[Callable[[], None]] = []

    @property
    def key(self) -> Claim:
        return self.job.id, self.job.fence

    def report(self, fraction: float, stage: str | None) -> None:
        self._progress = Progress(min(1.0, max(0.0, fraction)), stage)

    def news(self, listener: str) -> Progress | None:
        """The progress, if it changed since this listener asked last."""
        now = self._progress
        if now is None or now == self._told.get(listener):
            return None
        self._told[listener] = now
        return now

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
        """Raise Stopped if the job has to end."""
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
        """While it runs, `stop` calls the killers and raises nothing, so that all is cleaned up. Raises Stopped at its end."""
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
            raise Stopped(self.stop_reason) if isinstance(error, Stopped) else error
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

    def __init__(self, running: Running, system: System) -> None:
        self._running = running
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

    def sleep(self, seconds: float) -> None:
        """Sleep at most so long; raises Stopped when the job has to end."""
        self._running.wait(seconds)

    def run_child(self, target: str, /, *, on_note: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """Run `module:function(report=…, **arguments)` in a child process that dies with this job; returns its result.

        With `on_note` the function gets an argument `note`, and what it calls that with (JSON) arrives here.
        """
        from agentflow.worker import child  # the child itself imports this package: keep it light there

        return child.run(self._running, target, arguments, on_note)
