"""Postgres 15 from Debian's package: servers of a test's own, with TLS, passwords and a standby, which it may kill."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from agentflow.prove.ports import free_port
from tests.processes import eventually

BIN = Path("/usr/lib/postgresql/15/bin")

_CONF = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
fsync = off
shared_buffers = 16MB
max_connections = 60
max_wal_senders = 4
wal_level = replica
hot_standby = on
"""
_HBA = "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 {method}\n"


class Cluster:
    """A server. `method` is how users of TCP identify themselves; the socket trusts everybody."""

    def __init__(self, folder: Path, *, method: str = "trust") -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.method = method

    @property
    def by_socket(self) -> str:
        return f"postgresql://agentflow@/postgres?host={self.folder}&port={self.port}"

    def url(self, port: int | None = None, *, password: str = "", host: str = "127.0.0.1", query: str = "") -> str:
        user = f"agentflow:{password}" if password else "agentflow"
        return f"postgresql://{user}@{host}:{port or self.port}/postgres{query}"

    def make(self, *settings: str) -> None:
        self.run("initdb", "-D", self.data, "-U", "agentflow", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
        (self.data / "pg_hba.conf").write_text(_HBA.format(method=self.method))
        self.configure(*settings)

    def make_standby_of(self, primary: Cluster) -> None:
        self.run(
            "pg_basebackup",
            "-h",
            primary.folder,
            "-p",
            str(primary.port),
            "-U",
            "agentflow",
            "-D",
            self.data,
            "-R",
            "--no-sync",
        )
        self.configure()

    def configure(self, *settings: str) -> None:
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write(_CONF.format(port=self.port, folder=self.folder) + "\n".join(settings) + "\n")

    def start(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-l", self.folder / "log", "start")

    def promote(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "promote")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")

    def kill(self) -> None:
        """kill -9 of the postmaster: its children notice and end."""
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, 9)
            eventually(lambda: not (Path("/proc") / str(pid)).exists() or _is_zombie(pid))

    def sql(self, statement: str) -> list[Any]:
        with psycopg.connect(self.by_socket, autocommit=True) as conn:
            cursor = conn.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [str(BIN / program), *(str(a) for a in arguments)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "out").open("ab"),
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
            **account(),
        )
        assert done.returncode == 0, (self.folder / "out").read_text()[-3000:]


@contextmanager
def cluster(*, method: str = "trust") -> Iterator[Cluster]:
    """A folder for a server, which the caller makes and starts; killed and deleted at the end."""
    assert (BIN / "initdb").exists(), f"the tests need Postgres 15 in {BIN}: apt-get install postgresql"
    folder = Path(tempfile.mkdtemp(prefix="agentflow-pg15-"))
    own(folder)
    made = Cluster(folder, method=method)
    try:
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)


def account() -> dict[str, Any]:
    """For subprocess: postgres and pgbouncer refuse root."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def own(path: Path) -> None:
    if found := account():
        os.chown(path, found["user"], found["group"])


def _is_zombie(pid: int) -> bool:
    return ") Z" in (Path("/proc") / str(pid) / "stat").read_text()
