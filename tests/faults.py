"""Faults on order, for the servers that stand for vendors."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Fault:
    kind: str
    chance: float = 1.0
    times: int | None = None  # None: until it is healed
    path: str = ""  # only what begins so
    seconds: float = 0.0
    when: Callable[[Any], bool] = lambda subject: True
    struck: int = 0


class Faults:
    """What goes wrong, and how often. The same seed and the same questions strike the same."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self._ordered: list[Fault] = []
        self._lock = threading.Lock()

    def order(self, kind: str, **how: Any) -> Fault:
        fault = Fault(kind, **how)
        with self._lock:
            self._ordered.append(fault)
        return fault

    def heal(self) -> None:
        with self._lock:
            self._ordered.clear()

    def strike(self, kind: str, subject: Any = None, path: str = "") -> Fault | None:
        """The fault that hits this subject now, if one does; `path` is where it happens."""
        with self._lock:
            for fault in self._ordered:
                meant = fault.kind == kind and fault.times != 0 and path.startswith(fault.path) and fault.when(subject)
                if meant and self.random.random() < fault.chance:
                    fault.times = None if fault.times is None else fault.times - 1
                    fault.struck += 1
                    return fault
        return None
