"""What a ping does in its child process. Imports little, since each child starts from nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def block(*, milliseconds: int, report: Callable[[float, str | None], None]) -> None:
    """Sit in a C call that holds the interpreter: no Python, and no signal handler of Python's, runs until it ends."""
    report(0.0, "blocking")
    ctypes.PyDLL(None).usleep(milliseconds * 1000)
