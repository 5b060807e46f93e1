"""A RabbitMQ of the tests' own, from Debian's package: one node on free ports, with an epmd of its own, which tests may kill.

Its consumer_timeout is 5 s (the default is 30 minutes), looked at every second: nothing of ours may hold a message for longer.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pika
import psutil
import pytest

from tests.processes import eventually, free_port

logging.getLogger("pika").setLevel(logging.CRITICAL)  # as agentflow.log does; else each look for a port is pages of log

BIN = Path("/usr/lib/rabbitmq/bin")  # the scripts in /usr/sbin change to another account
CONSUMER_TIMEOUT_S = 5.0

_CONF = """\
log.console = false
log.file.level = warning
vm_memory_high_watermark.absolute = 512MiB
disk_free_limit.absolute = 50MB
"""
_ADVANCED = "[{rabbit, [{consumer_timeout, 5000}, {channel_tick_interval, 1000}]}].\n"


class Node:
    """`url` is a user's; the methods are the operator's and the fate's."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.port = free_port()
        self._epmd_port = free_port()
        self._popen: subprocess.Popen[bytes] | None = None
        for name in ("db", "log"):
            (folder / name).mkdir()
        (folder / "rabbitmq.conf").write_text(_CONF + f"loopback_users.guest = {str(address == '127.0.0.1').lower()}\n")
        (folder / "advanced.config").write_text(_ADVANCED)
        (folder / "plugins").write_text("[].\n")
        cookie = folder / ".erlang.cookie"
        cookie.write_text("AGENTFLOWTESTS")
        cookie.chmod(0o400)
        first = free_port()
        self.environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"af{os.getpid()}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": address,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CTL_DIST_PORT_MIN": str(first),
            "RABBITMQ_CTL_DIST_PORT_MAX": str(min(first + 20, 65535)),
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

    def start(self) -> None:
        self.launch()
        self.wait_started()

    def launch(self) -> None:
        with (self.folder / "out").open("ab") as out:
            self._popen = subprocess.Popen(
                [str(BIN / "rabbitmq-server")],
                env=self.environment,
                cwd=self.folder,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait_started(self) -> None:
        eventually(self.answers, within_s=120, every_s=0.2)

    def answers(self) -> bool:
        assert self._popen is None or self._popen.poll() is None, (self.folder / "out").read_text()[-2000:]
        parameters = pika.URLParameters(self.url)
        parameters.socket_timeout = parameters.stack_timeout = 2
        with suppress(Exception):
            pika.BlockingConnection(parameters).close()
            return True
        return False

    def ctl(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / "rabbitmqctl"), "-q", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def connections(self) -> list[str]:
        """The names that the clients gave to their connections; of test clients without one: the empty string."""
        answer = self.ctl("list_connections", "client_properties", "--no-table-headers")
        return [
            line.partition('{"connection_name","')[2].partition('"')[0] for line in answer.splitlines() if line.strip()
        ]

    def close_all_connections(self) -> None:
        self.ctl("close_all_connections", "by a test")

    def ready_messages(self, *queues: str) -> dict[str, int]:
        """Messages that wait at the broker and are with no consumer."""
        counts = {}
        with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
            for queue in queues:
                counts[queue] = connection.channel().queue_declare(queue, passive=True).method.message_count
        return counts

    def kill(self) -> None:
        """kill -9 of the whole node."""
        if self._popen is not None:
            for process in self._family():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._popen.wait(10)
            self._popen = None

    def freeze(self) -> None:
        for process in self._family():
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._family():
            process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """All queues and messages are gone; clients see their connections closed."""
        self.ctl("stop_app")
        self.ctl("reset")
        self.ctl("start_app")

    def forget(self) -> None:
        """What a stopped node kept on its disk is gone."""
        shutil.rmtree(self.folder / "db")
        (self.folder / "db").mkdir()

    def mend(self) -> None:
        """As a test expects it: running, thawed, no alarm."""
        if self._popen is None or self._popen.poll() is not None:
            self.start()
        self.thaw()

    def close(self) -> None:
        self.kill()
        # Its epmd is a daemon that outlives it, and refuses `epmd -kill` while it remembers a node that was killed.
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                if process.info["name"] == "epmd" and process.environ().get("HOME") == str(self.folder):
                    process.kill()

    def _family(self) -> list[psutil.Process]:
        if self._popen is None:
            return []
        try:
            parent = psutil.Process(self._popen.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[Node]:
    assert (BIN / "rabbitmq-server").exists(), "the tests need RabbitMQ: apt-get install rabbitmq-server"
    folder = Path(tempfile.mkdtemp(prefix="agentflow-rabbitmq-"))
    node = Node(folder)
    try:
        node.start()
        yield node
    finally:
        node.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def rabbitmq(rabbitmq_node: Node) -> Iterator[Node]:
    """The session's node, mended before and after a test that hurts it."""
    rabbitmq_node.mend()
    yield rabbitmq_node
    rabbitmq_node.mend()
