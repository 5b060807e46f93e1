"""Dramatiq's Redis broker with a bell: a publish beside each enqueue wakes the consumers at once.

Dramatiq polls Redis with a back-off per queue, which is either slow (p95 0.85 s) or busy (7 % of a core). With the bell an
idle worker picks up within milliseconds and asks only once in a while, in case a ring was lost.

Builds on private names of dramatiq 2.2.1 (`do_*`, `_RedisConsumer`'s protocol): pinned exactly.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message
from dramatiq.middleware import Middleware
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentflow import log, network, tls
from agentflow.broker.doorbell import Doorbell
from agentflow.broker.message import Bringing, DeliveredMessage, lane_name, message_for, queue_name
from agentflow.jobs.model import QUEUES, Ring
from agentflow.presence import Presence
from agentflow.tls import Trust

CANCEL: Final = "!cancel"
CONNECT_S: Final = 5.0
#: For a connection that the server closed while it was idle. Upstream's default, three times with pauses and on time-outs, too,
#: makes a frozen server cost four times the time-out.
_ONCE_MORE: Final = Retry(NoBackoff(), 1, (redis.ConnectionError,))
_RECONNECT_S: Final = 1.0
#: How long nothing is published after a failure: doubled from the first to the second. A try may cost the time-out.
_LEFT_ALONE_S: Final = (1.0, 10.0)

logger = log.get(__name__)


def connect(
    url: str,
    *,
    connect_timeout_s: float,
    client_name: str,
    answer_timeout_s: float = 10.0,
    presence: Presence | None = None,
    trust: Trust | None = None,
) -> redis.Redis:
    """A client that connects at its first use, to whatever address of the name answers. Every wait has an end."""
    trust = trust or Trust()
    scheme = urlsplit(url).scheme
    pool = redis.ConnectionPool.from_url(
        url,
        connection_class=_KINDS[scheme],
        presence=presence or presence_of(url, trust),
        socket_connect_timeout=connect_timeout_s,
        socket_timeout=answer_timeout_s,
        client_name=client_name.replace(" ", "-"),
        health_check_interval=30,
        **(trust.redis() if scheme == "rediss" else {}),
        retry=_ONCE_MORE,
    )
    return redis.Redis.from_pool(pool)


def presence_of(url: str, trust: Trust, **callbacks: Any) -> Presence:
    """For all connections of a process to the server that `url` names."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        where: dict[str, Any] = {"host": "socket", "tls": "none"}
    else:
        verified = "verified" if trust.verify and not tls.unverified("", url) else "not verified"
        encrypted = verified if parts.scheme == "rediss" else "none"
        where = {"host": parts.hostname or "localhost", "port": parts.port or 6379, "tls": encrypted}
    return Presence("Redis", variable="REDIS_URL", where=where, **callbacks)


class _Watched(redis.connection.AbstractConnection):
    """Connects when the server is not known to be away, and says how that went."""

    def __init__(self, *, presence: Presence, **others: Any) -> None:
        self.presence = presence
        super().__init__(**others)

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if self._sock:
            return
        if why := self.presence.begin():
            # The client tries once more by itself: what a caller hears is why the first attempt was refused.
            raise type(refusal)(*refusal.args) if (refusal := self.presence.refusal) else redis.ConnectionError(why)
        self.presence.refusal = None
        try:
            super().connect_check_health(check_health, retry_socket_connect)
        except (redis.RedisError, OSError) as error:
            cause = error.__context__ if isinstance(error.__context__, ssl.SSLError) else None
            why = tls.reason(cause) if cause else str(error)
            self.presence.failed(
                why, refused=cause is not None or isinstance(error, redis.AuthenticationError | redis.ResponseError)
            )
            if cause:
                self.presence.refusal = redis.ConnectionError(f"{self.presence.variable}: {why}")
                raise self.presence.refusal from cause
            if isinstance(error, redis.AuthenticationError):
                self.presence.refusal = error
            raise
        except BaseException:
            self.presence.gave_up()
            raise
        self.presence.came()


class _Tcp(redis.Connection):
    def _connect(self) -> socket.socket:
        sock = network.connect(self.host, self.port, float(self.socket_connect_timeout or CONNECT_S))
        sock.settimeout(self.socket_timeout)
        return sock


class _TcpConnection(_Watched, _Tcp):
    pass


class _TlsConnection(_Watched, redis.SSLConnection, _Tcp):
    """The last base is what SSLConnection finds when it asks for a socket to wrap."""


class _SocketConnection(_Watched, redis.UnixDomainSocketConnection):
    pass


_KINDS: Final[dict[str, Any]] = {
    "redis": _TcpConnection,
    "rediss": _TlsConnection,
    "unix": _SocketConnection,
}


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
        self.saturated = False
        self._consumers: list[BellConsumer] = []
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
        self._consumers = [c for c in self._consumers if c.queue_name != queue_name] + [consumer]
        return consumer

    def held(self) -> int:
        return sum(len(consumer.held) for consumer in self._consumers)

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

    def nudge(self) -> None:
        if self.saturated:
            self.saturated = False
            self._ring_all_bells()

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


class BellConsumer(Bringing):
    """Fetches when the bell rang, and only what the process has room for, critical messages first; gives back what nobody claimed
    within a second."""

    UNCLAIMED_S: Final = 1.0

    def __init__(self, broker: BellBroker, queue_name: str, prefetch: int) -> None:
        self.broker = broker
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.lanes = {lane_name(queue_name, critical): critical for critical in (True, False)}
        self.held: dict[str, RedisMessage] = {}  # fetched and not acknowledged, by token
        self._fetched: deque[RedisMessage] = deque()  # of those, what was not handed over yet
        self._lock = threading.Lock()

    def acknowledge(self, message: MessageProxy) -> None:
        """From any thread, once; an acknowledgement of another's message is ignored."""
        if not isinstance(message, RedisMessage) or message.origin is not self:
            return
        with self._lock:
            if message.acknowledged or self.held.pop(message.token, None) is None:
                return
            message.acknowledged = True
        try:
            self.broker.do_ack(message.lane, message.token)
        except redis.RedisError as error:
            # The message comes again when this process is gone, and its claim finds nothing: harmless.
            logger.debug("acknowledgement lost", error=str(error))

    def pass_on(self, message: DeliveredMessage) -> bool:
        return False

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """At shutdown: the messages that no thread took go back to their lists, for the other workers."""
        messages = list(messages)
        self.broker.give_back_own(messages)
        self._put_back([m for m in messages if isinstance(m, RedisMessage) and not m.acknowledged])

    def __next__(self) -> RedisMessage | None:
        bell = self.broker.bell(self.queue_name)
        bell.clear()  # before the fetch: a ring during it is not lost
        self._give_back_unclaimed()
        if not self.broker.can_hear():
            bell.wait(self.broker.idle_poll_s)  # set when the connection is there again
            return None
        if not self._fetched:
            self._fetch()
        while self._fetched:
            message = self._fetched.popleft()
            if self.broker.known(message.actor_name):
                return message
            # A worker of an older version, in the middle of a deploy: another one may know the type.
            message.given_back = True
            self.broker.give_back([message], 30.0)
        bell.wait(self.UNCLAIMED_S / 4 if self.held else self.broker.idle_poll_s)
        return None

    def close(self) -> None:
        with self._lock:
            held = list(self.held.values())
        self._put_back(held)

    def _fetch(self) -> None:
        for lane, critical in self.lanes.items():
            room = self.broker.room(critical)
            if room <= 0:
                self.broker.saturated = (
                    True  # from here on whoever makes room rings; look again, for one who was quicker
                )
                room = self.broker.room(critical)
            if room <= 0:
                continue
            try:
                found = self.broker.do_fetch(lane, min(self.prefetch, room))
            except redis.RedisError as error:
                raise ConnectionClosed(error) from None
            for data in found:
                if data is not None and (message := self._decode(data, lane)) is not None:
                    with self._lock:
                        self.held[message.token] = message
                    self._fetched.append(message)

    def _decode(self, data: bytes, lane: str) -> RedisMessage | None:
        try:
            return RedisMessage(Message.decode(data), self, lane)
        except DecodeError:
            logger.warning("a message that is not one of ours was dropped", queue=self.queue_name)
            return None

    def _give_back_unclaimed(self) -> None:
        if not self.held:
            return
        too_old = time.monotonic() - self.UNCLAIMED_S
        with self._lock:
            late = [m for m in self.held.values() if m.delivered_at < too_old and not m.given_back]
            for message in late:
                message.given_back = True
        if late:
            self.broker.give_back(late, 1.0)

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
