"""Ids that are made in a process: in order, near its clock, never the same."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentflow import ids
from agentflow.ids import new_id


def ms_of(made: uuid.UUID) -> int:
    return made.int >> 80


def test_it_is_a_uuid_of_version_7_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()

    assert type(made) is uuid.UUID and (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= ms_of(made) <= time.time_ns() // 1_000_000 + 1


def test_a_hundred_thousand_at_once_are_in_order_and_not_ahead_of_the_clock() -> None:
    made = [new_id() for _ in range(100_000)]

    assert made == sorted(made) and len(set(made)) == len(made)
    assert ms_of(made[-1]) <= time.time_ns() // 1_000_000 + 1


def test_threads_make_no_two_alike() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: [new_id() for _ in range(2_000)], range(8)))

    assert len({each.int >> 64 for some in made for each in some}) == 16_000  # by their time already
    assert all(some == sorted(some) for some in made)


def test_a_clock_that_is_set_back_does_not_put_them_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_id()
    monkeypatch.setattr(ids.time, "time_ns", lambda: 1_000_000_000)

    assert before < new_id() < new_id()
