"""Taking jobs in: what is refused and how it is named, idempotency keys, the window, the caller's transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

import actors  # noqa: F401 - declares the product's types
from agentflow.database import BoundedConnection
from agentflow.jobs import batches, dispatch, inserting, intake, records, requests
from agentflow.jobs.intake import IdempotencyConflict, Submitted
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import MAX_THEN_DEPTH, MAX_THEN_JOBS, InvalidJob, NewJob, Prepared
from agentflow.jobs.unique import Unique
from agentflow.system import System
from tests import core_support
from tests.core_support import (
    ORGANIZATION,
    claim,
    column,
    prepared,
    read,
    value,
)
from tests.one_database import database_url, original
from tests.two_at_once import Background, together

__all__ = ["database_url", "original"]

Connection = psycopg.Connection
Connect = Callable[[], Connection]
WINDOW = 16


def ping(**request: Any) -> NewJob:
    return NewJob("ping", request.pop("payload", {}), **request)


def prepare(new: NewJob, max_payload_bytes: int = 10_000) -> Prepared:
    return requests.prepare(new, organization_id=ORGANIZATION, max_payload_bytes=max_payload_bytes)


def submit(conn: Connection, new: NewJob, **more: Any) -> Submitted:
    return intake.submit(conn, ORGANIZATION, prepare(new), **more)


def jobs(conn: Connection) -> int:
    return int(value(conn, "select count(*) from agentflow.jobs"))


# ---- what is answered ----


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize(
    "new",
    [
        ping(),
        ping(payload={"sleep_ms": 20, "result_bytes": 7}, correlation_id="mine", priority="critical"),
        ping(run_at=datetime(2100, 1, 1, 12, 30, 1, 5, UTC), max_attempts=9, time_limit_s=1 / 3),
        ping(run_at=datetime(2001, 1, 1, tzinfo=UTC), head_start_s=30, priority="low"),
        ping(concurrency_key="file", concurrency_limit=3, callback_url="https://example.com/a?b=c"),
        ping(idempotency_key="once", unique=Unique("one"), then=(ping(then=(ping(),)),)),
    ],
)
def test_the_job_that_is_answered_is_the_row_as_it_stands(conn: Connection, new: NewJob, ring: bool) -> None:
    submitted = submit(conn, new, ring=ring)

    assert submitted.job == read(conn, submitted.job)
    is_due = new.run_at is None or new.run_at < datetime.now(UTC)
    assert [r.job_id for r in submitted.rings] == ([submitted.job.id] if ring and is_due else [])
    assert column(conn, submitted.job, "sends") == len(submitted.rings)


def test_one_job_and_many_become_the_same_rows(conn: Connection) -> None:
    """Two statements write them."""
    requests = [
        ping(correlation_id="x", then=(ping(),)),
        ping(concurrency_key="k", max_attempts=2, callback_url="https://example.com/"),
        ping(head_start_s=5, priority="low", time_limit_s=7.5),
    ]
    alone = [submit(conn, new).job for new in requests]
    together_, _ = intake.submit_many(conn, ORGANIZATION, [prepare(new) for new in requests])
    assert together_ == [read(conn, job) for job in together_]

    row = (
        "select to_jsonb(j) - array['id', 'run_at', 'wake_at', 'sent_at', 'created_at', 'then_jobs'] from agentflow.jobs j"
        " where id = %s"
    )
    for one, other in zip(alone, together_, strict=True):
        assert value(conn, row, one.id) == value(conn, row, other.id)
        assert (column(conn, one, "then_jobs") is None) == (column(conn, other, "then_jobs") is None)


_STORED = (
    "insert into agentflow.rows_of_test (name, job) values (%(name)s, %(named)s) on conflict do nothing"
    " returning job as job_id"
)


def of_stored(conn: Connection, name: str, new: NewJob, *, ring: bool = True) -> tuple[Prepared, list[Any] | None]:
    p = prepare(new)
    values = {"name": name, "named": p.id}
    return p, inserting.one_of_stored(conn, _STORED, values, ORGANIZATION, p, ring)


@pytest.fixture
def stored(conn: Connection) -> Iterator[None]:
    conn.execute("create table agentflow.rows_of_test (name text primary key, job uuid)")
    yield
    conn.execute("drop table agentflow.rows_of_test")


@pytest.mark.usefixtures("stored")
def test_a_job_beside_a_row_of_the_callers_is_as_one_alone(conn: Connection) -> None:
    new = ping(
        concurrency_key="k", concurrency_limit=2, max_attempts=2, head_start_s=5, callback_url="https://example.com/"
    )
    p, rings = of_stored(conn, "first", new)

    assert [ring.job_id for ring in rings or ()] == [p.id]
    row = "select to_jsonb(j) - array['id', 'run_at', 'wake_at', 'sent_at', 'created_at'] from agentflow.jobs j where id = %s"
    alone = value(conn, row, submit(conn, new).job.id)
    assert {**alone, "sends": 1} == value(conn, row, p.id)  # of two that wait in one lane the first is rung
    assert of_stored(conn, "second", new, ring=False)[1] == []


@pytest.mark.usefixtures("stored")
def test_where_the_callers_row_was_there_nothing_is_written(conn: Connection) -> None:
    first, _ = of_stored(conn, "same", ping(concurrency_key="a"))
    _, rings = of_stored(conn, "same", ping(concurrency_key="b"))

    assert rings is None
    assert conn.execute("select id from agentflow.jobs").fetchall() == [(first.id,)]
    assert conn.execute("select key from agentflow.concurrency_keys").fetchall() == [(f"{ORGANIZATION}:a",)]


@pytest.mark.usefixtures("stored")
def test_a_keys_slots_are_written_beside_a_row_of_the_callers_too(conn: Connection) -> None:
    slots = "select slots from agentflow.concurrency_keys where key = %s"
    for number, limit in enumerate((2, 2, 5)):
        of_stored(conn, f"row {number}", ping(concurrency_key="k", concurrency_limit=limit))
        assert value(conn, slots, f"{ORGANIZATION}:k") == limit


# ---- what is refused ----


@pytest.mark.parametrize(
    ("new", "field", "problem"),
    [
        (ping(payload={"sleep_ms": "long"}), "payload.sleep_ms", "valid integer"),
        (ping(payload={"sleep_ms": -1}), "payload.sleep_ms", "greater than or equal to 0"),
        (ping(payload={"sleep": 1}), "payload.sleep", "not permitted"),
        (ping(payload={"sleep_ms": object()}), "payload", "is not JSON"),
        (ping(idempotency_key="a\x00b"), "idempotency_key", "NUL"),
        (ping(correlation_id="a\ud800b"), "correlation_id", "surrogate"),
        (ping(concurrency_key="\x00"), "concurrency_key", "NUL"),
        (ping(callback_url="http://x/\udfff"), "callback_url", "surrogate"),
        (ping(then=(ping(), ping(payload={"sleep_ms": "x"}))), "then.1.payload.sleep_ms", "valid integer"),
        (ping(then=(ping(then=(ping(payload={"x": 1}),)),)), "then.0.then.0.payload.x", "not permitted"),
        (ping(then=(NewJob("no_such_type", {}),)), "then.0.type", "no_such_type"),
        (ping(then=(NewJob("deliver_callback", {}),)), "then.0.type", "deliver_callback"),
        (ping(then=(ping(run_at=datetime.now(UTC)),)), "then.0", "may not have run_at"),
        (ping(then=(ping(idempotency_key="i"),)), "then.0", "may not have run_at, a head start, an idempotency key"),
        (ping(then=(ping(concurrency_key="k"),)), "then.0", "concurrency key"),
        (ping(then=(ping(),) * (MAX_THEN_JOBS + 1)), "then", "more than 50"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_request_is_refused_and_names_the_field(new: NewJob, field: str, problem: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        prepare(new)

    assert refused.value.field == field
    assert problem in refused.value.problem


def test_an_endless_payload_is_refused() -> None:
    endless: dict[str, Any] = {}
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    endless["sleep_ms"] = deep

    with pytest.raises(InvalidJob, match="payload"):
        prepare(ping(payload=endless))


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "\udc00"])
def test_text_that_postgres_cannot_store_is_refused_inside_a_payload_too(text: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        prepare(NewJob("analyze_video", {"url": f"http://x.example/{text}"}))

    assert refused.value.field.startswith("payload")


def test_text_that_only_looks_like_it_is_taken(conn: Connection) -> None:
    job = submit(conn, ping(correlation_id="back\\u0000slash \\ud800 \u20ac \U0001f600")).job

    assert read(conn, job).correlation_id == "back\\u0000slash \\ud800 \u20ac \U0001f600"


def test_a_payload_may_be_as_large_as_the_limit_and_not_larger() -> None:
    size = len(prepare(ping()).payload.encode())

    assert prepare(ping(), max_payload_bytes=size)
    with pytest.raises(InvalidJob, match=f"payload: is larger than {size - 1} bytes; put large things in storage"):
        prepare(ping(), max_payload_bytes=size - 1)


def test_the_jobs_that_follow_may_be_nested_to_a_depth_and_not_deeper(conn: Connection) -> None:
    def nested(depth: int) -> NewJob:
        return ping(then=(nested(depth - 1),)) if depth else ping()

    job = submit(conn, nested(MAX_THEN_DEPTH)).job
    for _ in range(MAX_THEN_DEPTH):
        (running,) = claim(conn, UUID(int=1), job)
        core_support.finish(conn, running)
        (job,) = records.children(conn, job.id)

    assert column(conn, job, "then_jobs") is None
    with pytest.raises(InvalidJob, match="nested deeper than 8"):
        prepare(nested(MAX_THEN_DEPTH + 1))


@pytest.mark.parametrize("name", ["no_such_type", "", "deliver_callback", "\x00"])
def test_a_type_that_is_unknown_or_not_for_callers_is_refused(name: str) -> None:
    with pytest.raises(UnknownType):
        prepare(NewJob(name, {}))


def test_a_request_becomes_the_row_it_asks_for(conn: Connection) -> None:
    run_at = datetime.now(UTC) + timedelta(hours=1)
    asked = ping(
        payload={"sleep_ms": 5},
        priority="critical",
        run_at=run_at,
        max_attempts=7,
        time_limit_s=9.0,
        concurrency_key="gpu",
        concurrency_limit=2,
        correlation_id="c",
        callback_url="http://x.example/",
    )

    job = read(conn, submit(conn, asked).job)

    assert (job.type, job.queue, job.priority, job.state, job.attempt) == ("ping", "default", "critical", "queued", 0)
    assert (job.max_attempts, job.time_limit_s, job.run_at, job.wake_at) == (7, 9.0, run_at, run_at)
    assert (job.concurrency_key, job.correlation_id, job.callback_url) == ("1:gpu", "c", "http://x.example/")
    assert job.payload["sleep_ms"] == 5
    assert value(conn, "select slots from agentflow.concurrency_keys where key = '1:gpu'") == 2


def test_no_request_gets_more_time_than_its_type() -> None:
    assert prepare(ping(time_limit_s=1e9)).time_limit_s == prepare(ping()).time_limit_s


def test_keys_of_two_organizations_are_two_keys(conn: Connection) -> None:
    new = ping(concurrency_key="k")
    first = intake.submit(conn, 1, requests.prepare(new, organization_id=1, max_payload_bytes=1000)).job
    second = intake.submit(conn, 2, requests.prepare(new, organization_id=2, max_payload_bytes=1000)).job

    assert len(claim(conn, UUID(int=1), first, second)) == 2


# ---- idempotency ----


def test_the_same_key_with_the_same_request_is_the_same_job(conn: Connection) -> None:
    first = submit(conn, ping(idempotency_key="i", payload={"sleep_ms": 1}))
    again = submit(conn, ping(idempotency_key="i", payload={"sleep_ms": 1}))

    assert (first.created, again.created, again.job.id, again.rings) == (True, False, first.job.id, ())
    assert jobs(conn) == 1


def test_a_repeated_key_tells_how_the_job_is_now(conn: Connection) -> None:
    first = submit(conn, ping(idempotency_key="i")).job
    (running,) = claim(conn, UUID(int=1), first)
    core_support.finish(conn, running)

    assert submit(conn, ping(idempotency_key="i")).job.state == "succeeded"


@pytest.mark.parametrize(
    "other",
    [
        {"payload": {"sleep_ms": 2}},
        {"priority": "low"},
        {"max_attempts": 2},
        {"time_limit_s": 2.0},
        {"callback_url": "http://x.example/"},
        {"concurrency_key": "k"},
        {"run_at": datetime(2030, 1, 1, tzinfo=UTC)},
        {"then": (ping(),)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_same_key_with_another_request_is_a_conflict(conn: Connection, other: dict[str, Any]) -> None:
    first = submit(conn, ping(idempotency_key="i")).job

    with pytest.raises(IdempotencyConflict) as conflict:
        submit(conn, ping(idempotency_key="i", **other))

    assert conflict.value.job_id == first.id
    assert jobs(conn) == 1


def test_another_job_deep_among_those_that_follow_is_a_conflict(conn: Connection) -> None:
    def request(sleep_ms: int) -> NewJob:
        return ping(idempotency_key="i", then=(ping(then=(ping(payload={"sleep_ms": sleep_ms}),)),))

    first = submit(conn, request(1)).job

    assert submit(conn, request(1)).job.id == first.id
    with pytest.raises(IdempotencyConflict):
        submit(conn, request(2))


def test_a_key_of_another_organization_is_another_key(conn: Connection) -> None:
    mine = intake.submit(conn, 1, prepare(ping(idempotency_key="i")))
    theirs = intake.submit(conn, 2, prepare(ping(idempotency_key="i", payload={"sleep_ms": 9})))

    assert (mine.created, theirs.created) == (True, True)


def test_eight_at_once_with_one_key_make_one_job(conn: Connection, connect: Connect) -> None:
    def ask(c: Connection, key: str) -> Submitted:
        with c.transaction():
            return submit(c, ping(idempotency_key=key))

    for key in ("a", "b", "c"):
        others = [connect() for _ in range(8)]
        answers = together(*(lambda c=c, key=key: ask(c, key) for c in others))

        assert len({answer.job.id for answer in answers}) == 1
        assert sum(answer.created for answer in answers) == 1
    assert jobs(conn) == 3


def test_a_second_request_waits_for_the_first_ones_transaction(conn: Connection, connect: Connect) -> None:
    for rolled_back in (False, True):
        one, other = connect(), connect()
        key = f"i{rolled_back}"
        with one.transaction(force_rollback=rolled_back):
            first = submit(one, ping(idempotency_key=key))
            second = Background(other, lambda c, key=key: submit(c, ping(idempotency_key=key)))
            assert second.waits(conn)

        answer = second.result()
        assert answer.created is rolled_back
        assert (answer.job.id == first.job.id) is not rolled_back


def test_a_caller_with_an_old_snapshot_gets_an_error_to_repeat_on_and_never_a_second_job(
    conn: Connection, connect: Connect
) -> None:
    caller = connect()
    caller.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with pytest.raises(psycopg.errors.SerializationFailure), caller.transaction():
        caller.execute("select count(*) from agentflow.jobs")
        submit(conn, ping(idempotency_key="i"))
        submit(caller, ping(idempotency_key="i"))

    assert submit(caller, ping(idempotency_key="i")).created is False
    assert jobs(conn) == 1


def test_an_expired_key_may_be_used_again(conn: Connection) -> None:
    first = submit(conn, ping(idempotency_key="i")).job
    conn.execute("update agentflow.idempotency_keys set created_at = created_at - interval '25 h'")

    assert submit(conn, ping(idempotency_key="i"), idempotency_hours=48).job.id == first.id
    other = submit(conn, ping(idempotency_key="i", payload={"sleep_ms": 1}), idempotency_hours=24)
    assert other.created
    assert submit(conn, ping(idempotency_key="i", payload={"sleep_ms": 1})).job.id == other.job.id


def test_a_key_whose_job_was_cleaned_up_makes_no_second_one(conn: Connection) -> None:
    submit(conn, ping(idempotency_key="i"))
    conn.execute("delete from agentflow.jobs")

    with pytest.raises(IdempotencyConflict):
        submit(conn, ping(idempotency_key="i"))


def test_a_batch_has_an_idempotency_key_too(conn: Connection) -> None:
    new = [prepare(ping(payload={"sleep_ms": n})) for n in range(3)]

    first = batches.submit(conn, ORGANIZATION, new, idempotency_key="b")
    again = batches.submit(
        conn, ORGANIZATION, [prepare(ping(payload={"sleep_ms": n})) for n in range(3)], idempotency_key="b"
    )

    assert (first.created, again.created, again.id, again.ids) == (True, False, first.id, first.ids)
    with pytest.raises(IdempotencyConflict):
        batches.submit(conn, ORGANIZATION, new[:2], idempotency_key="b")
    with pytest.raises(IdempotencyConflict):
        submit(conn, ping(idempotency_key="b"))


# ---- the window ----


def test_a_flood_leaves_the_rest_to_the_relay(conn: Connection) -> None:
    new = [prepare(ping()) for _ in range(WINDOW + 9)]

    made, rings = intake.submit_many(conn, ORGANIZATION, new)

    assert [job.id for job in made] == [p.id for p in new]
    assert [ring.job_id for ring in rings] == [p.id for p in new[:WINDOW]]
    assert [column(conn, p.id, "sends") for p in new] == [1] * WINDOW + [0] * 9
    claim(conn, UUID(int=1), *(ring.job_id for ring in rings))
    rest, _ = dispatch.pick_due(conn, "default")
    assert {ring.job_id for ring in rest} == {p.id for p in new[WINDOW:]}


def test_in_a_flood_the_critical_jobs_are_rung_first(conn: Connection) -> None:
    new = [prepare(ping(priority="critical" if n >= 12 else "default")) for n in range(24)]

    _, rings = intake.submit_many(conn, ORGANIZATION, new)

    assert {ring.job_id for ring in rings} == {p.id for p in (*new[12:], *new[:4])}


def test_a_later_job_is_not_rung_before_its_time(conn: Connection) -> None:
    job = submit(conn, ping(run_at=datetime.now(UTC) + timedelta(hours=1)))

    assert job.rings == ()
    assert dispatch.pick_due(conn, "default")[0] == []


def test_a_window_grows_with_what_live_workers_can_use(conn: Connection) -> None:
    worker = core_support.rescuer(conn)
    conn.execute("update agentflow.workers set demand = '{\"default\": 40}' where id = %s", (worker,))

    assert len(intake.submit_many(conn, ORGANIZATION, [prepared() for _ in range(60)])[1]) == 40


def test_one_organizations_flood_does_not_silence_another(conn: Connection) -> None:
    intake.submit_many(conn, 2, [prepared() for _ in range(WINDOW + 1)])

    assert len(submit(conn, ping()).rings) == 1


# ---- the caller's transaction ----


class Broker:
    """Writes down what is rung, and how many jobs anybody can see at that moment."""

    def __init__(self, watcher: Connection) -> None:
        self.rung: list[tuple[UUID, int]] = []
        self.on_unrung = lambda: None
        self._watcher = watcher

    def can_publish(self) -> bool:
        return True

    def ring(self, rings: Any) -> None:
        self.rung.extend((ring.job_id, jobs(self._watcher)) for ring in rings)

    def tell_cancel(self) -> None:
        pass


def test_a_rolled_back_transaction_leaves_nothing_and_rings_nothing(system: System, conn: Connection) -> None:
    broker = system.publisher._broker = Broker(conn)

    with pytest.raises(ZeroDivisionError), system.transaction() as transaction:
        transaction.submit(ORGANIZATION, ping(idempotency_key="i", concurrency_key="k"))
        transaction.submit_many(ORGANIZATION, [prepared()])
        _ = 1 / 0
    time.sleep(0.1)

    assert broker.rung == []
    for table in ("jobs", "idempotency_keys", "concurrency_keys"):
        assert value(conn, f"select count(*) from agentflow.{table}".encode()) == 0  # noqa: S608


def test_jobs_are_rung_once_the_callers_transaction_is_committed(system: System, conn: Connection) -> None:
    broker = system.publisher._broker = Broker(conn)

    with system.transaction() as transaction:
        transaction.conn.execute("create table agentflow.callers_own (x integer)")
        first = transaction.submit(ORGANIZATION, ping()).job
        (second,) = transaction.submit_many(ORGANIZATION, [prepared()])
        assert transaction.submit(ORGANIZATION, ping(idempotency_key="i")).created
        again = transaction.submit(ORGANIZATION, ping(idempotency_key="i"))
        time.sleep(0.05)
        assert broker.rung == []
    system.publisher.close()
    conn.execute("drop table agentflow.callers_own")

    assert [seen for _, seen in broker.rung] == [3, 3, 3]
    assert [id_ for id_, _ in broker.rung] == [first.id, second.id, again.job.id]


@pytest.mark.usefixtures("stored")
def test_a_job_beside_a_row_of_the_callers_is_rung_and_one_that_was_not_made_is_not(
    system: System, conn: Connection
) -> None:
    broker = system.publisher._broker = Broker(conn)
    made = []

    for _ in range(2):
        p = prepare(ping())
        with system.transaction(one_statement=True) as transaction:
            made.append((transaction.submit_with(_STORED, {"name": "same", "named": p.id}, ORGANIZATION, p), p.id))
    system.publisher.close()

    (is_new, first), (again, _) = made
    assert (is_new, again) == (True, False)
    assert [id_ for id_, _ in broker.rung] == [first]


def test_a_ring_that_failed_is_taken_back(system: System, conn: Connection) -> None:
    class Away(Broker):
        def ring(self, rings: Any) -> None:
            raise OSError("connection refused")

    system.publisher._broker = Away(conn)
    job = system.submit(ORGANIZATION, ping()).job
    system.publisher.close()

    assert column(conn, job, "sent_at") is None
    assert 0 < (read(conn, job).wake_at - datetime.now(UTC)).total_seconds() < 2  # type: ignore[operator]


@pytest.mark.parametrize("field", ["idempotency_key", "correlation_id", "concurrency_key"])
def test_a_key_too_long_for_an_index_is_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidJob, match=f"{field}: is longer than 1000 bytes"):
        prepare(NewJob("ping", {}, **{field: "ж" * 501}))


@pytest.mark.parametrize(
    "keys",
    [{"idempotency_key": "once"}, {"unique": Unique("one")}, {"unique": Unique("one"), "concurrency_key": "file 1"}],
    ids=["idempotency", "unique", "concurrency"],
)
def test_of_what_takes_several_statements_nothing_is_left_when_the_last_fails(
    system: System, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    insert = inserting.one

    def and_fail(*args: Any) -> Any:
        insert(*args)
        raise psycopg.OperationalError("the server went away")

    monkeypatch.setattr(inserting, "one", and_fail)
    request = ping(**keys)

    with pytest.raises(psycopg.OperationalError):
        system.submit(ORGANIZATION, request)

    with system.database.connection() as conn:
        assert jobs(conn) == 0
        for beside in ("idempotency_keys", "unique_keys", "concurrency_keys"):
            assert value(conn, f"select count(*) from agentflow.{beside}") == 0  # noqa: S608 - constants
    monkeypatch.setattr(inserting, "one", insert)
    assert system.submit(ORGANIZATION, request).created


def test_a_key_is_named_by_the_jobs_own_statement_and_not_without_its_job(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedConnection, "transaction", lambda _: pytest.fail("BEGIN and COMMIT are two trips more"))
    slots = "select slots from agentflow.concurrency_keys where key = %s"

    for number in (2, 2, 3):
        job = system.submit(ORGANIZATION, ping(concurrency_key="k", concurrency_limit=number)).job
        assert (job, value(conn, slots, f"{ORGANIZATION}:k")) == (read(conn, job), number)

    conn.execute("alter table agentflow.jobs add constraint none_of_these check (concurrency_key not like '%%:bad')")
    with pytest.raises(psycopg.errors.CheckViolation):
        system.submit(ORGANIZATION, ping(concurrency_key="bad"))
    conn.execute("alter table agentflow.jobs drop constraint none_of_these")
    assert value(conn, "select count(*) from agentflow.concurrency_keys where key like '%%:bad'") == 0
