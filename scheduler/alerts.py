"""Raising alerts without Prometheus: those of the table whose gauges the scheduler has itself.

Of several schedulers one watches (agentflow/alerts/standing.py). While Postgres is away that is the one that held the lease when
it went: nobody else can take it, and what it has told it keeps in mind, since there is nowhere to write it down.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Final
from uuid import uuid4

import psycopg
from prometheus_client import Metric

from agentflow import gauges, health, log, metrics
from agentflow.alerts import standing, telling
from agentflow.alerts.judging import judge
from agentflow.alerts.standing import Standing
from agentflow.alerts.table import with_thresholds
from agentflow.alerts.telling import NotTold, Receiver
from agentflow.database import Connection, Unavailable
from agentflow.system import System

logger = log.get(__name__)

#: Above what a look may take, with a database that is slow and two receivers that do not answer.
_LEASE_S: Final = 60.0
_OF_POSTGRES: Final = "PostgresUnreachable"


class Watch:
    """One look judges, writes down and tells. Safe in one thread at a time."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._alerts = with_thresholds(dict(system.settings.alert_thresholds))
        self._for_s = {alert.name: float(alert.for_s) for alert in self._alerts}
        self._holder = uuid4()
        self._holds = False
        self._away: _Away | None = None

    @cached_property
    def receivers(self) -> list[Receiver]:
        return telling.receivers(self._system)

    def look(self) -> bool:
        """False where another scheduler watches, or there is no database."""
        lease_s = max(_LEASE_S, 4.0 * self._system.settings.alert_interval)
        connections = health.of(
            self._system
        ).connections()  # brings their gauges up to date, whether they answer or not
        try:
            if not connections["database"].connected:
                raise psycopg.OperationalError(str(connections["database"].last_error))
            with self._system.database.connection() as conn:
                self._holds = standing.hold(conn, self._holder, lease_s)
                if self._holds:
                    found = judge(self._alerts, self._gauges(conn))
                    standing.forget_receivers(conn, [receiver.name for receiver in self.receivers])
                    stand = standing.note(conn, found, self._for_s)
        except Unavailable as error:
            self._without_database(error)
            return False
        if self._away is not None:
            self._is_back(self._away)
        if self._holds:
            self._tell(stand)
        return self._holds

    def leave(self) -> None:
        """Another scheduler may go on at once."""
        if self._holds:
            self._holds = False
            with suppress(*Unavailable), self._system.database.connection() as conn:
                standing.let_go(conn, self._holder)

    def _gauges(self, conn: Connection) -> Iterable[Metric]:
        return [*metrics.own(self._system), *gauges.read(self._system, conn)]

    def _tell(self, stand: Sequence[Standing]) -> None:
        for receiver in self.receivers:
            news = [each for each in stand if _is_news(each, receiver.name)]
            if news and self._told(receiver, news):
                with suppress(*Unavailable), self._system.database.connection() as conn:
                    standing.was_told(conn, receiver.name, news)

    @staticmethod
    def _told(receiver: Receiver, news: Sequence[Standing]) -> bool:
        try:
            receiver.tell(news)
        except NotTold as error:
            logger.warning(str(error), receiver=receiver.name)
            return False
        return True

    def _without_database(self, error: BaseException) -> None:
        if not self._holds:
            return
        if self._away is None:
            self._away = _Away()
        if time.monotonic() - self._away.since < self._for_s[_OF_POSTGRES]:
            return
        logger.debug("alerts are not looked at: the database is away", error=str(error).strip())
        for receiver in self.receivers:
            if receiver.name not in self._away.told and self._told(receiver, [self._away.as_standing(ended=False)]):
                self._away.told.add(receiver.name)

    def _is_back(self, away: _Away) -> None:
        for receiver in self.receivers:
            if receiver.name in away.told and self._told(receiver, [away.as_standing(ended=True)]):
                away.told.discard(receiver.name)
        if not away.told:
            self._away = None


class _Away:
    """An outage of Postgres."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.began = datetime.now(UTC)
        self.told: set[str] = set()

    def as_standing(self, *, ended: bool) -> Standing:
        end = datetime.now(UTC) if ended else None
        return Standing(_OF_POSTGRES, {}, 0.0, self.began, self.began, end, frozenset(self.told))


def _is_news(each: Standing, receiver: str) -> bool:
    return {"pending": False, "firing": receiver not in each.told, "resolved": receiver in each.told}[each.status]
