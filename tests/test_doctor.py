"""`agentflow doctor`: what it tells of a sound system, and of servers that are absent, silent or ill."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

import actors  # noqa: F401 - makes ping known
from agentflow import settings
from agentflow.cli import checkup, output
from agentflow.cli.checkup import network, postgres, redis
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import cli_support
from tests.cli_support import Command

agentflow = cli_support.agentflow


def test_doctor_passes_on_a_sound_system_and_shows_no_secret(agentflow: Command, environment: dict[str, str]) -> None:
    said = agentflow("doctor")

    assert said.status == 0, said.out
    for check in ("settings", "home", "database", "clock", "schema", "redis", "storage", "workers", "web"):
        assert re.search(rf"^[✓!] {check} ", said.out, re.MULTILINE), said.out
    assert environment["ADMIN_API_KEY"] not in said.out
    assert not list(Path(environment["AGENTFLOW_HOME"]).glob(".doctor*"))


def test_doctor_goes_on_when_things_are_down_and_exits_with_1(agentflow: Command, tmp_path: Path) -> None:
    said = agentflow(
        "doctor",
        DATABASE_URL=f"postgresql://me:s3cret@127.0.0.1:{free_port()}/db",
        REDIS_URL=f"redis://:s3cret@127.0.0.1:{free_port()}/0",
        STORAGE_URL="file:///proc/nowhere",
    )

    assert said.status == 1
    assert re.search(
        r"^✗ database +refused: nobody listens at 127\.0\.0\.1 port \d+\n +→ .*DATABASE_URL", said.out, re.M
    )
    assert re.search(r"^✗ redis +refused: .*\n +→ .*REDIS_URL", said.out, re.MULTILINE)
    assert re.search(r"^✗ storage .*\n +→ .*STORAGE_URL", said.out, re.MULTILINE)
    assert "✓ home" in said.out and "s3cret" not in said.out + said.err
    assert "3 of " in said.err


def test_doctor_says_that_migrations_are_missing(agentflow: Command, conn: psycopg.Connection) -> None:
    conn.execute("delete from agentflow.migrations")

    said = agentflow("doctor")

    assert said.status == 1
    assert re.search(r"^✗ schema .*\n +→ run `python -m migrations`$", said.out, re.MULTILINE), said.out


@contextmanager
def server(answer: Callable[[socket.socket], Any]) -> Iterator[int]:
    """A port at which each connection is handled by `answer`."""
    stop = threading.Event()

    def one(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            answer(connection)
            stop.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread


def postgres_says(code: str, message: str) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        if connection.recv(4096)[4:8] == b"\x04\xd2\x16\x2f":  # SSLRequest: not here
            connection.sendall(b"N")
            connection.recv(4096)
        fields = f"SFATAL\0C{code}\0M{message}\0\0".encode()
        connection.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
        connection.close()

    return answer


def redis_says(line: str) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        while connection.recv(4096):
            connection.sendall(line.encode() + b"\r\n")

    return answer


def silence(connection: socket.socket) -> None:
    connection.recv(4096)
    time.sleep(10)


def hang_up(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.close()


@pytest.mark.parametrize(
    ("answer", "query", "kind", "advice"),
    [
        (postgres_says("28P01", 'password authentication failed for user "me"'), "", "auth", "DATABASE_URL"),
        (
            postgres_says("28000", 'no pg_hba.conf entry for host "x", user "me", no encryption'),
            "",
            "TLS",
            "sslmode=require",
        ),
        (postgres_says("3D000", 'database "db" does not exist'), "", 'database "db" does not exist', "create it"),
        (postgres_says("53300", "sorry, too many clients already"), "", "too many", "DATABASE_POOL_SIZE"),
        (postgres_says("57P03", "the database system is starting up"), "", "starting up", "wait a moment"),
        (postgres_says("00000", "-"), "?sslmode=require", "TLS", "sslmode"),
        (silence, "", "timeout", "overloaded"),
    ],
)
def test_doctor_tells_what_ails_postgres(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], None], query: str, kind: str, advice: str
) -> None:
    monkeypatch.setattr(network, "CONNECT_S", 2.0)
    with server(answer) as port, pytest.raises(checkup.Wrong) as wrong:
        postgres.server(f"postgresql://me:s3cret@127.0.0.1:{port}/db{query}", "DATABASE_URL")

    assert kind in str(wrong.value) and advice in wrong.value.advice


def tls_without_a_known_issuer(connection: socket.socket) -> None:
    connection.recv(1)
    connection.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert, as of a server that wants something else
    connection.close()


@pytest.mark.parametrize(
    ("answer", "scheme", "kind", "advice"),
    [
        (redis_says("-WRONGPASS invalid username-password pair or user is disabled."), "redis", "auth", "REDIS_URL"),
        (redis_says("-NOAUTH Authentication required."), "redis", "auth", "REDIS_URL"),
        (tls_without_a_known_issuer, "rediss", "TLS", "redis://"),
        (hang_up, "redis", "closed", "rediss://"),
        (silence, "redis", "timeout", "rediss://"),
    ],
)
def test_doctor_tells_what_ails_redis(
    agentflow: Command,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[socket.socket], None],
    scheme: str,
    kind: str,
    advice: str,
) -> None:
    monkeypatch.setattr(network, "CONNECT_S", 0.7)
    with server(answer) as port, pytest.raises(checkup.Wrong) as wrong:
        url = f"{scheme}://:s3cret@127.0.0.1:{port}/0"
        redis.server(System(settings.load(environment | {"REDIS_URL": url}), "test"))

    assert kind in str(wrong.value) and advice in wrong.value.advice, (str(wrong.value), wrong.value.advice)


def test_doctor_tells_an_unknown_name_from_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(checkup.Wrong, match=r"DNS: the name no-such-host\.invalid is not known") as wrong:
        network.reach("no-such-host.invalid", 5432, "DATABASE_URL")
    assert "DATABASE_URL" in wrong.value.advice

    monkeypatch.setattr(network, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        # A listener whose queue is full does not answer: as a firewall that drops.
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        with pytest.raises(checkup.Wrong, match=r"timeout: .* did not answer within 0\.3 s"):
            network.reach("127.0.0.1", full.getsockname()[1], "DATABASE_URL")
        for each in waiting:
            each.close()


def test_doctor_scrubs_what_a_library_might_quote(capsys: pytest.CaptureFixture[str]) -> None:
    read = settings.load(
        {
            "DATABASE_URL": "postgresql://me:p%40ss-word@h/d",
            "ADMIN_API_KEY": "an-operators-key-0",
            "REDIS_URL": "redis://h",
        }
    )
    report = checkup.Report(output.console(), read)

    with report.check("database"):
        raise checkup.Wrong("failed with p@ss-word, p%40ss-word and an-operators-key-0", "")

    said = capsys.readouterr().out
    assert "ss-word" not in said and "operators" not in said and said.count("***") == 3
