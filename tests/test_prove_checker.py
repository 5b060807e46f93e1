"""The checker of `agentflow prove`: a history without fault passes, and each fault written into it is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from agentflow.prove import checker
from agentflow.prove.checker import Accepted, Evidence, Violation
from agentflow.prove.history import Event, Row
from agentflow.prove.receiver import Delivery

START = datetime(2030, 1, 1, tzinfo=UTC)
JOB, CHILD, CALLBACK, BATCH = (UUID(int=n) for n in (1, 2, 3, 4))
ONE, OTHER = "agentflow worker host 11", "agentflow worker host 22"
WEB = "agentflow web host 9"


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


def submitted(job: UUID = JOB, **more: Any) -> Event:
    fields: dict[str, Any] = {"fence": 0, "attempt": 0, "crashes": 0, "run_at": at(0), "wake_at": at(30), "sent": at(0)}
    return Event(0, at(0), WEB, job, None, "queued", **{**fields, "cancel": False, "finished": False, **more})


def claimed(second: float, fence: int = 1, attempt: int = 1, writer: str = ONE, job: UUID = JOB, **more: Any) -> Event:
    fields = {
        "fence_was": fence - 1,
        "fence": fence,
        "attempt_was": attempt - 1,
        "attempt": attempt,
        "crashes_was": 0,
        "crashes": 0,
        "worker": uuid4(),
        "lease": at(second + 6),
        "run_at": at(0),
        "cancel": False,
        "finished": False,
    }
    return Event(0, at(second), writer, job, "queued", "running", **{**fields, **more})


def left(before: Event, second: float, state: str, writer: str = ONE, **more: Any) -> Event:
    """Out of running, from what the row was after `before`."""
    fields = {
        "fence_was": before.fence,
        "fence": before.fence,
        "attempt_was": before.attempt,
        "attempt": before.attempt,
        "crashes_was": before.crashes,
        "crashes": before.crashes,
        "worker_was": before.worker,
        "lease_was": before.lease,
        "run_at": at(second) if state == "queued" else before.run_at,
        "wake_at": at(second) if state == "queued" else None,
        "cancel": False,
        "finished": state != "queued",
    }
    return Event(0, at(second), writer, before.job, "running", state, **{**fields, **more})


def heartbeat(before: Event, second: float, writer: str = ONE, **more: Any) -> Event:
    fields = {"worker": before.worker, "lease": at(second + 6), "finished": False}
    return left(before, second, "running", writer, **{**fields, **more})


def story() -> list[Event]:
    """Parked, failed, handed back, rescued from a dead worker, and then it went well: two attempts."""
    first = claimed(1)
    parked = left(first, 2, "queued", attempt=0, reason="limit")
    second = claimed(3, fence=2)
    failed = left(second, 4, "queued", reason="retry")
    third = claimed(6, fence=3, attempt=2)
    handed_back = left(third, 7, "queued", attempt=1, reason="handback")
    fourth = claimed(8, fence=4, attempt=2)
    beat = heartbeat(fourth, 9)
    rescued = left(beat, 16, "queued", OTHER, attempt=1, crashes=1, reason="worker lost")
    fifth = claimed(18, fence=5, attempt=2, writer=OTHER, crashes_was=1, crashes=1)
    done = left(fifth, 19, "succeeded", OTHER)
    return [submitted(), first, parked, second, failed, third, handed_back, fourth, beat, rescued, fifth, done]


def changed(n: int, **more: Any) -> list[Event]:
    return [replace(event, **more) if i == n else event for i, event in enumerate(story())]


def rules(found: Sequence[Violation]) -> set[str]:
    return {violation.rule for violation in found}


def test_a_story_without_fault_passes() -> None:
    assert checker.check_story(story()) == []


def _resurrected() -> list[Event]:
    return [*story(), replace(claimed(20, fence=6, attempt=3, crashes_was=1, crashes=1), was="succeeded")]


def _claimed_while_running() -> list[Event]:
    first = claimed(1)
    return [
        submitted(),
        first,
        replace(claimed(2, fence=2, attempt=2, writer=OTHER), was="running", worker_was=first.worker),
    ]


BAD_STORIES: dict[str, tuple[Callable[[], list[Event]], str]] = {
    "made in the middle": (lambda: [submitted(fence=1)], "a beginning that is none"),
    "a change that was not recorded": (lambda: [e for i, e in enumerate(story()) if i != 2], "a gap in the history"),
    "deleted while it waits": (lambda: [submitted(), Event(0, at(1), WEB, JOB, "queued", None, fence_was=0)], "lost"),
    "a failure without a claim": (
        lambda: [submitted(), replace(left(claimed(1, fence=0, attempt=0), 1, "failed"), was="queued")],
        "an edge that does not exist",
    ),
    "claimed although it runs": (_claimed_while_running, "a fence that moves without a claim"),
    "it runs after its end": (_resurrected, "ended twice"),
    "a claim that skips a fence": (lambda: changed(3, fence=3), "a claim that does not raise the fence by one"),
    "a finish that raises the fence": (lambda: changed(11, fence=6), "a fence that moves without a claim"),
    "running without a lease": (lambda: changed(1, lease=None), "running without holder or lease, or the reverse"),
    "waiting for ever": (lambda: changed(2, wake_at=None), "waiting without an end, or the reverse"),
    "rung in an hour": (lambda: changed(2, wake_at=at(3600)), "not to be rung for too long"),
    "an end without a time": (lambda: changed(11, finished=False), "ended without a time, or the reverse"),
    "waits although cancelled": (lambda: changed(2, cancel=True), "cancelled, and waits again"),
    "claimed although cancelled": (lambda: changed(3, cancel=True), "claimed after it was cancelled"),
    "a key without a slot": (lambda: changed(1, key="k"), "a key without a slot, or the reverse"),
    "claimed too soon": (lambda: changed(3, run_at=at(60)), "claimed before its time"),
    "a claim for nothing": (lambda: changed(3, attempt=0), "a claim that does not count as an attempt"),
    "taken from the living": (lambda: changed(9, lease_was=at(20)), "taken from a holder whose lease is not over"),
    "finished by another": (lambda: changed(11, writer=ONE), "written by a process that does not hold it"),
    "its lease renewed by another": (lambda: changed(8, writer=OTHER), "written by a process that does not hold it"),
    "a holder who changes": (lambda: changed(8, worker=uuid4()), "a holder that changes without a claim"),
    "parking that costs": (lambda: changed(2, attempt=1), "an attempt spent on waiting"),
    "a deploy that costs": (lambda: changed(6, attempt=2), "an attempt spent on waiting"),
    "a death that costs": (lambda: changed(9, attempt=2), "an attempt spent on waiting"),
    "a failure for free": (lambda: changed(4, attempt=0), "a failed attempt that does not count"),
}


@pytest.mark.parametrize("name", BAD_STORIES)
def test_a_fault_in_a_story_is_found(name: str) -> None:
    bad, rule = BAD_STORIES[name]

    assert rule in rules(checker.check_story(bad()))


def test_a_rescue_from_a_lease_of_another_clock_is_allowed() -> None:
    assert checker.check_story(changed(9, lease_was=at(3600))) == []


# ---- keys ----


def test_a_line_of_a_key_is_held_to_its_limit_and_its_slots() -> None:
    a, b, c = (claimed(n, job=UUID(int=n), key="k", slot=n % 2) for n in (10, 11, 12))

    assert checker.check_key("k", 2, [a, b, left(a, 13, "succeeded"), c]) == []
    assert rules(checker.check_key("k", 1, [a, b])) == {"more jobs of a key at once than allowed"}
    assert rules(checker.check_key("k", 3, [a, b, c])) == {"two jobs in one slot"}


# ---- the rows, the promises, the world outside ----


def row(id_: UUID = JOB, **more: Any) -> Row:
    fields: dict[str, Any] = {
        "type": "ping",
        "state": "succeeded",
        "attempt": 1,
        "max_attempts": 5,
        "crashes": 0,
        "fence": 1,
        "parent_id": None,
        "batch_id": None,
        "idempotency_key": None,
        "has_callback": False,
        "then_jobs": 0,
        "attempts_recorded": 1,
        "retries": 0,
        "created_at": at(0),
        "started_at": at(1),
        "finished_at": at(2),
        "error": None,
    }
    return Row(id=id_, **{**fields, **more})


PROMISE = Accepted(JOB, "k1", "ping", frozenset({"succeeded"}))
SECOND = at(1.5).timestamp()
EFFECT = Delivery("effects", str(JOB), str(JOB), 1, SECOND, True, 200)
TOLD = Delivery("callbacks", str(CALLBACK), str(JOB), None, SECOND, True, 200)


def found_in(*rows: Row, **more: Any) -> set[str]:
    """The rules that this end of a run breaks, with a history that fits it."""
    evidence = Evidence(
        rows={r.id: r for r in rows}, limits={}, **{"batches": [], "accepted": [], "deliveries": [], **more}
    )
    stories = []
    for r in rows:
        one = claimed(1, job=r.id, fence=r.fence, attempt=1)
        ends = [] if r.state in ("queued", "running") else [left(one, 2, r.state)]
        begun = submitted(r.id) if r.fence == 1 else replace(submitted(r.id), fence=0)
        stories.append([begun, one, *ends])
    return rules(checker.check(evidence, stories, []))


def test_an_end_without_fault_passes() -> None:
    rows = [
        row(has_callback=True, then_jobs=1, batch_id=BATCH, idempotency_key="k1"),
        row(CHILD, parent_id=JOB),
        row(CALLBACK, type="deliver_callback", parent_id=JOB),
    ]
    promise = replace(PROMISE, effect=True)

    assert found_in(*rows, accepted=[promise], deliveries=[EFFECT, TOLD], batches=[(BATCH, 1, 1, 0, 0)]) == set()


@pytest.mark.parametrize(
    ("rule", "rows", "more"),
    [
        ("lost", [], {"accepted": [PROMISE]}),
        ("not ended", [row(state="running", finished_at=None, attempts_recorded=0)], {}),
        ("ended otherwise than asked", [row(state="failed")], {"accepted": [PROMISE]}),
        ("accepted twice", [row(), row(CHILD)], {"accepted": [PROMISE, replace(PROMISE, id=CHILD)]}),
        ("accepted twice", [row(idempotency_key="k"), row(CHILD, idempotency_key="k")], {}),
        ("attempts that do not count the claims", [row(attempts_recorded=2)], {}),
        ("an attempt spent on waiting", [row(attempt=2)], {}),
        ("a next job missing or too much", [row(then_jobs=1)], {}),
        ("a next job missing or too much", [row(state="failed", then_jobs=1), row(CHILD, parent_id=JOB)], {}),
        ("a callback missing or too much", [row(has_callback=True)], {}),
        ("a callback missing or too much", [row(), row(CALLBACK, type="deliver_callback", parent_id=JOB)], {}),
        ("a batch that miscounts", [row(batch_id=BATCH)], {"batches": [(BATCH, 1, 0, 1, 0)]}),
        ("effect not applied once", [row()], {"accepted": [replace(PROMISE, effect=True)]}),
        (
            "effect not applied once",
            [row()],
            {"accepted": [replace(PROMISE, effect=True)], "deliveries": [EFFECT, EFFECT]},
        ),
        ("callback not applied once", [row(CALLBACK, type="deliver_callback", parent_id=JOB)], {}),
        (
            "a callback about another job",
            [row(CALLBACK, type="deliver_callback", parent_id=CHILD)],
            {"deliveries": [TOLD]},
        ),
        (
            "delivered after its successor finished",
            [row(fence=2, attempts_recorded=2)],
            {"deliveries": [EFFECT, replace(EFFECT, at=at(2.5).timestamp(), applied=False)]},
        ),
        (
            "delivered after its successor finished",
            [row(CALLBACK, type="deliver_callback", parent_id=JOB)],
            {"deliveries": [TOLD, replace(TOLD, at=at(2.5).timestamp(), applied=False)]},
        ),
    ],
)
def test_a_fault_at_the_end_is_found(rule: str, rows: list[Row], more: dict[str, Any]) -> None:
    assert rule in found_in(*rows, **more)


def test_a_row_whose_history_says_otherwise_is_found() -> None:
    evidence = Evidence(rows={JOB: row()}, batches=[], limits={}, accepted=[], deliveries=[])

    assert rules(checker.check(evidence, [[submitted()]], [])) == {"a row that its history does not lead to"}


def test_what_the_load_saw_itself_is_reported() -> None:
    seen = [Violation("refused what is allowed", None, "422")]

    evidence = Evidence(rows={}, batches=[], limits={}, accepted=[], deliveries=[], seen=seen)
    assert checker.check(evidence, [], []) == seen
