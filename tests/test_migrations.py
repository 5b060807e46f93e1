"""Bringing the schema up to date: from several places at once, killed half-way, on Postgres 15, and what an older schema does."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from agentflow import embedded, schema, settings
from agentflow.jobs import dispatch, intake, leases, records
from agentflow.jobs.leases import Held
from agentflow.prove.ports import free_port
from agentflow.schema import Migration, SchemaError
from agentflow.system import System
from tests.conftest import with_database
from tests.core_support import (
    LEASE_S,
    MAX_CRASHES,
    ORGANIZATION,
    audit,
    broken,
    child,
    claim,
    claimed,
    finish,
    pass_time,
    prepared,
    read,
    rescuer,
    submit,
    value,
)
from tests.two_at_once import together

Connection = psycopg.Connection
ROOT = Path(__file__).parent.parent
POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def empty_url(stack: embedded.Embedded) -> Iterator[str]:
    """A database in which nobody has been yet."""
    name = f"empty_{uuid4().hex[:12]}"
    with psycopg.connect(stack.database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    yield with_database(stack.database_url, name)
    with psycopg.connect(stack.database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def empty(empty_url: str) -> Iterator[Connection]:
    with psycopg.connect(empty_url, autocommit=True) as conn:
        yield conn


def objects(conn: Connection) -> set[str]:
    """Everything of ours in the database, by name."""
    rows = conn.execute(
        "select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname in ('agentflow', 'public')"
        " union all select n.nspname || '.' || p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace"
        " where n.nspname in ('agentflow', 'public')"
    ).fetchall()
    return {row[0] for row in rows}


# ---- what is made ----


def test_all_tables_are_in_the_schema_with_row_level_security_and_nothing_is_in_public(conn: Connection) -> None:
    tables = dict(
        conn.execute(
            "select relname, relrowsecurity from pg_class where relkind in ('r', 'p')"
            " and relnamespace = 'agentflow'::regnamespace"
        ).fetchall()
    )

    assert {"jobs", "attempts", "migrations", "workers", "batches"} <= tables.keys()
    assert [name for name, secured in tables.items() if not secured] == []
    assert [name for name in objects(conn) if name.startswith("public.")] == []


def test_a_view_is_read_with_the_rights_of_its_reader(conn: Connection) -> None:
    """A view's owner is not bound by row level security, so a view of his would go around it."""
    views = conn.execute(
        "select relname, reloptions from pg_class where relkind = 'v' and relnamespace = 'agentflow'::regnamespace"
    ).fetchall()

    assert views
    assert [name for name, options in views if "security_invoker=true" not in (options or [])] == []


def test_another_role_sees_nothing_even_when_it_was_let_in(conn: Connection) -> None:
    submit(conn)
    role = f"other_{uuid4().hex[:8]}"
    with conn.transaction(force_rollback=True):
        conn.execute(
            f"create role {role}; grant usage on schema agentflow to {role};"
            f" grant select on all tables in schema agentflow to {role}; set local role {role}".encode()
        )
        seen = [
            value(conn, f"select count(*) from agentflow.{t}".encode())  # noqa: S608
            for t in ("jobs", "job_attempts", "migrations")
        ]

    assert seen == [0, 0, 0]


def test_the_shipped_files_are_numbered_without_gaps() -> None:
    names = [migration.name for migration in schema.shipped()]

    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


# ---- running ----


def test_a_second_run_does_nothing(empty: Connection) -> None:
    first = schema.migrate(empty)
    before = objects(empty)

    assert first == [migration.name for migration in schema.shipped()]
    assert schema.migrate(empty) == []
    assert objects(empty) == before


def test_five_runners_at_once_apply_each_file_once(empty: Connection, empty_url: str) -> None:
    def run() -> list[str]:
        with psycopg.connect(empty_url, autocommit=True) as conn:
            return schema.migrate(conn)

    applied = together(*[run] * 5)

    assert sorted(name for names in applied for name in names) == [m.name for m in schema.shipped()]
    schema.check(empty)


def test_a_killed_runner_leaves_nothing_half(empty: Connection, empty_url: str, tmp_path: Path) -> None:
    whole = Migration("0001_whole.sql", "create table agentflow.whole ()")
    half = Migration("0002_half.sql", "create table agentflow.half (); select pg_sleep(60)")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, psycopg\nfrom agentflow.schema import Migration, migrate\n"
        f"conn = psycopg.connect({empty_url!r}, autocommit=True)\n"
        f"migrate(conn, [{whole!r}, {half!r}])\n"
    )
    runner = subprocess.Popen([sys.executable, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    sleeping = "select pid from pg_stat_activity where query like '%pg_sleep(60)%' and pid <> pg_backend_pid()"
    while not (found := empty.execute(sleeping).fetchall()):
        assert runner.poll() is None, "the runner ended by itself"
        time.sleep(0.02)

    runner.send_signal(signal.SIGKILL)
    runner.wait()
    # Its backend finds out at the end of the statement; a server that was restarted would be as short.
    empty.execute("select pg_terminate_backend(%s, 5000)", (found[0][0],))

    assert {"agentflow.whole"} == objects(empty) & {"agentflow.whole", "agentflow.half"}
    repaired = Migration(half.name, "create table agentflow.half ()")
    assert schema.migrate(empty, [whole, repaired]) == [half.name]


def test_a_failing_file_is_rolled_back_and_named(empty: Connection) -> None:
    good = Migration("0001_good.sql", "create table agentflow.good ()")
    bad = Migration("0002_bad.sql", "create table agentflow.bad (); select 1 / 0")
    never = Migration("0003_never.sql", "create table agentflow.never ()")

    with pytest.raises(SchemaError, match=r"0002_bad\.sql failed and changed nothing: division by zero"):
        schema.migrate(empty, [good, bad, never])

    assert objects(empty) & {"agentflow.good", "agentflow.bad", "agentflow.never"} == {"agentflow.good"}
    assert empty.execute("select name from agentflow.migrations").fetchall() == [("0001_good.sql",)]


def test_a_file_is_not_blamed_for_a_connection_that_is_cut(empty: Connection) -> None:
    cut = Migration("0001_cut.sql", "select pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(psycopg.OperationalError):
        schema.migrate(empty, [cut])


def test_a_start_in_which_the_connection_is_cut_is_tried_again(
    environment: dict[str, str], conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    check = schema.check

    def cut_at_first(connection: psycopg.Connection) -> None:
        looks.append(connection)
        if len(looks) == 1:
            conn.execute("select pg_terminate_backend(%s, 5000)", (connection.info.backend_pid,))
        check(connection)

    monkeypatch.setattr(schema, "check", cut_at_first)

    System.start(settings.load(environment), "test").close()

    assert len(looks) == 2


def test_a_file_that_was_edited_afterwards_is_refused(empty: Connection) -> None:
    schema.migrate(empty, [Migration("0001_a.sql", "create table agentflow.a ()")])

    with pytest.raises(SchemaError, match=r"0001_a\.sql was changed after it was applied"):
        schema.migrate(empty, [Migration("0001_a.sql", "create table agentflow.a (x integer)")])


def test_percent_signs_and_dollar_quotes_stand_as_they_are(empty: Connection) -> None:
    body = "create function agentflow.f() returns text language sql as $$ select format('%s%%', 5) $$; -- 100 % of it"

    schema.migrate(empty, [Migration("0001_f.sql", body)])

    assert value(empty, "select agentflow.f()") == "5%"


def test_a_file_that_must_stand_alone_runs_outside_a_transaction(empty: Connection) -> None:
    table = Migration("0001_t.sql", "create table agentflow.t (x integer)")
    index = Migration("0002_i.sql", "-- no-transaction\ncreate index concurrently if not exists t_x on agentflow.t (x)")

    assert schema.migrate(empty, [table, index]) == [table.name, index.name]
    assert schema.migrate(empty, [table, index]) == []
    assert value(empty, "select indisvalid from pg_index where indexrelid = 'agentflow.t_x'::regclass")


def test_an_index_left_invalid_by_an_interrupted_build_is_named(empty: Connection) -> None:
    schema.migrate(
        empty, [Migration("0001_t.sql", "create table agentflow.t as select 1 as x from generate_series(1, 2)")]
    )
    unique = "-- no-transaction\ncreate unique index concurrently if not exists t_x on agentflow.t (x)"
    with pytest.raises(SchemaError, match=r"0002_u\.sql failed"):
        schema.migrate(empty, [Migration("0002_u.sql", unique)])

    with pytest.raises(SchemaError, match="index t_x is invalid"):
        schema.migrate(empty, [Migration("0002_u.sql", unique)])


# ---- which schema a process accepts ----


def test_an_older_schema_is_refused_with_the_command_to_run(empty: Connection) -> None:
    with pytest.raises(SchemaError, match="no AgentFlow schema yet: run `python -m migrations`"):
        schema.check(empty)

    schema.migrate(empty, schema.shipped()[:-1])

    last = schema.shipped()[-1].name
    with pytest.raises(
        SchemaError, match=rf"older than this version \({last} is missing\): run `python -m migrations`"
    ):
        schema.check(empty)


def test_a_newer_schema_is_accepted(conn: Connection) -> None:
    conn.execute("insert into agentflow.migrations (name, sha) values ('9999_of_the_next_release.sql', '')")

    schema.check(conn)


PROCESSES = {
    "scheduler": [sys.executable, "-m", "scheduler"],
    "worker": [sys.executable, "-m", "dramatiq", "actors", "--processes", "1", "--threads", "1"],
    "web": [sys.executable, "-m", "gunicorn", "-c", "web/gunicorn_config.py", "web.wsgi:app"],
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_refuses_to_start_on_a_database_without_the_schema(
    environment: dict[str, str], empty_url: str, process: str
) -> None:
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}

    ended = subprocess.run(
        PROCESSES[process],
        cwd=ROOT,
        env={**inherited, **environment, "DATABASE_URL": empty_url, "PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    said = [line for line in (ended.stdout + ended.stderr).splitlines() if "run `python -m migrations`" in line]
    assert ended.returncode != 0
    assert len(said) == 1, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_the_command_says_what_it_applied(environment: dict[str, str], empty_url: str) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "migrations"]
        given = {**os.environ, **environment, "DATABASE_URL": empty_url}
        return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False)

    first, second = run(), run()

    names = [migration.name for migration in schema.shipped()]
    assert (first.returncode, second.returncode) == (0, 0)
    assert [line.removeprefix("applied ") for line in first.stdout.splitlines()[:-1]] == names
    assert second.stdout == "schema is up to date (0 applied)\n"


# ---- Postgres 15 ----


def _as_server_account() -> dict[str, object]:
    """Postgres refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def postgres_15() -> Iterator[str]:
    """The URL of a Postgres 15 of this test's own."""
    assert (POSTGRES_15 / "initdb").exists(), (
        f"no Postgres 15 in {POSTGRES_15}: apt-get install -y --no-install-recommends postgresql-15"
    )
    folder = Path(tempfile.mkdtemp(prefix="agentflow-pg15-"))
    account = _as_server_account()
    if account:
        os.chown(folder, int(str(account["user"])), int(str(account["group"])))
    run: Callable[..., subprocess.CompletedProcess[bytes]] = lambda *command: subprocess.run(  # noqa: E731
        command,
        cwd="/",
        check=True,
        capture_output=True,
        timeout=60,
        **account,  # type: ignore[call-overload]
    )
    run(
        POSTGRES_15 / "initdb",
        "-D",
        folder / "data",
        "-U",
        "agentflow",
        "-A",
        "trust",
        "--no-sync",
        "--locale=C",
        "-E",
        "UTF8",
    )
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c shared_buffers=16MB"
    run(POSTGRES_15 / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start")
    yield f"postgresql://agentflow@/postgres?host={folder}"
    run(POSTGRES_15 / "pg_ctl", "-D", folder / "data", "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


def test_a_jobs_whole_life_works_on_postgres_15(postgres_15: str) -> None:
    with psycopg.connect(postgres_15, autocommit=True) as conn:
        assert conn.info.server_version // 10000 == 15
        assert schema.migrate(conn) == [migration.name for migration in schema.shipped()]
        schema.check(conn)
        audit(conn)
        worker = uuid4()

        job = claimed(conn, worker, callback_url="http://x.example", then=[child()])
        assert leases.renew(conn, worker, [Held(job.id, job.fence, 0.5, "half")], LEASE_S) == {(job.id, 1): "ok"}
        assert finish(conn, job, "retry") == "queued"
        (job,) = claim(conn, worker, job)
        assert finish(conn, job) == "succeeded"
        assert len(records.children(conn, job.id)) == 2

        first, second = submit(conn, key="k"), submit(conn, key="k")
        (running,) = claim(conn, worker, first, second)
        assert read(conn, second).wait_reason == "busy"
        pass_time(conn, 31)
        settled = leases.rescue(conn, rescuer(conn), limit=10, lease_s=LEASE_S, max_crashes=MAX_CRASHES)
        assert settled.states == {(running.id, 1): "queued"}
        assert [ring.job_id for ring in settled.rings] == [second.id]

        later = submit(conn, run_at=datetime.now(UTC) + timedelta(seconds=60))
        pass_time(conn, 61)
        assert later.id in {ring.job_id for ring in dispatch.pick_due(conn, "default")[0]}
        dispatch.take_back(conn, [later.id], 1.0)
        assert records.cancel(conn, ORGANIZATION, later.id)[0] == "cancelled"

        keyed = prepared(idempotency_key="i")
        assert intake.submit(conn, ORGANIZATION, keyed).created
        assert not intake.submit(conn, ORGANIZATION, keyed).created
        assert broken(conn) == []


def test_an_older_postgres_is_refused(empty: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(empty.info), "server_version", 140_012)

    with pytest.raises(SchemaError, match="Postgres 14 is too old; 15 or newer is needed"):
        schema.migrate(empty)
