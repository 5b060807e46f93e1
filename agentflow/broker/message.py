"""What is said to a broker for one job, and what a worker got from it."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Protocol

import dramatiq
from dramatiq.broker import MessageProxy
from dramatiq.errors import DecodeError

from agentflow.jobs.model import Ring


def queue_name(prefix: str, queue: str) -> str:
    """The broker's name of a queue: `agent-jobs.default`."""
    return f"{prefix}.{queue}"


def lane_name(queue_name: str, critical: bool) -> str:
    """Critical jobs of a queue have a lane of their own: a worker reads it, too, while it has threads for nothing else."""
    return queue_name + (".critical" if critical else "")


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


def read_message(body: bytes, queue_name: str) -> dramatiq.Message[Any]:
    """What `message_for` wrote. Raises DecodeError for anything else: Dramatiq's threads end on fields of other types."""
    message = dramatiq.Message.decode(body)
    options: Any = message.options
    if message.queue_name != queue_name or not isinstance(message.actor_name, str) or not isinstance(options, dict):
        raise DecodeError("not a message of ours", body, None)
    return dramatiq.Message(
        queue_name, message.actor_name, message.args, {}, {"priority": options.get("priority")}, str(message.message_id)
    )


class Origin(Protocol):
    """The consumer that delivered a message: acknowledgements go to it and to no other."""

    def acknowledge(self, message: Any) -> None: ...

    def pass_on(self, message: Any) -> bool: ...


class DeliveredMessage(MessageProxy):
    """A message with the consumer that delivered it. It is acknowledged once, as soon as the claim's answer is known, by
    the worker's thread, and not when Dramatiq's thread is done with it (`DoorbellConsumer`).

    One that is not `at_broker` is known to this process alone: what it does not claim, it has to give back.
    """

    at_broker: ClassVar[bool] = True

    def __init__(self, message: dramatiq.Message[Any], origin: Origin) -> None:
        super().__init__(message)
        self.origin = origin
        self.acknowledged = False
        self.delivered_at = time.monotonic()
        self.given_back = False
        self.claimed = False  # or asked for: a message that comes for its job again finds nothing

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.origin.acknowledge(self)

    def pass_on(self) -> bool:
        """Let the broker offer it to another consumer. False where that is not to be had: it is to be given back."""
        return self.origin.pass_on(self)


class PolledMessage(DeliveredMessage):
    """What a worker told itself: it found the job in Postgres, and no broker knows of it."""

    at_broker = False

    def __init__(self, ring: Ring, prefix: str) -> None:
        super().__init__(message_for(ring, prefix), _Nobody())


class _Nobody:
    def acknowledge(self, message: Any) -> None:
        message.acknowledged = True

    def pass_on(self, message: Any) -> bool:
        return False
