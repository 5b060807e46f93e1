"""The version of the database's schema: applying the numbered files, and refusing to start on an older one.

Each file runs in a transaction of its own that holds one advisory lock, so runners may race and be killed at any moment.
A file whose first line is `-- no-transaction` holds one idempotent statement that must stand alone (CREATE INDEX CONCURRENTLY).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

import psycopg

_LOCK = 0x6167656E74666C6F  # "agentflo": one runner at a time


class SchemaError(Exception):
    """The database cannot be used by this version; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    name: str
    sql: str

    @property
    def sha(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def alone(self) -> bool:
        return self.sql.startswith("-- no-transaction")


def shipped() -> list[Migration]:
    """The files of this version, in order."""
    return read(files("migrations"))


def read(folder: Traversable) -> list[Migration]:
    found = [f for f in folder.iterdir() if f.name.endswith(".sql") and f.name[:4].isdigit()]
    return [Migration(f.name, f.read_text(encoding="utf-8")) for f in sorted(found, key=lambda f: f.name)]


def migrate(
    conn: psycopg.Connection, migrations: Sequence[Migration] | None = None, say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Apply what is missing; returns the names applied. `conn` is in autocommit mode and goes past a pooler where there is one.

    Raises SchemaError when an applied file was changed afterwards, when the server is too old, and names a file that failed;
    psycopg.OperationalError when the connection was lost.
    """
    if conn.info.server_version < 150000:
        raise SchemaError(f"Postgres {conn.info.server_version // 10000} is too old; 15 or newer is needed")
    with conn.transaction():  # CREATE … IF NOT EXISTS races with itself: lock first
        conn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
        conn.execute("create schema if not exists agentflow")
        conn.execute(
            "create table if not exists agentflow.migrations (name text primary key, sha text not null,"
            " applied_at timestamptz not null default clock_timestamp())"
        )
        conn.execute("alter table agentflow.migrations enable row level security")
    return [m.name for m in (shipped() if migrations is None else migrations) if _apply(conn, m, say)]


def _apply(conn: psycopg.Connection, migration: Migration, say: Callable[[str], None]) -> bool:
    try:
        with conn.transaction():
            conn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
            row = conn.execute("select sha from agentflow.migrations where name = %s", (migration.name,)).fetchone()
            if row is not None:
                if row[0] != migration.sha:
                    raise SchemaError(f"{migration.name} was changed after it was applied; write a new file instead")
                return False
            if not migration.alone:
                # Without parameters psycopg uses the simple protocol: many statements, '%' and '$$' as they stand.
                conn.execute(migration.sql.encode())
                _mark(conn, migration)
        if migration.alone:
            # Not under the lock: CONCURRENTLY waits for transactions that may wait for that lock.
            conn.execute(migration.sql.encode())
            _refuse_invalid_index(conn)
            _mark(conn, migration)
    except psycopg.Error as error:
        if conn.closed:
            raise  # the connection was cut, which is nothing the file has done
        raise SchemaError(f"{migration.name} failed and changed nothing: {error}") from error
    say(migration.name)
    return True


def _mark(conn: psycopg.Connection, migration: Migration) -> None:
    conn.execute(
        "insert into agentflow.migrations (name, sha) values (%s, %s) on conflict do nothing",
        (migration.name, migration.sha),
    )


def _refuse_invalid_index(conn: psycopg.Connection) -> None:
    """A killed CREATE INDEX CONCURRENTLY leaves an invalid index that IF NOT EXISTS accepts."""
    broken = conn.execute(
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid"
        " join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'agentflow' and not i.indisvalid"
    ).fetchall()
    if broken:
        raise SchemaError(f"index {broken[0][0]} is invalid after an interrupted build: drop it, then run this again")


def applied(conn: psycopg.Connection) -> dict[str, str] | None:
    """The files that were applied, with their hashes; None: there is no schema yet."""
    row = conn.execute("select to_regclass('agentflow.migrations') is not null").fetchone()
    if row != (True,):
        return None
    return dict(conn.execute("select name, sha from agentflow.migrations order by name").fetchall())


def check(conn: psycopg.Connection) -> None:
    """Raises SchemaError when a file of this version has not been applied. A newer schema is fine: deploys overlap."""
    found = applied(conn)
    if found is None:
        raise SchemaError("the database has no AgentFlow schema yet: run `python -m migrations`")
    missing = [m.name for m in shipped() if m.name not in found]
    if missing:
        raise SchemaError(
            f"the database's schema is older than this version ({missing[0]} is missing): run `python -m migrations`"
        )
