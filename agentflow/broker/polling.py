"""No broker at all: workers look into Postgres themselves, each for its free threads (agentflow/worker/chores.py).

Dramatiq wants a broker with consumers to start its threads. These consumers never bring anything: what a worker finds is put
on Dramatiq's queue of work, as it is where a broker is away.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

from dramatiq.broker import Consumer
from dramatiq.message import Message
from dramatiq.middleware import Middleware

from agentflow.broker.doorbell import BrokerAway, Doorbell, DoorbellConsumer
from agentflow.jobs.model import Ring

_IDLE_S: Final = 1.0
_NOBODY: Final = "there is no broker: workers poll"


class PollingBroker(Doorbell):
    """A doorbell without a bell."""

    connected = True

    def __init__(self, *, prefix: str, middleware: list[Middleware]) -> None:
        super().__init__(prefix=prefix, middleware=middleware)
        self.queues: set[str] = set()
        self.stopped = threading.Event()
        self.declare_queues()

    @property
    def fingerprint(self) -> str:
        return f"database {self.prefix}"

    def get_declared_queues(self) -> set[str]:
        return self.queues.copy()

    def can_publish(self) -> bool:
        return False

    def can_hear(self) -> bool:
        return False

    def ring(self, rings: Sequence[Ring]) -> None:
        raise BrokerAway(_NOBODY)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        raise BrokerAway(f"{_NOBODY}; submit a job instead of sending a message")

    def tell_cancel(self) -> None:
        self.on_cancel()  # a worker in this process; the others' heartbeats come often in this tier

    def check(self, timeout_s: float) -> None:
        """There is nothing to be asked."""

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        return _Silence(self, queue_name, threading.Event())

    def close(self) -> None:
        self.stopped.set()


class _Silence(DoorbellConsumer):
    """Brings nothing."""

    broker: PollingBroker

    def __next__(self) -> None:
        self.broker.stopped.wait(_IDLE_S)
