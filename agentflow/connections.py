"""Pooled connections to others' servers, on which every wait ends: at the call's deadline, within a second of its job's stop.

httpx2 knows time-outs for single waits only, and a thread that sits in `recv` hears of no cancellation. So its transport gets
a network backend of ours, which waits in slices; a connection serves one call after the other, hence the call's deadline is
not a part of it but of the context.
"""

from __future__ import annotations

import functools
import logging
import math
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import httpcore2
import httpx2

from agentflow import USER_AGENT
from agentflow.deadline import Deadline
from agentflow.errors import Transient

CONNECT_TIMEOUT_S: Final = 10.0
STOP_CHECK_S: Final = 1.0
#: A hundred embeddings of 3072 numbers are 4 MB of JSON.
MAX_ANSWER_BYTES: Final = 64 << 20
_CONNECTIONS: Final = 32
_IDLE_S: Final = 30.0

# Both would log each request's address.
logging.getLogger("httpx2").setLevel(logging.WARNING)
logging.getLogger("httpcore2").setLevel(logging.INFO)


class NoAnswer(Transient):
    """`sent`: the request may have arrived, and what it asks for may have been done."""

    def __init__(self, message: str, *, code: str, sent: bool) -> None:
        super().__init__(message, code=code)
        self.sent = sent


@dataclass(frozen=True)
class Head:
    """An answer whose body is still to be read."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]
    too_large: Transient

    def read(self) -> bytes:
        """The whole body. Raises `Transient` when there is no end of it."""
        body = bytearray()
        for piece in self.pieces:
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise self.too_large
        return bytes(body)


class Connections:
    """The connections of a process to one kind of server, shared by its threads.

    `server` is what errors call it ("the model server"), `code` what their codes begin with. At most `most` at once: who wants
    one more waits for it.
    """

    def __init__(self, server: str, code: str, *, most: int = _CONNECTIONS) -> None:
        self._server = server
        self._code = code
        self._transport = _Transport(most)
        self._client = httpx2.Client(
            transport=self._transport,
            headers={"User-Agent": USER_AGENT},
            follow_redirects=False,  # the key would travel along
        )

    @property
    def open(self) -> int:
        """How many stand now, idle ones among them."""
        return self._transport.open

    @contextmanager
    def send(
        self,
        method: str,
        url: str,
        *,
        total_s: float,
        check: Callable[[], None],
        headers: Mapping[str, str],
        **content: Any,
    ) -> Iterator[Head]:
        """Send, and give the answer's head; its body is read inside the block. `content` as httpx2 takes it: json, data, files.

        Raises `NoAnswer` with a code that ends in _timeout, _unreachable or _cut, and whatever `check` does.
        """
        deadline = Deadline(total_s, check)
        token = _deadline.set(deadline)
        try:
            deadline.cut(None)
            # The deadline knows nothing of the wait for a free connection.
            timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=min(total_s, CONNECT_TIMEOUT_S))
            with self._client.stream(method, url, headers=dict(headers), timeout=timeout, **content) as response:
                too_large = Transient(f"{self._server}'s answer is too large", code=f"{self._code}_bad_answer")
                yield Head(response.status_code, response.headers, response.iter_bytes(), too_large)
        except httpx2.TimeoutException as err:
            unreachable = isinstance(err, httpx2.ConnectTimeout | httpx2.PoolTimeout)
            text = f"{self._server} did not answer within {total_s:g} s"
            raise self._no_answer(text, "unreachable" if unreachable else "timeout", sent=not unreachable) from err
        except httpx2.ConnectError as err:
            raise self._no_answer(f"{self._server} cannot be reached", "unreachable", sent=False) from err
        except (httpx2.TransportError, httpx2.DecodingError) as err:
            raise self._no_answer(f"{self._server} broke off its answer", "cut", sent=True) from err
        finally:
            _deadline.reset(token)

    def close(self) -> None:
        self._client.close()

    def _no_answer(self, text: str, how: str, *, sent: bool) -> NoAnswer:
        return NoAnswer(text, code=f"{self._code}_{how}", sent=sent)


_deadline: ContextVar[Deadline] = ContextVar("deadline")


class _Transport(httpx2.HTTPTransport):
    def __init__(self, most: int) -> None:
        super().__init__(verify=_tls())
        self._pool.close()
        self._pool = httpcore2.ConnectionPool(
            ssl_context=_tls(),
            max_connections=most,
            keepalive_expiry=_IDLE_S,
            network_backend=_Backend(),
        )

    @property
    def open(self) -> int:
        return len(self._pool.connections)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Backend(httpcore2.NetworkBackend):
    def __init__(self) -> None:
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        timeout = _deadline.get().cut(timeout)
        return _Stream(self._backend.connect_tcp(host, port, timeout, local_address, socket_options))


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        deadline = _deadline.get()
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            wait = max(0.001, min(STOP_CHECK_S, ends - time.monotonic()))
            try:
                return self._stream.read(max_bytes, deadline.cut(wait))
            except httpcore2.ReadTimeout:
                if deadline.is_over or time.monotonic() >= ends:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _deadline.get().cut(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _deadline.get().cut(timeout)))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
