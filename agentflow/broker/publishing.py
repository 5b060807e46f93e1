"""The connection by which a process publishes: many messages at once, each confirmed, none waited for longer than seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import pika
from pika.spec import Basic

from agentflow import log
from agentflow.broker.amqp import Link
from agentflow.broker.doorbell import BrokerAway
from agentflow.presence import Presence

logger = log.get(__name__)

#: A broker that has not confirmed by then is frozen or drowning: its connection is dropped, the relay rings again.
CONFIRM_S: Final = 5.0
#: How long the first message, or one just after a loss, waits for the connection.
_CONNECTION_S: Final = 1.5


class Letter(NamedTuple):
    queue: str
    body: bytes


class _Batch:
    """Messages sent together, and the tags that are not confirmed yet."""

    def __init__(self, letters: Sequence[Letter]) -> None:
        self.letters = letters
        self.waiting: set[int] = set()
        self.error: str | None = None
        self.done = threading.Event()

    def fail(self, why: str) -> None:
        if not self.done.is_set():
            self.error = why
            self.done.set()


class PublishingLink(Link):
    """`publish` is for one thread at a time; others wait for their turn.

    Messages are persistent: otherwise a restarted broker, its queues there but empty, would cost each of its jobs the time
    after which a ring counts as lost. `missing(queue)` says that a queue was not there; it has been declared by then.
    """

    def __init__(
        self,
        parameters: Any,
        presence: Presence,
        *,
        control: str,
        declare: Callable[[Any, str], None],
        missing: Callable[[str], None],
    ) -> None:
        super().__init__(parameters, "publishing", presence)
        self.on_ready: Callable[[], None] = lambda: None
        self._control = control
        self._declare = declare
        self._missing = missing
        self._properties = pika.BasicProperties(delivery_mode=2, content_type="application/json")
        self._turn = threading.Lock()
        self._batch: _Batch | None = None
        self._channel: Any = None
        self._tag = 0
        self._blocked: str | None = None

    @property
    def away(self) -> bool:
        """Known to be lost or refusing."""
        return self._blocked is not None or super().away

    def publish(self, letters: Sequence[Letter], timeout_s: float = CONFIRM_S) -> None:
        """Returns when all are confirmed. Raises BrokerAway (nothing was sent), ConnectionError, TimeoutError (unknown)."""
        with self._turn:
            self.start()
            if self.away or not self.ready.wait(_CONNECTION_S):
                raise BrokerAway(self._blocked or self.last_error or "RabbitMQ is not connected yet")
            batch = self._batch = _Batch(letters)
            try:
                if not self.call(partial(self._send, batch)):
                    raise BrokerAway(self.last_error or "the connection is lost")
                if not batch.done.wait(timeout_s):
                    late = TimeoutError(f"RabbitMQ did not confirm within {timeout_s:g} s")
                    self.silent = True
                    self.call(partial(self.drop, late))
                    raise late
                if batch.error is not None:
                    raise ConnectionError(batch.error)
            finally:
                self._batch = None

    def tell(self, body: bytes) -> None:
        """To every worker that listens now; not confirmed, and not kept for those who are away."""
        if self.away or not self.call(partial(self._tell, body)):
            raise BrokerAway(self._blocked or self.last_error or "RabbitMQ is not connected yet")

    def check(self, timeout_s: float) -> None:
        """A round trip. Raises ConnectionError, TimeoutError."""
        self.start()
        if self._blocked is not None:
            raise BrokerAway(self._blocked)
        if not self.ready.wait(timeout_s):
            raise BrokerAway(self.last_error or "RabbitMQ is not connected yet")
        answered = threading.Event()

        def ask() -> None:
            if self._channel is not None:
                self._channel.exchange_declare(self._control, passive=True, callback=lambda _: answered.set())

        if not self.call(ask) or not answered.wait(timeout_s):
            raise TimeoutError(self._blocked or self.last_error or f"RabbitMQ did not answer within {timeout_s:g} s")

    # ---- in the connection's thread ----

    def opened(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self.channel(connection, self._on_channel)

    def lost(self, why: str) -> None:
        self._channel = None
        self._blocked = None
        self._fail(why)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_return_callback(self._on_return)
        channel.exchange_declare(self._control, exchange_type="fanout", durable=True)
        channel.confirm_delivery(self._on_confirm, callback=partial(self._on_confirming, channel))

    def _on_confirming(self, channel: Any, _frame: Any) -> None:
        self._channel, self._tag = channel, 0
        self.is_ready()
        self.on_ready()

    def _send(self, batch: _Batch) -> None:
        if self._channel is None:
            batch.fail("the connection was lost before anything was sent")
        for letter in batch.letters if self._channel is not None else ():
            self._send_one(batch, letter)

    def _send_one(self, batch: _Batch, letter: Letter) -> None:
        self._tag += 1
        batch.waiting.add(self._tag)
        self._channel.basic_publish("", letter.queue, letter.body, self._properties, mandatory=True)

    def _tell(self, body: bytes) -> None:
        if self._channel is not None:
            self._tag += 1  # confirmed like any other, and no batch waits for it
            self._channel.basic_publish(self._control, "", body)

    def _on_confirm(self, frame: Any) -> None:
        batch, method = self._batch, frame.method
        if batch is None:
            return
        if method.multiple:
            confirmed = {tag for tag in batch.waiting if tag <= method.delivery_tag}
        else:
            confirmed = batch.waiting & {method.delivery_tag}
        batch.waiting -= confirmed
        if isinstance(method, Basic.Nack) and confirmed:
            batch.fail("RabbitMQ refused the message (a queue's limit, or a fault of its own)")
        elif not batch.waiting and confirmed:
            batch.done.set()

    def _on_return(self, channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        """No such queue: somebody deleted it, or the broker is a new one. Comes before the confirmation of the same message."""
        batch = self._batch
        self._declare(channel, method.routing_key)
        if batch is not None:
            self._send_one(batch, Letter(method.routing_key, body))
        self._missing(method.routing_key)

    def _on_blocked(self, _connection: Any, frame: Any) -> None:
        why = f"RabbitMQ blocks publishers: {frame.method.reason}"
        logger.warning(why)
        self._blocked = self.last_error = why
        self._fail(why)

    def _on_unblocked(self, _connection: Any, _frame: Any) -> None:
        logger.info("RabbitMQ takes messages again")
        self._blocked = None
        self.on_ready()

    def _fail(self, why: str) -> None:
        if self._batch is not None:
            self._batch.fail(why)
