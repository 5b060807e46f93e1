"""Answers that are costly to find, and how long they are given again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from agentflow import kept
from agentflow.kept import Kept
from agentflow.system import System
from tests.processes import eventually


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(kept, "monotonic", made.monotonic)
    return made


class Question:
    """Costs what it is told to, and counts how often it was asked."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self.seconds = seconds
        self.asked = 0
        self.__name__ = "question"
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: Exception | None = None

    def __call__(self, _conn: Any, _key: str = "") -> int:
        self.begun.set()
        assert self.may_go_on.wait(60)
        self.asked += 1
        self._clock.now += self.seconds
        if self.error is not None:
            raise self.error
        return self.asked


@pytest.fixture
def get(system: System) -> Iterator[Callable[[Question], int]]:
    found = Kept(system.database)
    with system.database.connection() as conn:
        yield lambda question: found.get(conn, question)


def test_what_is_found_quickly_is_found_each_time(clock: Clock, get: Callable[[Question], int]) -> None:
    question = Question(clock, kept.QUICK_S / 2)

    assert [get(question) for _ in range(3)] == [1, 2, 3]


def test_what_took_long_is_given_again_for_twenty_times_as_long_and_then_found_beside(
    clock: Clock, get: Callable[[Question], int]
) -> None:
    question = Question(clock, 1.0)
    assert [get(question) for _ in range(3)] == [1, 1, 1]
    clock.now += 19.9
    assert get(question) == 1

    clock.now += 0.2
    question.may_go_on.clear()

    assert [get(question) for _ in range(3)] == [1, 1, 1]  # nobody waits, and one thread alone asks
    question.may_go_on.set()
    eventually(lambda: get(question) == 2)
    assert question.asked == 2


def test_what_is_very_old_is_not_told_any_more(clock: Clock, get: Callable[[Question], int]) -> None:
    question = Question(clock, 1.0)
    get(question)

    clock.now += 1000

    assert get(question) == 2


@pytest.mark.parametrize("error", [psycopg.OperationalError("gone"), ValueError("a fault")])
def test_what_cannot_be_found_anew_is_asked_for_by_the_next(
    clock: Clock, get: Callable[[Question], int], error: Exception
) -> None:
    question = Question(clock, 1.0)
    get(question)
    question.error = error
    clock.now += 30

    assert get(question) == 1
    eventually(lambda: question.asked == 2)

    def raises() -> bool:
        try:
            get(question)
        except type(error):
            return True
        return False

    eventually(raises)


def test_an_answer_can_be_forgotten(clock: Clock, system: System) -> None:
    found, questions = Kept(system.database), [Question(clock, 1.0), Question(clock, 1.0)]
    with system.database.connection() as conn:
        for question in questions:
            found.get(conn, question)
        found.forget(questions[0])

        assert [found.get(conn, question) for question in questions] == [2, 1]


def test_an_answer_that_was_being_found_while_it_was_forgotten_is_not_kept(clock: Clock, system: System) -> None:
    found, question = Kept(system.database), Question(clock, 1.0)
    with system.database.connection() as conn:
        question.may_go_on.clear()
        looking = threading.Thread(target=found.get, args=(conn, question))
        looking.start()
        assert question.begun.wait(60)
        found.forget(question)  # a change was made after the question began: what it is about to say is old
        question.may_go_on.set()
        looking.join(60)

        assert found.get(conn, question) == 2


def test_the_same_question_about_something_else_is_another(clock: Clock, system: System) -> None:
    found, question = Kept(system.database), Question(clock, 1.0)
    with system.database.connection() as conn:
        assert [found.get(conn, question, key) for key in ("one", "two", "one")] == [1, 2, 1]


def test_no_more_than_so_many_are_kept(clock: Clock, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST", 2)
    found, question = Kept(system.database), Question(clock, 1.0)
    with system.database.connection() as conn:
        for key in ("one", "two", "three"):
            found.get(conn, question, key)
        assert found.get(conn, question, "three") == 3
        assert found.get(conn, question, "one") == 4
