"""Connections to Postgres: a pool per process, and single ones for the threads that must not wait for the pool.

No session state, and prepared statements only where no pooler can be in between: the same code runs behind one. Every wait has
an end: connecting, waiting for a free connection, and waiting for an answer (a frozen server keeps its sockets open and
acknowledges packets).
"""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
import psycopg.errors
from psycopg.abc import PQGen
from psycopg_pool import ConnectionPool, PoolTimeout

T = TypeVar("T")
Connection = psycopg.Connection[Any]

ANSWER_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5
POOL_TIMEOUT_S: Final = 4.0

#: What is raised when the database is not there, as opposed to a statement that is wrong.
Unavailable = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that does not answer, and closes, since the outcome is unknown."""

    answer_timeout_s: float = ANSWER_TIMEOUT_S

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.answer_timeout_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"the server did not answer within {self.answer_timeout_s:g} s") from None


class Database:
    """The database of a process. Opens nothing before the first use, so that it may be made before a fork."""

    def __init__(self, url: str, *, application_name: str, pool_size: int, direct: bool = False) -> None:
        self._url = url
        self._application_name = application_name
        self._pool_size = pool_size
        # Behind a transaction pooler the next statement may meet another server connection, which knows no such statement.
        self._prepare_threshold = 5 if direct else None
        self._pool: ConnectionPool[BoundedConnection] | None = None
        self._opening = threading.Lock()
        #: How long a statement on a connection of the pool may take.
        self.answer_timeout_s = ANSWER_TIMEOUT_S
        self._away = False
        self._asking = threading.Lock()

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "autocommit": True,
            "prepare_threshold": self._prepare_threshold,
            "application_name": self._application_name,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        }

    def connect(self, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> BoundedConnection:
        """A connection of one's own, in autocommit mode. The caller closes it."""
        conn = BoundedConnection.connect(self._url, **self._options)
        conn.answer_timeout_s = answer_timeout_s
        return conn

    def open(self) -> None:
        """Make the pool; connecting goes on in the background."""
        with self._opening:  # two threads at once would make two, and the lost one ends in a traceback
            if self._pool is None:
                self._pool = ConnectionPool(
                    self._url,
                    connection_class=BoundedConnection,
                    kwargs=self._options,
                    min_size=1,
                    max_size=self._pool_size,
                    timeout=POOL_TIMEOUT_S,
                    num_workers=1,
                    # The default, 300 s of growing pauses, finds a server that was away for a minute a minute late.
                    # After giving up the pool tries anew when somebody asks.
                    reconnect_timeout=3.0,
                    check=_refuse_closed,
                    configure=self._configure,
                    open=True,
                    name="agentflow",
                )

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection of the pool, in autocommit mode: each statement by itself.

        Of a server that does not answer one caller at a time finds out whether it is back; the others are told at once that
        it is not. Else each of a crowd would wait for seconds, and there would be no thread left for anything else.
        """
        self.open()
        assert self._pool is not None  # noqa: S101 - set by open()
        asking = self._away and self._asking.acquire(blocking=False)
        if self._away and not asking:
            raise psycopg.OperationalError("the database did not answer the last time")
        conn = None
        try:
            with self._pool.connection() as conn:
                if asking:
                    conn.execute("select 1")  # a frozen server leaves its connections standing
                    self._away = False
                    self._asking.release()
                    asking = False
                yield conn
        except Unavailable:
            self._away = self._away or conn is None or conn.closed
            raise
        finally:
            if asking:
                self._asking.release()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection of the pool inside a transaction: committed at the end, rolled back by an exception."""
        with self.connection() as conn, conn.transaction():
            yield conn

    def _configure(self, conn: BoundedConnection) -> None:
        conn.answer_timeout_s = self.answer_timeout_s

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _refuse_closed(conn: BoundedConnection) -> None:
    """A pool's check without a round trip: a server that hung up has left an end-of-file on the idle socket."""
    poll = select.poll()
    poll.register(conn.pgconn.socket, select.POLLIN | select.POLLERR | select.POLLHUP)
    if poll.poll(0):
        conn.close()  # or the pool takes it back for a good one, and offers it again and again
        raise psycopg.OperationalError("the server closed the connection while it was idle")
