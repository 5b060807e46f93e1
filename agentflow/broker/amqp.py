"""A connection to RabbitMQ and the one thread that owns it: connects, connects anew, says so once.

Builds on private names of pika 1.4.4 (`_terminate_stream`, `_transport`): pinned exactly.
"""

from __future__ import annotations

import copy
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import pika
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed
from pika.exceptions import ProbableAccessDeniedError, ProbableAuthenticationError

from agentflow import log, network, tls
from agentflow.presence import REFUSED_MOST_S, Presence
from agentflow.tls import Trust

#: A frozen peer is noticed after 15 to 30 s (pika looks every heartbeat + 5 s), sooner where an answer is waited for.
HEARTBEAT_S: Final = 10
#: A server that is short of memory or disk blocks publishers. Pika's default is to bear that for ever.
BLOCKED_S: Final = 60.0
CONNECT_S: Final = 5.0
#: TCP, TLS and AMQP together: a frozen server still accepts connections.
HANDSHAKE_S: Final = 8.0
_BACKOFF_MOST_S: Final = 10.0
_SHORT_LIFE_S: Final = 5.0

logger = log.get(__name__)


def parameters_of(url: str, client_name: str, trust: Trust | None = None) -> Any:
    """Pika's parameters for `url`, with every wait bounded; TLS as Trust has it, or `ssl_options` in `url`."""
    parameters = pika.URLParameters(url)
    if parameters.ssl_options is not None and "ssl_options=" not in url:
        parameters.ssl_options = pika.SSLOptions((trust or Trust()).context(), parameters.host)
    parameters.heartbeat = HEARTBEAT_S
    parameters.blocked_connection_timeout = BLOCKED_S
    parameters.socket_timeout = CONNECT_S
    parameters.stack_timeout = HANDSHAKE_S
    parameters.connection_attempts = 1  # the back-off is ours
    parameters.tcp_options = dict(network.KEEPALIVE)
    parameters.client_properties = {"connection_name": client_name}
    return parameters


def presence_of(parameters: Any) -> Presence:
    """For all connections of a process to the server of these parameters."""
    encrypted = "none"
    if (options := parameters.ssl_options) is not None:
        encrypted = "not verified" if options.context.verify_mode == ssl.CERT_NONE else "verified"
    where = {"host": parameters.host, "port": parameters.port, "vhost": parameters.virtual_host, "tls": encrypted}
    return Presence("RabbitMQ", variable="RABBITMQ_URL", where=where)


class Link:
    """One connection. Subclasses make their channels in `opened` and call `is_ready`; `lost` says that all of that is gone.

    `call` runs a function in the connection's thread; everything else of pika's may be used there only. The thread starts at
    the first use, so that it belongs to this side of a fork.
    """

    def __init__(self, parameters: Any, purpose: str, presence: Presence | None = None) -> None:
        self.purpose = purpose
        self.presence = presence or presence_of(parameters)
        self.ready = threading.Event()
        self.last_error: str | None = None
        self.reconnects = 0
        self.server = ""  # product and version
        self.failures = 0  # since it was ready the last time
        self.silent = (
            False  # the last connection was dropped because the peer, which still takes connections, did not answer
        )
        self._parameters = parameters
        self._was_ready = False
        self._connection: Any = None
        self._ioloop: Any = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- from any thread ----

    @property
    def started(self) -> bool:
        return self._thread is not None

    @property
    def away(self) -> bool:
        """Known to be lost, as opposed to not tried yet, or lost a moment ago and about to be made anew."""
        return (self.failures > 1 or self.silent) and not self.ready.is_set()

    def start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name=f"rabbitmq-{self.purpose}", daemon=True)
                self._thread.start()

    def call(self, function: Callable[[], None]) -> bool:
        """Run `function` in the connection's thread, soon, unless the connection is lost before. False when there is none."""
        with self._lock:
            if self._ioloop is None:
                return False
            self._ioloop.add_callback_threadsafe(function)
            return True

    def close(self, timeout_s: float = 2.0) -> None:
        self._closing.set()
        self.call(self._say_goodbye)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # ---- in the connection's thread ----

    def opened(self, connection: Any) -> None:
        raise NotImplementedError

    def lost(self, why: str) -> None:
        """The connection is gone, or could not be made."""

    def is_ready(self) -> None:
        self.presence.came(self.purpose)
        if self._was_ready and self.failures:
            self.reconnects += 1
        self.failures, self.silent, self._was_ready = 0, False, True
        self.ready.set()

    def drop(self, error: Exception) -> None:
        """End the connection without asking a peer that may not answer any more."""
        connection = self._connection
        if connection is not None and connection.is_open:
            connection._terminate_stream(error)

    def channel(self, connection: Any, use: Callable[[Any], None]) -> None:
        """Open a channel whose end, for whatever reason, is the end of the connection: both are made anew."""

        said = connection.server_properties or {}
        self.server = " ".join(_text(said.get(name, "")) for name in ("product", "version"))

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(lambda _channel, reason: self.drop(reason))
            use(channel)

        connection.channel(on_open_callback=opened)

    def _run(self) -> None:
        short_lives = 0  # one that is refused as soon as it is ready must not be made anew in a hot loop
        while not self._closing.is_set():
            began = time.monotonic()
            error = self._live()
            short_lives = short_lives + 1 if time.monotonic() - began < _SHORT_LIFE_S else 0
            if self._closing.is_set():
                return
            self.last_error = why = describe(error)
            self.failures += 1
            refused = _refused(error)
            self.presence.failed(why, self.purpose, refused=refused)
            self.lost(why)
            most_s = REFUSED_MOST_S if refused and self.failures > 1 else _BACKOFF_MOST_S
            most_s = min(most_s, 0.05 * 2.0 ** min(max(self.failures, short_lives), 10))
            self._closing.wait(most_s * random.uniform(0.5, 1.0))

    def _live(self) -> BaseException | None:
        """Connect, and serve the connection until it ends. Returns why it did."""
        ended: list[BaseException] = []

        def end(_connection: Any, error: BaseException) -> None:
            ended.append(error)
            ioloop.stop()

        try:
            parameters = self._to_an_address()
        except OSError as error:
            return error
        ioloop = IOLoop()
        try:
            self._connection = SelectConnection(
                parameters,
                on_open_callback=self.opened,
                on_open_error_callback=end,
                on_close_callback=end,
                custom_ioloop=ioloop,
            )
            with self._lock:
                self._ioloop = ioloop
            if not self._closing.is_set():
                ioloop.start()
        except Exception as error:  # a fault in a callback must not end the thread, nor leak a socket
            logger.exception("unexpected error", link=self.purpose)
            ended.append(error)
            if transport := getattr(self._connection, "_transport", None):
                transport.abort()
        finally:
            with self._lock:
                self._ioloop = None
            self.ready.clear()
            self._connection = None
            ioloop.close()
        return ended[0] if ended else None

    def _to_an_address(self) -> Any:
        """Pika would give each address of a name the whole time limit, and the look-up none; another one after each failure."""
        addresses = network.in_order(self._parameters.host, self._parameters.port, CONNECT_S)
        chosen = copy.copy(self._parameters)
        chosen.host = addresses[self.failures % len(addresses)]
        return chosen

    def _say_goodbye(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.close()
        elif self._ioloop is not None:
            self._ioloop.stop()


def _refused(error: BaseException | None) -> bool:
    """The password or the certificate, which does not pass by itself."""
    return isinstance(_innermost(error), ssl.SSLError | ProbableAuthenticationError | ProbableAccessDeniedError)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def describe(error: BaseException | None) -> str:
    """What went wrong, from inside of pika's wrappers, in one line and without the URL."""
    error = _innermost(error)
    if error is None:
        return "the connection ended"
    if isinstance(error, ssl.SSLError):
        return tls.reason(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _innermost(error: BaseException | None) -> BaseException | None:
    while error is not None and (inner := _inside(error)):
        error = inner
    return error


def _inside(error: BaseException) -> BaseException | None:
    if isinstance(error, AMQPConnectionWorkflowFailed):
        return error.exceptions[-1] if error.exceptions else None
    inner = getattr(error, "exception", None) or (error.args[0] if error.args else None)
    return inner if isinstance(inner, BaseException) else None
