"""PgBouncer from Debian's package in transaction mode, in front of the tests' Postgres: what Supabase's port 6543 is."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg

from agentflow.prove.ports import free_port
from tests.postgres15 import account, own
from tests.processes import eventually

BIN = Path("/usr/sbin/pgbouncer")

# Nothing is ignored at the start of a connection: whatever we send there has to be what a stock pooler takes.
_CONF = """
[databases]
* = {server} user=agentflow
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = agentflow
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 300
server_check_delay = 0
logfile = {folder}/log
pidfile = {folder}/pid
"""


class PgBouncer:
    """`url_of` leads to the same database by the pooler."""

    def __init__(self, folder: Path, server_url: str, size: int) -> None:
        self.folder = folder
        self.port = free_port()
        parts = urlsplit(server_url)
        query = parse_qs(parts.query)
        host = query["host"][0] if "host" in query else parts.hostname
        server = f"host={host} port={query['port'][0] if 'port' in query else parts.port or 5432}"
        (folder / "pgbouncer.ini").write_text(_CONF.format(server=server, port=self.port, size=size, folder=folder))
        self._popen: subprocess.Popen[bytes] | None = None

    def url_of(self, database_url: str) -> str:
        return f"postgresql://agentflow@127.0.0.1:{self.port}{urlsplit(database_url).path}"

    def start(self) -> None:
        self._popen = subprocess.Popen(
            [str(BIN), str(self.folder / "pgbouncer.ini")],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **account(),
        )
        eventually(self.answers)

    def answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            self.ask("show version")
            return True
        return False

    def ask(self, command: str) -> list[dict[str, str]]:
        """A command for the console: `show clients`, `reconnect`, `kill` …"""
        url = f"postgresql://agentflow@127.0.0.1:{self.port}/pgbouncer"
        with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor) as conn:
            cursor = conn.execute(command)  # type: ignore[call-overload]
            if cursor.description is None:
                return []
            names = [column.name for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(10)
            self._popen = None
            (self.folder / "pid").unlink(missing_ok=True)


@contextmanager
def pooler(server_url: str, *, size: int = 5) -> Iterator[PgBouncer]:
    """Transaction mode, with `size` connections to the server."""
    assert BIN.exists(), "the tests need PgBouncer: apt-get install pgbouncer"
    folder = Path(tempfile.mkdtemp(prefix="agentflow-pgbouncer-"))
    own(folder)
    made = PgBouncer(folder, server_url, size)
    try:
        made.start()
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)
