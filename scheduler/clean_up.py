"""Deleting by retention, a little at a time: batches with pauses, counted, and an alarm when it does not get to the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from agentflow.database import Connection
from agentflow.jobs import retention
from agentflow.system import System
from scheduler.calendar import Done

_PAUSE_S: Final = 0.05  # between two batches, so that vacuum and the workers keep up
#: What is not deleted after so long is left for the next run: a backlog of one kind must not hold up the others.
BUDGET_S: Final = 120.0


def in_batches(delete: Callable[[Connection], int], *, batch: int = retention.BATCH) -> Callable[[System], Done]:
    """Work that calls `delete` until it deletes less than a batch, or the time is over."""

    def work(system: System) -> Done:
        def one() -> int:
            with system.database.connection() as conn:
                return delete(conn)

        return until_done(system, one, batch)

    return work


def until_done(system: System, one_batch: Callable[[], int], batch: int) -> Done:
    total, end = 0, time.monotonic() + BUDGET_S
    while True:
        deleted = one_batch()
        total += deleted
        if deleted < batch or system.closing:
            return Done({"deleted": total})
        if time.monotonic() >= end:
            return Done({"deleted": total}, behind=True)
        time.sleep(_PAUSE_S)


def once(delete: Callable[[Connection], int]) -> Callable[[System], Done]:
    """Work that deletes all at once, of which there is never much."""

    def work(system: System) -> Done:
        with system.database.connection() as conn:
            return Done({"deleted": delete(conn)})

    return work
