"""Kommo's accounts in the calendar: each has its own rhythm, kept in its row."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import Job
from agentflow.kommo import syncing
from agentflow.kommo.syncing import Due
from agentflow.schedules.ticks import Tick
from agentflow.system import Transaction
from scheduler.calendar import Entry

_MODES: Final[tuple[Literal["incremental", "reconcile"], ...]] = ("incremental", "reconcile")


def entries() -> list[Entry]:
    return [_entry(mode) for mode in _MODES]


def _entry(mode: Literal["incremental", "reconcile"]) -> Entry:
    def due(conn: Connection, _now: datetime) -> Iterator[Tick]:
        for each in syncing.due(conn):
            if each.mode == mode:
                yield Tick("", each.at, str(each.account_id), each.organization_id)

    def submit(transaction: Transaction, tick: Tick) -> Job:
        return syncing.submit_due(transaction, Due(UUID(tick.subject), tick.organization_id, mode, tick.at)).job

    return Entry(f"kommo.{mode}", due, submit=submit, asks=True)
