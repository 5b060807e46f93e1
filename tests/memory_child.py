"""What a hungry job does in its child process. Imports nothing: each child starts from nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def eat(*, megabytes: int, until: str | None, report: Callable[[float, str | None], None]) -> int:
    """Hold so much, until a file is there. Leaves one beside it when it is full."""
    held = bytearray()
    for _ in range(megabytes):
        held += b"x" * (1 << 20)
    report(0.5, "full")
    if until is not None:
        Path(f"{until}.full").touch()
        while not Path(until).exists():
            time.sleep(0.02)
    return len(held) >> 20
