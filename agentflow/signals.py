"""How a process is told to end: by signals, or by the death of the process that started it.

The first SIGTERM (or SIGHUP) begins the drain at once. A second one ends the grace: what runs is handed back now. Its copies are
not a second one: a platform, a terminal or `docker stop` may signal the whole group, and the parent passes its own on as well,
for which Dramatiq alone ends the process in the middle of its work.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Final

#: Two signals closer together than this are one.
SAME_SIGNAL_S: Final = 1.0
#: A signal that arrives just before the main thread begins to wait does not end the wait; its handler runs after it.
_SIGNAL_LOOK_S: Final = 0.5
_PARENT_LOOK_S: Final = 0.5


class Signals:
    """Takes over the handlers that are there for SIGTERM and SIGHUP, and calls them once, at the first signal.

    `stop()` and `hurry()` are called in a thread of their own. `parent` is the process whose death is a SIGTERM, too; None:
    nobody's is. To be made in the main thread.
    """

    def __init__(self, *, stop: Callable[[], None], hurry: Callable[[], None], parent: int | None) -> None:
        self._stop = stop
        self._hurry = hurry
        self._parent = parent
        # Python's forkserver stands between a process and the one that asked for it.
        self._is_direct = parent == os.getppid()
        self._told_at: float | None = None
        # Its `put` may be interrupted by a handler that puts, too: with an Event that would be a deadlock.
        self._told: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and (before := signal.getsignal(number)) != signal.SIG_IGN:
                signal.signal(number, self._handler(before))
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _handler(self, before: Any) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._told_at is None:
                self._told_at = now
                self._told.put(self._stop)
                if callable(before):
                    before(number, frame)
            elif now - self._told_at > SAME_SIGNAL_S:
                self._told.put(self._hurry)

        return handle

    def _listen(self) -> None:
        while True:
            try:
                told = self._told.get(timeout=_PARENT_LOOK_S)
                threading.Thread(target=told, name="told", daemon=True).start()
            except queue.Empty:
                if self._parent_is_gone():
                    self._parent = None
                    log_to_the_real_stderr()
                    from agentflow import log  # processes that do nothing but wait for their end stay light without it

                    log.get(__name__).warning("the parent process is gone: stopping")
                    os.kill(os.getpid(), signal.SIGTERM)

    def _parent_is_gone(self) -> bool:
        if self._parent is None:
            return False
        if self._is_direct:
            return os.getppid() != self._parent
        try:
            os.kill(self._parent, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, as somebody else
            return False
        return False


def log_to_the_real_stderr() -> None:
    """Dramatiq's children write to a pipe that its master reads: without a master every line would be an error."""
    if sys.__stderr__ is None:
        return
    sys.stdout = sys.stderr = sys.__stderr__
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.__stderr__)


class Inbox:
    """What signals' handlers `put` and the main thread waits for. A put may interrupt another one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()

    def put(self, number: int, _frame: FrameType | None = None) -> None:
        """May be a handler itself."""
        self._queue.put(number)

    def get(self, timeout_s: float | None = None) -> int | None:
        """The next one; None when there was none for so long. Without `timeout_s` it waits for ever."""
        end = time.monotonic() + timeout_s if timeout_s is not None else None
        while True:
            left_s = _SIGNAL_LOOK_S if end is None else min(_SIGNAL_LOOK_S, max(0.0, end - time.monotonic()))
            with suppress(queue.Empty):
                return self._queue.get(timeout=left_s)
            if end is not None and time.monotonic() >= end:
                return None
