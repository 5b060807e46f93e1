"""What an effect does in its child process before it has its effect."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def block(*, milliseconds: int, report: Callable[[float, str | None], None]) -> None:
    """Sit in a C call that holds the interpreter."""
    report(0.0, "blocking")
    ctypes.PyDLL(None).usleep(milliseconds * 1000)
