"""The arithmetic of estimates: who goes before, when a place is free, and ranges that hold as often as they say."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from agentflow.jobs.estimates import (
    RESOLUTION_S,
    Calibration,
    Durations,
    Estimate,
    Lane,
    Outcome,
    free_after,
    turns_before,
)
from agentflow.jobs.forecasts import MOST_OPEN

# ---- how long jobs take ----


def test_what_is_left_of_a_job_is_what_those_that_took_longer_needed() -> None:
    known = Durations([1.0, 2.0, 3.0, 10.0, 12.0, 14.0])

    assert known.left(0.0) == 3.0
    assert known.left(5.0) == 7.0  # the median of 10, 12 and 14
    assert known.left(13.0) == 1.0
    assert known.left(40.0) == 40.0  # longer than all of them: as long again


def test_progress_counts_the_more_the_further_it_is() -> None:
    known = Durations([100.0])

    assert known.left(10.0, None) == known.left(10.0, 0.0) == 90.0
    assert known.left(10.0, 0.5) == pytest.approx(0.5 * 10.0 + 0.5 * 90.0)
    assert known.left(90.0, 0.99) == pytest.approx(0.99 * 90 / 99 + 0.01 * 10.0)
    assert known.left(90.0, 1.0) == 0.0


# ---- when a place is free ----


def test_a_free_slot_is_free_now() -> None:
    assert free_after(2, [5.0], 0, 0.0) == 0.0
    assert free_after(2, [], 1, 3.0) == 0.0
    assert free_after(2, [5.0, 3.0], 0, 0.0) == 3.0


def test_jobs_ahead_take_the_slots_in_turn() -> None:
    assert free_after(2, [5.0, 3.0], 1, 4.0) == 5.0  # until 7 and 5
    assert free_after(2, [5.0, 3.0], 2, 8.0) == 7.0
    assert free_after(1, [], 3, 6.0) == 6.0


def test_what_runs_beyond_the_slots_has_to_end_first() -> None:
    assert free_after(1, [1.0, 4.0, 9.0], 0, 0.0) == 9.0
    assert free_after(2, [1.0, 4.0, 9.0], 0, 0.0) == 4.0


def test_a_long_line_flows_as_the_work_in_it() -> None:
    assert free_after(10, [1.0] * 10, 10_000, 20_000.0) == pytest.approx(2000, rel=0.01)
    assert free_after(7.5, [1.0] * 10, 10_000, 20_000.0) == pytest.approx(20_000 / 7.5, rel=0.02)


# ---- who goes before ----


def test_a_lane_alone_has_its_own_line_before_it() -> None:
    assert turns_before(Lane(1, 1, 5, 2.0), 5, []) == (5, 10.0)


def test_lanes_of_a_class_take_turns_by_the_work_that_they_ask_for() -> None:
    mine, other = Lane(1, 1, 3, 1.0), Lane(2, 1, 100, 2.0)

    jobs, work_s = turns_before(mine, 3, [other])

    assert (jobs, work_s) == (3 + 2, 3.0 + 4.0)  # my fourth comes when both have had four seconds
    assert turns_before(mine, 3, [Lane(2, 1, 1, 2.0)])[0] == 3 + 1  # it has no more than one
    assert turns_before(mine, 3, [Lane(2, 1, 100, 2.0, virtual_s=3.0)])[0] == 3 + 0.5  # it had some already
    assert turns_before(mine, 3, [Lane(2, 1, 100, 2.0, weight=2.0)])[0] == 3 + 4
    assert turns_before(mine, 3, [Lane(2, 1, 0, 2.0, per_s=0.1).after(10.0)])[0] == 3 + 1  # one more has come by then


def test_classes_come_in_order_with_a_tenth_for_low() -> None:
    critical, low = Lane(2, 0, 40, 1.0), Lane(2, 2, 1000, 1.0)

    assert turns_before(Lane(1, 1, 50, 1.0), 50, [critical])[0] == 90
    assert turns_before(Lane(1, 0, 50, 1.0), 50, [Lane(2, 1, 40, 1.0)])[0] == 50
    assert turns_before(Lane(1, 1, 90, 1.0), 90, [low])[0] == pytest.approx(100)
    assert turns_before(Lane(1, 2, 1, 1.0), 1, [critical])[0] == pytest.approx(1 + 18)
    assert turns_before(Lane(1, 2, 9, 1.0), 9, [critical])[0] == 9 + 40


# ---- ranges ----


def test_there_is_no_range_before_enough_was_seen() -> None:
    assert Calibration([]).around(10.0) == Estimate(10.0, 10.0)
    assert Calibration([Outcome(10.0, 11.0)] * 10).around(10.0).low is None


def test_what_is_wrong_by_the_same_factor_each_time_is_set_right() -> None:
    chance = random.Random(1)
    seen = [Outcome(x, 2 * x) for x in (chance.uniform(1, 100) for _ in range(200))]

    said = Calibration(seen).around(10.0)

    assert said.expected == 10.0
    assert said.middle == pytest.approx(20.0, rel=0.05)
    assert said.low is not None and said.high is not None and said.high - said.low < 1.0


def test_short_and_long_forecasts_are_judged_each_by_its_like() -> None:
    chance = random.Random(2)
    short = [Outcome(0.2, 0.2 * math.exp(chance.gauss(0, 1))) for _ in range(150)]
    long = [Outcome(300.0, 300.0 * math.exp(chance.gauss(0, 0.05))) for _ in range(150)]
    seen = Calibration([each for pair in zip(short, long, strict=True) for each in pair])

    assert width(seen.around(300.0)) / 300 < 0.3
    assert width(seen.around(0.2)) / 0.2 > 1.0


def test_new_outcomes_count_more_than_old_ones() -> None:
    before, now = [Outcome(10.0, 10.0)] * 300, [Outcome(10.0, 40.0)] * 250

    assert Calibration([*before, *now]).around(10.0).middle == pytest.approx(40.0)


def test_what_is_overdue_counts_before_it_has_ended() -> None:
    early = [Outcome(10.0, 10.0)] * 60
    overdue = [Outcome(10.0, 35.0, inside=False, over=False)] * 60
    not_yet = [Outcome(10.0, 35.0, over=False)] * 60

    late, in_time = (Calibration([*early, *others]).around(10.0).high or 0.0 for others in (overdue, not_yet))
    assert late >= 35.0 and in_time == pytest.approx(10.0)


def test_ranges_that_do_not_hold_are_made_wider() -> None:
    chance = random.Random(3)
    scores = [math.exp(chance.gauss(0, 0.5)) for _ in range(400)]
    hits = Calibration([Outcome(10.0, 10 * s, inside=True) for s in scores])
    misses = Calibration([Outcome(10.0, 10 * s, inside=n % 3 > 0) for n, s in enumerate(scores)])

    assert hits.margin < 0 < misses.margin
    assert width(misses.around(10.0)) > width(hits.around(10.0))


KEPT = 400


@dataclass
class Shop:
    """A queue with so many threads at a time, fed by an arrival rate over time: simulated, job by job."""

    rate: Callable[[float], float]
    threads: Callable[[float], int]
    spread: float


CALM = Shop(lambda t: 6.0, lambda t: 8, 0.3)
WAVES = Shop(lambda t: 7.0 + 5.0 * math.sin(t / 40), lambda t: 8, 0.5)
BURSTS = Shop(lambda t: 30.0 if t % 90 < 15 else 2.0, lambda t: 8, 0.3)
LOST_WORKERS = Shop(lambda t: 6.0, lambda t: 8 if t < 120 else 5, 0.3)


@pytest.mark.parametrize(
    ("shop", "bias"),
    [
        pytest.param(BURSTS, 1.0, id="bursts"),
        pytest.param(LOST_WORKERS, 0.4, id="lost_workers_biased"),
        pytest.param(CALM, 1.0, id="calm", marks=pytest.mark.long),
        pytest.param(WAVES, 1.0, id="waves", marks=pytest.mark.long),
        pytest.param(WAVES, 0.4, id="waves_biased", marks=pytest.mark.long),
        pytest.param(BURSTS, 2.5, id="bursts_biased", marks=pytest.mark.long),
        pytest.param(LOST_WORKERS, 1.0, id="lost_workers", marks=pytest.mark.long),
    ],
)
def test_nine_in_ten_jobs_end_within_their_range(shop: Shop, bias: float) -> None:
    """2,000 jobs under a load that changes, also where what is thought to be left is wrong by a constant factor."""
    held, widths = run(shop, bias, random.Random(4))

    assert 0.85 <= statistics.mean(held) <= 0.97
    assert statistics.median(widths) < 1.5


def run(shop: Shop, bias: float, chance: random.Random) -> tuple[list[bool], list[float]]:
    """Whether each range held, and how wide it was as a multiple of what happened."""
    known = Durations([duration(shop, chance) for _ in range(200)])
    now, free = 0.0, [0.0] * shop.threads(0.0)
    jobs: list[tuple[float, float]] = []  # started, ended
    open_: list[tuple[float, float, Estimate]] = []  # ends at, was asked at, what was said
    outcomes: list[Outcome] = []
    held, widths = [], []
    calibration = Calibration([])
    for number in range(2000):
        now += chance.expovariate(shop.rate(now))
        while len(free) > shop.threads(now):
            free.remove(min(free))
            heapq.heapify(free)
        ahead = next((n for n, (started, _) in enumerate(reversed(jobs)) if started <= now), len(jobs))
        lately = jobs[max(0, len(jobs) - ahead - 60) : len(jobs) - ahead]
        running = [now - started for started, ended in lately if ended > now]
        start_s = free_after(len(free), [known.left(e) for e in running], ahead, ahead * known.mean)
        if number % 20 == 0:
            for each in [each for each in open_ if each[0] <= now]:
                open_.remove(each)
                outcomes.append(judged(each[2], each[0] - each[1]))
            waiting = [judged(said, now - asked, over=False) for _, asked, said in open_]
            calibration = Calibration([*outcomes[-KEPT:], *waiting])
        said = calibration.around((start_s + known.median) * bias)

        started = max(now, heapq.heappop(free))
        ended = started + duration(shop, chance)
        heapq.heappush(free, ended)
        jobs.append((started, ended))
        if len(open_) < MOST_OPEN:  # as it is remembered
            open_.append((ended, now, said))
        if said.low is not None and said.high is not None:
            held.append(said.low <= ended - now <= said.high)
            widths.append(width(said) / (ended - now))
    return held, widths


def judged(said: Estimate, happened_s: float, *, over: bool = True) -> Outcome:
    inside = None
    if said.low is not None and said.high is not None and (over or happened_s > said.high):
        inside = said.low <= happened_s <= said.high
    return Outcome(said.expected, happened_s, inside=inside, over=over)


def duration(shop: Shop, chance: random.Random) -> float:
    return RESOLUTION_S + math.exp(chance.gauss(0, shop.spread))


def width(said: Estimate) -> float:
    assert said.low is not None and said.high is not None
    return said.high - said.low
