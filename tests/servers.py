"""Servers of a test's own, which it may stop, freeze and wipe: Debian's Postgres, Valkey from its wheel, and RabbitMQ.

All have the same verbs, so that a scenario can be written for any of them:

    start     and wait until it answers
    stop      as an operator does: it takes leave of its clients
    kill      -9 of the server and all below it
    freeze    SIGSTOP: its sockets stay open, the kernel acknowledges packets, nobody answers; `thaw` ends it
    wipe      forget everything and be there again (Postgres has no such verb: it is the truth)
    mend      running and thawed, as the next test expects it
    clients   how many connections each client has, by the name that it gave
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import redis
from psycopg import sql

from agentflow import schema
from agentflow.embedded import binaries
from agentflow.prove.ports import free_port
from tests import rabbitmq
from tests.folders import server_folder
from tests.processes import eventually

POSTGRES = Path("/usr/lib/postgresql/15/bin")

_POSTGRES_SETTINGS = {
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "32MB",
    # A killed process loses nothing that it gave to the kernel; only a machine does.
    "fsync": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_parallel_workers": "0",
    "autovacuum_naptime": "10s",
    "timezone": "UTC",
    "jit": "off",
}


class Server(ABC):
    """A server with a folder of its own, on a free port of `address`. `url` is what its clients are given."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.port = free_port()
        self._popen: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def clients(self) -> Counter[str]: ...

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def text(self) -> str:
        """What it wrote to its log."""
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._ended()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def mend(self) -> None:
        self.thaw()
        if not self.running:
            self.start()

    def close(self) -> None:
        self.kill()

    def family(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        if self._popen is None:
            return []
        try:
            parent = psutil.Process(self._popen.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _spawn(self, *command: str | Path, account: pwd.struct_passwd | None = None) -> None:
        with (self.folder / "log").open("ab") as log:
            self._popen = subprocess.Popen(
                command,
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )

    def _signal(self, number: int) -> None:
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _ended(self, within_s: float = 30.0) -> None:
        if self._popen is not None:
            self._popen.wait(within_s)
            self._popen = None


class Postgres(Server):
    """Debian's Postgres 15, one cluster, with a database that has the schema."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", **settings: str) -> None:
        super().__init__(folder, address)
        self._settings = {**_POSTGRES_SETTINGS, **settings}
        assert (POSTGRES / "postgres").exists(), "the tests need Postgres 15: apt-get install postgresql-15"
        self._account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None  # it refuses to run as root
        self.data = folder / "data"
        if self._account is not None:
            os.chown(folder, self._account.pw_uid, self._account.pw_gid)
        self._run("initdb", "-D", str(self.data), "-U", "agentflow", "-A", "trust", "-E", "UTF8", "--no-sync")
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\n")

    @property
    def url(self) -> str:
        return f"postgresql://agentflow@{self.address}:{self.port}/agentflow"

    def start(self) -> None:
        settings = {**self._settings, "listen_addresses": self.address, "port": str(self.port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._spawn(POSTGRES / "postgres", "-D", self.data, *options, account=self._account)
        eventually(self.answers, within_s=60, every_s=0.1)

    def make_database(self, name: str = "agentflow") -> str:
        """A new one with the schema. Returns its URL."""
        with psycopg.connect(self._url_of("postgres"), autocommit=True) as conn:
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        with psycopg.connect(self._url_of(name), autocommit=True) as conn:
            schema.migrate(conn)
        return self._url_of(name)

    def answers(self) -> bool:
        assert self.running, self.text()[-2000:]
        with suppress(psycopg.OperationalError), psycopg.connect(self._url_of("postgres"), connect_timeout=2):
            return True
        return False

    def stop(self, how: int = signal.SIGINT) -> None:
        """`fast` (SIGINT): clients are told. SIGQUIT is `immediate`: a crash, and recovery at the next start."""
        if self._popen is not None:
            self._popen.send_signal(how)
            self._ended()

    def clients(self) -> Counter[str]:
        with psycopg.connect(self._url_of("postgres"), application_name="the test", autocommit=True) as conn:
            rows = conn.execute(
                "select application_name from pg_stat_activity"
                " where backend_type = 'client backend' and pid <> pg_backend_pid()"
            ).fetchall()
        return Counter(row[0] for row in rows)

    def _url_of(self, database: str) -> str:
        return f"postgresql://agentflow@{self.address}:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        account = self._account
        done = subprocess.run(
            [POSTGRES / program, *arguments],
            cwd="/",
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=120,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


class Redis(Server):
    """Valkey, which keeps nothing on disk: a restart empties it."""

    @property
    def url(self) -> str:
        return f"redis://{self.address}:{self.port}/0"

    def start(self) -> None:
        nothing_kept = ("--save", "", "--appendonly", "no")
        open_to_all = ("--protected-mode", "no", "--bind", self.address)
        self._spawn(binaries.find_valkey(), "--port", str(self.port), *open_to_all, *nothing_kept)
        eventually(self.answers, within_s=60, every_s=0.1)

    def answers(self) -> bool:
        assert self.running, self.text()[-2000:]
        with suppress(redis.RedisError), self._client() as client:
            return bool(client.ping())
        return False

    def stop(self) -> None:
        if self._popen is not None:
            self._popen.send_signal(signal.SIGTERM)
            self._ended()

    def wipe(self) -> None:
        self.kill()
        self.start()

    def clients(self) -> Counter[str]:
        with self._client() as client:
            mine = client.client_id()
            return Counter(each["name"] for each in client.client_list() if int(each["id"]) != mine)

    def _client(self) -> redis.Redis:
        return redis.Redis(host=self.address, port=self.port, socket_timeout=2, socket_connect_timeout=2)


class RabbitMQ(rabbitmq.Node):
    """The tests' node with the verbs of the others."""

    def stop(self) -> None:
        """`rabbitmqctl stop`: connections are closed with a reason, queues and messages are kept."""
        assert self._popen is not None
        self.ctl("stop")
        self._popen.wait(60)
        self._popen = None

    def clients(self) -> Counter[str]:
        return Counter(self.connections())

    @property
    def running(self) -> bool:
        return self.alive()

    def family(self) -> list[psutil.Process]:
        return self.processes()


@dataclass(frozen=True)
class Servers:
    """What the production tier needs."""

    postgres: Postgres
    redis: Redis
    rabbitmq: RabbitMQ

    @property
    def environment(self) -> dict[str, str]:
        return {"DATABASE_URL": self.postgres.url, "REDIS_URL": self.redis.url, "RABBITMQ_URL": self.rabbitmq.url}

    def mend(self) -> None:
        for server in (self.postgres, self.redis, self.rabbitmq):
            server.mend()


@contextmanager
def production(address: str = "127.0.0.1") -> Iterator[Servers]:
    """All three, started, with the schema in place; gone without a trace at the end."""
    with server_folder("servers") as folder, ExitStack() as stack:
        (folder / "rabbitmq").mkdir()
        broker = RabbitMQ(folder / "rabbitmq", address)
        stack.callback(broker.close)
        broker.launch()  # takes seconds: the others start meanwhile
        postgres = Postgres(folder / "postgres", address)
        stack.callback(postgres.close)
        postgres.start()
        postgres.make_database()
        scratchpad = Redis(folder / "redis", address)
        stack.callback(scratchpad.close)
        scratchpad.start()
        broker.wait_answers()
        yield Servers(postgres, scratchpad, broker)
