"""The web process as the Procfile starts it: gunicorn, real sockets, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import psycopg
import pytest

from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.processes import BIN, Process, eventually
from tests.web_support import Web, count, gunicorn, run
from web import server

MB = 1 << 20


@pytest.fixture
def web(environment: dict[str, str], tmp_path: Path) -> Iterator[Web]:
    with gunicorn(environment, tmp_path, WEB_THREADS="4", WEB_WAIT_SHARE="0.5") as web:
        yield web


def files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]


def raw(web: Web, data: bytes, *, timeout_s: float = 10) -> bytes:
    """Send bytes as they are; what is answered until the other side closes."""
    with socket.create_connection(("127.0.0.1", web.port), timeout=timeout_s) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    return got


def head(web: Web, path: str, kind: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_an_upload_that_is_cut_off_leaves_no_row_and_no_file(
    web: Web, conn: psycopg.Connection, tmp_path: Path
) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    for kind, start in (("video/mp4", b""), ("multipart/form-data; boundary=b", form)):
        with socket.create_connection(("127.0.0.1", web.port)) as connection:
            connection.sendall(head(web, "/api/videos", kind, 100 * MB) + start)
            for _ in range(12):
                connection.sendall(b"x" * MB)
            eventually(lambda: files(tmp_path), within_s=10)  # it was on its way

        eventually(lambda: files(tmp_path) == [], within_s=10)
    assert count(conn, "videos") == 0
    assert web.http.get("/api/jobs").status_code == 200


def test_a_large_upload_does_not_raise_the_memory(web: Web, conn: psycopg.Connection, tmp_path: Path) -> None:
    web.http.post("/api/videos", content=b"x" * MB, headers={"Content-Type": "video/mp4"}).raise_for_status()
    boundary = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    sizes = []
    before = web.rss()
    most = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most.append(web.rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    block = os.urandom(MB)
    for kind, start, end in (
        ("video/mp4", b"", b""),
        ("multipart/form-data; boundary=b", boundary, b"\r\n--b--\r\n"),
    ):
        with socket.create_connection(("127.0.0.1", web.port), timeout=60) as connection:
            connection.sendall(head(web, "/api/videos", kind, 300 * MB + len(start) + len(end)) + start)
            for _ in range(300):
                connection.sendall(block)
            connection.sendall(end)
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come one after the other
                answer += connection.recv(65536)
        assert b" 201 " in answer.split(b"\r\n")[0], answer
        sizes.append(json.loads(answer.split(b"\r\n\r\n", 1)[1])["size_bytes"])
    done.set()
    watcher.join()

    assert sizes == [300 * MB, 300 * MB]
    grown = (max(most) - before) / MB
    print(f"grew by {grown:.1f} MB")
    assert grown < 20
    assert count(conn, "videos") == 3


def test_what_is_refused_before_its_body_is_answered_all_the_same(web: Web, conn: psycopg.Connection) -> None:
    stranger = raw(
        web, head(web, "/api/jobs", "application/json", 10 << 30).replace(ADMIN_KEY.encode(), b"wrong") + b"{"
    )
    too_large = raw(web, head(web, "/api/jobs", "application/json", 10 << 30) + b"{")

    assert stranger.startswith(b"HTTP/1.1 401 ")
    assert too_large.startswith(b"HTTP/1.1 413 ")
    assert count(conn) == 0


def test_a_body_that_ends_early_is_no_job(web: Web, conn: psycopg.Connection) -> None:
    whole = b'{"type": "ping"}'
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as connection:
        connection.sendall(head(web, "/api/jobs", "application/json", len(whole) + 10) + whole)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert count(conn) == 0


def test_the_servers_own_errors_are_problem_documents(web: Web) -> None:
    for request, status in (
        (b"GET /api/jobs?x=" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    ):
        start, _, body = raw(web, request).partition(b"\r\n\r\n")

        assert start.startswith(b"HTTP/1.1 %d " % status), start
        assert b"Content-Type: application/problem+json" in start
        assert json.loads(body)["status"] == status


def test_streams_and_waits_hold_their_share_of_the_threads_and_no_more(
    web: Web, system: System, conn: psycopg.Connection
) -> None:
    job = web.http.post("/api/jobs", json={"type": "ping"}).json()["id"]
    first: list[str] = []

    def follow() -> None:
        with web.http.stream("GET", f"/api/jobs/{job}/events") as stream:
            first.extend(stream.iter_lines())

    def wait() -> None:
        web.http.get(f"/api/jobs/{job}?wait=20")

    holders = [threading.Thread(target=follow), threading.Thread(target=wait)]
    for holder in holders:
        holder.start()

    time.sleep(1.0)  # both have their seats
    with web.http.stream("GET", f"/api/jobs/{job}/events") as refused:
        assert refused.status_code == 503
    began = time.monotonic()
    assert web.http.get(f"/api/jobs/{job}?wait=20").json()["state"] == "queued"
    assert web.http.get("/health/live").status_code == 200
    assert time.monotonic() - began < 3

    run(system, conn, job, result={"pong": True})
    for holder in holders:
        holder.join(10)
    states = [json.loads(line.removeprefix("data: "))["state"] for line in first if line.startswith("data: ")]
    assert (states[0], states[-1]) == ("queued", "succeeded")


def test_a_follower_who_hangs_up_frees_the_seat_soon(web: Web) -> None:
    job = web.http.post("/api/jobs", json={"type": "ping"}).json()["id"]
    for _ in range(2):
        with web.http.stream("GET", f"/api/jobs/{job}/events") as stream:
            assert stream.status_code == 200
            assert next(stream.iter_lines()).startswith("retry:")
    began = time.monotonic()

    def has_room() -> bool:
        with web.http.stream("GET", f"/api/jobs/{job}/events") as stream:
            return stream.status_code == 200

    eventually(has_room, within_s=5, every_s=0.2)
    assert time.monotonic() - began < 5


def test_callers_who_do_not_close_hold_nobody_up(web: Web) -> None:
    lingering = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(3)]
    for connection in lingering:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")

    began = time.monotonic()
    assert web.http.get("/health/live").status_code == 200
    assert time.monotonic() - began < 1
    for connection in lingering:
        connection.close()


def test_sigterm_answers_whoever_waits_and_ends_the_process(web: Web) -> None:
    job = web.http.post("/api/jobs", json={"type": "ping"}).json()["id"]
    answers: list[httpx2.Response] = []
    ended: list[float] = []

    def wait() -> None:
        answers.append(web.http.get(f"/api/jobs/{job}?wait=25"))

    def follow() -> None:
        with web.http.stream("GET", f"/api/jobs/{job}/events") as stream:
            for _ in stream.iter_lines():
                pass
        ended.append(time.monotonic())

    waiting = [threading.Thread(target=wait), threading.Thread(target=follow)]
    for thread in waiting:
        thread.start()
    time.sleep(1.0)
    began = time.monotonic()
    web.process.popen.send_signal(signal.SIGTERM)
    for thread in waiting:
        thread.join(10)

    assert answers[0].status_code == 200 and answers[0].json()["state"] == "queued"
    assert ended and ended[0] - began < 4
    assert web.process.popen.wait(15) == 0
    assert time.monotonic() - began < 10


@contextlib.contextmanager
def waiting_and_following(web: Web) -> Iterator[tuple[Future[httpx2.Response], Iterator[str]]]:
    """A `?wait=` and an event stream that the server holds: all its seats are taken."""
    job = web.http.post("/api/jobs", json={"type": "ping"}).json()["id"]

    def no_seat_is_left() -> bool:
        with web.http.stream("GET", f"/api/jobs/{job}/events") as refused:
            return refused.status_code == 503

    with ThreadPoolExecutor(1) as callers, web.http.stream("GET", f"/api/jobs/{job}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        waiting = callers.submit(web.http.get, f"/api/jobs/{job}?wait=25")
        eventually(no_seat_is_left)
        yield waiting, lines


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1)], ids=["TERM", "twice", "Ctrl-C"]
)
def test_a_signal_to_the_whole_group_cuts_nobody_off(web: Web, number: int, times: int) -> None:
    with waiting_and_following(web) as (waiting, lines):
        family = web.process.family()

        for _ in range(times):
            os.killpg(web.process.pid, number)

        for _ in lines:
            pass  # to its end, which is no error
        assert waiting.result(20).json()["state"] == "queued"
    assert web.process.popen.wait(20) == 0, web.process.text()
    eventually(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


def test_sighup_starts_over_and_cuts_nobody_off(web: Web) -> None:
    before = web.worker.pid
    with waiting_and_following(web) as (waiting, lines):
        web.process.popen.send_signal(signal.SIGHUP)

        for _ in lines:
            pass
        assert waiting.result(20).json()["state"] == "queued"
    eventually(lambda: before not in [p.pid for p in web.process.family()] and len(web.process.family()) == 2)
    eventually(lambda: httpx2.get(f"{web.url}/health/ready").status_code == 200)
    assert web.process.terminate() == 0


def test_accepted_sockets_do_not_wait_for_ever() -> None:
    """gunicorn has no limit of its own for a head or a body that stops coming."""

    class Listener:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.limit_waits([Listener(listening)])
        with socket.create_connection(listening.getsockname()):
            accepted, _ = listening.accept()
            limits = [
                accepted.getsockopt(socket.SOL_SOCKET, each, 16) for each in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
            ]
            accepted.close()

    assert [struct.unpack("ll", limit)[0] for limit in limits] == [server.SOCKET_TIMEOUT_S] * 2
    assert "server.limit_waits(arbiter.LISTENERS)" in Path("web/gunicorn_config.py").read_text()


def test_wrong_settings_and_an_old_schema_stop_gunicorn_with_one_line(
    environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    def ends(name: str, **more: str) -> tuple[int, str]:
        arguments = [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"]
        process = Process(
            arguments, {**environment, "PORT": str(free_port()), "PYTHONPATH": ".", **more}, tmp_path / f"{name}.log"
        )
        try:
            return process.popen.wait(30), process.text()
        finally:
            process.kill()

    status, said = ends("settings", JOB_LEASE="x")
    assert status == 3
    assert "JOB_LEASE" in said and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1

    conn.execute("delete from agentflow.migrations where name like '0002%'")
    status, said = ends("schema")
    assert status == 3
    assert "python -m migrations" in said and "Traceback" not in said


class Relay:
    """A TCP relay in front of Postgres that can be taken away and put back."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.port = free_port()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self.target)
            self._open += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)


def test_a_database_that_goes_away_and_comes_back(
    environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    folder = conn.info.host
    relay = Relay(f"{folder}/.s.PGSQL.{conn.info.port}")
    relay.up()
    url = f"postgresql://agentflow@127.0.0.1:{relay.port}/{conn.info.dbname}?sslmode=disable"
    with gunicorn({**environment, "DATABASE_URL": url}, tmp_path) as web:
        assert web.http.post("/api/jobs", json={"type": "ping"}).status_code == 202
        assert web.http.get("/health/ready").status_code == 200

        relay.down()
        refused = web.http.post("/api/jobs", json={"type": "ping"})
        assert refused.status_code == 503
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert int(refused.headers["Retry-After"]) > 0
        eventually(lambda: web.http.get("/health/ready").status_code == 503, within_s=10)
        assert web.http.get("/health").json()["status"] == "degraded"
        assert web.http.get("/health/live").status_code == 200

        relay.up()
        began = time.monotonic()
        eventually(lambda: web.http.post("/api/jobs", json={"type": "ping"}).status_code == 202, within_s=20)
        eventually(lambda: web.http.get("/health/ready").status_code == 200, within_s=10)
        print(f"back after {time.monotonic() - began:.1f} s")
    relay.down()


def test_it_starts_while_the_database_is_away_and_is_ready_when_it_comes(
    environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    relay = Relay(f"{conn.info.host}/.s.PGSQL.{conn.info.port}")
    url = f"postgresql://agentflow@127.0.0.1:{relay.port}/{conn.info.dbname}?sslmode=disable"
    with gunicorn({**environment, "DATABASE_URL": url}, tmp_path) as web:
        assert web.http.get("/health/ready").status_code == 503

        relay.up()
        eventually(lambda: web.http.get("/health/ready").status_code == 200, within_s=15)
    relay.down()
