"""The connection: to an address that was checked, within one deadline, its errors in the words of a job."""

from __future__ import annotations

import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore2

from agentflow.deadline import Deadline
from agentflow.errors import Permanent, Transient
from agentflow.fetch.guard import Guard
from agentflow.fetch.urls import Place

MAX_ADDRESSES = 4  # of one name, tried one after the other
# How long a cancelled download may go on waiting for the network.
STOP_CHECK_S = 1.0

# At DEBUG httpcore2 logs the headers of answers, and a Location holds a query string.
logging.getLogger("httpcore2").setLevel(logging.INFO)


class GuardedBackend(httpcore2.NetworkBackend):
    """Connects to an address that it has checked itself; whoever answers the next look-up of that name has no say."""

    def __init__(self, guard: Guard, deadline: Deadline, netloc: str) -> None:
        self._guard = guard
        self._deadline = deadline
        self._netloc = netloc
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            addresses = resolve(host, port, self._deadline.cut(timeout))
        except TimeoutError as err:
            raise httpcore2.ConnectTimeout("name look-up") from err
        except OSError as err:
            raise Transient(f"the host name of {self._netloc} cannot be found", code="url_unreachable") from err
        # All before the first connect: a name with one foot inside is not one that we go to.
        for address in addresses:
            self._guard.check_address(host, port, address)
        error: Exception | None = None
        for address in addresses[:MAX_ADDRESSES]:
            try:
                stream = self._backend.connect_tcp(
                    address, port, timeout=self._deadline.cut(timeout), socket_options=socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as err:
                error = err
            else:
                return _Stream(stream, self._deadline, self._netloc)
        raise error or httpcore2.ConnectError("no address")


class _Stream(httpcore2.NetworkStream):
    """A connection whose every wait counts against the deadline and can be stopped."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline, netloc: str) -> None:
        self._stream = stream
        self._deadline = deadline
        self._netloc = netloc

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        ends = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            wait = max(0.001, min(STOP_CHECK_S, ends - time.monotonic()))
            try:
                return self._stream.read(max_bytes, self._deadline.cut(wait))
            except httpcore2.ReadTimeout:
                if self._deadline.is_over or time.monotonic() >= ends:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.cut(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            secure = self._stream.start_tls(ssl_context, server_hostname, self._deadline.cut(timeout))
        except httpcore2.ConnectError as err:
            cause = err.__cause__  # looked at here, because the pool takes it away
            if isinstance(cause, ssl.SSLCertVerificationError):
                why = f"its certificate is not valid ({cause.verify_message})"
            elif isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                why = cause.reason or "refused"
            else:
                raise  # the connection broke, which may pass
            raise Permanent(f"no TLS connection with {self._netloc}: {why}", code="url_tls") from err
        return _Stream(secure, self._deadline, self._netloc)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def resolve(host: str, port: int, timeout: float) -> list[str]:
    """The addresses of `host` in the order to try them. Raises `OSError`, of which `TimeoutError` is one.

    getaddrinfo has no time limit of its own (usual resolvers: up to 30 s), so it runs in a thread that may be left.
    """
    found: list[str] = []
    error: list[OSError] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))
        except UnicodeError as err:  # a label that the idna codec does not take
            error.append(OSError(str(err)))
        except OSError as err:
            error.append(err)

    thread = threading.Thread(target=look_up, name="fetch-resolve", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    if error:
        raise error[0]
    return found


@contextmanager
def errors(place: Place, deadline: Deadline) -> Iterator[None]:
    """What the connection raises, in the words of a job."""
    try:
        yield
    except httpcore2.TimeoutException as err:
        if deadline.is_over:
            text = f"the download from {place.netloc} took longer than {deadline.total_s:g} s"
        elif isinstance(err, httpcore2.ConnectTimeout):
            text = f"{place.netloc} could not be connected to in time"
        else:
            text = f"{place.netloc} stopped sending"
        raise Transient(text, code="url_timeout") from err
    except httpcore2.ConnectError as err:
        raise Transient(f"{place.netloc} cannot be reached", code="url_unreachable") from err
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as err:
        raise Transient(f"the connection to {place.netloc} broke off", code="url_cut") from err
