"""What the tests of connections share: an authority, names of our own, servers behind middlemen, and what the log said."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
import redis
import trustme

from agentflow import embedded, presence
from agentflow.broker import RabbitBroker
from agentflow.embedded.binaries import find_valkey
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.middleman import Middleman, Target, between
from tests.processes import eventually
from tests.rabbitmq import Node

KINDS = ("Postgres", "Redis", "RabbitMQ")
VARIABLES = {"Postgres": "DATABASE_URL", "Redis": "REDIS_URL", "RabbitMQ": "RABBITMQ_URL"}
HOST = "server.example.com"  # public by its name; `names` says where it leads
#: What a client raises when its server is away or refuses.
AWAY = (psycopg.OperationalError, redis.RedisError, OSError)


class Log:
    """In place of presence's logger."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = info

    def of(self, ending: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.lines if event.endswith(ending)]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(presence, "logger", log)
    return log


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and the addresses that the resolver answers for them, in this process; without addresses: no such name."""
    table: dict[str, list[str]] = {HOST: ["127.0.0.1"]}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in table:
            return real(host, *arguments, **options)
        if not table[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [answer for address in table[host] for answer in real(address, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


@dataclass
class Authority:
    ca: trustme.CA
    file: Path

    @classmethod
    def make(cls, folder: Path, name: str) -> Authority:
        ca = trustme.CA()
        file = folder / f"{name}.pem"
        ca.cert_pem.write_to_path(str(file))
        return cls(ca, file)

    def server(self, *hosts: str, days: int = 30) -> ssl.SSLContext:
        """For a server of these names, whose certificate ends in so many days."""
        now = datetime.now(UTC)
        issued = self.ca.issue_cert(*hosts, not_before=now - timedelta(days=60), not_after=now + timedelta(days=days))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(context)
        return context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody knows."""
    return Authority.make(tmp_path_factory.mktemp("stranger"), "strangers")


@dataclass
class Servers:
    """The tests' servers, each by a middleman of the same kind. `environment` leads to them under `host`."""

    stack: embedded.Embedded
    node: Node
    database: str
    middlemen: dict[str, Middleman] = field(default_factory=dict)

    def target(self, kind: str) -> Target:
        if kind == "Postgres":
            return Path(parse_qs(urlsplit(self.stack.database_url).query)["host"][0]) / ".s.PGSQL.5432"
        if kind == "Redis":
            return Path(urlsplit(self.stack.redis_url).path)
        return ("127.0.0.1", self.node.port)

    @contextlib.contextmanager
    def behind(self, **options: Any) -> Iterator[Mapping[str, Middleman]]:
        with contextlib.ExitStack() as stack:
            for kind in KINDS:
                postgres = kind == "Postgres" and options.get("tls") is not None
                self.middlemen[kind] = stack.enter_context(between(self.target(kind), postgres=postgres, **options))
            yield self.middlemen

    def environment(self, host: str = "127.0.0.1", *, tls: bool = False, query: str = "") -> dict[str, str]:
        at = {kind: f"{host}:{middleman.port}" for kind, middleman in self.middlemen.items()}
        s = "s" if tls else ""
        return {
            "DATABASE_URL": f"postgresql://agentflow@{at['Postgres']}/{self.database}"
            + ("" if tls else "?sslmode=disable"),
            "REDIS_URL": f"redis{s}://{at['Redis']}/0",
            "RABBITMQ_URL": f"amqp{s}://guest:guest@{at['RabbitMQ']}/%2F",
        }


@pytest.fixture
def servers(stack: embedded.Embedded, rabbitmq: Node, database_url: str) -> Servers:
    return Servers(stack, rabbitmq, urlsplit(database_url).path.strip("/"))


def reach(system: System, kind: str) -> None:
    """A new connection, and a round trip on it. Raises one of AWAY."""
    if kind == "Postgres":
        with system.database.connect(answer_timeout_s=2.0) as conn:
            conn.execute("select 1")
    elif kind == "Redis":
        client = system.redis_client(answer_timeout_s=2.0, connect_timeout_s=5.0)
        try:
            client.ping()
        finally:
            client.close()
    else:
        broker = broker_of(system)
        broker.publishing.start()
        eventually(lambda: broker.publishing.ready.is_set() or broker.presence.away)
        if broker.presence.away:  # `check` would wait for the next attempt
            raise ConnectionError(broker.presence.last_error)
        broker.check(8.0)


def reachable(system: System, kind: str) -> bool:
    try:
        reach(system, kind)
        return True
    except AWAY:
        return False


def broker_of(system: System) -> RabbitBroker:
    assert isinstance(system.broker, RabbitBroker)
    return system.broker


@contextlib.contextmanager
def valkey(folder: Path, *arguments: str) -> Iterator[int]:
    """A Valkey of a test's own, on a port. Its folder is the test's."""
    port = free_port()
    process = subprocess.Popen(
        [
            str(find_valkey()),
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(folder),
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr,
    )

    def answers() -> bool:
        with contextlib.suppress(redis.AuthenticationError), contextlib.suppress(redis.ConnectionError):
            with redis.Redis(port=port) as client:
                client.ping()
            return True
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        return False

    try:
        eventually(answers)
        yield port
    finally:
        process.kill()
        process.wait(10)
