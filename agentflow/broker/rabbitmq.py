"""RabbitMQ as the doorbell: two connections in a worker, one in any other process, whatever the number of queues.

Dramatiq's own broker for RabbitMQ has a connection per consumer and per publishing thread, two more queues for each, and
acknowledges to whatever channel is there now. Here one thread consumes all queues by one channel and hands messages over to
Dramatiq's consumer threads; another publishes, many messages to one wait for their confirmations.

A queue has two lanes at the broker, `<prefix>.default` and `<prefix>.default.critical`: a process whose threads are busy stops
reading the first and goes on reading the second, for the threads that are kept for critical jobs. What it had read goes back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dramatiq.message import Message
from dramatiq.middleware import Middleware

from agentflow.broker.amqp import Link, parameters_of, presence_of
from agentflow.broker.consuming import DELIVERY_LIMIT, ConsumingLink, RabbitConsumer, aside
from agentflow.broker.doorbell import Doorbell
from agentflow.broker.message import lane_name, message_for, queue_name
from agentflow.broker.publishing import Letter, PublishingLink
from agentflow.jobs.model import QUEUES, Ring
from agentflow.tls import Trust


class RabbitBroker(Doorbell):
    """Connects to nothing before its first use."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        middleware: list[Middleware],
        client_name: str,
        quorum: bool = False,
        trust: Trust | None = None,
    ) -> None:
        super().__init__(prefix=prefix, middleware=middleware)
        self.queues: set[str] = set()
        self.quorum = quorum
        self.control = f"{prefix}.control"
        self._parameters = parameters_of(url, client_name, trust)
        self.presence = presence_of(self._parameters)
        self.consumers: list[RabbitConsumer] = []
        self._stopped = False
        self.publishing = PublishingLink(
            self._parameters,
            self.presence,
            control=self.control,
            declare=self.declare_at,
            missing=self._found_missing,
        )
        self.publishing.on_ready = lambda: self.on_ready()
        self.consuming = ConsumingLink(self, self._parameters, self.presence)
        self.declare_queues()

    # ---- names ----

    def lane_name(self, queue_name: str, critical: bool) -> str:
        """The broker's name of a lane. Quorum queues have names of their own: a queue's type cannot be changed."""
        return lane_name(queue_name, critical) + (".q" if self.quorum else "")

    def lane_names(self) -> list[str]:
        names = [queue_name(self.prefix, queue) for queue in QUEUES]
        return [self.lane_name(name, critical) for name in names for critical in (False, True)]

    def declare_at(self, channel: Any, lane: str) -> None:
        arguments: dict[str, Any] = {"x-queue-type": "classic"}
        if self.quorum:
            arguments = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
        channel.queue_declare(lane, durable=True, arguments=arguments)

    @property
    def fingerprint(self) -> str:
        where = self._parameters
        kind = "quorum" if self.quorum else "classic"
        return f"rabbitmq {where.host}:{where.port}/{where.virtual_host} {self.consuming.cluster} {kind} {self.prefix}"

    def get_declared_queues(self) -> set[str]:
        return self.queues.copy()

    # ---- state ----

    @property
    def host(self) -> str:
        return str(self._parameters.host)

    @property
    def port(self) -> int:
        return int(self._parameters.port)

    @property
    def encrypted(self) -> bool:
        return self._parameters.ssl_options is not None

    @property
    def _links(self) -> list[Link]:
        return [link for link in (self.publishing, self.consuming) if link.started]

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return bool(self._links) and all(link.ready.is_set() for link in self._links) and not self.publishing.away

    @property
    def last_error(self) -> str | None:  # type: ignore[override]
        return next((link.last_error for link in self._links if link.last_error), None)

    @property
    def reconnects(self) -> int:  # type: ignore[override]
        return sum(link.reconnects for link in self._links)

    def can_publish(self) -> bool:
        return not self.publishing.away

    def can_hear(self) -> bool:
        return not (self.publishing.away or self.consuming.away)

    def check(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        self.publishing.check(timeout_s)
        if self.consuming.started and not self.consuming.ready.wait(max(0.0, end - time.monotonic())):
            raise ConnectionError(self.consuming.last_error or "the consuming connection is not ready yet")

    # ---- publishing ----

    def ring(self, rings: Sequence[Ring]) -> None:
        """Publish a message for each and wait for the confirmations of all. Raises BrokerAway, ConnectionError, TimeoutError."""
        self.publishing.publish([self._letter(message_for(ring, self.prefix)) for ring in rings])

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Dramatiq's own way in (`actor.send`); jobs come by `ring`."""
        if delay is not None:
            raise ValueError("nothing is delayed in the broker: submit a job with run_at")
        self.publishing.publish([self._letter(message)])
        return message

    def tell_cancel(self) -> None:
        self.publishing.start()
        self.publishing.tell(b"cancel")

    def _letter(self, message: Message[Any]) -> Letter:
        return Letter(self.lane_name(message.queue_name, message.options.get("priority") == 0), message.encode())

    def _found_missing(self, _lane: str) -> None:
        aside(self.on_emptied)

    # ---- consuming ----

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> RabbitConsumer:
        consumer = RabbitConsumer(self, queue_name, prefetch)
        self.add_consumer(consumer)
        self.publishing.start()
        self.consuming.start()
        return consumer

    def room(self, critical: bool) -> int:
        return 0 if self._stopped else super().room(critical)

    def take(self, rings: Sequence[Ring]) -> list[Ring]:
        """A round trip by the broker would bring it here, or somewhere else, which has the rest: it costs more than the claim."""
        if not self.can_hear():
            return list(rings)
        consumers = {consumer.queue_name: consumer for consumer in self.consumers}
        return [
            ring
            for ring in rings
            if (consumer := consumers.get(queue_name(self.prefix, ring.queue))) is None or not consumer.take(ring)
        ]

    def stop_consuming(self) -> None:
        self._stopped = True
        for consumer in self.consumers:
            consumer.stop()

    def close(self) -> None:
        self._stopped = True
        self.consuming.close()
        self.publishing.close()
