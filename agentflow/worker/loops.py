"""A thread that does one step again and again, on a connection of its own, and survives the database's absence."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from agentflow import health, log
from agentflow.database import BoundedConnection, Database, Unavailable

logger = log.get(__name__)
T = TypeVar("T")

_BACKOFF_MOST_S = 5.0


class Loop:
    """`step(conn)` does one round and returns the seconds until the next; `wake()` ends the pause early."""

    def __init__(self, name: str, database: Database, *, answer_timeout_s: float = 30.0) -> None:
        self.name = name
        self._database = database
        self._answer_timeout_s = answer_timeout_s
        self._conn: BoundedConnection | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failures = 0
        self.unexpected = 0  # rounds in a row that failed for another reason than the database's absence
        self._in_round_since: float | None = None

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stop.set()
        self.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def step(self, conn: BoundedConnection) -> float:
        raise NotImplementedError

    def waiting(self, get: Callable[[], T]) -> T:
        """For a round that waits until there is something to do: meanwhile it is not stuck."""
        self._in_round_since = None
        try:
            return get()
        finally:
            self._in_round_since = time.monotonic()

    def stuck(self) -> str | None:
        """A sentence, once a round takes far longer than a database that is away could hold it up, or the thread is gone."""
        since = self._in_round_since
        if since is not None and (seconds := time.monotonic() - since) > health.STUCK_ANSWERS * self._answer_timeout_s:
            return f"the loop {self.name!r} has been in one round for {seconds:.0f} s"
        if self._thread.ident is not None and not self._thread.is_alive() and not self.stopping:
            return f"the loop {self.name!r} has ended"
        return None

    def failed(self, error: Exception) -> None:
        """Called at each round that the database refused, with the first one logged already."""

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            self._in_round_since = time.monotonic()
            pause_s = self._one_round()
            self._in_round_since = None
            if pause_s > 0 and not self._stop.is_set():
                self._wake.wait(pause_s)
        self._disconnect()

    def _one_round(self) -> float:
        try:
            if self._conn is None or self._conn.closed:
                self._conn = self._database.connect(answer_timeout_s=self._answer_timeout_s)
            pause_s = self.step(self._conn)
            self.failures = self.unexpected = 0
            return pause_s
        except Unavailable as error:
            # That the connection is gone and cannot be had again is said once for all loops (agentflow/presence.py).
            refused = self._conn is not None and not self._conn.closed
            self._disconnect()
            self.failures += 1
            if self.failures == 1 and refused:
                logger.warning("the database refused a statement", loop=self.name, error=str(error).strip())
            self.failed(error)
            return backoff_s(self.failures)
        except Exception:
            self._disconnect()
            self.failures += 1
            self.unexpected += 1
            logger.exception("unexpected error", loop=self.name)
            return backoff_s(self.failures)

    def _disconnect(self) -> None:
        if self._conn is not None:
            with contextlib.suppress(Exception):
                self._conn.close()
            self._conn = None


def backoff_s(failures: int) -> float:
    return min(_BACKOFF_MOST_S, 0.1 * 2.0 ** min(failures, 8)) * random.uniform(0.5, 1.0)
