"""Connections to Redis: to whatever address of the name answers, with every wait bounded, and known to be there or away."""

from __future__ import annotations

import socket
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentflow import network, tls
from agentflow.presence import Presence
from agentflow.tls import Trust

CONNECT_S: Final = 5.0
#: For a connection that the server closed while it was idle. Upstream's default, three times with pauses and on time-outs, too,
#: makes a frozen server cost four times the time-out.
_ONCE_MORE: Final = Retry(NoBackoff(), 1, (redis.ConnectionError,))


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
