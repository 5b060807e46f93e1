"""What a job's own look at its lease does."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from agentflow import fetch
from agentflow.fetch import Guard
from agentflow.worker.running import Running, Stopped


def running(*, lease_s: float, repeatable: bool) -> Running:
    job: Any = SimpleNamespace(id=uuid4(), fence=1)
    return Running(job, time.monotonic() + lease_s, repeatable=repeatable)


def test_work_that_must_not_be_repeated_ends_at_its_first_look_after_the_lease() -> None:
    late = running(lease_s=-0.001, repeatable=False)

    with pytest.raises(Stopped):
        late.check()

    assert late.stop_reason == "lost"


def test_work_that_may_be_repeated_goes_on_and_so_does_any_within_its_lease() -> None:
    running(lease_s=-60, repeatable=True).check()
    running(lease_s=60, repeatable=False).check()


def test_a_post_stops_between_its_connect_and_its_first_byte() -> None:
    received: list[bytes] = []
    connected = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        client, _ = listener.accept()
        connected.set()
        received.append(client.recv(100))
        client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def should_stop() -> None:
        if connected.wait(0.2):  # the lease ends while it connects
            raise Stopped("lost")

    with pytest.raises(Stopped):
        fetch.post(
            f"http://127.0.0.1:{port}/",
            b"{}",
            guard=Guard(allow=[f"127.0.0.1:{port}"]),
            timeout_s=5,
            user_agent="test",
            headers={},
            should_stop=should_stop,
        )

    thread.join(5)
    listener.close()
    assert received == [b""]
