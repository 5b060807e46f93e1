"""Pooled connections on which every wait ends: at the deadline of the call, and within a second of a stop of its job.

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


@dataclass(frozen=True)
class Head:
    """An answer whose body is still to be read."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]

    def read(self) -> bytes:
        """The whole body. Raises `Transient` when there is no end of it."""
        body = bytearray()
        for piece in self.pieces:
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise Transient("the model's answer is too large", code="model_bad_answer")
        return bytes(body)


class Connections:
    """The connections of a process to its model servers, shared by its threads."""

    def __init__(self) -> None:
        self._client = httpx2.Client(
            transport=_Transport(),
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            headers={"User-Agent": USER_AGENT},
            follow_redirects=False,  # the key would travel along
        )

    @contextmanager
    def post(
        self, url: str, *, total_s: float, check: Callable[[], None], headers: Mapping[str, str], **content: Any
    ) -> Iterator[Head]:
        """Send, and give the answer's head; its body is read inside the block. `content` as httpx2 takes it: json, data, files.

        Raises `Transient` with the code model_timeout, model_unreachable or model_cut, and whatever `check` does.
        """
        deadline = _Deadline(total_s, check)
        token = _deadline.set(deadline)
        try:
            deadline.cut(None)
            with self._client.stream("POST", url, headers=dict(headers), **content) as response:
                yield Head(response.status_code, response.headers, response.iter_bytes())
        except httpx2.TimeoutException as err:
            code = "model_unreachable" if isinstance(err, httpx2.ConnectTimeout) else "model_timeout"
            raise Transient(f"the model server did not answer within {total_s:g} s", code=code) from err
        except httpx2.ConnectError as err:
            raise Transient("the model server cannot be reached", code="model_unreachable") from err
        except (httpx2.TransportError, httpx2.DecodingError) as err:
            raise Transient("the model server broke off its answer", code="model_cut") from err
        finally:
            _deadline.reset(token)

    def close(self) -> None:
        self._client.close()


class _Deadline:
    def __init__(self, total_s: float, check: Callable[[], None]) -> None:
        self._ends = time.monotonic() + total_s
        self._check = check

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends

    def cut(self, timeout: float | None) -> float:
        """`timeout` or what is left, whichever is shorter. Raises httpcore2's error when nothing is left."""
        self._check()
        left = self._ends - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("deadline")
        return left if timeout is None else min(timeout, left)


_deadline: ContextVar[_Deadline] = ContextVar("deadline")


class _Transport(httpx2.HTTPTransport):
    def __init__(self) -> None:
        super().__init__(verify=_tls())
        self._pool.close()
        self._pool = httpcore2.ConnectionPool(
            ssl_context=_tls(),
            max_connections=_CONNECTIONS,
            keepalive_expiry=_IDLE_S,
            network_backend=_Backend(),
        )


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
