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
    assert len(waiting) > 60
    assert waiting[-1] - waiting[0] > 4


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
    # Five in a hundred fewer than before: 95 in a minute, of which four are taken.
    time.sleep(0.7)
    burst = [there.take([bucket], f"burst {n}") for n in range(120)]
    assert burst.count(0.0) == 91


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
