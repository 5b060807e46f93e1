"""When a schedule ticks. The one place that computes times; scheduler and web both ask it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MAX_CRON_CHARACTERS: Final = 200
#: So many ticks of a cron line are looked at to learn how close together they may come.
_LOOKED_AT: Final = 60


class InvalidWhen(ValueError):
    """This is no time to be at. `field` names what is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class When:
    """One of three: a line of `cron` by the clocks of `time_zone`, `every_s` seconds from `starts_at`, or `once_at`.

    On a day when clocks change a line with a fixed hour ticks once, as Debian's cron has it: at the first moment after an hour
    that is left out, at the first of two. A line for every hour or minute goes by time that passes, as intervals do.
    """

    cron: str | None = None
    every_s: int | None = None
    once_at: datetime | None = None
    time_zone: str = "UTC"
    starts_at: datetime = EPOCH

    def after(self, moment: datetime) -> datetime | None:
        """The first tick later than `moment`, in UTC; None: there is none. Raises InvalidWhen for a zone that is not known."""
        if self.once_at is not None:
            return self.once_at.astimezone(UTC) if self.once_at > moment else None
        if self.every_s is not None:
            passed = math.floor((moment - self.starts_at).total_seconds() / self.every_s)
            # A schedule ticks for the first time an interval after its start.
            return self.starts_at.astimezone(UTC) + timedelta(seconds=self.every_s * max(1, passed + 1))
        assert self.cron is not None  # noqa: S101 - one of the three
        local = moment.astimezone(self._zone())
        # In the second of two equal hours the library names the first one's ticks, which are over.
        return next((tick for tick in self._lines(local) if tick > moment), None)

    def following(self, moment: datetime, number: int) -> list[datetime]:
        """The next `number` ticks, or as many as there are."""
        found: list[datetime] = []
        while len(found) < number and (tick := self.after(found[-1] if found else moment)) is not None:
            found.append(tick)
        return found

    def missed(self, first: datetime, now: datetime, most: int = 1000) -> int:
        """How many ticks came due after `first`, until `now`; counted up to `most`."""
        if self.every_s is not None:
            return max(0, math.floor((now - first).total_seconds() / self.every_s))
        number, tick = 0, self.after(first)
        while tick is not None and tick <= now and number < most:
            number, tick = number + 1, self.after(tick)
        return number

    def check(self, now: datetime, *, min_interval_s: int) -> None:
        """Raises InvalidWhen."""
        if sum(each is not None for each in (self.cron, self.every_s, self.once_at)) != 1:
            raise InvalidWhen("cron", "give one of cron, every_s and at")
        self._zone()
        if self.cron is not None:
            self._check_cron(self.cron, now, min_interval_s)
        elif self.every_s is not None and self.every_s < min_interval_s:
            raise InvalidWhen("every_s", f"must be at least {min_interval_s} (SCHEDULE_MIN_INTERVAL)")
        elif self.once_at is not None and self.once_at <= now:
            raise InvalidWhen("at", "lies in the past")

    def _check_cron(self, line: str, now: datetime, min_interval_s: int) -> None:
        if len(line) > MAX_CRON_CHARACTERS:
            raise InvalidWhen("cron", f"is longer than {MAX_CRON_CHARACTERS} characters")
        if len(line.split()) != 5:
            raise InvalidWhen("cron", "needs five fields: minute, hour, day of month, month, day of week")
        try:
            ticks = self.following(now, _LOOKED_AT)
        except CronSimError as error:
            raise InvalidWhen("cron", f"{str(error)[:1].lower()}{str(error)[1:]}") from None
        if not ticks:
            raise InvalidWhen("cron", "never comes true")
        closest_s = min(((later - tick).total_seconds() for tick, later in pairwise(ticks)), default=math.inf)
        if closest_s < min_interval_s:
            raise InvalidWhen(
                "cron",
                f"ticks after {closest_s:g} s; at least {min_interval_s} s (SCHEDULE_MIN_INTERVAL) must lie between",
            )

    def _zone(self) -> ZoneInfo:
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise InvalidWhen("time_zone", "is not the name of a time zone, such as Europe/Berlin") from None

    def _lines(self, local: datetime) -> Iterator[datetime]:
        assert self.cron is not None  # noqa: S101 - asked for cron lines only
        return (tick.astimezone(UTC) for tick in CronSim(self.cron, local))
