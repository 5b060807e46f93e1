"""Calls that jobs make to outside services: each takes a place among all workers' before it is sent; none is sent over a budget.

Who has to wait is parked by `Wait`: reason `limit` until its place comes, `budget` until midnight UTC or a larger budget.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agentflow import metrics
from agentflow.database import Database, Unavailable
from agentflow.errors import Wait
from agentflow.jobs import budgets, rules
from agentflow.limits import Bucket, Limits, Window

#: So many seconds after midnight those that waited for it are back, one after the other.
_MORNING_S: Final = 60.0
#: A parked job takes about so long from its time to its call; it is told to come so much sooner, that no place stays empty …
_ON_ITS_WAY_S: Final = 0.04
#: … and who is early waits out what is left: parking again would take longer than this.
_NOT_WORTH_PARKING_S: Final = 0.08
_MOST_TRIES: Final = 3
#: How long a service that says "too often", and no more, is left alone by all.
_NOT_SAID_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Service:
    """Somebody else's API. `provider` is what rules name it by; `windows` hold for each organization where no rule says
    otherwise; `credential` tells keys apart, and is no secret (`fingerprint`)."""

    provider: str
    credential: str
    windows: tuple[Window, ...] = ()


def fingerprint(*parts: str | None) -> str:
    """A short name for a credential, from which nobody gets it back."""
    return hashlib.sha256("\0".join(part or "" for part in parts).encode()).hexdigest()[:24]


class Calls:
    """Safe in threads."""

    def __init__(self, database: Database, known: rules.Known, limits: Limits) -> None:
        self._database = database
        self._known = known
        self._limits = limits

    def permit(self, service: Service, organization_id: int, holder: str, within: Sequence[Bucket] = ()) -> None:
        """Take a place for one call. Raises Wait. `holder` keeps its place in the line when it comes back.

        `within` are narrower buckets (a chat, an account), taken before: in one decision with the service's own, whoever waits
        for one of them would stand in the line of all.
        """
        self.within_budget(organization_id)
        seconds = self._take(within, f"{holder}:within") if within else 0.0
        if seconds <= 0:
            buckets = self._buckets(service, organization_id)
            seconds = self._take(buckets, holder)
            if metrics.wants_share(service.provider, organization_id):
                metrics.limit_share(service.provider, organization_id, self._limits.share(buckets[0]))
        if seconds > 0:
            early = max(seconds - _ON_ITS_WAY_S, 0.0)
            raise Wait(early, "limit", message=f"{service.provider} may not be called more often")

    def within_budget(self, organization_id: int) -> None:
        """Raises Wait. Asks the database only for organizations that had reached a budget within the last seconds."""
        if organization_id not in self._known.now().over_budget:
            return
        try:
            with self._database.connection() as conn:
                reached = budgets.reached(conn, organization_id)
        except Unavailable:
            return  # what is known is old, and the job's own writes will say so
        if reached is not None:
            seconds = reached.resets_in_s + random.uniform(0, _MORNING_S)
            raise Wait(seconds, "budget", message=f"the day's budget of {reached.measure} is used up")

    def refused(self, service: Service, organization_id: int, retry_after_s: float | None) -> None:
        """The service answered 429: its credential is closed for all, and the organization's calls become a little slower."""
        for bucket in self._buckets(service, organization_id):
            not_said_s = None if bucket.windows else _NOT_SAID_S
            self._limits.refused(bucket, not_said_s if retry_after_s is None else retry_after_s)

    def exhausted(self, service: Service, for_s: float) -> None:
        """The service said, with a good answer, that the credential has none left for so long."""
        self._limits.close(_credential(service), for_s)

    def _take(self, buckets: Sequence[Bucket], holder: str) -> float:
        for _ in range(_MOST_TRIES):
            seconds = self._limits.take(buckets, holder)
            if not 0 < seconds <= _NOT_WORTH_PARKING_S:
                break
            time.sleep(seconds)
        return seconds

    def _buckets(self, service: Service, organization_id: int) -> list[Bucket]:
        windows = self._known.now().limit_of(organization_id, service.provider, service.windows)
        mine = [Bucket(f"calls:{service.provider}:{organization_id}", windows)] if windows else []
        return [*mine, _credential(service)]


def _credential(service: Service) -> Bucket:
    return Bucket(f"credential:{service.credential}")
