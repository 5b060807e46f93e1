"""Rows out of Postgres and into it, table by table, by COPY.

COPY and not pg_dump: that one is not installed where most of this runs, refuses a server that is newer than itself, and would
bring the schema along, which the migrations make. COPY needs a connection, also one through a pooler; and in one transaction of
REPEATABLE READ all tables are of one moment, while everybody else goes on writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Final

import psycopg
from psycopg import sql

from agentflow.backup.errors import Refused
from agentflow.backup.manifest import Numbers
from agentflow.database import Connection

SCHEMA: Final = "agentflow"
#: Not copied: which files were applied is in the manifest; processes of the old system, and who is signed in there, are none of
#: the new one's.
_OWN: Final = ("migrations", "workers", "dashboard_sessions", "alert_watch")
#: What a new system holds before anybody has used it: the default organization, and secrets that are made at the first look.
_FROM_THE_START: Final = {"organizations": 1, "installation": 100}
_LOCK_WAIT: Final = "30s"


@dataclass(frozen=True, slots=True)
class Table:
    """`size`: bytes that it takes in the database."""

    name: str
    columns: tuple[str, ...]
    size: int


@contextmanager
def snapshot(conn: Connection) -> Iterator[datetime]:
    """A transaction that sees the database as it is at one moment, which it yields, however long it lasts."""
    conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    conn.read_only = True
    with conn.transaction():
        # Without the last one a role that may not see all rows would make a backup of those that it sees.
        for setting in ("statement_timeout = 0", "idle_in_transaction_session_timeout = 0", "row_security = off"):
            conn.execute(f"set local {setting}")
        row = conn.execute("select clock_timestamp()").fetchone()
        assert row is not None  # noqa: S101 - one row
        yield row[0]


def every(conn: Connection) -> list[Table]:
    """All tables with their columns, but for those that Postgres computes; each after those that it refers to."""
    rows = conn.execute(
        "select c.relname, array_agg(a.attname::text order by a.attnum), pg_table_size(c.oid) from pg_class c"
        " join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid"
        " where n.nspname = %s and c.relkind = 'r' and c.relname <> all (%s)"
        " and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' group by c.oid, c.relname",
        (SCHEMA, list(_OWN)),
    ).fetchall()
    found = {name: Table(name, tuple(columns), int(size)) for name, columns, size in rows}
    references = conn.execute(
        "select a.relname, b.relname from pg_constraint f"
        " join pg_class a on a.oid = f.conrelid join pg_class b on b.oid = f.confrelid"
        " join pg_namespace n on n.oid = a.relnamespace"
        " where f.contype = 'f' and n.nspname = %s and f.conrelid <> f.confrelid",
        (SCHEMA,),
    ).fetchall()
    order: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(sorted(found), ()))
    for name, referred in references:
        if name in found and referred in found:
            order.add(name, referred)
    return [found[name] for name in order.static_order()]


def has_rows(conn: Connection, table: Table) -> bool:
    row = conn.execute(sql.SQL("select exists (select from {})").format(_identifier(table.name))).fetchone()
    return row == (True,)


def copy_out(conn: Connection, table: Table, write: Callable[[memoryview], None]) -> int:
    """Returns how many rows there were."""
    with conn.cursor() as cursor:
        with cursor.copy(_copy(table.name, table.columns, sql.SQL("to stdout"))) as copy:
            for piece in copy:
                write(memoryview(piece))
        return cursor.rowcount


def copy_in(conn: Connection, name: str, columns: Sequence[str], pieces: Iterable[bytes]) -> int:
    """Returns how many rows there are now that were not there before."""
    with conn.cursor() as cursor:
        with cursor.copy(_copy(name, columns, sql.SQL("from stdin"))) as copy:
            for piece in pieces:
                copy.write(piece)
        return cursor.rowcount


def numbers(conn: Connection) -> list[Numbers]:
    """Of columns that number their rows themselves. To be read after the rows: a sequence knows no snapshot."""
    rows = conn.execute(_NUMBERED, (SCHEMA,)).fetchall()
    found = []
    for table, column, name in rows:
        row = conn.execute(
            sql.SQL("select case when is_called then last_value else 0 end from {}").format(_identifier(name))
        ).fetchone()
        assert row is not None  # noqa: S101 - a sequence has one row
        if row[0]:
            found.append(Numbers(table=table, column=column, last=row[0]))
    return found


_NUMBERED: Final = """
select t.relname, a.attname, s.relname from pg_class s join pg_namespace n on n.oid = s.relnamespace
join pg_depend d on d.objid = s.oid and d.classid = 'pg_class'::regclass and d.deptype in ('a', 'i') and d.refobjsubid > 0
join pg_class t on t.oid = d.refobjid join pg_attribute a on a.attrelid = t.oid and a.attnum = d.refobjsubid
where s.relkind = 'S' and n.nspname = %s order by 1, 2
"""


def go_on_from(conn: Connection, numbers: Iterable[Numbers]) -> None:
    for each in numbers:
        conn.execute(
            "select setval(pg_get_serial_sequence(%s, %s), %s)", (f"{SCHEMA}.{each.table}", each.column, each.last)
        )


def check_empty(conn: Connection) -> None:
    """Raises Refused when somebody has used this database already."""
    names = [row[0] for row in conn.execute(_NAMES, (SCHEMA,)).fetchall()]
    used = []
    for name in names:
        most = _FROM_THE_START.get(name, 0)
        query = sql.SQL("select count(*) from (select from {} limit {}) x").format(_identifier(name), most + 1)
        row = conn.execute(query).fetchone()
        if row is not None and row[0] > most:
            used.append(name)
    if used:
        shown = ", ".join(used[:5]) + (" …" if len(used) > 5 else "")
        raise Refused(
            f"the database is not empty (there are rows in {shown}): name a new one by DATABASE_URL, and start nothing on it"
            " before it is restored"
        )


_NAMES: Final = (
    "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
    " where n.nspname = %s and c.relkind = 'r' and c.relname <> 'migrations' order by 1"
)


@contextmanager
def filling(conn: Connection, names: Sequence[str]) -> Iterator[None]:
    """A transaction that fills these tables, all or none. Nobody looks into them before it ends; triggers stand still, since what
    follows from the rows is among them. Raises Refused when they are not empty any more.
    """
    tables = sql.SQL(", ").join(_identifier(name) for name in names)
    with conn.transaction():
        for setting in ("statement_timeout = 0", "idle_in_transaction_session_timeout = 0"):
            conn.execute(f"set local {setting}")
        conn.execute(sql.SQL("set local lock_timeout = {}").format(_LOCK_WAIT))
        try:
            conn.execute(sql.SQL("lock table {} in access exclusive mode").format(tables))
        except psycopg.errors.LockNotAvailable:
            raise Refused(
                "somebody uses the database: stop the processes of AgentFlow that are connected to it"
            ) from None
        check_empty(conn)
        for name in names:
            conn.execute(sql.SQL("alter table {} disable trigger user").format(_identifier(name)))
        # `cascade`: with the organizations go those who are signed in for them, who are none of a backup's.
        conn.execute(sql.SQL("truncate {} cascade").format(tables))
        yield
        for name in names:
            conn.execute(sql.SQL("alter table {} enable trigger user").format(_identifier(name)))


def analyze(conn: Connection, names: Iterable[str]) -> None:
    """A planner that knows nothing of the rows reads tables from end to end. For a connection in autocommit mode."""
    for name in names:
        conn.execute(sql.SQL("analyze {}").format(_identifier(name)))


def _copy(name: str, columns: Sequence[str], direction: sql.SQL) -> sql.Composed:
    listed = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("copy {} ({}) {}").format(_identifier(name), listed, direction)


def _identifier(name: str) -> sql.Identifier:
    return sql.Identifier(SCHEMA, name)
