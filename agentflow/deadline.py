"""One end for all steps of a request: connecting, sending, each piece that is read."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpcore2


class Deadline:
    """`check` is called at each step, and raises where the caller has to stop."""

    def __init__(self, total_s: float, check: Callable[[], None]) -> None:
        self.total_s = total_s
        self._check = check
        self._ends = time.monotonic() + total_s

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
