"""A RabbitMQ of the tests' own, from Debian's package: one node on free ports, with an epmd of its own, which tests may kill.

Its consumer_timeout is 5 s (the default is 30 minutes), looked at every second: nothing of ours may hold a message for longer.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from agentflow.prove import rabbitmq as own
from agentflow.prove.ports import free_port
from tests.folders import server_folder

logging.getLogger("pika").setLevel(logging.CRITICAL)  # as agentflow.log does; else each look for a port is pages of log

CONSUMER_TIMEOUT_S = 5.0

_CONF = """\
log.console = false
log.file.level = warning
vm_memory_high_watermark.absolute = 512MiB
disk_free_limit.absolute = 50MB
"""
_ADVANCED = "[{rabbit, [{consumer_timeout, 5000}, {channel_tick_interval, 1000}]}].\n"


class Node(own.Node):
    """Of its own, with an epmd of its own."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._epmd_port = free_port()
        super().__init__(
            folder,
            f"af{os.getpid()}",
            self._epmd_port,
            "AGENTFLOWTESTS",
            address=address,
            conf=_CONF + f"loopback_users.guest = {str(address == '127.0.0.1').lower()}\n",
            advanced=_ADVANCED,
        )

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

    def forget(self) -> None:
        """What a stopped node kept on its disk is gone."""
        shutil.rmtree(self.folder / "db")
        (self.folder / "db").mkdir()

    def mend(self) -> None:
        """As a test expects it: running, thawed, no alarm."""
        if not self.alive():
            self.start()
        self.thaw()

    def close(self) -> None:
        self.kill()
        own.end_epmd(self._epmd_port)


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[Node]:
    assert own.installed(), "the tests need RabbitMQ: apt-get install rabbitmq-server"
    with server_folder("rabbitmq") as folder:
        node = Node(folder)
        try:
            node.start()
            yield node
        finally:
            node.close()


@pytest.fixture
def rabbitmq(rabbitmq_node: Node) -> Iterator[Node]:
    """The session's node, mended before and after a test that hurts it."""
    rabbitmq_node.mend()
    yield rabbitmq_node
    rabbitmq_node.mend()
