"""When a job will start and end: arithmetic on measured figures, without a database and without a clock.

A forecast is computed from what is known now: who goes before, how long such jobs took, what runs. It is wrong by some factor,
and how wrong the last ones were says how far to trust the next: its range is the forecast times quantiles of the ratios of what
happened to what was expected. That is split conformal prediction (Lei et al., JASA 2018, arXiv:1604.04173) with the log of the
ratio as the score; weighted towards new outcomes and such as were expected to take about as long (Barber et al., Annals of
Statistics 2023, arXiv:2202.13415), since load changes; and made wider or narrower by whether the last ranges held (Gibbs and
Candès, NeurIPS 2021, arXiv:2106.00263; on the width, as the quantile tracker of Angelopoulos, Candès and Tibshirani, NeurIPS
2023, arXiv:2307.16895, since while load rises no earlier outcome was as late as the next one).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Final

#: What a range is to hold.
COVERAGE: Final = 0.9
#: Shorter times are not told apart: the ratio of two of them says nothing.
RESOLUTION_S: Final = 0.05
#: A class's share of each round of the relay, where low jobs wait.
_LOW_SHARE: Final = 0.1
#: So many jobs per slot are placed one by one; what is beyond them flows.
_PLACED: Final = 8
#: Outcomes, in effect, below which more distant ones are taken in: of 19 the extremes are a 90 % range.
_ENOUGH: Final = 40
#: An outcome counts half when so many newer ones are there.
_HALF_LIFE: Final = 250
#: Outcomes count by how near their expectation was, in powers of e; widened until there are enough.
_NEAR: Final = 0.7
_OTHER_TYPE: Final = 0.4
#: By how much a range that did not hold widens the next ones on either side, in powers of e (the step of the quantile tracker),
#: and the most that this comes to; below nothing it is a factor of the width.
_STEP: Final = 0.05
_NARROWEST, _WIDEST = -0.5, 0.7


# ---- how long jobs take ----


class Durations:
    """What jobs of one type took lately, in seconds; at least one."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._sorted = sorted(seconds)

    @cached_property
    def mean(self) -> float:
        return sum(self._sorted) / len(self._sorted)

    @property
    def median(self) -> float:
        return self._median(0)

    def left(self, elapsed_s: float, progress: float | None = None) -> float:
        """Seconds that one which has run for `elapsed_s` still needs: the median of those that took longer.

        One that has outlasted all others needs, for all that is known, as long again. Progress (0 to 1) that it reports counts
        the more the further it is.
        """
        longer = bisect_right(self._sorted, elapsed_s)
        left = self._median(longer) - elapsed_s if longer < len(self._sorted) else max(elapsed_s, RESOLUTION_S)
        if progress is None or progress <= 0:
            return left
        by_progress = elapsed_s * (1 - progress) / progress
        return progress * by_progress + (1 - progress) * left

    def _median(self, first: int) -> float:
        return self._sorted[(first + len(self._sorted) - 1) // 2]


# ---- who goes before, and when a place is free ----


@dataclass(frozen=True, slots=True)
class Lane:
    """Due jobs of an organization and class that nobody was rung for yet, and how many more come in a second. `cost_s` is what
    one of them takes; `virtual_s` the work done over the weight, by which the relay takes turns."""

    organization_id: int
    priority: int
    jobs: float
    cost_s: float
    virtual_s: float = 0.0
    weight: float = 1.0
    per_s: float = 0.0

    def after(self, seconds: float) -> Lane:
        """With those that will have come by then."""
        return replace(self, jobs=self.jobs + seconds * self.per_s)


def turns_before(mine: Lane, ahead: int, others: Sequence[Lane]) -> tuple[float, float]:
    """How many jobs of all lanes get their turn before the one that has `ahead` others before it in its own, and their work in
    seconds.

    As the relay does it: classes in order, but a tenth for low, and within a class by virtual time.
    """
    place = mine.virtual_s + (ahead + 1) * mine.cost_s / mine.weight
    jobs, work_s = float(ahead), ahead * mine.cost_s
    higher, lower = [], []
    for lane in others:
        if lane.priority == mine.priority:
            turns = min(lane.jobs, max(0.0, (place - lane.virtual_s) * lane.weight / lane.cost_s))
            jobs, work_s = jobs + turns, work_s + turns * lane.cost_s
        elif lane.priority < mine.priority:
            higher.append(lane)
        elif lane.priority == 2:
            lower.append(lane)
    before = sum(lane.jobs for lane in higher)
    # Those of a low job's round are nine times as many, while there are so many.
    share = min(1.0, (jobs + 1) * (1 - _LOW_SHARE) / _LOW_SHARE / before) if mine.priority == 2 and before else 1.0
    work_s += share * sum(lane.jobs * lane.cost_s for lane in higher)
    jobs += share * before
    behind = sum(lane.jobs for lane in lower)
    if behind:
        share = min(1.0, jobs * _LOW_SHARE / (1 - _LOW_SHARE) / behind)
        work_s += share * sum(lane.jobs * lane.cost_s for lane in lower)
        jobs += share * behind
    return jobs, work_s


def free_after(slots: float, left_s: Sequence[float], ahead: float, work_s: float) -> float:
    """Seconds until a slot is free for the one behind `ahead` others, which are `work_s` of work together.

    `left_s`: what each running job still needs. `slots` may be a fraction: of what is measured to be in use.
    """
    count = max(1, round(slots))
    cost_s = work_s / ahead if ahead else 0.0
    running = sorted(left_s)
    surplus = max(0, len(running) - count)  # those have to end before anybody else may begin
    free_at = running[surplus:] + [0.0] * (count - len(running))
    if surplus:
        free_at = [max(each, running[surplus - 1]) for each in free_at]
    heapq.heapify(free_at)
    placed = min(round(ahead), count * _PLACED)
    for _ in range(placed):
        heapq.heapreplace(free_at, free_at[0] + cost_s)
    return free_at[0] + max(0.0, ahead - placed) * cost_s / max(slots, 1.0)


# ---- how far to trust it ----


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was expected and what happened, in seconds. `inside`: whether the range that was given held; None: none was given.

    `over` is false while it has not happened yet: it takes `happened_s` at least. That says something once it is longer than the
    range was.
    """

    expected_s: float
    happened_s: float
    type: str = ""
    inside: bool | None = None
    over: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now. `expected` was computed, `middle` is what that has come to lately; the range from `low` to `high` holds
    with COVERAGE, and is None while too little is known of earlier forecasts."""

    expected: float
    middle: float
    low: float | None = None
    high: float | None = None


class Calibration:
    """What the last forecasts of one kind came to; the oldest outcome first."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        counted = [o for o in outcomes if o.over or o.inside is False]
        self._scores = [_log(o.happened_s) - _log(o.expected_s) for o in counted]
        self._at = [_log(o.expected_s) for o in counted]
        self._types = [o.type for o in counted]
        self._fresh = [0.5 ** ((len(counted) - 1 - i) / _HALF_LIFE) for i in range(len(counted))]
        self.margin = _margin([o.inside for o in outcomes])

    def around(self, expected_s: float, type_: str = "") -> Estimate:
        """The estimate for a forecast: corrected by what forecasts like it were wrong by, and its range."""
        weights = self._weights(_log(expected_s), type_)
        if weights is None:
            return Estimate(expected_s, expected_s)
        effective = sum(weights) ** 2 / sum(w * w for w in weights)
        # The next outcome is one of n + 1, of which n are known.
        missing = (1 - COVERAGE) / 2
        tail = max(0.0, missing - (1 - missing) / effective)
        order = sorted(zip(self._scores, weights, strict=True))
        cumulated = list(accumulate(weight for _, weight in order))

        def at(level: float) -> float:
            index = bisect_right(cumulated, level * cumulated[-1])
            return order[min(index, len(order) - 1)][0]

        def seconds(score: float) -> float:
            return max(0.0, (expected_s + RESOLUTION_S) * math.exp(score) - RESOLUTION_S)

        middle = at(0.5)
        beyond, factor = max(0.0, self.margin), math.exp(min(0.0, self.margin))
        low, high = (
            middle + factor * (at(level) - middle) + way * beyond for level, way in ((tail, -1), (1 - tail, 1))
        )
        return Estimate(expected_s, seconds(middle), seconds(low), seconds(high))

    def _weights(self, here: float, type_: str) -> list[float] | None:
        if len(self._scores) < _ENOUGH:
            return None
        far = [((at - here) / _NEAR) ** 2 / 2 for at in self._at]
        base = [w * (1.0 if t == type_ else _OTHER_TYPE) for w, t in zip(self._fresh, self._types, strict=True)]
        while True:
            weights = [w * math.exp(-d) for w, d in zip(base, far, strict=True)]
            squares = sum(w * w for w in weights)
            if max(far) < 0.01 or (squares > 0 and sum(weights) ** 2 / squares >= _ENOUGH):
                return weights
            far = [d / 2 for d in far]


def _margin(held: Sequence[bool | None]) -> float:
    """How much further than the quantiles a range has to go: more after misses, less after hits, neither where COVERAGE hold."""
    margin = 0.0
    for inside in held:
        if inside is not None:
            margin += _STEP * ((not inside) - (1 - COVERAGE))
            margin = min(_WIDEST, max(_NARROWEST, margin))
    return margin


def _log(seconds: float) -> float:
    return math.log(max(0.0, seconds) + RESOLUTION_S)
