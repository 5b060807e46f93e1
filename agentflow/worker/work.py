"""What one running job takes of the memory, gathered while it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from agentflow.errors import OutOfMemory

if TYPE_CHECKING:
    from agentflow.worker.memory import Memory

#: What is over sooner grew by nothing that could be told from what its neighbours did.
_SHORT_S: Final = 1.0


class Work:
    """`counted`: it has its place in the ledger, and `memory` is told of each process at it beside the worker's own."""

    def __init__(self, type_: str, input_bytes: int | None, memory: Memory) -> None:
        self.type: Final = type_
        self.input_bytes = input_bytes
        self.memory: Final = memory
        self.counted = False
        self.killed: OutOfMemory | None = None
        self._of_processes = 0
        self._started = time.monotonic()
        self._before: int | None = None
        self._grown = 0

    def had(self, peak: int) -> None:
        """A process at it has had so much."""
        self._of_processes = max(self._of_processes, peak)

    def saw(self, resident: int, jobs: int) -> None:
        """What the worker's own process has now, while so many jobs run in it."""
        if self._before is None:
            self._before = resident
        self._grown = max(self._grown, (resident - self._before) // max(1, jobs))

    @property
    def peak(self) -> int:
        """Bytes, in all processes; what grew in the worker's own is an estimate."""
        own = self._grown if time.monotonic() - self._started >= _SHORT_S else 0
        return self._of_processes + own
