"""TCP connections to servers by name: every address of a name gets its chance, within one time limit.

A name may have an address of a family that this host cannot reach (IPv6 only, IPv4 only), or one that is dead. The addresses
are raced, a quarter of a second apart, the families in turn (RFC 8305).
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack
from itertools import chain, zip_longest
from typing import Any, Final, NamedTuple

#: Between the start of one attempt and of the next (RFC 8305, section 5).
APART_S: Final = 0.25
#: An idle peer that is gone is noticed after 60 s; one that does not acknowledge what was sent, after 20 s.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Address(NamedTuple):
    """One answer of getaddrinfo."""

    family: int
    socket_address: Any

    @property
    def ip(self) -> str:
        return str(self.socket_address[0])


def resolve(host: str, port: int, timeout_s: float) -> list[Address]:
    """The addresses of `host` in the order to try them. Raises OSError, of which TimeoutError and gaierror are kinds.

    getaddrinfo has no time limit of its own (usual resolvers: up to 30 s), so it runs in a thread that may be left.
    """
    found: list[Address] = []
    error: list[OSError] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(Address(family, where) for family, _, _, _, where in answers))
        except UnicodeError as err:  # a label that the idna codec does not take
            error.append(OSError(str(err)))
        except OSError as err:
            error.append(err)

    thread = threading.Thread(target=look_up, name="resolve", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"the name {host} was not looked up within {timeout_s:g} s")
    if error:
        raise OSError(f"the name {host} cannot be found: {error[0].strerror or error[0]}") from error[0]
    return _families_in_turn(found)


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connected socket, with keep-alives, in blocking mode. Raises OSError when no address answers in time."""
    end = time.monotonic() + timeout_s
    addresses = resolve(host, port, timeout_s)
    return _race(addresses, f"{host} port {port}", end)[1]


def in_order(host: str, port: int, timeout_s: float) -> list[str]:
    """The IP addresses of `host`, one that answers first, for clients that make their sockets themselves. Raises OSError.

    A name with one address is not tried: the client finds out.
    """
    end = time.monotonic() + timeout_s
    addresses = resolve(host, port, timeout_s)
    if len(addresses) == 1:
        return [addresses[0].ip]
    winner, sock = _race(addresses, f"{host} port {port}", end)
    sock.close()
    return [winner.ip, *(address.ip for address in addresses if address is not winner)]


def _families_in_turn(addresses: list[Address]) -> list[Address]:
    """The first one's family first, as the resolver's order says, then the other and back."""
    first = [a for a in addresses if a.family == addresses[0].family]
    other = [a for a in addresses if a.family != addresses[0].family]
    return [a for a in chain.from_iterable(zip_longest(first, other)) if a is not None]


def _race(addresses: list[Address], where: str, end: float) -> tuple[Address, socket.socket]:
    waiting = deque(addresses)
    error: OSError | None = None
    next_at = 0.0
    with ExitStack() as undo:
        selector = undo.enter_context(selectors.DefaultSelector())
        while waiting or selector.get_map():
            now = time.monotonic()
            if now >= end:
                break
            if waiting and (now >= next_at or not selector.get_map()):
                address = waiting.popleft()
                sock = undo.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
                try:
                    _begin(sock, address)
                except OSError as err:
                    error = err
                    continue
                selector.register(sock, selectors.EVENT_WRITE, address)
                next_at = time.monotonic() + APART_S
            pause_s = min(end, next_at) - time.monotonic() if waiting else end - time.monotonic()
            for key, _ in selector.select(max(0.0, pause_s)):
                sock = key.fileobj  # type: ignore[assignment]
                selector.unregister(sock)
                if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    error = OSError(code, errno.errorcode.get(code, str(code)))
                    next_at = 0.0  # this one has lost: the next need not wait
                    continue
                sock.settimeout(None)
                return key.data, socket.socket(fileno=sock.detach())
    if error is not None and not waiting:
        raise OSError(error.errno, _reason(error), where) from None
    raise TimeoutError(f"{where} did not answer in time")


def _begin(sock: socket.socket, address: Address) -> None:
    keep_alive(sock)
    sock.setblocking(False)
    code = sock.connect_ex(address.socket_address)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        raise OSError(code, errno.errorcode.get(code, str(code)))


def keep_alive(sock: socket.socket) -> None:
    """Small messages at once, and an end for a peer that is gone without a word. macOS knows some of the options."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _reason(error: OSError) -> str:
    import os

    return os.strerror(error.errno) if error.errno else str(error)
