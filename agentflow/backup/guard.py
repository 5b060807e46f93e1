"""One backup of a system at a time; and while it lasts no file that its rows may name is removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentflow.backup.errors import Refused
from agentflow.database import Connection

_KEY = "hashtextextended('a backup of agentflow', 7)"


@contextmanager
def held(conn: Connection) -> Iterator[None]:
    """Until the block ends; also when the process dies in it. Of a transaction, since poolers know no session's locks.

    An open transaction that does nothing holds no snapshot: tables are cleaned up all the same. Raises Refused; and
    psycopg.OperationalError at the end of the block when the lock was lost on the way.
    """
    with conn.transaction():
        conn.execute("set local idle_in_transaction_session_timeout = 0")
        row = conn.execute(f"select pg_try_advisory_xact_lock({_KEY})").fetchone()
        if row != (True,):
            raise Refused("another backup of this system is under way")
        yield
        conn.execute("select 1")


def under_way(conn: Connection) -> bool:
    """Whether a backup is being made. For a connection in autocommit mode: what is locked to find out is given back at once."""
    return conn.execute(f"select pg_try_advisory_xact_lock_shared({_KEY})").fetchone() == (False,)
