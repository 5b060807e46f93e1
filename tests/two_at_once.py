"""Calls that meet: on rows that somebody has locked, in threads that start at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar
from uuid import UUID

import psycopg

from agentflow.jobs.model import Job
from tests.core_support import end_others, value

T = TypeVar("T")


class Background(Generic[T]):
    """A call on a connection of its own that may have to wait for a lock, in a thread."""

    started: ClassVar[list[threading.Thread]] = []

    def __init__(self, conn: psycopg.Connection, call: Callable[[psycopg.Connection], T]) -> None:
        self._pid = conn.info.backend_pid
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(conn, call), daemon=True)
        self._thread.start()
        self.started.append(self._thread)

    @classmethod
    def end_all(cls, conn: psycopg.Connection) -> None:
        """After a test that failed half-way: a connection must not be closed while a thread is in it."""
        if any(thread.is_alive() for thread in cls.started):
            end_others(conn)
        for thread in cls.started:
            thread.join(10)
        cls.started.clear()

    def _run(self, conn: psycopg.Connection, call: Callable[[psycopg.Connection], T]) -> None:
        try:
            self._outcome.append(call(conn))
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            self._error = error

    def waits(self, watcher: psycopg.Connection) -> bool:
        """Whether it waits for a lock of somebody else; waits itself until that is known."""
        while self._thread.is_alive():
            if value(watcher, "select cardinality(pg_blocking_pids(%s)) > 0", self._pid):
                return True
            time.sleep(0.002)
        return False

    def result(self, timeout_s: float = 10.0) -> T:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self._outcome[0]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls in threads that start at the same moment; their results in order. Raises the first error."""
    barrier = threading.Barrier(len(calls))
    outcomes: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(index: int, call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            outcomes[index] = call()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, call), daemon=True) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return outcomes


@contextmanager
def row_locked(conn: psycopg.Connection, *jobs: Job) -> Iterator[None]:
    """Somebody else looks at these rows with a lock, for as long as the block runs."""
    with conn.transaction():
        conn.execute("select from agentflow.jobs where id = any (%s) order by id for update", ([j.id for j in jobs],))
        yield


def lockable(conn: psycopg.Connection, *jobs: Job) -> list[UUID]:
    """Which of these rows nobody has locked."""
    query = "select id from agentflow.jobs where id = any (%s) for update skip locked"
    return [row[0] for row in conn.execute(query, ([j.id for j in jobs],)).fetchall()]
