"""Real servers for every test: one embedded Postgres and Valkey per test process, a fresh database and a prefix per test."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from agentflow import embedded, schema, settings
from agentflow.settings import Settings
from agentflow.system import System
from tests import statements

# Here and not in the modules that use them: imported there, each module would get a node of its own.
from tests.connection_support import authority, names, said, servers, stranger  # noqa: F401
from tests.folders import server_folder
from tests.rabbitmq import rabbitmq, rabbitmq_node  # noqa: F401

pytest.register_assert_rewrite("tests.plant")  # it asserts, and is no test module

_numbers = itertools.count(1)
TEMPLATE = "agentflow_template"
#: Characters, from the end: the assertion, and what was seen.
_TOLD_OF_A_RERUN = 4000
ADMIN_KEY = "test-operator-key-0123456789"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with few tests first: theirs are the long ones, and begun last they would keep one process busy while the others
    have nothing left."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test that was run again had failed: whether it is a bug can only be seen by that."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"failed at first: {report.nodeid}", sep="_")
        terminalreporter.line(report.longreprtext[-_TOLD_OF_A_RERUN:])


RECORDER = statements.Recorder()
statements.install(RECORDER)


@pytest.fixture(autouse=True)
def every_statement_names_its_organization(tmp_path: Path) -> Iterator[None]:
    """Of every test, and of the workers that it starts: no statement on a tenant's table may forget whose rows it means."""
    RECORDER.problems.clear()
    yield
    found = [*RECORDER.problems, *(file.read_text() for file in (tmp_path / "statements").glob("*.txt"))]
    RECORDER.problems.clear()
    assert not found, "a statement on a tenant's table " + "\n".join(found[:5])


@pytest.fixture(scope="session")
def stack() -> Iterator[embedded.Embedded]:
    """Postgres and Valkey of this test process, with a migrated template database."""
    with server_folder("tests") as home:
        with embedded.join(home) as joined:
            with psycopg.connect(joined.database_url, autocommit=True) as conn:
                # Its processes are killed, not its machine: the disk need not be waited for, which is half a second for each
                # database that is dropped.
                for switched_off in ("fsync", "full_page_writes"):
                    conn.execute(sql.SQL("alter system set {} = off").format(sql.Identifier(switched_off)))
                conn.execute("select pg_reload_conf()")
                conn.execute(sql.SQL("create database {}").format(sql.Identifier(TEMPLATE)))
            with psycopg.connect(with_database(joined.database_url, TEMPLATE), autocommit=True) as conn:
                schema.migrate(conn)
            yield joined
        joined.wait_stopped(20)


def with_database(url: str, name: str) -> str:
    """The same server, another database."""
    head, _, query = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}" + (f"?{query}" if query else "")


@contextmanager
def new_database(stack: embedded.Embedded, name: str, template: str = TEMPLATE) -> Iterator[str]:
    """The URL of a database with the schema and nothing in it, until the end of the block."""
    # Copied file by file: writing it to the log takes three times as long.
    make = sql.SQL("create database {} template {} strategy file_copy")
    with psycopg.connect(stack.database_url, autocommit=True) as conn:
        conn.execute(make.format(sql.Identifier(name), sql.Identifier(template)))
    yield with_database(stack.database_url, name)
    with psycopg.connect(stack.database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(stack: embedded.Embedded) -> Iterator[str]:
    """A database of its own for one test, with the schema and nothing in it."""
    with new_database(stack, f"t{os.getpid()}_{next(_numbers)}") as url:
        yield url


@pytest.fixture
def environment(stack: embedded.Embedded, database_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a system on the tests' servers, for this process and for those that a test starts."""
    return {
        "AGENTFLOW_ENV": "test",
        "AGENTFLOW_HOME": str(tmp_path / "home"),
        "DATABASE_URL": database_url,
        "REDIS_URL": stack.redis_url,
        "STORAGE_URL": (tmp_path / "storage").as_uri(),
        "STORAGE_SHARED": "true",  # one machine
        "ADMIN_API_KEY": ADMIN_KEY,
        "JOB_QUEUE_NAME": f"t{os.getpid()}-{next(_numbers)}",
        "CANARY_INTERVAL": "0",  # jobs are counted
        "ALERT_INTERVAL": "0",
        "JOB_CONCURRENCY": "8",
        "WORKER_POLLING_INTERVAL": "0.2",
        statements.FOLDER: str(tmp_path / "statements"),
    }


@pytest.fixture
def test_settings(environment: dict[str, str]) -> Settings:
    return settings.load(environment)


@pytest.fixture
def system(test_settings: Settings) -> Iterator[System]:
    """A system that submits and looks, without a worker."""
    system = System.start(test_settings, "test")
    yield system
    system.close()


@pytest.fixture
def conn(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[[], psycopg.Connection]]:
    """More connections to the test's database."""
    opened: list[psycopg.Connection] = []

    def one() -> psycopg.Connection:
        opened.append(psycopg.connect(database_url, autocommit=True))
        return opened[-1]

    yield one
    for connection in opened:
        connection.close()
