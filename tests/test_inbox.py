"""Batches of what threads hand to a loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from agentflow.worker import inbox
from agentflow.worker.inbox import Inbox
from tests.processes import eventually

T = TypeVar("T")


def at_once(get: Callable[[], T]) -> T:
    return get()


def filled(count: int, linger_s: float = 0.0) -> Inbox[int]:
    made = Inbox[int](linger_s)
    for n in range(count):
        made.put(n)
    return made


def test_what_waits_is_taken_together_in_its_order_a_hundred_at_most() -> None:
    box = filled(103)

    assert box.take(at_once) == list(range(100))
    assert box.take(at_once) == [100, 101, 102]


def test_a_wait_is_ended_by_whatever_comes_first() -> None:
    box = Inbox[int]()
    taken = list[list[int]]()
    for action in (box.wake, lambda: box.put(1)):
        thread = threading.Thread(target=lambda: taken.append(box.take(at_once)))
        thread.start()
        action()
        thread.join(30)

    assert taken == [[], [1]]


def test_a_wake_among_items_is_no_item() -> None:
    box = filled(1)
    box.wake()
    box.put(2)

    assert box.take(at_once) == [0, 2]


@pytest.mark.parametrize("last", [1, 2])
def test_what_comes_by_ones_and_twos_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    box = filled(last, linger_s=60.0)
    box.take(at_once)
    monkeypatch.setattr(inbox, "sleep", lambda _s: pytest.fail("it waits"))
    box.put(7)

    assert box.take(at_once) == [7]


def test_under_load_it_waits_for_twice_as_many_as_the_last_time() -> None:
    box = filled(3, linger_s=60.0)
    box.take(at_once)
    taken = list[list[int]]()
    box.put(0)
    thread = threading.Thread(target=lambda: taken.append(box.take(at_once)))
    thread.start()
    for n in range(1, 6):
        time.sleep(0.01)
        assert not taken
        box.put(n)
    box.put(6)  # the first one is out already: six more make twice three

    eventually(lambda: taken == [[0, 1, 2, 3, 4, 5, 6]])
    thread.join(30)


def test_it_waits_no_longer_than_it_may() -> None:
    box = filled(50, linger_s=0.01)
    box.take(at_once)
    box.put(1)

    assert box.take(at_once) == [1]
