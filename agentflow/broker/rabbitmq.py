"""RabbitMQ as the doorbell: two connections in a worker, one in any other process, whatever the number of queues.

Dramatiq's own broker for RabbitMQ has a connection per consumer and per publishing thread, two more queues for each, and
acknowledges to whatever channel is there now. Here one thread consumes all queues by one channel and hands messages over to
Dramatiq's consumer threads; another publishes, many messages to one wait for their confirmations.

A queue has two lanes at the broker, `<prefix>.default` and `<prefix>.default.critical`: a process whose threads are busy stops
reading the first and goes on reading the second, for the threads that are kept for critical jobs. What it had read goes back.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final
from uuid import uuid4

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import DecodeError
from dramatiq.message import Message
from dramatiq.middleware import Middleware
from pika.exceptions import ChannelClosedByBroker

from agentflow import log, metrics
from agentflow.broker.amqp import Link, parameters_of, presence_of
from agentflow.broker.doorbell import Doorbell
from agentflow.broker.message import DeliveredMessage, message_for, queue_name, read_message
from agentflow.broker.publishing import Letter, PublishingLink
from agentflow.jobs.model import QUEUES, Ring
from agentflow.presence import Presence
from agentflow.tls import Trust

#: A quorum queue gives up a message that was delivered so often without an acknowledgement; the relay rings for its job.
DELIVERY_LIMIT: Final = 20
#: Without room for so long, what was read goes back to the broker, and no more is read.
CROWDED_S: Final = 0.2
_CROWDED_POLL_S: Final = 0.05
_IDLE_POLL_S: Final = 1.0
_NOT_FOUND: Final = 404

logger = log.get(__name__)


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
        self.saturated = False
        self.control = f"{prefix}.control"
        self._parameters = parameters_of(url, client_name, trust)
        self.presence = presence_of(self._parameters)
        self._consumers: list[RabbitConsumer] = []
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
        return queue_name + (".critical" if critical else "") + (".q" if self.quorum else "")

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
        _aside(self.on_emptied)

    # ---- consuming ----

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> RabbitConsumer:
        consumer = RabbitConsumer(self, queue_name, prefetch)
        self._consumers = [c for c in self._consumers if c.queue_name != queue_name] + [consumer]
        self.publishing.start()
        self.consuming.start()
        return consumer

    def room(self, critical: bool) -> int:
        """How many more messages may be handed to Dramatiq's threads now."""
        if self._stopped:
            return 0
        free = self.allowance() - sum(len(consumer.held) for consumer in self._consumers)
        return free if critical else free - self.reserved()

    def take(self, rings: Sequence[Ring]) -> list[Ring]:
        """A round trip by the broker would bring it here, or somewhere else, which has the rest: it costs more than the claim."""
        if not self.can_hear():
            return list(rings)
        consumers = {consumer.queue_name: consumer for consumer in self._consumers}
        return [
            ring
            for ring in rings
            if (consumer := consumers.get(queue_name(self.prefix, ring.queue))) is None or not consumer.take(ring)
        ]

    def nudge(self) -> None:
        if self.saturated:
            self.saturated = False
            for consumer in self._consumers:
                consumer.bell.set()

    def stop_consuming(self) -> None:
        self._stopped = True
        for consumer in self._consumers:
            consumer.stop()

    def close(self) -> None:
        self._stopped = True
        self.consuming.close()
        self.publishing.close()


class RabbitMessage(DeliveredMessage):
    """Knows its delivery, which means something to its channel only."""

    def __init__(
        self, message: Message[Any], origin: RabbitConsumer, channel: Any, method: Any, properties: Any
    ) -> None:
        super().__init__(message, origin)
        self.channel = channel
        self.tag: int = method.delivery_tag
        self.redelivered: bool = method.redelivered
        self.deliveries = int((properties.headers or {}).get("x-delivery-count", 0))  # of quorum queues


class OwnMessage(RabbitMessage):
    """What this process told itself: no broker knows of it, nor can it be passed on by one."""

    def __init__(self, ring: Ring, origin: RabbitConsumer, prefix: str) -> None:
        DeliveredMessage.__init__(self, message_for(ring, prefix), origin)
        self.channel = None
        self.tag = 0
        self.redelivered = True
        self.deliveries = DELIVERY_LIMIT


class Lane:
    """One queue at the broker, as this process reads it: `prefetch` messages at a time, 0: not."""

    def __init__(self, name: str, critical: bool) -> None:
        self.name = name
        self.critical = critical
        self.prefetch = 0
        self.consumer_tag: str | None = None
        self.waiting: deque[RabbitMessage] = deque()
        self.crowded_since: float | None = None


class RabbitConsumer(Consumer):
    """Hands over what there is room for, critical messages first. What finds no room is passed on to other workers; what no
    thread has claimed within a second is given back.

    A lane is read as many messages at a time as there is room, so that a worker does not sit on others' work.
    """

    UNCLAIMED_S: Final = 1.0

    def __init__(self, broker: RabbitBroker, queue_name: str, prefetch: int) -> None:
        self.broker = broker
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.lanes = [Lane(broker.lane_name(queue_name, critical), critical) for critical in (True, False)]
        self.bell = threading.Event()
        self.held: dict[int, RabbitMessage] = {}  # handed over, neither acknowledged nor passed on; by id()
        self._lock = threading.Lock()

    def __next__(self) -> RabbitMessage | None:
        self.bell.clear()  # before the look: a message that comes during it is not overlooked
        self._give_back_unclaimed()
        crowded = False
        for lane in self.lanes:
            while (message := self._next_of(lane)) is not None:
                if self.broker.known(message.actor_name):
                    return message
                # A worker of an older version, in the middle of a deploy: another one may know the type.
                message.given_back = True
                self.broker.give_back([message], 30.0)
            crowded = crowded or bool(lane.waiting)
        self.bell.wait(_CROWDED_POLL_S if crowded else self.UNCLAIMED_S / 4 if self.held else _IDLE_POLL_S)
        return None

    def ack(self, message: MessageProxy) -> None:
        """From any thread, once, and to the channel that delivered: tags begin anew on the next one. Others' are none of ours."""
        if isinstance(message, RabbitMessage) and self._let_go(message):
            self.broker.consuming.settle(message)
            self.broker.nudge()

    nack = ack  # nothing is dead-lettered in the broker: the row says what became of the job

    def pass_on(self, message: DeliveredMessage) -> bool:
        """Back to the queue's head, for whoever else reads it; once, since that may be this process again."""
        assert isinstance(message, RabbitMessage)  # noqa: S101 - as above
        if message.redelivered or not self._let_go(message):
            return False
        self.broker.consuming.settle(message, requeue=True)
        return True

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """At shutdown: the messages that no thread took."""
        messages = list(messages)
        self.broker.give_back_polled(messages)
        self.broker.give_back([m for m in messages if isinstance(m, OwnMessage) and not m.acknowledged], 0.0)
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
            message = RabbitMessage(read_message(body, self.queue_name), self, channel, method, properties)
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
            lane.waiting = deque(message for message in lane.waiting if isinstance(message, OwnMessage))
            lane.consumer_tag = None
        for key, message in list(self.held.items()):
            if not isinstance(message, OwnMessage):
                self.held.pop(key, None)

    # ---- in Dramatiq's consumer thread ----

    def _next_of(self, lane: Lane) -> RabbitMessage | None:
        room = self.broker.room(lane.critical)
        if room <= 0:
            self.broker.saturated = True  # from here on whoever makes room rings; look again, for one who was quicker
            room = self.broker.room(lane.critical)
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

    def _give_back_unclaimed(self) -> None:
        too_old = time.monotonic() - self.UNCLAIMED_S
        late = [m for m in list(self.held.values()) if m.delivered_at < too_old and not m.given_back]
        for message in late:
            message.given_back = True
        if late:
            self.broker.give_back(late, 1.0)

    def _let_go(self, message: RabbitMessage) -> bool:
        """Whether it was ours to answer for until now."""
        with self._lock:
            if message.acknowledged:
                return False
            message.acknowledged = True
        self.held.pop(id(message), None)
        return True


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
        if message.channel is None:
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
        for consumer in self._broker._consumers:
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
        for consumer in self._broker._consumers:
            for lane in consumer.lanes:
                self._read(lane)
        self.is_ready()
        _aside(partial(self._broker.on_connected, self._broker.fingerprint))
        if self._missing:
            _aside(self._broker.on_emptied)

    def _read(self, lane: Lane) -> None:
        channel = self._channel
        if channel is None:
            return  # done when there is one
        if lane.consumer_tag is not None:
            # What is delivered until the broker knows is put back by pika.
            channel.basic_cancel(lane.consumer_tag, callback=lambda _frame: None)
            lane.consumer_tag = None
        if lane.prefetch:
            consumer = next(c for c in self._broker._consumers if lane in c.lanes)
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


def _aside(call: Any) -> None:
    """In a thread of its own: it may ask the database, and the connection's thread must not wait."""
    threading.Thread(target=call, name="rabbitmq-aside", daemon=True).start()
