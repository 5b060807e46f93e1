"""`agentflow up`: everything in one process, started, stopped and killed as people and platforms do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import psutil
import psycopg
import pytest

import actors  # noqa: F401 - makes ping known
from agentflow import embedded
from agentflow.cli import running, serve, servers
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.folders import server_folder
from tests.processes import ROOT, Process, eventually, started

ARGUMENTS = [sys.executable, "-m", "agentflow.cli", "up", "--port"]
AUTH = {"Authorization": f"Bearer {ADMIN_KEY}"}


class Up(Process):
    """A process of `agentflow up` that has said it is ready."""

    url: str
    home: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def inner(self) -> psutil.Process:
        """The one process that the arbiter keeps alive."""
        (child,) = psutil.Process(self.pid).children()
        return child

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health/ready", timeout=2).status_code == 200
        except httpx2.TransportError:
            return False


@contextmanager
def running_up(environment: dict[str, str], log: Path, arguments: list[str] | None = None, **more: str) -> Iterator[Up]:
    up = Up([*(arguments or ARGUMENTS), "0"], environment | more, log)
    try:
        up.wait_for("Ctrl-C stops it.")
        found = re.search(r"ready at (http://\S+)", up.text())
        assert found
        up.url = found.group(1)
        yield up
    finally:
        up.kill()


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder for a home: root's Postgres runs as nobody, who may not enter pytest's own."""
    with server_folder("up") as folder:
        try:
            yield folder
        finally:
            eventually(lambda: not list(folder.glob("*/run/.s.PGSQL.*")), within_s=20)


@pytest.fixture
def up(environment: dict[str, str], tmp_path: Path) -> Iterator[Up]:
    with running_up(environment, tmp_path / "up.log", SHUTDOWN_GRACE="6") as up:
        yield up


def submit(system: System, **payload: Any) -> UUID:
    return system.submit(1, NewJob("ping", payload)).job.id


def job(system: System, job_id: UUID) -> Job:
    with system.database.connection() as conn:
        found = records.get(conn, None, job_id)
    assert found is not None
    return found


@contextmanager
def upload_in_the_middle(up: Up) -> Iterator[None]:
    """A request that does not end meanwhile."""
    head = f"POST /api/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\nContent-Type: video/mp4\r\n"
    with socket.create_connection(("127.0.0.1", up.port)) as connection:
        connection.sendall(head.encode() + b"Content-Length: 1000000\r\n\r\nthe beginning")
        time.sleep(0.3)
        yield


def is_refused(up: Up) -> bool:
    try:
        socket.create_connection(("127.0.0.1", up.port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until_running(system: System, job_id: UUID) -> None:
    eventually(lambda: job(system, job_id).state == "running", within_s=10)


def test_one_process_serves_requests_runs_jobs_and_keeps_the_schedule(up: Up, conn: psycopg.Connection) -> None:
    assert up.is_ready()
    posted = httpx2.post(f"{up.url}/api/jobs", json={"type": "ping", "payload": {"native_ms": 10}}, headers=AUTH)

    assert posted.status_code == 202
    done = httpx2.get(f"{up.url}/api/jobs/{posted.json()['id']}?wait=20", headers=AUTH, timeout=30).json()
    assert (done["state"], done["attempt"]) == ("succeeded", 1)
    assert conn.execute("select kind, pid from agentflow.workers").fetchall() == [("up", up.inner.pid)]
    # One system: the pool's connections and those of the worker's four loops have one name, nobody else has any.
    names = conn.execute(
        "select distinct application_name from pg_stat_activity"
        " where datname = current_database() and application_name like 'agentflow%'"
    ).fetchall()
    assert len(names) == 1 and names[0][0].startswith("agentflow up")
    threads = {Path(f"/proc/{up.inner.pid}/task/{t.id}/comm").read_text().strip() for t in up.inner.threads()}
    if sys.version_info >= (3, 14):  # only then do threads have their names in the kernel
        assert "APScheduler" in threads


def test_its_metrics_tell_of_requests_and_of_jobs(up: Up, system: System) -> None:
    done = submit(system)
    eventually(lambda: job(system, done).terminal)

    text = eventually(
        lambda: t if "worker_jobs_completed_total{" in (t := httpx2.get(f"{up.url}/metrics").text) else None, within_s=5
    )

    assert re.search(r"^worker_jobs_completed_total\{.*ping.*\} 1\.0$", text, re.MULTILINE), text[:3000]


def test_a_stop_ends_requests_and_work_at_the_same_time_and_no_job_loses_an_attempt(up: Up, system: System) -> None:
    short, long = submit(system, sleep_ms=1500), submit(system, sleep_ms=60_000)
    until_running(system, short)
    until_running(system, long)

    with upload_in_the_middle(up):
        began = time.monotonic()
        up.popen.send_signal(signal.SIGTERM)
        eventually(lambda: is_refused(up), within_s=5)
        refused_after_s = time.monotonic() - began
        late = submit(system)
        time.sleep(1.0)
    status = up.popen.wait(20)

    assert status == 0, up.text()
    assert refused_after_s < 1.4, "requests were refused only when the work was done"
    assert 1.5 < time.monotonic() - began < 6 + serve.STOP_MARGIN_S
    assert (job(system, short).state, job(system, short).attempt) == ("succeeded", 1)
    assert (job(system, long).state, job(system, long).attempt) == ("queued", 0)
    assert job(system, late).fence == 0, "a job was taken after the signal"


def test_ctrl_c_which_reaches_both_processes_is_a_stop_like_any_other(up: Up, system: System) -> None:
    short = submit(system, sleep_ms=1500)
    until_running(system, short)

    began = time.monotonic()
    os.killpg(up.pid, signal.SIGINT)

    assert up.popen.wait(20) == 0, up.text()
    assert time.monotonic() - began < 6, "it was killed in the end"
    assert (job(system, short).state, job(system, short).attempt) == ("succeeded", 1)


def test_a_signal_in_the_middle_of_handling_another_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serve.Worker.__new__(serve.Worker)
    worker._told_to_stop, worker._stop_asked = False, threading.Event()
    handled = []

    def with_a_lock_held(self: serve.Worker, sig: int, frame: object) -> None:
        handled.append(sig)
        assert len(handled) == 1, "it would wait for its own lock"
        self.handle_exit(signal.SIGTERM, None)

    monkeypatch.setattr(serve.server.Worker, "handle_exit", with_a_lock_held)

    worker.handle_exit(signal.SIGINT, None)

    assert handled == [signal.SIGINT] and worker._stop_asked.is_set()


def test_a_third_signal_ends_at_once_where_the_second_is_not_heard(up: Up, system: System) -> None:
    until_running(system, submit(system, sleep_ms=60_000))
    family = up.family()
    up.inner.suspend()

    for _ in range(3):
        assert up.popen.poll() is None
        up.popen.send_signal(signal.SIGTERM)
        time.sleep(serve.SAME_SIGNAL_S + 0.3)

    assert up.popen.wait(10) == 128 + signal.SIGTERM
    eventually(lambda: not any(is_alive(process) for process in family), within_s=5)


def test_a_killed_inner_process_is_replaced_and_its_job_is_done(
    environment: dict[str, str], tmp_path: Path, system: System
) -> None:
    leases = {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1"}
    with running_up(environment, tmp_path / "up.log", **leases) as up:
        work = submit(system, sleep_ms=1000)
        until_running(system, work)
        first = up.inner.pid

        os.kill(first, signal.SIGKILL)

        eventually(lambda: up.is_ready() and up.inner.pid != first, within_s=10)
        eventually(lambda: job(system, work).state == "succeeded", within_s=30)
        assert up.text().count("is ready at") == 1, "the greeting is for the first start"


def test_when_the_arbiter_is_killed_the_rest_stops_by_itself_and_the_port_is_free(up: Up, system: System) -> None:
    short = submit(system, sleep_ms=1500)
    until_running(system, short)
    inner, port = up.inner, up.port

    with upload_in_the_middle(up):
        os.kill(up.pid, signal.SIGKILL)
        eventually(lambda: "the parent process is gone" in up.text(), within_s=3)
        eventually(lambda: is_refused(up), within_s=1)
        late = submit(system)
        time.sleep(0.5)

    inner.wait(12)
    assert job(system, late).fence == 0, "a job was taken by a process that nobody can stop"
    assert (job(system, short).state, job(system, short).attempt) == ("succeeded", 1)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


#: Starts `agentflow up` with a job type that ignores its end, and with less patience than people would have.
STUBBORN = """
import sys, time
from agentflow.jobs.registry import Payload, job
from agentflow.worker import runtime

@job("stubborn", payload=Payload, time_limit_s=0.5)
def stubborn(context, payload):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

runtime._REPLACED_AT_MOST_EVERY_S = 0.0
runtime.random.uniform = lambda least, most: least
runtime.Runtime.__init__.__kwdefaults__["stuck_grace_s"] = 0.5

from agentflow.cli import main, serve
serve.REPLACE_S = 0.5
main(sys.argv[1:])
"""


def test_a_job_that_does_not_end_has_the_inner_process_replaced(
    environment: dict[str, str], tmp_path: Path, conn: psycopg.Connection
) -> None:
    arguments = [sys.executable, "-c", STUBBORN, "up", "--port"]
    with running_up(environment, tmp_path / "up.log", arguments, SHUTDOWN_GRACE="5") as up:
        first = up.inner.pid
        posted = httpx2.post(f"{up.url}/api/jobs", json={"type": "stubborn", "max_attempts": 1}, headers=AUTH)

        assert posted.status_code == 202
        eventually(lambda: first not in [p.pid for p in psutil.Process(up.pid).children()], within_s=20)
        eventually(up.is_ready, within_s=10)
        row = conn.execute("select state, error->>'code' from agentflow.jobs").fetchone()
        assert row == ("failed", "time_limit")


def says(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and stderr of a command that is expected to end by itself."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "agentflow.cli", *arguments],
        env=keep | environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_what_keeps_it_from_starting_is_one_line(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = says(["up", "--port", str(port)], environment)
        assert (status, said.count("\n")) == (3, 1)
        assert str(port) in said and "--port" in said

    status, said = says(["up"], environment | {"JOB_LEASE": "soon"})
    assert (status, said.count("\n")) == (2, 1) and "JOB_LEASE" in said

    nobody = f"postgresql://agentflow:s3cret@127.0.0.1:{free_port()}/agentflow"
    status, said = says(["up", "--port", "0"], environment | {"DATABASE_URL": nobody})
    assert (status, said.count("\n")) == (3, 1)
    assert "database cannot be reached" in said and "s3cret" not in said


def test_an_older_schema_is_refused(environment: dict[str, str], conn: psycopg.Connection) -> None:
    conn.execute("delete from agentflow.migrations where name like '0002%'")

    status, said = says(["up", "--port", "0"], environment)

    assert (status, said.count("\n")) == (3, 1)
    assert "python -m migrations" in said


def test_the_platforms_port_is_taken_and_all_addresses_are_listened_at(
    environment: dict[str, str], tmp_path: Path
) -> None:
    port = free_port()
    arguments = [sys.executable, "-m", "agentflow.cli", "up"]

    with started(arguments, environment | {"PORT": str(port)}, tmp_path / "up.log") as process:
        process.wait_for("Ctrl-C stops it.")

        listening = [c.laddr for p in process.family() for c in p.net_connections() if c.status == "LISTEN"]
        assert {(a.ip, a.port) for a in listening} == {("0.0.0.0", port)}  # noqa: S104


def test_without_settings_all_is_in_the_home_and_stops_with_it(tmp_path: Path) -> None:
    with open_folder() as folder, running_up({"AGENTFLOW_HOME": str(folder / "ein Ümlaut")}, tmp_path / "up.log") as up:
        home = folder / "ein Ümlaut"
        key = (home / "admin.key").read_text().strip()
        listed = httpx2.get(f"{up.url}/api/jobs", headers={"Authorization": f"Bearer {key}"})
        assert listed.status_code == 200
        assert str(home / "admin.key") in up.text() and key not in up.text()
        assert (home / "admin.key").stat().st_mode & 0o077 == 0
        assert running.url_of(home) == up.url

        assert up.terminate() == 0, up.text()
        assert running.url_of(home) is None
        eventually(lambda: not (home / "run" / ".s.PGSQL.5432").exists(), within_s=10)


def test_as_a_containers_first_process_it_waits_for_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder() as folder:
        stack = embedded.join(folder / "home")
        monkeypatch.setattr(servers.os, "getpid", lambda: 1)

        servers.leave(stack)

        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(stack.database_url, connect_timeout=2)


def test_whoever_starts_it_for_a_while_gets_the_url_and_takes_it_along(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    log = (tmp_path / "up.log").open("wb")
    process = subprocess.Popen(
        [*ARGUMENTS, "0", "--announce", str(theirs.fileno())],
        env=os.environ | environment,
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdout=log,
        stderr=log,
    )
    try:
        theirs.close()
        ours.settimeout(30)
        url = ours.recv(200).decode().strip()
        assert json.loads(httpx2.get(f"{url}/health/live").text) == {"status": "live"}

        ours.close()  # as the kernel does when the other process is killed

        assert process.wait(15) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
