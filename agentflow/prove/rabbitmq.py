"""RabbitMQ from the system's package, on free ports of the loopback, with an epmd of its own: one node, or three in a cluster."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

import pika
import psutil

from agentflow.prove.ports import free_port
from agentflow.prove.servers import family, send_all, until

#: The scripts elsewhere on PATH change to another account.
BIN: Final = Path("/usr/lib/rabbitmq/bin")
_START_S: Final = 120.0
_CTL_S: Final = 120.0
_CTL_PORTS: Final = 21
_CONF: Final = """\
log.console = false
log.file.level = warning
vm_memory_high_watermark.absolute = 512MiB
disk_free_limit.absolute = 50MB
cluster_partition_handling = pause_minority
"""


class RabbitError(Exception):
    """It did not start, or did not do what it was told."""


def installed() -> bool:
    return (BIN / "rabbitmq-server").exists()


class Node:
    """One node. `url` is a user's; the methods are the operator's and the fate's."""

    def __init__(
        self,
        folder: Path,
        name: str,
        epmd_port: int,
        cookie: str,
        *,
        address: str = "127.0.0.1",
        conf: str = _CONF,
        advanced: str = "[].\n",
    ) -> None:
        self.folder = folder
        self.name = f"{name}@localhost"
        self.address = address
        self.port = free_port()
        self._popen: subprocess.Popen[bytes] | None = None
        for part in ("db", "log"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "rabbitmq.conf").write_text(conf)
        (folder / "advanced.config").write_text(advanced)
        (folder / "plugins").write_text("[].\n")
        secret = folder / ".erlang.cookie"
        secret.write_text(cookie)
        secret.chmod(0o400)
        first = free_port(room=_CTL_PORTS)
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": address,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CTL_DIST_PORT_MIN": str(first),
            "RABBITMQ_CTL_DIST_PORT_MAX": str(first + _CTL_PORTS - 1),
            "RABBITMQ_MNESIA_BASE": str(folder / "db"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
            ),
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.address}:{self.port}/%2F"

    def launch(self) -> None:
        with (self.folder / "out").open("ab") as out:
            self._popen = subprocess.Popen(
                [str(BIN / "rabbitmq-server")],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start(self) -> None:
        """Raises RabbitError."""
        self.launch()
        self.wait_answers()

    def wait_answers(self) -> None:
        if not until(lambda: self.answers() or not self.alive(), within_s=_START_S, every_s=0.2) or not self.alive():
            said = (self.folder / "out").read_text(errors="replace")[-500:]
            raise RabbitError(f"RabbitMQ did not start: {' '.join(said.split())}")

    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def processes(self) -> list[psutil.Process]:
        return family(self._popen.pid) if self._popen is not None else []

    def answers(self) -> bool:
        parameters = pika.URLParameters(self.url)
        parameters.socket_timeout = parameters.stack_timeout = 2
        with suppress(Exception):
            pika.BlockingConnection(parameters).close()
            return True
        return False

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl. Raises RabbitError."""
        try:
            done = subprocess.run(
                [str(BIN / "rabbitmqctl"), "-q", *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_CTL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RabbitError(f"rabbitmqctl {arguments[0]} did not end") from None
        if done.returncode:
            raise RabbitError(f"rabbitmqctl {arguments[0]}: {' '.join((done.stdout + done.stderr).split())[:300]}")
        return done.stdout

    def kill(self) -> None:
        """kill -9 of the whole node."""
        if self._popen is not None:
            send_all(family(self._popen.pid), signal.SIGKILL)
            self._popen.wait(20)
            self._popen = None

    def freeze(self) -> None:
        if self._popen is not None:
            send_all(family(self._popen.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        if self._popen is not None:
            send_all(family(self._popen.pid), signal.SIGCONT)

    def wipe(self) -> None:
        """All queues and messages are gone; clients see their connections closed."""
        self.ctl("stop_app")
        self.ctl("reset")
        self.ctl("start_app")

    def refuse_publishes(self) -> None:
        """As if it were short of memory: it stops reading from whoever publishes."""
        self.ctl("set_vm_memory_high_watermark", "absolute", "1")

    def accept_publishes(self) -> None:
        self.ctl("set_vm_memory_high_watermark", "absolute", "512MiB")

    def protocol_errors(self) -> list[str]:
        """What it holds against its clients' use of the protocol."""
        found = []
        for log in (self.folder / "log").glob("*.log"):
            lines = log.read_text(errors="replace").splitlines()
            found += [line for line in lines if "channel exception" in line and "not_found" not in line]
            found += [line for line in lines if "PRECONDITION_FAILED" in line or "unknown delivery tag" in line]
        return found


def end_epmd(port: int) -> None:
    """A daemon that outlives its nodes, and refuses `epmd -kill` while it remembers one that was killed."""
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.info["name"] == "epmd" and process.environ().get("ERL_EPMD_PORT") == str(port):
                process.kill()


class Rabbit:
    """One node, or a cluster, behind one address; its epmd ends with it. The nodes themselves are at `address`."""

    def __init__(self, folder: Path, *, nodes: int = 1, address: str = "127.0.0.1", conf: str = _CONF) -> None:
        self.folder = folder
        self._epmd_port = free_port()
        cookie = secrets.token_hex(16).upper()
        self.nodes = [
            Node(folder / f"n{n}", f"af{os.getpid()}n{n}", self._epmd_port, cookie, address=address, conf=conf)
            for n in range(nodes)
        ]
        self._entrance = Entrance([node.port for node in self.nodes])

    @property
    def node(self) -> Node:
        return self.nodes[0]

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self._entrance.port}/%2F"

    def start(self) -> None:
        """Raises RabbitError."""
        self.nodes[0].start()
        for node in self.nodes[1:]:
            node.start()
            node.ctl("stop_app")
            node.ctl("join_cluster", self.nodes[0].name)
            node.ctl("start_app")

    def cut(self) -> None:
        """Every connection ends at once, as when a router between the two is restarted."""
        self._entrance.cut()

    def whole(self) -> bool:
        """Whether every node runs, and every queue has all its copies."""
        if not all(node.alive() and node.answers() for node in self.nodes):
            return False
        with suppress(RabbitError):
            listed = self.node.ctl("list_queues", "type", "members", "online", "--no-table-headers")
            rows = [line.split("\t") for line in listed.splitlines()]
            # The workers' own queues for control messages are classic, and end with their connections.
            copied = [row for row in rows if len(row) == 3 and "quorum" in row[0]]
            return all(row[1].count("@") == row[2].count("@") == len(self.nodes) for row in copied)
        return False

    def close(self) -> None:
        self._entrance.close()
        for node in self.nodes:
            node.thaw()
            node.kill()
        end_epmd(self._epmd_port)
        shutil.rmtree(self.folder, ignore_errors=True)


class Entrance:
    """What stands before the nodes: takes connections at one port and leads each to the next node that takes it."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = itertools.cycle(ports)
        self._tries = len(ports)
        self._led: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="entrance", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else accept goes on waiting
        self._listener.close()

    def cut(self) -> None:
        for client in list(self._led):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._lead, args=(client,), daemon=True).start()

    def _lead(self, client: socket.socket) -> None:
        for port in itertools.islice(self._ports, self._tries):
            with suppress(OSError):
                node = socket.create_connection(("127.0.0.1", port), 3)
                node.settimeout(None)
                with client, node:
                    self._led.add(client)
                    there = threading.Thread(target=_pour, args=(client, node), daemon=True)
                    there.start()
                    _pour(node, client)
                    there.join()
                    self._led.discard(client)
                return
        client.close()


def _pour(source: socket.socket, into: socket.socket) -> None:
    """Until one of them ends; then both do."""
    with suppress(OSError):
        while data := source.recv(65536):
            into.sendall(data)
    for end in (source, into):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
