"""What is said to a broker for one job, and what a worker got from it."""

from __future__ import annotations

import time
from typing import Any, Protocol

import dramatiq
from dramatiq.broker import MessageProxy

from agentflow.jobs.model import Ring


def queue_name(prefix: str, queue: str) -> str:
    """The broker's name of a queue: `agent-jobs.default`."""
    return f"{prefix}.{queue}"


def message_for(ring: Ring, prefix: str) -> dramatiq.Message[Any]:
    """The message id is the job's id, so that Dramatiq's results backend finds the result under it."""
    return dramatiq.Message(
        queue_name=queue_name(prefix, ring.queue),
        actor_name=ring.type,
        args=(str(ring.job_id),),
        kwargs={},
        options={"priority": ring.priority},
        message_id=str(ring.job_id),
    )


class Origin(Protocol):
    """The consumer that delivered a message: acknowledgements go to it and to no other."""

    def ack(self, message: Any) -> None: ...


class DeliveredMessage(MessageProxy):
    """A message with the consumer that delivered it. It is acknowledged once, as soon as the claim's answer is known, by
    the worker's thread; what Dramatiq acknowledges after the job is then a no-op."""

    def __init__(self, message: dramatiq.Message[Any], origin: Origin) -> None:
        super().__init__(message)
        self.origin = origin
        self.acknowledged = False
        self.delivered_at = time.monotonic()
        self.given_back = False

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.origin.ack(self)
