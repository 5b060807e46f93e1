"""Limits of calls to outside services: what is let through, who waits how long, and what a 429 teaches."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentflow import embedded
from agentflow.limits import Bucket, Limits, Window


@pytest.fixture(params=["shared", "alone"])
def limits(request: pytest.FixtureRequest, stack: embedded.Embedded) -> Iterator[Limits]:
    """Over Redis, and without it."""
    client = redis.Redis.from_url(stack.redis_url) if request.param == "shared" else None
    yield Limits(client, f"t-{uuid4()}")
    if client is not None:
        client.close()


def a_bucket(*windows: tuple[int, float]) -> Bucket:
    return Bucket(str(uuid4()), tuple(Window(*window) for window in windows))


def test_a_window_is_longer_by_what_calls_may_be_later_than_others() -> None:
    """Seven that leave within a second and 50 ms arrive within no less than a second."""
    assert [Window(7, per_s).length_ms for per_s in (0.1, 1, 60)] == [105, 1050, 60_050]


def test_a_full_window_lets_nothing_through_until_its_oldest_call_has_left_it(limits: Limits) -> None:
    bucket = a_bucket((5, 600))

    answers = [limits.take([bucket], f"call {n}") for n in range(8)]

    assert answers[:5] == [0.0] * 5
    assert all(590 <= seconds <= 600 + 3 * 120 + 1 for seconds in answers[5:])


def test_who_waits_is_told_times_one_calls_distance_apart(limits: Limits) -> None:
    bucket = a_bucket((10, 100))
    for n in range(10):
        limits.take([bucket], f"call {n}")

    places = [limits.take([bucket], f"waiting {n}") for n in range(1000)]

    distances = [later - sooner for sooner, later in itertools.pairwise(places)]
    assert all(8.5 < distance < 11.5 for distance in distances)  # one place in 10 s, less what the asking took


def test_the_distance_is_that_of_the_window_that_is_full(limits: Limits) -> None:
    bucket = a_bucket((5, 100), (100_000, 86_400))
    for n in range(5):
        limits.take([bucket], f"call {n}")

    places = [limits.take([bucket], f"waiting {n}") for n in range(10)]

    assert all(18 < later - sooner < 21 for sooner, later in itertools.pairwise(places))


@pytest.mark.parametrize("limits", ["shared"], indirect=True)
def test_it_is_known_how_many_calls_each_window_holds(limits: Limits) -> None:
    bucket = a_bucket((5, 600), (4, 3600), (10, 0.001))
    assert (limits.used(bucket), limits.share(bucket)) == ([0, 0, 0], 0.0)

    for n in range(6):
        limits.take([bucket], f"call {n}")
    time.sleep(0.01)  # the time of the shortest window

    assert (limits.used(bucket), limits.share(bucket)) == ([4, 4, 0], 1.0)
    assert limits.used(Bucket("without windows")) is limits.share(Bucket("without windows")) is None


def test_other_windows_begin_another_line(limits: Limits) -> None:
    bucket = a_bucket((1, 600))
    for n in range(20):
        limits.take([bucket], f"call {n}")

    larger = Bucket(bucket.name, (Window(5, 600),))

    assert limits.take([larger], "fresh") == 0.0
    assert [limits.take([larger], f"call {n}") for n in range(1, 4)] == [0.0] * 3
    assert limits.take([larger], "late") > 500


def test_those_who_wait_for_one_bucket_hold_up_nobody_by_another_without_windows(limits: Limits) -> None:
    mine, theirs, credential = a_bucket((1, 600)), a_bucket((5, 600)), Bucket(str(uuid4()))
    for n in range(20):
        limits.take([mine, credential], f"mine {n}")

    assert [limits.take([theirs, credential], f"theirs {n}") for n in range(5)] == [0.0] * 5
    limits.close(credential, 30)
    assert limits.take([theirs, credential], "theirs") > 29


def test_a_close_that_was_announced_makes_nobody_slower(stack: embedded.Embedded) -> None:
    limits, bucket = Limits(redis.Redis.from_url(stack.redis_url), f"t-{uuid4()}"), a_bucket((100, 60))

    limits.close(bucket, 0.2)
    closed = limits.take([bucket], "a")
    time.sleep(closed + 0.05)

    assert closed > 0
    assert [limits.take([bucket], "a" if n == 0 else f"{n}") for n in range(100)].count(0.0) > 95


def test_the_tightest_of_several_windows_decides(limits: Limits) -> None:
    bucket = a_bucket((3, 0.2), (4, 600))

    taken = [limits.take([bucket], f"call {n}") for n in range(3)]
    time.sleep(0.25)
    fourth, fifth = limits.take([bucket], "fourth"), limits.take([bucket], "fifth")

    assert taken == [0.0, 0.0, 0.0]
    assert fourth == 0.0
    assert fifth > 500


def test_a_call_counts_in_all_of_its_buckets_or_in_none(limits: Limits) -> None:
    narrow, wide = a_bucket((1, 600)), a_bucket((2, 600))

    first = limits.take([narrow, wide], "first")
    refused = [limits.take([narrow, wide], f"refused {n}") for n in range(5)]

    assert first == 0.0
    assert min(refused) > 500
    # The refused ones stand in wide's line; what they took of it is nothing.
    other = Bucket(wide.name, (Window(2, 600),))
    assert limits.take([other], "refused 0") == 0.0


def test_who_comes_later_does_not_overtake_those_who_wait(limits: Limits) -> None:
    bucket = a_bucket((2, 1.0))
    for n in range(2):
        limits.take([bucket], f"call {n}")
    place = limits.take([bucket], "waiting")
    time.sleep(place * 0.9)

    late = limits.take([bucket], "late")
    time.sleep(max(0.0, place * 0.1) + 0.02)

    assert late > 0.3
    assert limits.take([bucket], "waiting") == 0.0


def test_those_who_come_back_too_late_stand_in_line_again_and_not_all_at_once(limits: Limits) -> None:
    bucket = a_bucket((5, 0.5))
    for n in range(5):
        limits.take([bucket], f"call {n}")
    for n in range(100):
        limits.take([bucket], f"waiting {n}")
    time.sleep(3)  # nobody worked meanwhile; about 25 places are over

    answers = [limits.take([bucket], f"waiting {n}") for n in range(100)]

    assert answers.count(0.0) <= 10
    waiting = sorted(answer for answer in answers if answer > 0.26)
    assert len(waiting) > 40
    assert waiting[-1] - waiting[0] > 3


def test_never_more_than_the_amount_within_a_window_whoever_asks(stack: embedded.Embedded) -> None:
    prefix, bucket = f"t-{uuid4()}", a_bucket((20, 0.5))
    through: list[float] = []
    until = time.monotonic() + 3.0

    def worker(number: int) -> None:
        client = redis.Redis.from_url(stack.redis_url)
        limits = Limits(client, prefix)
        while time.monotonic() < until:
            seconds = limits.take([bucket], f"worker {number}")
            if seconds:
                time.sleep(min(seconds, max(0.0, until - time.monotonic())))
            else:
                now = client.time()
                through.append(now[0] + now[1] / 1e6)
        client.close()

    workers = [threading.Thread(target=worker, args=(n,)) for n in range(8)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()

    through.sort()
    # Written down a moment after it was decided, hence not the whole half second.
    assert all(later - sooner > 0.35 for sooner, later in zip(through, through[20:], strict=False))
    assert len(through) >= 60


def test_a_refusal_closes_the_bucket_for_all_and_makes_it_slower(stack: embedded.Embedded) -> None:
    prefix, bucket = f"t-{uuid4()}", a_bucket((100, 60))
    here, there = (Limits(redis.Redis.from_url(stack.redis_url), prefix) for _ in range(2))
    limits_before = [here.take([bucket], f"before {n}") for n in range(3)]

    here.refused(bucket, retry_after_s=1.0)
    closed = there.take([bucket], "a")
    time.sleep(closed + 0.05)
    after = there.take([bucket], "a")

    assert limits_before == [0.0] * 3
    assert 0.7 < closed < 1.7
    assert after == 0.0
    # Five in a hundred fewer than before: some 95 in a minute, of which four are taken.
    time.sleep(0.7)
    burst = [there.take([bucket], f"burst {n}") for n in range(120)]
    assert 91 <= burst.count(0.0) <= 93


class Learning:
    """A bucket of 100 calls in a minute, of which time is made to pass."""

    def __init__(self, client: redis.Redis, amount: int = 100) -> None:
        self._client = client
        self._amount = amount
        self._limits = Limits(client, f"t-{uuid4()}")
        self._bucket = a_bucket((amount, 60))
        self.next_place_s = 0.0

    def refused(self) -> None:
        self._limits.refused(self._bucket, retry_after_s=1.0)

    def later(self, seconds: float) -> None:
        """All calls have left the window meanwhile, and nobody waits."""
        calls, state = self._limits._keys(self._bucket)
        self._client.delete(calls)
        self._client.hdel(state, "line", "windows")
        for name in ("closed", "lowered", "quiet"):
            if self._client.hexists(state, name):
                self._client.hincrbyfloat(state, name, -seconds * 1000)

    def let_through(self) -> int:
        """At once, of an empty window."""
        self.later(0)
        for calls in range(self._amount):
            self.next_place_s = self._limits.take([self._bucket], f"{uuid4()}")
            if self.next_place_s:
                return calls
        self.next_place_s = self._limits.take([self._bucket], f"{uuid4()}")
        return self._amount


@pytest.fixture
def learning(stack: embedded.Embedded) -> Iterator[Learning]:
    with redis.Redis.from_url(stack.redis_url) as client:
        yield Learning(client)


def about(calls: float) -> object:
    """It recovers while one looks, and part of a call is a call in a longer window."""
    return pytest.approx(calls, abs=1.5)


def test_refusals_that_follow_each_other_take_off_more_and_more(learning: Learning) -> None:
    left = []
    for _ in range(5):
        learning.refused()
        learning.later(2)
        left.append(learning.let_through())

    assert left == [about(95), about(85.5), about(68.4), about(54.7), about(43.8)]


def test_all_refusals_of_calls_that_were_under_way_are_one(learning: Learning) -> None:
    for _ in range(30):
        learning.refused()
        learning.later(0.02)
    learning.later(2)

    assert learning.let_through() == about(95)


def test_after_a_quiet_time_half_of_a_large_step_is_given_back_and_the_next_refusal_is_a_first_one(
    learning: Learning,
) -> None:
    for _ in range(3):
        learning.refused()
        learning.later(2)
    before = learning.let_through()
    learning.later(70)
    after = learning.let_through()
    learning.refused()
    learning.later(2)

    assert before == about(68.4)
    assert after == about(68.4 + 8.6 + 2.1)
    assert learning.let_through() == about(0.95 * (68.4 + 8.6 + 2.1))


@pytest.mark.parametrize(("seconds", "share"), [(70, 0.021), (300, 0.208), (600, 1)])
def test_what_a_refusal_took_comes_back_slowly_and_within_ten_minutes_all(
    learning: Learning, seconds: float, share: float
) -> None:
    for _ in range(14):
        learning.refused()
        learning.later(2)
    left = 100 * 0.95 * 0.9 * 0.8**12

    learning.later(seconds)

    assert learning.let_through() == about(min(100, left * (1 + 0.5 / 4) + 100 * share))


@pytest.mark.parametrize(("allowed", "refusals"), [(90, 2), (50, 5), (20, 9)])
def test_a_limit_that_a_vendor_lowers_is_found_in_a_few_refusals_and_nine_tenths_of_it_are_used(
    learning: Learning, allowed: int, refusals: int
) -> None:
    refused_at = []
    for look in range(refusals + 10):
        if learning.let_through() > allowed:
            learning.refused()
            refused_at.append(look)
        learning.later(2 if look < refusals else 10)

    assert refused_at[:refusals] == [*range(refusals)]
    # Then one each time that it tries whether there is more.
    assert len(refused_at) <= refusals + 3
    assert 0.9 * allowed <= learning.let_through() <= allowed


def test_a_small_limit_is_lowered_by_less_than_a_call(stack: embedded.Embedded) -> None:
    with redis.Redis.from_url(stack.redis_url) as client:
        learning = Learning(client, amount=7)
        learning.refused()
        learning.later(2)

        assert learning.let_through() == 7
        assert learning.next_place_s == pytest.approx(60 / 0.95, abs=1)  # and not 60


def test_without_redis_a_process_takes_its_share(stack: embedded.Embedded) -> None:
    away = redis.Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    limits = Limits(away, "t", workers=lambda: 4)
    bucket = a_bucket((20, 600))

    answers = [limits.take([bucket], f"call {n}") for n in range(20)]

    assert answers.count(0.0) == 5


def test_a_closed_bucket_is_closed_without_redis_too() -> None:
    limits = Limits(None, "t")
    bucket = Bucket("credential")

    before = limits.take([bucket], "a")
    limits.refused(bucket, retry_after_s=30)

    assert before == 0.0
    assert limits.take([bucket], "b") > 29


@pytest.mark.parametrize("window", [(0, 1), (1, 0), (2_000_000, 1), (5, -1)])
def test_a_window_that_means_nothing_is_refused(window: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="a window allows"):
        Window(*window)
