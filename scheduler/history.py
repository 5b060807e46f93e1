"""Bringing the history of jobs up to date, which the dashboard's charts are drawn from."""

from __future__ import annotations

import time
from typing import Final

from agentflow.jobs import history
from agentflow.system import System
from scheduler.calendar import Done

#: Counting what waits may take at most such a share of the time: of a million jobs it takes a second.
_SHARE: Final = 0.05


class Rolling:
    """Remembers how long it took, so that it costs the database little however much waits."""

    def __init__(self) -> None:
        self._sample_again_at = 0.0

    def work(self, system: System) -> Done:
        with system.database.connection() as conn:
            history.roll_up(conn)
            if time.monotonic() >= self._sample_again_at:
                began = time.monotonic()
                history.sample_depths(conn)
                ended = time.monotonic()
                self._sample_again_at = ended + (ended - began) / _SHARE
        return Done()
