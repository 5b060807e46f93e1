"""How much is sent."""

from __future__ import annotations

import threading
import time


class Allowance:
    """`burst` at once, and so many a second after that. Safe in threads."""

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = float(burst)
        self._at = time.monotonic()
        self._refused = 0
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """How many were refused since the last one that was not; None: so is this one."""
        with self._lock:
            now = time.monotonic()
            self._left = min(float(self._burst), self._left + (now - self._at) * self._per_s)
            self._at = now
            if self._left < 1:
                self._refused += 1
                return None
            self._left -= 1
            refused, self._refused = self._refused, 0
            return refused
