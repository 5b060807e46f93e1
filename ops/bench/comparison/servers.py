"""Every server that a compared system may need, private and on the loopback, as long as the comparison lasts."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pika
import psutil
import psycopg
import redis

from agentflow import embedded, schema
from agentflow.embedded.binaries import find_valkey
from agentflow.embedded.layout import Layout
from agentflow.prove.ports import free_port
from agentflow.prove.rabbitmq import Node, end_epmd
from agentflow.prove.servers import family, until
from ops.bench.peers.catalogue import Durability

_START_S: Final = 60.0
OURS_TABLES: Final = "agentflow.jobs, agentflow.workers, agentflow.lanes, agentflow.batches"
_CONF: Final = """\
log.console = false
log.file.level = warning
vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 50MB
"""


class Servers:
    """Postgres and Valkey as AgentFlow brings them, RabbitMQ, and a Valkey for each way of keeping what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.joined = embedded.join(self.home)
        self._layout = Layout.of(self.home)
        with self.connect() as conn:
            schema.migrate(conn)
        self._epmd_port = free_port()
        self.rabbitmq = Node(folder / "rabbitmq", "compare", self._epmd_port, "AGENTFLOWCOMPARE", conf=_CONF)
        self.rabbitmq.start()
        self._valkeys = {durability: Valkey(folder, durability) for durability in ("no", "everysec", "always")}

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.joined.database_url, autocommit=True)

    def redis_url(self, durability: Durability) -> str:
        return self._valkeys[durability].url

    @property
    def procrastinate_url(self) -> str:
        return self.joined.database_url.replace("/postgres?", "/procrastinate?")

    def clean(self) -> None:
        """As if nothing had run before."""
        with self.connect() as conn:
            conn.execute(f"truncate {OURS_TABLES} cascade")
            conn.execute("drop database if exists procrastinate with (force)")
            conn.execute("create database procrastinate")
            conn.execute("checkpoint")
        for url in (self.joined.redis_url, *(valkey.url for valkey in self._valkeys.values())):
            with redis.Redis.from_url(url) as client:
                client.flushall()

    def cpu_s(self) -> dict[str, float]:
        """Seconds of a processor that each kind of server has used so far."""
        found = {
            "postgres": cpu_s(family(self._embedded("postgres"))),
            "redis": cpu_s(family(self._embedded("valkey"))),
            "rabbitmq": cpu_s(self.rabbitmq.processes()),
        }
        found["redis"] += sum(cpu_s(family(valkey.popen.pid)) for valkey in self._valkeys.values())
        return found

    def connections(self) -> dict[str, int]:
        """Of clients, this process's own one to Postgres left out."""
        with self.connect() as conn:
            row = conn.execute(
                "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
            ).fetchone()
        clients = 0
        for url in (self.joined.redis_url, *(valkey.url for valkey in self._valkeys.values())):
            with redis.Redis.from_url(url) as client:
                clients += len(client.client_list()) - 1
        rabbitmq = self.rabbitmq.ctl("list_connections", "pid", "--no-table-headers").split()
        return {"postgres": row[0] if row else 0, "redis": clients, "rabbitmq": len(rabbitmq)}

    def versions(self) -> dict[str, str]:
        with self.connect() as conn, redis.Redis.from_url(self.redis_url("no")) as client:
            row = conn.execute("show server_version").fetchone()
            valkey = client.info("server").get("valkey_version", "")
        with pika.BlockingConnection(pika.URLParameters(self.rabbitmq.url)) as connection:
            rabbitmq = str(connection._impl.server_properties["version"])
        return {"postgres": str(row[0]) if row else "", "valkey": str(valkey), "rabbitmq": rabbitmq}

    def close(self) -> None:
        for valkey in self._valkeys.values():
            valkey.close()
        self.rabbitmq.kill()
        end_epmd(self._epmd_port)
        self.joined.leave()
        self.joined.wait_stopped(30)

    def _embedded(self, name: str) -> int:
        return int(self._layout.lock(name).read_text())


class Valkey:
    def __init__(self, folder: Path, durability: str) -> None:
        home = folder / f"valkey-{durability}"
        home.mkdir()
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        keep = ["--appendonly", "no"] if durability == "no" else ["--appendonly", "yes", "--appendfsync", durability]
        with (home / "log").open("wb") as log:
            self.popen = subprocess.Popen(
                [find_valkey(), "--port", str(port), "--bind", "127.0.0.1", "--dir", home, "--save", "", *keep],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not until(self._answers, within_s=_START_S):
            raise SystemExit(f"Valkey did not start: {(home / 'log').read_text()[-500:]}")

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def close(self) -> None:
        self.popen.terminate()
        self.popen.wait(30)


@contextmanager
def running() -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="agentflow-compare-"))
    folder.chmod(0o755)
    servers = None
    try:
        servers = Servers(folder)
        yield servers
    finally:
        if servers is not None:
            servers.close()
        shutil.rmtree(folder, ignore_errors=True)


def cpu_s(processes: list[psutil.Process]) -> float:
    """Of processes, and of their children that have ended."""
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total
