"""The connection by which a worker consumes: one channel for all of its queues, read only as far as there is room."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from dramatiq.broker import MessageProxy
from dramatiq.errors import DecodeError
from dramatiq.message import Message
from pika.exceptions import ChannelClosedByBroker

from agentflow import log, metrics
from agentflow.broker.amqp import Link
from agentflow.broker.doorbell import DoorbellConsumer
from agentflow.broker.message import DeliveredMessage, message_for, read_message
from agentflow.jobs.model import Ring
from agentflow.presence import Presence

if TYPE_CHECKING:
    from agentflow.broker.rabbitmq import RabbitBroker

#: A quorum queue gives up a message that was delivered so often without an acknowledgement; the relay rings for its job.
DELIVERY_LIMIT: Final = 20
#: Without room for so long, what was read goes back to the broker, and no more is read.
CROWDED_S: Final = 0.2
_CROWDED_POLL_S: Final = 0.05
_IDLE_POLL_S: Final = 1.0
_NOT_FOUND: Final = 404

logger = log.get(__name__)


class RabbitMessage(DeliveredMessage):
    """Knows its delivery, which means something to its channel only. Quorum queues count the `deliveries` before this one."""

    def __init__(
        self,
        message: Message[Any],
        origin: RabbitConsumer,
        *,
        channel: Any,
        tag: int,
        redelivered: bool,
        deliveries: int,
    ) -> None:
        super().__init__(message, origin)
        self.channel = channel
        self.tag = tag
        self.redelivered = redelivered
        self.deliveries = deliveries


class OwnMessage(RabbitMessage):
    """What this process told itself. There is no queue to put it back to, so that it is given back as what has been around is."""

    at_broker = False

    def __init__(self, ring: Ring, origin: RabbitConsumer, prefix: str) -> None:
        message = message_for(ring, prefix)
        super().__init__(message, origin, channel=None, tag=0, redelivered=True, deliveries=DELIVERY_LIMIT)


class Lane:
    """One queue at the broker, as this process reads it: `prefetch` messages at a time, 0: not."""

    def __init__(self, name: str, critical: bool) -> None:
        self.name = name
        self.critical = critical
        self.prefetch = 0
        self.consumer_tag: str | None = None
        self.waiting: deque[RabbitMessage] = deque()
        self.crowded_since: float | None = None


class RabbitConsumer(DoorbellConsumer):
    """Hands over what there is room for, critical messages first. What finds no room is passed on to other workers; what no
    thread has claimed within a second is given back.

    A lane is read as many messages at a time as there is room, so that a worker does not sit on others' work.
    """

    broker: RabbitBroker

    def __init__(self, broker: RabbitBroker, queue_name: str, prefetch: int) -> None:
        super().__init__(broker, queue_name, threading.Event())
        self.prefetch = prefetch
        self.lanes = [Lane(broker.lane_name(queue_name, critical), critical) for critical in (True, False)]

    def __next__(self) -> RabbitMessage | None:
        self.bell.clear()  # before the look: a message that comes during it is not overlooked
        self._give_back_unclaimed()
        crowded = False
        for lane in self.lanes:
            while (message := self._next_of(lane)) is not None:
                if self._is_known(message):
                    self.broker.on_handing_over(message)
                    return message
            crowded = crowded or bool(lane.waiting)
        self.bell.wait(_CROWDED_POLL_S if crowded else self.UNCLAIMED_S / 4 if self.held else _IDLE_POLL_S)
        return None

    def acknowledge(self, message: MessageProxy) -> None:
        """From any thread, once, and to the channel that delivered: tags begin anew on the next one. Others' are none of ours."""
        if isinstance(message, RabbitMessage) and self._let_go(message):
            self.broker.consuming.settle(message)
            self.broker.nudge()

    def pass_on(self, message: DeliveredMessage) -> bool:
        """Back to the queue's head, for whoever else reads it; once, since that may be this process again."""
        assert isinstance(message, RabbitMessage)  # noqa: S101 - as above
        if message.redelivered or not self._let_go(message):
            return False
        self.broker.consuming.settle(message, requeue=True)
        return True

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        messages = list(messages)
        super().requeue(messages)
        for message in messages:
            if isinstance(message, RabbitMessage) and self._let_go(message):
                self.broker.consuming.settle(message, requeue=True)

    def take(self, ring: Ring) -> bool:
        """Put it before this process's threads, where there is room. From the relay's thread."""
        lane = next(lane for lane in self.lanes if lane.critical == (ring.priority == 0))
        if self.broker.room(lane.critical) <= len(lane.waiting):
            return False
        lane.waiting.append(OwnMessage(ring, self, self.broker.prefix))
        self.bell.set()
        return True

    def stop(self) -> None:
        for lane in self.lanes:
            self._stop_reading(lane)

    def close(self) -> None:
        self.stop()
        self.requeue(list(self.held.values()))

    # ---- from the connection's thread ----

    def deliver(self, lane: Lane, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        try:
            message = RabbitMessage(
                read_message(body, self.queue_name),
                self,
                channel=channel,
                tag=method.delivery_tag,
                redelivered=method.redelivered,
                deliveries=int((properties.headers or {}).get("x-delivery-count", 0)),
            )
        except DecodeError:
            logger.warning("a message that is not one of ours was dropped", queue=lane.name)
            metrics.message_dropped("malformed")
            channel.basic_ack(method.delivery_tag)
            return
        lane.waiting.append(message)
        self.bell.set()

    def forget(self) -> None:
        """The channel is gone, and the broker offers its messages anew. Those handed over go on: the claim decides."""
        for lane in self.lanes:
            for _ in range(len(lane.waiting)):  # one by one: the relay may put another there meanwhile
                with contextlib.suppress(IndexError):
                    if not (message := lane.waiting.popleft()).at_broker:
                        lane.waiting.append(message)
            lane.consumer_tag = None
        for key, held in list(self.held.items()):
            if held.at_broker and not held.claimed:
                self.held.pop(key, None)

    # ---- in Dramatiq's consumer thread ----

    def _next_of(self, lane: Lane) -> RabbitMessage | None:
        room = self.broker.room_or_nudge(lane.critical)
        if room <= 0:
            if not lane.waiting:
                lane.crowded_since = None
            elif lane.crowded_since is None:
                lane.crowded_since = time.monotonic()
            elif time.monotonic() - lane.crowded_since > CROWDED_S:
                self._stop_reading(lane)
            return None
        lane.crowded_since = None
        wanted = min(self.prefetch, room)
        if wanted >= 2 * lane.prefetch:
            lane.prefetch = wanted
            self.broker.consuming.read(lane)
        with contextlib.suppress(IndexError):
            message = lane.waiting.popleft()
            self.held[id(message)] = message
            return message
        return None

    def _stop_reading(self, lane: Lane) -> None:
        if lane.prefetch:
            lane.prefetch = 0
            self.broker.consuming.read(lane)
        lane.crowded_since = None
        with contextlib.suppress(IndexError):
            while True:
                self._put_back(lane.waiting.popleft())

    def _put_back(self, message: RabbitMessage) -> None:
        if message.deliveries < DELIVERY_LIMIT // 2:
            message.acknowledged = True
            self.broker.consuming.settle(message, requeue=True)
        else:  # before the queue takes it for poison
            message.given_back = True
            self.held[id(message)] = message
            self.broker.give_back([message], 0.0)


class ConsumingLink(Link):
    """One channel for all queues, and one for the control exchange's messages."""

    def __init__(self, broker: RabbitBroker, parameters: Any, presence: Presence) -> None:
        super().__init__(parameters, "consuming", presence)
        self.cluster = ""
        self._broker = broker
        self._channel: Any = None
        self._answers: deque[tuple[RabbitMessage, bool]] = deque()
        self._answering = False
        self._answers_lock = threading.Lock()
        self._unknown: set[str] = set()
        self._missing: set[str] = set()

    # ---- from any thread ----

    def settle(self, message: RabbitMessage, *, requeue: bool = False) -> None:
        """Acknowledge it, or put it back. To a channel that is gone nothing is said: the broker has its message back."""
        if not message.at_broker:
            return
        with self._answers_lock:
            self._answers.append((message, requeue))
            if self._answering:
                return
            self._answering = True
        if not self.call(self._answer):
            self._forget_answers()

    def read(self, lane: Lane) -> None:
        """Read a lane by its `prefetch` from now on."""
        self.call(partial(self._read, lane))

    # ---- in the connection's thread ----

    def opened(self, connection: Any) -> None:
        """Before anything is declared: which of the queues are not there? Each look that fails costs its channel."""
        self.cluster = str((connection.server_properties or {}).get("cluster_name", b""))
        self._unknown, self._missing = set(self._broker.lane_names()), set()
        for name in sorted(self._unknown):
            connection.channel(on_open_callback=partial(self._look_for, name))

    def lost(self, why: str) -> None:
        self._channel = None
        self._forget_answers()
        for consumer in self._broker.consumers:
            consumer.forget()

    def _look_for(self, name: str, channel: Any) -> None:
        channel.add_on_close_callback(partial(self._looked_for, name))
        channel.queue_declare(name, passive=True, callback=lambda _frame: channel.close())

    def _looked_for(self, name: str, channel: Any, reason: Exception) -> None:
        connection = channel.connection
        if not connection.is_open:
            return
        if isinstance(reason, ChannelClosedByBroker) and reason.reply_code == _NOT_FOUND:
            self._missing.add(name)
        self._unknown.discard(name)
        if not self._unknown:
            self.channel(connection, self._set_up)

    def _set_up(self, channel: Any) -> None:
        """Nothing here needs an answer: a refusal closes the channel, and with it the connection."""
        broker = self._broker
        for name in broker.lane_names():
            broker.declare_at(channel, name)
        channel.exchange_declare(broker.control, exchange_type="fanout", durable=True)
        mine = f"{broker.control}.{uuid4()}"
        channel.queue_declare(mine, exclusive=True, auto_delete=True)
        channel.queue_bind(mine, broker.control)
        channel.basic_consume(mine, lambda *_: broker.on_cancel(), auto_ack=True)
        # The broker ends a consumer whose queue is deleted: begin again, which finds the queue missing.
        channel.add_on_cancel_callback(lambda _frame: self.drop(ConnectionError("a queue was deleted")))
        channel.basic_qos(prefetch_count=1, callback=partial(self._is_set_up, channel))

    def _is_set_up(self, channel: Any, _frame: Any) -> None:
        self._channel = channel
        for consumer in self._broker.consumers:
            for lane in consumer.lanes:
                self._read(lane)
        self.is_ready()
        aside(partial(self._broker.on_connected, self._broker.fingerprint))
        if self._missing:
            aside(self._broker.on_emptied)

    def _read(self, lane: Lane) -> None:
        channel = self._channel
        if channel is None:
            return  # done when there is one
        if lane.consumer_tag is not None:
            # What is delivered until the broker knows is put back by pika.
            channel.basic_cancel(lane.consumer_tag, callback=lambda _frame: None)
            lane.consumer_tag = None
        if lane.prefetch:
            consumer = next(c for c in self._broker.consumers if lane in c.lanes)
            channel.basic_qos(prefetch_count=lane.prefetch)
            lane.consumer_tag = channel.basic_consume(lane.name, partial(consumer.deliver, lane))

    def _answer(self) -> None:
        with self._answers_lock:
            answers, self._answers = self._answers, deque()
            self._answering = False
        for message, requeue in answers:
            if message.channel is not self._channel or not self._channel.is_open:
                continue  # the broker gives what is not acknowledged to somebody else
            if requeue:
                self._channel.basic_nack(message.tag, requeue=True)
            else:
                self._channel.basic_ack(message.tag)

    def _forget_answers(self) -> None:
        with self._answers_lock:
            self._answers.clear()
            self._answering = False


def aside(call: Any) -> None:
    """In a thread of its own: it may ask the database, and the connection's thread must not wait."""
    threading.Thread(target=call, name="rabbitmq-aside", daemon=True).start()
