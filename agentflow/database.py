"""Connections to Postgres: a pool per process, and single ones for the threads that must not wait for the pool.

No session state, and prepared statements only where no pooler can be in between: the same code runs behind one. Every wait has
an end: connecting, waiting for a free connection, and waiting for an answer (a frozen server keeps its sockets open and
acknowledges packets). A server that only reads, as a standby does, counts as away: the one that is to take over may not have
done so yet.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
import psycopg.errors
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

from agentflow import network, tls
from agentflow.presence import Presence
from agentflow.tls import Trust

T = TypeVar("T")
Connection = psycopg.Connection[Any]

ANSWER_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5
POOL_TIMEOUT_S: Final = 4.0
_HOURS_S: Final = 100 * 3600.0

#: What is raised when the database is not there, as opposed to a statement that is wrong.
Unavailable = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)


_READ_ONLY: Final = "the server takes no writes: a standby, or one that was made read-only"


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that does not answer, and closes, since the outcome is unknown."""

    answer_timeout_s: float = ANSWER_TIMEOUT_S
    presence: Presence | None = None

    @classmethod
    def connect(  # type: ignore[override]
        cls,
        conninfo: str = "",
        *,
        presence: Presence,
        trust: Trust,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        **kwargs: Any,
    ) -> BoundedConnection:
        """Raises psycopg.OperationalError, at once while the server is known to be away."""
        if why := presence.begin():
            raise psycopg.OperationalError(why)
        try:
            conn = cls._connected(conninfo, trust, kwargs)
            conn.presence = presence
            conn.answer_timeout_s = answer_timeout_s
            conn._refuse_read_only(presence)
        except psycopg.OperationalError as error:
            refused = _refused(str(error))
            presence.failed(error, refused=refused)
            if refused:
                raise psycopg.OperationalError(f"{presence.variable}: {' '.join(str(error).split())}") from None
            raise
        except BaseException:
            presence.gave_up()
            raise
        presence.came()
        return conn

    @classmethod
    def _connected(cls, conninfo: str, trust: Trust, options: dict[str, Any]) -> BoundedConnection:
        """psycopg gives each address of a name the whole time limit, one after the other; here they share it."""
        given = conninfo_to_dict(conninfo)
        host, port = str(given.get("host") or ""), str(given.get("port") or 5432)
        options = {**options, **trust.postgres(conninfo)}
        if not host or host.startswith(("/", "@")) or "," in host or given.get("hostaddr"):
            return super().connect(conninfo, **options)
        end = time.monotonic() + options.get("connect_timeout", CONNECT_TIMEOUT_S)
        try:
            addresses = network.in_order(host, int(port), end - time.monotonic())
        except OSError as error:
            raise psycopg.OperationalError(str(error)) from None
        while True:
            address = addresses.pop(0)
            left_s = max(2, round(end - time.monotonic()))  # libpq's least
            try:
                return super().connect(conninfo, **{**options, "hostaddr": address, "connect_timeout": left_s})
            except psycopg.OperationalError as error:
                if "certificate verify failed" in str(error):
                    why = tls.why_refused(host, address, int(port), trust.context()) or str(error)
                    raise psycopg.OperationalError(why) from None
                if not addresses or time.monotonic() >= end:
                    raise

    def _refuse_read_only(self, presence: Presence) -> None:
        """Postgres says so by itself; behind a pooler that keeps it back it is asked, after an outage."""
        said = {self.info.parameter_status(name) for name in ("in_hot_standby", "default_transaction_read_only")}
        if said == {None} and presence.away:
            row = self.execute("show transaction_read_only").fetchone()
            said = {row[0]} if row else said
        if "on" in said:
            self.pgconn.finish()
            raise psycopg.OperationalError(_READ_ONLY)

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.answer_timeout_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"the server did not answer within {self.answer_timeout_s:g} s") from None
        except psycopg.errors.ReadOnlySqlTransaction:
            # Behind the same name, another server by now: this connection must not stay with the old one.
            self.pgconn.finish()
            if self.presence is not None:
                self.presence.failed(_READ_ONLY)
            raise psycopg.OperationalError(_READ_ONLY) from None
        except psycopg.Error as error:
            if error.diag.severity_nonlocalized == "FATAL" and not isinstance(error, psycopg.OperationalError):
                raise psycopg.OperationalError(str(error)) from error  # poolers end connections with codes of their own
            raise


def _refused(text: str) -> bool:
    """libpq says it in words alone: there is no server yet that could send an SQLSTATE."""
    low = text.lower()
    return any(word in low for word in ("authentication", "password", "certificate", "pg_hba.conf", "not found"))


class Database:
    """The database of a process. Opens nothing before the first use, so that it may be made before a fork."""

    def __init__(
        self,
        url: str,
        *,
        application_name: str,
        pool_size: int,
        direct: bool = False,
        trust: Trust | None = None,
        variable: str = "DATABASE_URL",
    ) -> None:
        self._url = url
        self._trust = trust or Trust()
        self._application_name = application_name
        self._pool_size = pool_size
        # Behind a transaction pooler the next statement may meet another server connection, which knows no such statement.
        self._prepare_threshold = 5 if direct else None
        self._pool: ConnectionPool[BoundedConnection] | None = None
        self._opening = threading.Lock()
        self.presence = Presence("Postgres", variable=variable, where=_where(url, self._trust))
        #: How long a statement on a connection of the pool may take.
        self.answer_timeout_s = ANSWER_TIMEOUT_S
        self._away = False
        self._asking = threading.Lock()

    @property
    def _options(self) -> dict[str, Any]:
        return {
            **options(application_name=self._application_name),
            "prepare_threshold": self._prepare_threshold,
            "presence": self.presence,
            "trust": self._trust,
        }

    def connect(self, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> BoundedConnection:
        """A connection of one's own, in autocommit mode. The caller closes it."""
        return BoundedConnection.connect(self._url, answer_timeout_s=answer_timeout_s, **self._options)

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

    def waited_s(self) -> float:
        """How long all threads of this process have waited for a connection of its pool since it was made."""
        pool = self._pool
        return pool.get_stats().get("requests_wait_ms", 0) / 1000 if pool is not None else 0.0

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


def connect_once(
    url: str, *, application_name: str, trust: Trust, variable: str, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> BoundedConnection:
    """A connection for statements that may take hours, such as migrations."""
    presence = Presence("Postgres", variable=variable, where=_where(url, trust))
    given = {**options(application_name=application_name), "connect_timeout": max(2, round(connect_timeout_s))}
    return BoundedConnection.connect(url, presence=presence, trust=trust, answer_timeout_s=_HOURS_S, **given)


def options(*, application_name: str) -> dict[str, Any]:
    """psycopg's parameters for any connection of ours: no prepared statements, and an end to each wait for the network."""
    return {
        "autocommit": True,
        "prepare_threshold": None,
        "application_name": application_name,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": network.KEEPALIVE["TCP_KEEPIDLE"],
        "keepalives_interval": network.KEEPALIVE["TCP_KEEPINTVL"],
        "keepalives_count": network.KEEPALIVE["TCP_KEEPCNT"],
        "tcp_user_timeout": network.KEEPALIVE["TCP_USER_TIMEOUT"],
    }


def _where(url: str, trust: Trust) -> dict[str, Any]:
    """What the log says of a URL: no user, no password."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # connecting says what is wrong with it
        return {}
    host = str(given.get("host") or given.get("hostaddr") or "this machine")
    mode = tls.postgres_mode(given, verify=trust.verify)
    if mode is None:
        return {"host": "socket" if host.startswith("/") else host, "database": given.get("dbname"), "tls": "none"}
    return {
        "host": host,
        "port": int(str(given.get("port") or 5432).split(",")[0]),
        "database": given.get("dbname"),
        "tls": mode,
    }
