"""Dramatiq's Redis broker with a bell: a publish beside each enqueue wakes the consumers at once.

Dramatiq polls Redis with a back-off per queue, which is either slow (p95 0.85 s) or busy (7 % of a core). With the bell an
idle worker picks up within milliseconds and asks only once in a while, in case a ring was lost.

Builds on private names of dramatiq 2.2.1 (`do_*`, `_RedisConsumer`'s protocol): pinned exactly.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

import redis
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message
from dramatiq.middleware import Middleware
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentflow import log
from agentflow.broker.doorbell import Doorbell, DoorbellConsumer
from agentflow.broker.message import DeliveredMessage, lane_name, message_for, queue_name
from agentflow.jobs.model import QUEUES, Ring

CANCEL: Final = "!cancel"
_RECONNECT_S: Final = 1.0
#: How long nothing is published after a failure: doubled from the first to the second. A try may cost the time-out.
_LEFT_ALONE_S: Final = (1.0, 10.0)

logger = log.get(__name__)


class RedisMessage(DeliveredMessage):
    """One of a list, which knows it by its token."""

    def __init__(self, message: Message[Any], origin: BellConsumer, lane: str) -> None:
        super().__init__(message, origin)
        self.lane = lane
        self.token = str(message.options["redis_message_id"])


class BellBroker(Doorbell, RedisBroker):
    """Dramatiq's lists in Redis, with the bell: of each queue one list for critical jobs and one for the others."""

    def __init__(
        self, client: redis.Redis, *, prefix: str, middleware: list[Middleware], idle_poll_s: float = 1.0
    ) -> None:
        super().__init__(prefix=prefix, client=client, middleware=middleware, namespace=f"{prefix}-bell")
        self.idle_poll_s = idle_poll_s
        self._bells: dict[str, threading.Event] = {queue_name(prefix, q): threading.Event() for q in QUEUES}
        self._listening = threading.Event()
        self._closed = threading.Event()
        self._failed_rings = 0
        self._publish_again_at = 0.0
        self.declare_queues()

    @property
    def fingerprint(self) -> str:
        where = self.client.connection_pool.connection_kwargs
        server = where.get("path") or f"{where.get('host')}:{where.get('port')}"
        return f"redis {server}/{where.get('db') or 0} {self.namespace}"

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> BellConsumer:
        self._listen()
        consumer = BellConsumer(self, queue_name, prefetch)
        self.add_consumer(consumer)
        return consumer

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Dramatiq's own way in (`actor.send`); jobs come by `ring`."""
        enqueued: Message[Any] = super().enqueue(message, delay=delay)
        self.client.publish(self._channel, enqueued.queue_name)
        return enqueued

    def can_publish(self) -> bool:
        return self.can_hear()

    def can_hear(self) -> bool:
        """A failed ring counts, too: it finds a frozen server before the listening connection does."""
        unknown = not self._listening.is_set() or self.last_error is None
        return (self.connected or unknown) and time.monotonic() >= self._publish_again_at

    def ring(self, rings: Sequence[Ring]) -> None:
        """Publish a message for each, in one round trip. Raises redis.RedisError; what was sent then is unknown."""
        try:
            self._ring(rings)
        except redis.RedisError:
            first, most = _LEFT_ALONE_S
            self._publish_again_at = time.monotonic() + min(most, first * 2.0 ** min(self._failed_rings, 10))
            self._failed_rings += 1
            raise
        self._failed_rings = 0

    def _ring(self, rings: Sequence[Ring]) -> None:
        dispatch = self.scripts["dispatch"]
        limit = self._max_unpack_size()  # type: ignore[no-untyped-call]
        queues = set()
        with self.client.pipeline(transaction=False) as pipe:
            for ring in rings:
                message = message_for(ring, self.prefix)
                token = f"{ring.job_id}:{time.monotonic_ns()}"  # unique: a doubled ring is a message of its own
                message.options["redis_message_id"] = token
                lane = lane_name(message.queue_name, ring.priority == 0)
                # fmt: off
                dispatch(
                    keys=[self.namespace],
                    args=["enqueue", current_millis(), lane, self.broker_id, self.heartbeat_timeout,
                          self.dead_message_ttl, 0, limit, token, message.encode()],
                    client=pipe,
                )
                # fmt: on
                queues.add(message.queue_name)
            for name in queues:
                pipe.publish(self._channel, name)
            pipe.execute()

    def tell_cancel(self) -> None:
        self.client.publish(self._channel, CANCEL)

    def check(self, timeout_s: float) -> None:
        self.client.ping()

    def bell(self, name: str) -> threading.Event:
        return self._bells.setdefault(name, threading.Event())

    def close(self) -> None:
        self._closed.set()
        self._ring_all_bells()
        super().close()

    @property
    def _channel(self) -> str:
        return f"{self.namespace}:bell"

    def _ring_all_bells(self) -> None:
        for event in self._bells.values():
            event.set()

    def _listen(self) -> None:
        if not self._listening.is_set():
            self._listening.set()
            threading.Thread(target=self._hear, name="bell", daemon=True).start()

    def _hear(self) -> None:
        """Set the bells as rings arrive; all of them after each (re)connection, since rings may have been missed."""
        while not self._closed.is_set():
            try:
                with self.client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(self._channel)
                    # It would connect and subscribe anew by itself, without our knowing that rings may have been missed.
                    pubsub.connection.retry = Retry(NoBackoff(), 0)
                    self._connected_again()
                    self._ring_all_bells()
                    while not self._closed.is_set():
                        message = pubsub.get_message(timeout=5.0)
                        if message is None:
                            pubsub.ping()  # a frozen server is noticed by the next read's timeout
                        elif message["type"] == "message":
                            self._heard(message["data"].decode())
            except redis.RedisError as error:
                self.connected, self.last_error = False, str(error) or type(error).__name__
                self.on_unrung()  # from now on this process looks for itself
                self._closed.wait(_RECONNECT_S)

    def _connected_again(self) -> None:
        if self.last_error is not None and not self.connected:
            self.reconnects += 1
        # Whoever sets the mark is the first to see a server that is new, or was emptied: its messages are gone.
        emptied = self.client.set(f"{self.namespace}:mark", self.broker_id, nx=True)
        self.connected = True
        self._failed_rings, self._publish_again_at = 0, 0.0
        if emptied:
            self.on_emptied()
        self.on_connected(self.fingerprint)
        self.on_ready()

    def _heard(self, what: str) -> None:
        if what == CANCEL:
            self.on_cancel()
        else:
            self.bell(what).set()


class BellConsumer(DoorbellConsumer):
    """Fetches when the bell rang, and only what the process has room for, critical messages first."""

    broker: BellBroker

    def __init__(self, broker: BellBroker, queue_name: str, prefetch: int) -> None:
        super().__init__(broker, queue_name, broker.bell(queue_name))
        self.prefetch = prefetch
        self.lanes = {lane_name(queue_name, critical): critical for critical in (True, False)}
        self._fetched: deque[RedisMessage] = deque()  # held, and not handed over yet

    def acknowledge(self, message: MessageProxy) -> None:
        """From any thread, once; an acknowledgement of another's message is ignored."""
        if not isinstance(message, RedisMessage) or message.origin is not self or not self._let_go(message):
            return
        try:
            self.broker.do_ack(message.lane, message.token)
        except redis.RedisError as error:
            # The message comes again when this process is gone, and its claim finds nothing: harmless.
            logger.debug("acknowledgement lost", error=str(error))

    def pass_on(self, message: DeliveredMessage) -> bool:
        return False

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        messages = list(messages)
        super().requeue(messages)
        self._put_back([m for m in messages if isinstance(m, RedisMessage) and not m.acknowledged])

    def __next__(self) -> RedisMessage | None:
        self.bell.clear()  # before the fetch: a ring during it is not lost
        self._give_back_unclaimed()
        if not self.broker.can_hear():
            self.bell.wait(self.broker.idle_poll_s)  # set when the connection is there again
            return None
        if not self._fetched:
            self._fetch()
        while self._fetched:
            if self._is_known(message := self._fetched.popleft()):
                self.broker.on_handing_over(message)
                return message
        self.bell.wait(self.UNCLAIMED_S / 4 if self.held else self.broker.idle_poll_s)
        return None

    def close(self) -> None:
        self._put_back(list(self.held.values()))

    def _fetch(self) -> None:
        for lane, critical in self.lanes.items():
            if (room := self.broker.room_or_nudge(critical)) <= 0:
                continue
            try:
                found = self.broker.do_fetch(lane, min(self.prefetch, room))
            except redis.RedisError as error:
                raise ConnectionClosed(error) from None
            for data in found:
                if data is not None and (message := self._decode(data, lane)) is not None:
                    self.held[id(message)] = message
                    self._fetched.append(message)

    def _decode(self, data: bytes, lane: str) -> RedisMessage | None:
        try:
            return RedisMessage(Message.decode(data), self, lane)
        except DecodeError:
            logger.warning("a message that is not one of ours was dropped", queue=self.queue_name)
            return None

    def _put_back(self, messages: Sequence[RedisMessage]) -> None:
        tokens: dict[str, list[str]] = {}
        for message in messages:
            tokens.setdefault(message.lane, []).append(message.token)
        try:
            for lane, of_lane in tokens.items():
                self.broker.do_requeue(lane, *of_lane)
            if tokens:
                self.broker.client.publish(self.broker._channel, self.queue_name)
        except redis.RedisError as error:
            raise ConnectionClosed(error) from None
