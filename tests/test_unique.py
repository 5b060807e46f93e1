"""Unique keys: which of many requests become jobs, also when they come at the same moment, and in batches."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

import actors  # noqa: F401 - declares the product's types
from agentflow.jobs import batches, intake, records, requests, retention
from agentflow.jobs.intake import Submitted
from agentflow.jobs.registry import Payload, job
from agentflow.jobs.requests import InvalidJob, NewJob, Prepared
from agentflow.jobs.unique import Unique
from tests import core_support
from tests.core_support import (
    ORGANIZATION,
    claim,
    column,
    finish,
    pass_time,
    read,
    value,
)
from tests.mutations import mutate_code
from tests.one_database import database_url, original
from tests.two_at_once import Background, together
from tests.web_support import client, count, problem

__all__ = ["client", "database_url", "original"]

Connection = psycopg.Connection
Connect = Callable[[], Connection]
THROTTLE = Unique("k", "throttle", 60)
DEBOUNCE = Unique("k", "debounce", 30, 100)


class Contact(Payload):
    contact: int


@job("unique_sync", payload=Contact, unique=lambda p: Unique(f"contact:{p.contact}"))
def sync(context: Any, payload: Contact) -> None:
    """Single by what it is about, without the caller's help."""


def prepare(unique: Unique | None, text: int = 0, organization_id: int = ORGANIZATION, **more: Any) -> Prepared:
    new = NewJob("ping", {"sleep_ms": text}, unique=unique, **more)
    return requests.prepare(new, organization_id=organization_id, max_payload_bytes=10_000)


def submit(conn: Connection, unique: Unique | None, text: int = 0, **more: Any) -> Submitted:
    with conn.transaction():
        return intake.submit(conn, ORGANIZATION, prepare(unique, text, **more))


def time_passes(conn: Connection, seconds: float) -> None:
    pass_time(conn, seconds)
    conn.execute("update agentflow.unique_keys set accepted_at = accepted_at - make_interval(secs => %s)", (seconds,))


def jobs(conn: Connection) -> int:
    return int(value(conn, "select count(*) from agentflow.jobs"))


# ---- keep ----


def test_while_one_is_queued_or_running_the_others_answer_it_and_after_its_end_there_is_a_new_one(
    conn: Connection,
) -> None:
    first = submit(conn, Unique("k"))
    queued = submit(conn, Unique("k"), 5)
    (running,) = claim(conn, uuid4(), first.job)
    during = submit(conn, Unique("k"))
    finish(conn, running)
    after = submit(conn, Unique("k"))

    assert first.created and first.found is None and first.rings
    assert (queued.job.id, queued.created, queued.found, queued.rings) == (first.job.id, False, "kept", ())
    assert during.job.id == first.job.id and during.job.state == "running"
    assert after.created and after.job.id != first.job.id
    assert column(conn, first.job, "payload")["sleep_ms"] == 0


def test_keys_are_of_an_organization_and_a_type(conn: Connection) -> None:
    submit(conn, Unique("k"))

    elsewhere = intake.submit(conn, 2, prepare(Unique("k"), organization_id=2))
    other_key = submit(conn, Unique("K"))
    no_key = submit(conn, None)

    assert elsewhere.created and other_key.created and no_key.created


def test_a_type_may_say_what_is_single_and_a_caller_may_say_otherwise(conn: Connection) -> None:
    def hand_in(contact: int, unique: Unique | None = None) -> Submitted:
        new = NewJob("unique_sync", {"contact": contact}, unique=unique)
        prepared = requests.prepare(new, organization_id=ORGANIZATION, max_payload_bytes=1000)
        return intake.submit(conn, ORGANIZATION, prepared)

    first, again, other, named = hand_in(1), hand_in(1), hand_in(2), hand_in(1, Unique("mine"))

    assert again.job.id == first.job.id
    assert len({first.job.id, other.job.id, named.job.id}) == 3


# ---- throttle ----


def test_at_most_one_in_a_period_whatever_became_of_it(conn: Connection) -> None:
    first = submit(conn, THROTTLE)
    (running,) = claim(conn, uuid4(), first.job)
    finish(conn, running, "failed")
    time_passes(conn, 59)
    within = submit(conn, THROTTLE)
    time_passes(conn, 2)
    after = submit(conn, THROTTLE)

    assert (within.job.id, within.job.state, within.found) == (first.job.id, "failed", "throttled")
    assert after.created and after.job.id != first.job.id
    assert submit(conn, THROTTLE).job.id == after.job.id  # the period runs anew


# ---- debounce ----


def test_the_newest_request_replaces_what_waits_and_moves_its_start(conn: Connection) -> None:
    first = submit(conn, DEBOUNCE, 1, correlation_id="old", then=(NewJob("ping", {}),))
    assert first.rings == () and read(conn, first.job).run_at - value(conn, "select now()") > timedelta(seconds=25)
    time_passes(conn, 29)
    second = submit(conn, DEBOUNCE, 2, priority="critical", correlation_id="new")

    found = read(conn, first.job)
    assert (second.job.id, second.created, second.found) == (first.job.id, False, "debounced")
    assert (found.payload["sleep_ms"], found.priority, found.correlation_id) == (2, "critical", "new")
    assert column(conn, first.job, "then_jobs") is None
    assert timedelta(seconds=25) < found.run_at - value(conn, "select now()") <= timedelta(seconds=30)
    assert found.wake_at == found.run_at
    assert claim(conn, uuid4(), first.job) == []  # though the first one's time would have come by now
    time_passes(conn, 31)
    assert len(claim(conn, uuid4(), first.job)) == 1
    assert submit(conn, DEBOUNCE, 3).created


def test_requests_without_end_do_not_put_off_the_start_for_ever(conn: Connection) -> None:
    first = submit(conn, DEBOUNCE, 0)
    for number in range(1, 5):
        time_passes(conn, 22)
        assert submit(conn, DEBOUNCE, number).job.id == first.job.id

    left = read(conn, first.job).run_at - value(conn, "select now()")

    assert timedelta(seconds=5) < left <= timedelta(seconds=12)  # 100 s after the first, of which 88 have passed


def test_a_request_that_comes_while_the_job_is_claimed_makes_a_new_one(conn: Connection, connect: Connect) -> None:
    first = submit(conn, DEBOUNCE, 1)
    time_passes(conn, 31)
    other = connect()

    with conn.transaction():
        assert len(claim(conn, uuid4(), first.job)) == 1  # not committed yet
        waiting = Background(other, lambda c: submit(c, DEBOUNCE, 2))
        assert waiting.waits(connect())
    second = waiting.result()

    assert second.created and second.job.id != first.job.id
    assert column(conn, first.job, "payload")["sleep_ms"] == 1


# ---- many at once ----


@pytest.mark.parametrize("unique", [Unique("k"), THROTTLE, DEBOUNCE], ids=lambda u: u.mode)
def test_of_sixteen_at_the_same_moment_one_becomes_a_job(conn: Connection, connect: Connect, unique: Unique) -> None:
    connections = [connect() for _ in range(16)]

    for number in range(5):
        key = Unique(f"k{number}", unique.mode, unique.period_s)
        answers = together(*(lambda c=c, n=n, key=key: submit(c, key, n) for n, c in enumerate(connections)))

        assert [a.created for a in answers].count(True) == 1
        assert len({a.job.id for a in answers}) == 1
    assert jobs(conn) == 5


def test_of_sixteen_without_the_lock_more_become_jobs(
    conn: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: with a look instead of the lock it does."""
    mutate_code(
        monkeypatch,
        intake.unique,
        "lock",
        ("on conflict (organization_id, type, key) do update set job_id = u.job_id", "on conflict do nothing"),
    )
    with pytest.raises((AssertionError, KeyError)):
        test_of_sixteen_at_the_same_moment_one_becomes_a_job(conn, connect, Unique("k"))


def test_batches_with_the_same_keys_in_another_order_do_not_wait_for_each_other(
    connect: Connect, conn: Connection
) -> None:
    keys = [Unique(f"k{n}") for n in range(20)]

    def hand_in(c: Connection, wanted: list[Unique]) -> list[Any]:
        with c.transaction():
            return batches.submit(c, ORGANIZATION, [prepare(u) for u in wanted]).ids

    for _ in range(3):
        connections = [connect() for _ in range(4)]
        orders = [keys, keys[::-1], keys[10:] + keys[:10], keys[::2] + keys[1::2]]
        answers = together(*(lambda c=c, o=o: hand_in(c, o) for c, o in zip(connections, orders, strict=True)))

        by_key = [
            {u.key: i for u, i in zip(order, ids, strict=True)} for order, ids in zip(orders, answers, strict=True)
        ]
        assert all(each == by_key[0] for each in by_key)
    assert jobs(conn) == 20


# ---- in batches, with idempotency keys, over HTTP ----


def test_in_a_batch_a_key_is_one_job_and_only_new_ones_are_counted(conn: Connection) -> None:
    there = submit(conn, Unique("there")).job
    wanted = [
        prepare(None),
        prepare(Unique("there")),
        prepare(Unique("new"), 1),
        prepare(Unique("new"), 2),
        prepare(Unique("late", "debounce", 60), 3),
        prepare(Unique("late", "debounce", 60), 4),
    ]

    with conn.transaction():
        batch = batches.submit(conn, ORGANIZATION, wanted)

    plain, kept, new, same, late, newest = batch.ids
    assert kept == there.id and new == same and late == newest
    assert len({plain, new, late}) == 3 == batch.total
    assert records.get_batch(conn, ORGANIZATION, batch.id).total == 3  # type: ignore[union-attr]
    assert column(conn, new, "payload")["sleep_ms"] == 1
    assert column(conn, late, "payload")["sleep_ms"] == 4
    assert column(conn, there, "batch_id") is None
    assert {ring.job_id for ring in batch.rings} == {plain, new}


def test_a_batch_of_nothing_new_has_ended(conn: Connection) -> None:
    there = submit(conn, Unique("k")).job

    batch = batches.submit(conn, ORGANIZATION, [prepare(Unique("k"))] * 1)

    assert batch.ids == [there.id] and batch.total == 0
    found = records.get_batch(conn, ORGANIZATION, batch.id)
    assert found is not None and found.finished_at is not None


def test_an_idempotency_key_answers_the_job_that_its_first_request_was_answered_with(conn: Connection) -> None:
    there = submit(conn, Unique("k")).job
    first = submit(conn, Unique("k"), idempotency_key="i")
    (running,) = claim(conn, uuid4(), there)
    finish(conn, running)
    again = submit(conn, Unique("k"), idempotency_key="i")

    assert first.job.id == there.id == again.job.id
    assert jobs(conn) == 1


@pytest.mark.parametrize(
    ("unique", "more", "field"),
    [
        (Unique(""), {}, "unique.key"),
        (Unique("x" * 1001), {}, "unique.key"),
        (Unique("a\x00"), {}, "unique.key"),
        (Unique("k", "throttle"), {}, "unique.period_s"),
        (Unique("k", "keep", 5), {}, "unique.period_s"),
        (Unique("k", "throttle", 0), {}, "unique.period_s"),
        (Unique("k", "throttle", 86_401), {}, "unique.period_s"),
        (Unique("k", "throttle", 5, 5), {}, "unique.max_wait_s"),
        (Unique("k", "debounce", 5), {"run_at": core_support.datetime.now().astimezone()}, "run_at"),
        (None, {"then": (NewJob("ping", {}, unique=Unique("k")),)}, "then.0"),
    ],
)
def test_a_wrong_unique_key_is_refused_by_name(unique: Unique | None, more: Any, field: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        prepare(unique, **more)

    assert refused.value.field == field


def test_old_keys_are_forgotten_unless_their_job_is_open(conn: Connection) -> None:
    submit(conn, Unique("open"))
    (running,) = claim(conn, uuid4(), submit(conn, Unique("ended")).job)
    finish(conn, running)
    assert retention.delete_unique_keys(conn) == 0
    time_passes(conn, 86_500)
    submit(conn, Unique("young"))

    assert retention.delete_unique_keys(conn) == 1

    left = conn.execute("select key from agentflow.unique_keys order by 1").fetchall()
    assert [row[0] for row in left] == ["open", "young"]


def test_over_http_the_answer_says_what_a_key_did(client: FlaskClient, conn: Connection) -> None:
    def send(mode: str, **more: Any) -> Any:
        return client.post("/api/jobs", json={"type": "ping", "unique": {"key": mode, "mode": mode, **more}})

    said = []
    for mode, more in (("keep", {}), ("throttle", {"period_s": 60}), ("debounce", {"period_s": 60})):
        first, again = send(mode, **more), send(mode, **more)
        assert (first.status_code, again.status_code) == (202, 202)
        assert first.json["id"] == again.json["id"]
        assert "Unique" not in first.headers and "Idempotency-Replayed" not in again.headers
        said.append(again.headers["Unique"])

    assert said == ["kept", "throttled", "debounced"]
    assert count(conn) == 3
    assert problem(send("throttle"), 422)["errors"][0]["field"] == "unique.period_s"
    assert problem(send("now"), 422)["errors"][0]["field"] == "unique.mode"
