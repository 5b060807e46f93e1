"""Ports for servers that are started here."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOWEST: Final = 10_000
#: Where Linux does not say it.
_OUTGOING_FROM: Final = 32_768
_LOOKS: Final = 1_000

_lock = threading.Lock()
_last: int | None = None


def free_port(*, room: int = 1) -> int:
    """A port at which nobody listens on the loopback, the first of `room` in a row that are kept for it.

    It lies below those that the kernel gives to outgoing connections: its server finds it free however long it takes to start,
    and again when it comes back after having been down. Processes that look for ports at the same time begin at different places.
    Raises OSError.
    """
    global _last
    upper = _outgoing_from()
    with _lock:
        for _ in range(_LOOKS):
            port = random.randrange(_LOWEST, upper) if _last is None else _last + 1
            if port + room > upper:
                port = _LOWEST
            _last = port + room - 1
            with suppress(OSError), socket.socket() as made:
                made.bind(("127.0.0.1", port))
                return port
    raise OSError(f"no free port from {_LOWEST} to {upper - 1}")


def _outgoing_from() -> int:
    """`ip_local_port_range` in the kernel's ip-sysctl documentation."""
    with suppress(OSError, ValueError, IndexError):
        found = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        return found if found > _LOWEST + _LOOKS else _OUTGOING_FROM
    return _OUTGOING_FROM
