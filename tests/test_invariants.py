"""The invariants of the job core, each with a test that fails when its condition is taken out of the code.

That is proved, too: test_invariants_notice.py takes the conditions out one by one and expects the test to notice.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow import embedded, schema, system
from agentflow.database import Database
from agentflow.jobs import batches, claims, dispatch, intake, leases, records, requests, settlement
from agentflow.jobs.leases import Held
from agentflow.jobs.model import Job, Settled, State, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.worker import claimer
from agentflow.worker.chores import Relay, Rescue
from agentflow.worker.claimer import Claimer
from agentflow.worker.heart import Heart
from agentflow.worker.settler import Ended, Settler
from tests import core_support
from tests.core_support import (
    LEASE_S,
    MAX_CRASHES,
    ORGANIZATION,
    Original,
    audit,
    broken,
    child,
    claim,
    claimed,
    column,
    finish,
    pass_time,
    prepared,
    read,
    rescuer,
    rows,
    settle,
    submit,
    value,
    verdict,
    whole_row,
)
from tests.one_database import database_url
from tests.processes import eventually
from tests.two_at_once import Background, lockable, row_locked, together

__all__ = ["database_url"]

Connection = psycopg.Connection
Connect = Callable[[], Connection]

WINDOW = 16  # of a queue without workers
URL = "http://caller.example/done"


@pytest.fixture(scope="module")
def original(stack: embedded.Embedded) -> Iterator[tuple[str, Original]]:
    with core_support.database(stack) as url:
        with psycopg.connect(url, autocommit=True) as conn:
            audit(conn)
        yield url, Original(url)


@pytest.fixture(autouse=True)
def nothing_goes_on(conn: Connection, connect: Connect) -> Iterator[None]:
    yield
    Background.end_all(conn)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, application_name="test", pool_size=2)
    yield database
    database.close()


def rescue(conn: Connection, worker: UUID | None = None) -> Settled:
    return leases.rescue(conn, worker or rescuer(conn), limit=100, lease_s=LEASE_S, max_crashes=MAX_CRASHES)


def beat(conn: Connection, worker: UUID, *jobs: Job) -> dict[tuple[UUID, int], str]:
    return dict(leases.renew(conn, worker, [Held(j.id, j.fence) for j in jobs], LEASE_S))


def crash(conn: Connection, job: Job) -> None:
    """The job's worker dies, and the rescue finds out."""
    conn.execute("update agentflow.jobs set lease_until = clock_timestamp() - interval '1 s' where id = %s", (job.id,))
    rescue(conn)


def again(conn: Connection, worker: UUID, job: Job) -> Job:
    """Claim a job that waits, when its time has come."""
    conn.execute(
        "update agentflow.jobs set run_at = least(run_at, clock_timestamp()),"
        " wake_at = least(wake_at, clock_timestamp()) where id = %s",
        (job.id,),
    )
    (now,) = claim(conn, worker, job)
    return now


# ---- 1. States and edges ----


def test_a_job_moves_along_the_six_edges_and_no_other(conn: Connection) -> None:
    worker = uuid4()
    long = claimed(conn, worker)
    for outcome in ("retry", "wait", "handback"):
        finish(conn, long, outcome)
        long = again(conn, worker, long)
    crash(conn, long)
    long = again(conn, worker, long)
    failed, stopped = claimed(conn, worker), claimed(conn, worker)
    queued = submit(conn)

    for knock in (1, 2):
        claim(conn, worker, long, failed, stopped)
        claim(conn, uuid4(), long, failed, stopped)
        if knock == 1:
            records.cancel(conn, ORGANIZATION, queued.id)
            records.cancel(conn, ORGANIZATION, stopped.id)
            assert [finish(conn, long), finish(conn, failed, "failed"), finish(conn, stopped, "cancelled")] == [
                "succeeded",
                "failed",
                "cancelled",
            ]
        for job in (long, failed, stopped, queued):
            settle(conn, worker, verdict(job, "retry"))
            records.cancel(conn, ORGANIZATION, job.id)
        rescue(conn)
        dispatch.take_back(conn, [long.id, failed.id, stopped.id, queued.id], 0.0)
        claim(conn, worker, long, failed, stopped, queued)

    assert broken(conn) == []
    assert set(conn.execute("select distinct old_state, new_state from audit.changes").fetchall()) == {
        ("queued", "running"),
        ("queued", "cancelled"),
        ("running", "queued"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("running", "cancelled"),
    }


def test_trying_a_dead_letter_again_makes_a_new_job_and_leaves_the_old_one(conn: Connection) -> None:
    import actors  # noqa: F401 - declares ping

    ping = requests.prepare(NewJob("ping", {}, max_attempts=1), organization_id=1, max_payload_bytes=1000)
    dead = intake.submit(conn, ORGANIZATION, ping).job
    (running,) = claim(conn, uuid4(), dead)
    finish(conn, running, "failed")
    before = whole_row(conn, dead)

    new = records.retry(conn, read(conn, dead), max_payload_bytes=1000).job

    assert (new.retry_of, new.state, new.id != dead.id) == (dead.id, "queued", True)
    assert whole_row(conn, dead) == {**before, "dealt_with": "retried"}
    refused = False
    try:
        records.retry(conn, new, max_payload_bytes=1000)
    except records.NotRetryable:
        refused = True
    assert refused


# ---- 2. One end ----


def test_a_job_ends_once_however_many_say_that_it_did(conn: Connection, connect: Connect) -> None:
    for _ in range(5):
        job = claimed(conn, callback_url=URL)
        conn.execute("update agentflow.jobs set lease_until = clock_timestamp() where id = %s", (job.id,))
        others = [connect() for _ in range(5)]

        answers = together(
            lambda job=job, c=others[0]: finish(c, job),
            lambda job=job, c=others[1]: finish(c, job, "failed"),
            lambda job=job, c=others[2]: finish(c, job, "cancelled"),
            lambda job=job, c=others[3]: records.cancel(c, ORGANIZATION, job.id) and None,
            lambda c=others[4]: rescue(c) and None,
        )

        assert sum(answer is not None for answer in answers) <= 1
        assert broken(conn) == []


def test_of_a_finish_and_a_cancel_that_meet_one_decides(conn: Connection, connect: Connect) -> None:
    one, other = connect(), connect()
    job = claimed(conn)
    with one.transaction():
        finish(one, job)
        cancel = Background(other, lambda c: records.cancel(c, ORGANIZATION, job.id))
        assert cancel.waits(conn)

    assert cancel.result()[0] == "succeeded"
    assert (read(conn, job).state, column(conn, job, "cancel_requested")) == ("succeeded", False)
    assert broken(conn) == []


# ---- 3. The fence ----


def test_the_fence_rises_by_one_at_each_claim_and_at_nothing_else(conn: Connection) -> None:
    worker = uuid4()
    for key in (None, "k"):
        job = claimed(conn, worker, key=key)
        fences = [job.fence]
        for outcome in ("wait", "handback", "retry", "wait"):
            beat(conn, worker, job)
            finish(conn, job, outcome)
            records.cancel(conn, ORGANIZATION + 1, job.id)
            dispatch.take_back(conn, [job.id], 0.0)
            job = again(conn, worker, job)
            fences.append(job.fence)
        crash(conn, job)
        assert fences == [1, 2, 3, 4, 5]
        assert (read(conn, job).fence, read(conn, job).attempt) == (5, 1)
        pass_time(conn, 600)
        dispatch.pick_due(conn, "default")
        records.cancel(conn, ORGANIZATION, job.id)
    assert broken(conn) == []


@pytest.mark.parametrize("outcome", ["wait", "handback", "crashed"])
def test_a_stale_holder_cannot_finish_what_was_claimed_again_as_the_same_attempt(
    conn: Connection, outcome: str
) -> None:
    worker = uuid4()
    stale = claimed(conn, worker)
    if outcome == "crashed":
        crash(conn, stale)
    else:
        finish(conn, stale, outcome)  # type: ignore[arg-type]
    holder = again(conn, worker, stale)

    written = finish(conn, stale)

    assert (stale.attempt, holder.attempt, stale.fence, holder.fence) == (1, 1, 1, 2)
    assert written is None
    assert read(conn, holder).state == "running"
    assert finish(conn, holder) == "succeeded"


def test_a_finish_by_another_worker_with_the_right_fence_is_refused(conn: Connection) -> None:
    job = claimed(conn)

    written = settle(conn, uuid4(), verdict(job))

    assert (written.states, read(conn, job).state) == ({}, "running")


def test_a_stale_holder_cannot_renew_the_lease(conn: Connection) -> None:
    worker = uuid4()
    stale = claimed(conn, worker)
    finish(conn, stale, "wait")
    holder = again(conn, worker, stale)
    lease = column(conn, holder, "lease_until")

    assert beat(conn, worker, stale) == {(stale.id, 1): "lost"}
    assert beat(conn, uuid4(), holder) == {(holder.id, 2): "lost"}
    assert column(conn, holder, "lease_until") == lease
    assert beat(conn, worker, holder) == {(holder.id, 2): "ok"}
    assert column(conn, holder, "lease_until") > lease


# ---- 4. The database refuses the rest ----

_LEASED = "lease_until = clock_timestamp()"
_RUNNING = "state = 'running', wake_at = null"
_HELD = "worker = gen_random_uuid()"
REFUSED = {
    "jobs_state_check": "state = 'paused', wake_at = null",
    "running_has_lease": f"{_RUNNING}, {_HELD}",
    "running_has_worker": f"{_RUNNING}, {_LEASED}",
    "running_keyed_has_slot": f"{_RUNNING}, {_HELD}, {_LEASED}, concurrency_key = 'k'",
    "queued_has_wake_at": "wake_at = null",
    "wake_at_is_finite": "wake_at = 'infinity'",
    "terminal_has_finished_at": "state = 'succeeded', wake_at = null",
    "attempt_within_budget": f"{_RUNNING}, {_HELD}, {_LEASED}, attempt = max_attempts + 1",
    "queued_has_attempts_left": "attempt = max_attempts",
}


@pytest.mark.parametrize("constraint", REFUSED)
def test_a_row_that_contradicts_itself_is_refused(conn: Connection, constraint: str) -> None:
    submit(conn)
    refused_by = None

    try:
        conn.execute(f"update agentflow.jobs set {REFUSED[constraint]}".encode())  # noqa: S608
    except psycopg.errors.CheckViolation as error:
        refused_by = error.diag.constraint_name

    assert refused_by == constraint


# ---- 5. Every wait has an end ----


def test_a_waiting_row_is_rung_within_five_minutes_of_being_due(conn: Connection) -> None:
    worker = uuid4()
    claimed(conn, worker, key="k")
    busy = submit(conn, key="k")
    claim(conn, worker, busy)
    submit(conn, run_at=datetime.now(UTC) + timedelta(hours=1))
    for outcome in ("retry", "wait", "handback"):
        finish(conn, claimed(conn, worker), outcome, 5.0)  # type: ignore[arg-type]
    crash(conn, claimed(conn, worker))
    given_back = submit(conn)
    dispatch.take_back(conn, [given_back.id], 1.0)

    assert read(conn, busy).wait_reason == "busy"
    for _ in range(8):  # nobody listens
        assert broken(conn) == []
        assert all(
            row[0] is not None for row in conn.execute("select wake_at from agentflow.jobs where state='queued'")
        )
        pass_time(conn, 600)
        rung, _ = dispatch.pick_due(conn, "default")
        assert {ring.job_id for ring in rung} >= {busy.id, given_back.id}
    assert broken(conn) == []


# ---- 6. Concurrency keys ----


def test_a_claim_that_meets_another_of_its_key_waits_and_finds_the_slot_taken(
    conn: Connection, connect: Connect
) -> None:
    one, other = connect(), connect()
    first = submit(conn, key="k")
    with one.transaction():
        assert len(claim(one, uuid4(), first)) == 1
        earlier = submit(conn, key="k", run_at=datetime.now(UTC) - timedelta(hours=1))
        second = Background(other, lambda c: claim(c, uuid4(), earlier))
        assert second.waits(conn)

    assert second.result() == []
    assert read(conn, earlier).wait_reason == "busy"
    assert broken(conn) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_key_gives_out_each_of_its_slots_once(conn: Connection, at_once: bool) -> None:
    worker = uuid4()
    jobs = [submit(conn, key="k", slots=2) for _ in range(4)]

    taken = claim(conn, worker, *jobs) if at_once else [t for job in jobs for t in claim(conn, worker, job)]

    assert sorted((job.id, job.slot) for job in taken) == [(jobs[0].id, 0), (jobs[1].id, 1)]
    assert [read(conn, job).wait_reason for job in jobs] == [None, None, "busy", "busy"]
    finish(conn, taken[0])
    assert [(job.id, job.slot) for job in claim(conn, worker, *jobs)] == [(jobs[2].id, taken[0].slot)]
    assert broken(conn) == []


def test_a_key_whose_slots_are_made_fewer_gives_out_none_until_it_is_below(conn: Connection) -> None:
    worker = uuid4()
    running = claim(conn, worker, *(submit(conn, key="k", slots=3) for _ in range(3)))
    waiting = submit(conn, key="k", slots=1)

    assert claim(conn, worker, waiting) == []
    assert [finish(conn, job) for job in running[:2]] == ["succeeded", "succeeded"]
    assert claim(conn, worker, waiting) == []
    assert [ring.job_id for ring in settle(conn, worker, verdict(running[2])).rings] == [waiting.id]


def test_two_running_jobs_cannot_have_the_same_slot(conn: Connection) -> None:
    claimed(conn, key="k", slots=2)
    claimed(conn, key="k", slots=2)
    refused = False

    try:
        conn.execute("update agentflow.jobs set slot = 0")
    except psycopg.errors.UniqueViolation:
        refused = True

    assert refused


@pytest.mark.parametrize("slots", [1, 3])
def test_never_more_jobs_of_a_key_run_than_it_has_slots(conn: Connection, connect: Connect, slots: int) -> None:
    jobs, _ = intake.submit_many(conn, ORGANIZATION, [prepared(key="k", slots=slots) for _ in range(300)])
    seen: list[int] = []

    def work(c: Connection, mine: Sequence[Job]) -> int:
        worker, ended, rung = uuid4(), 0, [job.id for job in mine]
        while rung and time.monotonic() < end:
            for job in claim(c, worker, *rung[:4]):
                settled = settle(c, worker, verdict(job))
                rung.extend(ring.job_id for ring in settled.rings)
                ended += len(settled.states)
            del rung[:4]
        return ended

    def count(c: Connection) -> None:
        while time.monotonic() < end:
            seen.append(value(c, "select count(*) from agentflow.jobs where state = 'running'"))

    shares = [(connect(), jobs[i::4]) for i in range(4)]
    watcher = connect()
    end = time.monotonic() + 1.0
    *ended, _ = together(*(lambda share=share: work(*share) for share in shares), lambda: count(watcher))

    assert 0 < max(seen) <= slots
    assert sum(ended) == value(conn, "select count(*) from agentflow.jobs where state = 'succeeded'") > slots
    assert broken(conn) == []


def test_a_key_with_a_free_slot_lets_nobody_wait_whose_message_was_overtaken(conn: Connection) -> None:
    first, second = submit(conn, key="k", slots=2), submit(conn, key="k", slots=2)

    # Each message rings for its key: the second's takes the head of the line, which is the first.
    assert [job.id for job in claim(conn, uuid4(), second)] == [first.id]
    assert claim(conn, uuid4(), first) == []

    rung, _ = dispatch.pick_due(conn, "default")
    assert [job.id for job in claim(conn, uuid4(), *(ring.job_id for ring in rung))] == [second.id]
    assert broken(conn) == []


def test_parking_as_busy_and_freeing_the_slot_cannot_miss_each_other(conn: Connection, connect: Connect) -> None:
    one, other = connect(), connect()
    running, waiting = claimed(conn, key="k"), submit(conn, key="k")

    with one.transaction():
        assert (
            settle(one, running.worker, verdict(running)).rings == []
        )  # it is not parked yet: its message is under way
        message = Background(other, lambda c: claim(c, uuid4(), waiting))
        assert message.waits(conn)

    assert [job.id for job in message.result()] == [waiting.id]


@pytest.mark.parametrize("leaving", ["succeeded", "failed", "retry", "wait", "handback", "cancelled", "crashed"])
def test_whoever_frees_a_slot_rings_the_next_in_line(conn: Connection, leaving: str) -> None:
    worker = uuid4()
    running = claimed(conn, worker, key="k")
    first, second = submit(conn, key="k"), submit(conn, key="k")
    assert claim(conn, worker, first, second) == []

    if leaving == "crashed":
        pass_time(conn, 31)
        rings = rescue(conn).rings
    else:
        rings = settle(conn, worker, verdict(running, leaving, 9.0)).rings  # type: ignore[arg-type]

    assert [ring.job_id for ring in rings] == [first.id]
    assert [job.id for job in claim(conn, worker, first)] == [first.id]


def test_cancelling_the_one_that_was_rung_rings_the_next(conn: Connection) -> None:
    worker = uuid4()
    running = claimed(conn, worker, key="k")
    first, second = submit(conn, key="k"), submit(conn, key="k")
    claim(conn, worker, first, second)
    finish(conn, running)

    assert records.cancel(conn, ORGANIZATION, first.id) == ("cancelled", [second.id])


# ---- 7. Attempts ----


def test_a_job_that_does_not_run_has_an_attempt_for_each_claim(conn: Connection) -> None:
    worker = uuid4()
    job = claimed(conn, worker)
    for outcome in ("retry", "wait", "handback"):
        finish(conn, job, outcome)  # type: ignore[arg-type]
        job = again(conn, worker, job)
    crash(conn, job)
    job = again(conn, worker, job)
    finish(conn, job)

    told = [(a.fence, a.outcome, a.worker) for a in records.attempts(conn, job.id)]

    outcomes = ["retry", "wait", "handback", "crashed", "succeeded"]
    assert told == [(i + 1, outcome, worker) for i, outcome in enumerate(outcomes)]
    for outcome in ("failed", "cancelled"):
        finish(conn, claimed(conn), outcome)  # type: ignore[arg-type]
    assert broken(conn) == []


# ---- 8. Budgets ----


def test_retrying_ends_when_the_attempts_are_spent(conn: Connection) -> None:
    worker = uuid4()
    job = claimed(conn, worker, max_attempts=3)
    states = []
    for _ in range(3):
        states.append(finish(conn, job, "retry"))
        if states[-1] == "queued":
            job = again(conn, worker, job)

    assert states == ["queued", "queued", "failed"]
    assert broken(conn) == []


def test_waiting_and_interruption_spend_no_attempt(conn: Connection) -> None:
    worker = uuid4()
    job = claimed(conn, worker, max_attempts=1)
    for outcome in ("wait", "handback") * 3:
        assert finish(conn, job, outcome) == "queued"  # type: ignore[arg-type]
        assert read(conn, job).attempt == 0
        job = again(conn, worker, job)
    assert (job.attempt, job.fence) == (1, 7)
    assert broken(conn) == []


def test_a_job_whose_worker_dies_again_and_again_fails_as_lost(conn: Connection) -> None:
    worker = uuid4()
    job = claimed(conn, worker, max_attempts=100)
    for _ in range(MAX_CRASHES - 1):
        crash(conn, job)
        assert (read(conn, job).state, read(conn, job).attempt) == ("queued", 0)
        job = again(conn, worker, job)
    crash(conn, job)

    ended = read(conn, job)
    assert (ended.state, ended.crashes, ended.error and ended.error["code"]) == ("failed", MAX_CRASHES, "worker_lost")
    assert broken(conn) == []


# ---- 9. What follows from an end ----


def _end(conn: Connection, how: str, **request: Any) -> Job:
    """A job that ended in the way named."""
    if how == "cancelled while queued":
        job = submit(conn, **request)
        records.cancel(conn, ORGANIZATION, job.id)
    elif how == "lost":
        job = claimed(conn, **request)
        conn.execute("update agentflow.jobs set crashes = %s where id = %s", (MAX_CRASHES - 1, job.id))
        crash(conn, job)
    elif how == "spent":
        job = claimed(conn, max_attempts=1, **request)
        finish(conn, job, "retry")
    elif how == "cancelled while running":
        job = claimed(conn, **request)
        records.cancel(conn, ORGANIZATION, job.id)
        finish(conn, job, "retry")
    else:
        job = claimed(conn, **request)
        finish(conn, job, how)  # type: ignore[arg-type]
    return read(conn, job)


ENDS = ["succeeded", "failed", "cancelled", "spent", "cancelled while running", "cancelled while queued", "lost"]


@pytest.mark.parametrize("how", ENDS)
def test_each_end_writes_one_callback_and_only_success_starts_the_next_jobs(conn: Connection, how: str) -> None:
    then = [child(), child(callback_url=URL, then=[child()])]

    ended = _end(conn, how, callback_url=URL, then=then)

    children = [c.type for c in records.children(conn, ended.id)]
    assert ended.terminal
    assert sorted(children) == ["deliver_callback"] + ["test", "test"] * (ended.state == "succeeded")
    assert broken(conn) == []


def test_what_follows_is_written_in_the_transaction_that_ends_the_job(conn: Connection, connect: Connect) -> None:
    running = claimed(conn, callback_url=URL, then=[child()])
    queued = submit(conn, callback_url=URL)
    other = connect()

    with other.transaction(force_rollback=True):
        finish(other, running)
        records.cancel(other, ORGANIZATION, queued.id)
        assert value(other, "select count(*) from agentflow.jobs") == 5
        assert value(conn, "select count(*) from agentflow.jobs") == 2

    assert (read(conn, running).state, read(conn, queued).state) == ("running", "queued")
    assert broken(conn) == []


def test_a_batch_counts_each_end_once_and_is_finished_by_the_last(conn: Connection) -> None:
    worker = uuid4()
    batch = batches.submit(conn, ORGANIZATION, [prepared() for _ in range(5)])
    jobs = claim(conn, worker, *batch.ids[:4])
    jobs.sort(key=lambda job: job.id)
    settle(conn, worker, verdict(jobs[0]), verdict(jobs[0]), verdict(jobs[1], "failed"), verdict(jobs[2], "cancelled"))
    settle(conn, worker, verdict(jobs[0]), verdict(jobs[3], "retry"))
    records.cancel(conn, ORGANIZATION, batch.ids[4])
    before = records.get_batch(conn, ORGANIZATION, batch.id)
    records.cancel(conn, ORGANIZATION, jobs[3].id)
    after = records.get_batch(conn, ORGANIZATION, batch.id)

    assert before and after
    assert (before.succeeded, before.failed, before.cancelled, before.finished_at) == (1, 1, 2, None)
    assert (after.succeeded, after.failed, after.cancelled, after.finished_at is not None) == (1, 1, 3, True)
    assert broken(conn) == []


def test_a_second_callback_of_a_job_is_refused(conn: Connection) -> None:
    ended = _end(conn, "succeeded", callback_url=URL)
    refused = False

    try:
        conn.execute(
            "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at, parent_id)"
            " values (gen_random_uuid(), 1, 'deliver_callback', 'default', 1, 1, clock_timestamp(), %s)",
            (ended.id,),
        )
    except psycopg.errors.UniqueViolation:
        refused = True

    assert refused


# ---- 10. A message changes nothing by itself ----


@pytest.mark.parametrize("key", [None, "k"])
def test_a_message_for_a_row_that_is_not_waiting_and_due_changes_nothing(conn: Connection, key: str | None) -> None:
    worker = uuid4()
    request: dict[str, Any] = {"key": key, "slots": 9}
    running = claimed(conn, worker, **request)
    ended = [_end(conn, how, **request) for how in ("succeeded", "failed", "cancelled")]
    later = submit(conn, run_at=datetime.now(UTC) + timedelta(hours=1), **request)
    parked = claimed(conn, worker, **request)
    finish(conn, parked, "wait", 60.0)
    expired = claimed(conn, worker, **request)
    conn.execute("update agentflow.jobs set lease_until = clock_timestamp() where id = %s", (expired.id,))
    before = [whole_row(conn, job) for job in (running, *ended, later, parked, expired)]

    for by in (worker, uuid4()):
        for job in (running, *ended, later, parked, expired):
            assert claim(conn, by, job, job.id) == []
    assert claim(conn, worker, uuid4()) == []

    assert [whole_row(conn, job) for job in (running, *ended, later, parked, expired)] == before


@pytest.mark.parametrize("key", [None, "k"])
def test_a_doubled_message_is_one_claim(conn: Connection, connect: Connect, key: str | None) -> None:
    others, looks = [connect() for _ in range(4)], connect()
    job = submit(conn, key=key, slots=20)
    conn.execute("begin")  # until all of them have come to the row, or to its key
    conn.execute("select from agentflow.jobs where id = %s for update", (job.id,))

    def let_go() -> list[Job]:
        waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        eventually(lambda: value(looks, waits) >= 4, within_s=20)
        conn.execute("commit")
        return []

    taken = together(let_go, *(lambda c=c: claim(c, uuid4(), job, job) for c in others))

    assert sum(map(len, taken)) == 1
    assert broken(conn) == []


def test_a_lost_message_is_rung_again(conn: Connection) -> None:
    job = submit(conn)
    assert dispatch.pick_due(conn, "default")[0] == []  # it was rung by its submitter

    pass_time(conn, 31)

    assert [ring.job_id for ring in dispatch.pick_due(conn, "default")[0]] == [job.id]


# ---- 11. No network while a transaction is open ----


def test_the_relay_publishes_after_its_commit(conn: Connection, connect: Connect, database: Database) -> None:
    job = submit(conn)
    pass_time(conn, 31)
    watcher, published = connect(), []

    def publish(rings: Sequence[Any]) -> None:
        published.extend(rings)
        assert lockable(watcher, job) == [job.id], "the row is still locked"
        assert column(watcher, job, "sends") == 2, "the stamp is not committed"

    with database.connect() as mine:
        Relay(database, ["default"], poll_s=1.0, publish=publish).step(mine)  # type: ignore[arg-type]

    assert [ring.job_id for ring in published] == [job.id]


def test_a_finish_and_a_rescue_tell_others_after_their_commit(
    conn: Connection, connect: Connect, database: Database
) -> None:
    worker, watcher = uuid4(), connect()
    job, lost = claimed(conn, worker), claimed(conn)
    told = []

    def after(settled: Settled, *_: Any) -> None:
        told.extend(settled.states)
        assert set(lockable(watcher, job, lost)) == {job.id, lost.id}

    with database.connect() as mine:
        write = Settler(database, worker, LEASE_S, MAX_CRASHES, lambda *_: None, after)
        write.put(Ended(verdict(job), None))
        write.step(mine)
        conn.execute("update agentflow.jobs set lease_until = clock_timestamp() where id = %s", (lost.id,))
        _rescue(database, rescuer(conn), after).step(mine)

    assert told == [(job.id, 1), (lost.id, 1)]


def test_a_submitter_rings_after_the_commit(system: system.System, conn: Connection) -> None:
    rung = []

    class Broker:
        def on_unrung(self) -> None:
            pass

        def can_publish(self) -> bool:
            return True

        def ring(self, rings: Sequence[Any]) -> None:
            rung.extend((ring.job_id, value(conn, "select count(*) from agentflow.jobs")) for ring in rings)

        def tell_cancel(self) -> None:
            pass

    system.publisher._broker = Broker()
    with system.transaction() as transaction:
        job = transaction.submit_prepared(ORGANIZATION, prepared()).job
        time.sleep(0.05)
        assert rung == []
    system.publisher.close()

    assert rung == [(job.id, 1)]


# ---- 12. The order of locks ----


def test_rows_are_locked_in_the_order_of_their_ids(conn: Connection, connect: Connect) -> None:
    worker, holder, other = uuid4(), connect(), connect()
    first, *rest = (submit(conn) for _ in range(4))

    def nothing_but_the_first_is_waited_for(call: Callable[[Connection], Any]) -> None:
        with row_locked(holder, first):
            waiting = Background(other, call)
            assert waiting.waits(conn)
            assert sorted(lockable(conn, *rest)) == [job.id for job in rest]
        waiting.result()

    backwards = [job.id for job in (*reversed(rest), first)]
    nothing_but_the_first_is_waited_for(lambda c: dispatch.take_back(c, backwards, 0.0))
    conn.execute("update agentflow.jobs set run_at = clock_timestamp(), wake_at = clock_timestamp()")
    nothing_but_the_first_is_waited_for(lambda c: claims.claim(c, backwards, worker, LEASE_S))
    verdicts = [Verdict(id_, 1, "retry") for id_ in backwards]
    nothing_but_the_first_is_waited_for(lambda c: settle(c, worker, *verdicts))
    assert value(conn, "select count(*) from agentflow.jobs where state = 'queued'") == 4


def test_a_keyed_claim_locks_the_head_and_those_it_parks_in_one_order(conn: Connection, connect: Connect) -> None:
    """The head may have the greater id: it is due earlier."""
    holder, other = connect(), connect()
    asked = submit(conn, key="k")
    head = submit(conn, key="k", run_at=datetime.now(UTC) - timedelta(hours=1))

    with row_locked(holder, asked):
        waiting = Background(other, lambda c: claim(c, uuid4(), asked))
        assert waiting.waits(conn)
        assert lockable(conn, head) == [head.id]

    assert [job.id for job in waiting.result()] == [head.id]


def test_keys_are_locked_before_rows_and_in_one_order(conn: Connection, connect: Connect) -> None:
    worker, holder, other = uuid4(), connect(), connect()
    keys = [
        row[0] for row in conn.execute("select k from unnest('{a,b,c,d}'::text[]) k order by hashtextextended(k, 7)")
    ]
    jobs = [submit(conn, key=key) for key in reversed(keys)]

    def only_the_first_key_is_waited_for(call: Callable[[Connection], Any], key: str, held: int) -> None:
        with holder.transaction():
            holder.execute("select agentflow.lock_keys_1(%s)", ([key],))
            waiting = Background(other, call)
            assert waiting.waits(conn)
            assert sorted(lockable(conn, *jobs)) == [job.id for job in jobs]
            locks = "select count(*) from pg_locks where locktype = 'advisory' and granted and pid = %s"
            assert value(conn, locks, other.info.backend_pid) == held
        waiting.result()

    ids = [job.id for job in jobs]
    only_the_first_key_is_waited_for(lambda c: claims.claim_keyed(c, ids, worker, LEASE_S), keys[0], 0)
    verdicts = [Verdict(id_, 1, "handback") for id_ in ids]
    only_the_first_key_is_waited_for(lambda c: settle(c, worker, *verdicts), keys[0], 0)
    only_the_first_key_is_waited_for(lambda c: claims.claim_keyed(c, ids, worker, LEASE_S), keys[2], 2)
    only_the_first_key_is_waited_for(lambda c: records.cancel(c, ORGANIZATION, ids[0]), keys[3], 0)


def test_batches_in_opposite_order_do_not_deadlock(conn: Connection, connect: Connect) -> None:
    worker = uuid4()
    jobs = [submit(conn, key=f"k{i % 3}" if i % 2 else None, slots=100) for i in range(24)]
    ids = [job.id for job in jobs]
    others = [connect() for _ in range(4)]

    def work(c: Connection, mine: Sequence[UUID]) -> None:
        for _ in range(15):
            claim(c, worker, *mine)
            held = rows(c, "select id, fence from agentflow.jobs where state = 'running'")
            settle(c, worker, *(Verdict(row.id, row.fence, "handback") for row in held[:: (1 if mine is ids else -1)]))
            beat(c, worker)
            dispatch.take_back(c, mine, 0.0)

    together(*(lambda c=c, i=i: work(c, ids if i % 2 else ids[::-1]) for i, c in enumerate(others)))

    assert broken(conn) == []


def test_a_heartbeat_waits_for_nobody(conn: Connection, connect: Connect) -> None:
    worker, holder = uuid4(), connect()
    looked_at, free = claimed(conn, worker), claimed(conn, worker)
    conn.execute("set lock_timeout = '2s'")

    with row_locked(holder, looked_at):
        answers = beat(conn, worker, looked_at, free)

    assert answers == {(looked_at.id, 1): "skipped", (free.id, 1): "ok"}


# ---- 13. Clocks ----


@pytest.mark.parametrize("key", [None, "k"])
def test_a_lease_is_whole_however_long_its_claim_had_to_wait(
    conn: Connection, connect: Connect, key: str | None
) -> None:
    holder, other = connect(), connect()
    job = submit(conn, key=key)
    with row_locked(holder, job):
        waiting = Background(other, lambda c: claim(c, uuid4(), job))
        assert waiting.waits(conn)
        time.sleep(0.6)
    waiting.result()

    left_s = value(conn, "select extract(epoch from lease_until - clock_timestamp()) from agentflow.jobs")
    assert LEASE_S - 0.3 < left_s <= LEASE_S


def test_a_renewed_lease_and_a_park_are_counted_from_their_writing(conn: Connection, connect: Connect) -> None:
    worker, holder, other = uuid4(), connect(), connect()
    job = claimed(conn, worker)
    with other.transaction():
        other.execute("select 1")
        time.sleep(0.6)
        beat(other, worker, job)
        left_s = value(other, "select extract(epoch from lease_until - clock_timestamp()) from agentflow.jobs")
        with row_locked(holder):
            settle(other, worker, verdict(job, "wait", 10.0))
        until_s = value(other, "select extract(epoch from wake_at - clock_timestamp()) from agentflow.jobs")
    assert LEASE_S - 0.3 < left_s <= LEASE_S
    assert 9.7 < until_s <= 10.0


def test_a_worker_counts_its_lease_from_before_the_claim_was_sent(
    conn: Connection, connect: Connect, database: Database
) -> None:
    holder, held = connect(), []
    job = submit(conn)
    take = Claimer(database, uuid4(), LEASE_S, held.append)
    take.ask(job.id)

    with database.connect() as mine:
        with row_locked(holder, job):
            waiting = Background(mine, take.step)  # type: ignore[arg-type]
            assert waiting.waits(conn)
            time.sleep(0.6)
        waiting.result()
        answered = time.monotonic()

    (running,) = held
    assert running.lease_ends <= answered + LEASE_S - 0.6


@pytest.mark.parametrize(("trips_s", "linger_s"), [((0.003, 30.0, 0.004), 0.0), ((0.091, 0.085, 0.3), 0.02)])
def test_only_far_from_postgres_a_claim_waits_for_those_that_come_just_after_it(
    database: Database, monkeypatch: pytest.MonkeyPatch, trips_s: tuple[float, ...], linger_s: float
) -> None:
    take = Claimer(database, uuid4(), LEASE_S, lambda _running: None)
    left = list(trips_s)
    monkeypatch.setattr(claimer, "_seconds", lambda _conn: left.pop())
    take.wake()

    with database.connect() as mine:
        take.step(mine)
        take.wake()
        take.step(mine)  # is not measured again

    assert take.trip_s == min(trips_s) and take._requests.linger_s == pytest.approx(linger_s)


def test_a_worker_counts_its_lease_from_before_the_heartbeat_was_sent(
    conn: Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = uuid4()
    job = claimed(conn, worker)
    running = _Running(job)
    renew = leases.renew

    def slow(*arguments: Any) -> Any:
        answers = renew(*arguments)
        time.sleep(0.4)
        return answers

    monkeypatch.setattr(leases, "renew", slow)
    with database.connect() as mine:
        _heart(database, worker, [running]).step(mine)

    assert 0 < running.lease_ends <= time.monotonic() + LEASE_S - 0.4


class _Running:
    """What the heart has to know of a job that runs."""

    def __init__(self, job: Job) -> None:
        self.key = (job.id, job.fence)
        self.lease_ends = 0.0
        self.settling = False
        self.stopped: list[str] = []

    def news(self, _: str) -> None:
        return None

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)


def _heart(
    database: Database,
    worker: UUID,
    running: Sequence[Any],
    handed_back: list[Any] | None = None,
    lease_s: float = LEASE_S,
) -> Heart:
    facts = {"kind": "worker", "host": "h", "pid": 1, "version": "0", "queues": ["default"], "threads": 1, "demand": {}}
    return Heart(
        database,
        worker,
        lease_s=lease_s,
        renew_s=lease_s / 3,
        held=lambda: list(running),
        facts=lambda: {**facts, "memory_bytes": None, "busy": 0},
        unsure_of=lambda _: False,
        hand_back=lambda *which: (handed_back if handed_back is not None else []).append(which),
        beat=lambda: None,
    )


def test_a_lease_too_far_ahead_counts_as_over(conn: Connection) -> None:
    """The clock went back at a failover: nobody renewed this lease within living memory."""
    job = claimed(conn)
    conn.execute("update agentflow.jobs set lease_until = lease_until + interval '1 h'")

    rescue(conn)

    assert read(conn, job).state == "queued"


# ---- 14. A cancel asked for is not forgotten ----


@pytest.mark.parametrize("outcome", ["retry", "wait", "handback", "crashed"])
@pytest.mark.parametrize("key", [None, "k"])
def test_a_job_asked_to_end_never_waits_again(conn: Connection, outcome: str, key: str | None) -> None:
    job = claimed(conn, callback_url=URL, key=key)
    assert records.cancel(conn, ORGANIZATION, job.id) == ("running", [])
    assert beat(conn, job.worker or uuid4(), job) == {(job.id, 1): "cancel"}

    if outcome == "crashed":
        crash(conn, job)
    else:
        finish(conn, job, outcome)  # type: ignore[arg-type]

    assert read(conn, job).state == "cancelled"
    assert broken(conn) == []


@pytest.mark.parametrize("key", [None, "k"])
def test_a_cancel_that_a_retry_had_to_wait_for_is_seen_by_it(
    conn: Connection, connect: Connect, key: str | None
) -> None:
    one, other = connect(), connect()
    job = claimed(conn, key=key)
    with one.transaction():
        assert records.cancel(one, ORGANIZATION, job.id)[0] == "running"
        end = Background(other, lambda c: finish(c, job, "retry"))
        assert end.waits(conn)

    assert end.result() == "cancelled"
    assert broken(conn) == []


def test_a_cancel_that_meets_a_claim_is_not_lost(conn: Connection, connect: Connect) -> None:
    one, other = connect(), connect()
    job = submit(conn)
    with one.transaction():
        (running,) = claim(one, uuid4(), job)
        cancel = Background(other, lambda c: records.cancel(c, ORGANIZATION, job.id))
        assert cancel.waits(conn)

    assert cancel.result()[0] == "running"
    assert beat(conn, running.worker or uuid4(), running) == {(job.id, 1): "cancel"}


def test_a_claim_that_meets_a_cancel_gets_nothing(conn: Connection, connect: Connect) -> None:
    one, other = connect(), connect()
    job = submit(conn)
    with one.transaction():
        assert records.cancel(one, ORGANIZATION, job.id)[0] == "cancelled"
        message = Background(other, lambda c: claim(c, uuid4(), job))
        assert message.waits(conn)

    assert message.result() == []
    assert broken(conn) == []


# ---- 15. Who may rescue ----


def _rescue(database: Database, worker: UUID, after: Callable[..., None] = lambda *_: None) -> Rescue:
    return Rescue(database, worker, lease_s=LEASE_S, max_crashes=MAX_CRASHES, after=after)


UNSTABLE = {
    "unknown": "id = gen_random_uuid()",
    "stopped": "stopped_at = clock_timestamp()",
    "silent": "seen_at = clock_timestamp() - interval '16 s'",
    "new": "well_since = clock_timestamp() - interval '14 s'",
}


@pytest.mark.parametrize("why", UNSTABLE)
def test_only_a_worker_whose_heartbeats_came_through_for_half_a_lease_rescues(
    conn: Connection, database: Database, why: str
) -> None:
    job, stable, unstable = claimed(conn), rescuer(conn), rescuer(conn)
    pass_time(conn, 31)
    conn.execute(f"update agentflow.workers set {UNSTABLE[why]} where id = %s".encode(), (unstable,))  # noqa: S608

    with database.connect() as mine:
        _rescue(database, unstable).step(mine)
        assert read(conn, job).state == "running"
        _rescue(database, stable).step(mine)
        assert read(conn, job).state == "queued"


def test_a_gap_between_heartbeats_makes_a_worker_start_anew(conn: Connection, database: Database) -> None:
    worker = uuid4()
    beating = _heart(database, worker, [])
    well_for_s = "select extract(epoch from clock_timestamp() - well_since)::float8 from agentflow.workers"

    def later(seconds: float) -> None:
        conn.execute(
            "update agentflow.workers set seen_at = seen_at - make_interval(secs => %(s)s),"
            " well_since = well_since - make_interval(secs => %(s)s)",
            {"s": seconds},
        )

    with database.connect() as mine:
        beating.step(mine)
        for pause_s, well_s in ((10, 10), (10, 20), (14, 34), (16, 0), (10, 10)):
            later(pause_s)
            beating.step(mine)
            assert value(conn, well_for_s) == pytest.approx(well_s, abs=0.9)


def test_a_lease_that_is_over_but_not_rescued_may_be_renewed_and_finished(conn: Connection) -> None:
    worker = uuid4()
    renewed, finished = claimed(conn, worker), claimed(conn, worker)
    pass_time(conn, 300)

    assert beat(conn, worker, renewed) == {(renewed.id, 1): "ok", (finished.id, 1): "orphan"}
    assert finish(conn, finished) == "succeeded"
    rescue(conn)
    assert read(conn, renewed).state == "running"


def test_a_lease_renewed_while_the_rescue_looks_is_left_alone(conn: Connection, connect: Connect) -> None:
    worker, one, other = uuid4(), connect(), connect()
    job = claimed(conn, worker)
    pass_time(conn, 31)
    with one.transaction():
        beat(one, worker, job)
        taking = Background(other, rescue)
        assert taking.waits(conn)

    assert taking.result().states == {}
    assert read(conn, job).state == "running"


def test_a_claim_nobody_heard_of_is_handed_back_when_seen_twice(conn: Connection, database: Database) -> None:
    worker, handed_back = uuid4(), []
    orphan = claimed(conn, worker)
    beating = _heart(database, worker, [], handed_back)

    with database.connect() as mine:
        beating.step(mine)
        assert handed_back == []
        beating.step(mine)

    assert handed_back == [(orphan.id, 1)]


# ---- 16. How many messages there are ----


def _outstanding(conn: Connection) -> int:
    return int(value(conn, "select count(*) from agentflow.jobs where state = 'queued' and sent_at is not null"))


def test_a_flood_is_rung_as_far_as_the_window_reaches(conn: Connection) -> None:
    _, first = intake.submit_many(conn, ORGANIZATION, [prepared() for _ in range(WINDOW + 20)])
    _, second = intake.submit_many(conn, ORGANIZATION, [prepared() for _ in range(5)])

    assert (len(first), len(second), _outstanding(conn)) == (WINDOW, 0, WINDOW)
    assert dispatch.pick_due(conn, "default")[0] == []
    worker = uuid4()
    for ring in first[:3]:
        claim(conn, worker, ring.job_id)
    assert len(dispatch.pick_due(conn, "default")[0]) == 3
    assert _outstanding(conn) == WINDOW


def hand_in(conn: Connection, alone: bool, **request: Any) -> Job:
    """One job, by the statement for one or by that for many."""
    if alone:
        return submit(conn, **request)
    return intake.submit_many(conn, ORGANIZATION, [prepared(**request)])[0][0]


@pytest.mark.parametrize("alone", [True, False])
def test_submitters_at_once_exceed_the_window_by_no_more_than_themselves(
    conn: Connection, connect: Connect, alone: bool
) -> None:
    others = [connect() for _ in range(6)]

    def flood(c: Connection) -> None:
        for _ in range(10):
            hand_in(c, alone)

    together(*(lambda c=c: flood(c) for c in others))

    assert WINDOW <= _outstanding(conn) <= WINDOW + len(others)


@pytest.mark.parametrize("alone", [True, False])
def test_nobody_is_rung_before_an_older_job_of_its_class(conn: Connection, alone: bool) -> None:
    parked = submit(conn, run_at=datetime.now(UTC) + timedelta(seconds=1))
    pass_time(conn, 2)  # it is due, and the relay has not come by yet

    young, critical = hand_in(conn, alone), hand_in(conn, alone, priority=0)

    assert [column(conn, job, "sends") for job in (parked, young, critical)] == [0, 0, 1]


def test_an_unheard_job_is_rung_ever_more_seldom_and_at_least_every_five_minutes(conn: Connection) -> None:
    job = submit(conn)
    pauses = []
    for _ in range(9):
        pauses.append(
            round(
                value(
                    conn,
                    "select extract(epoch from wake_at - sent_at)::float8 from agentflow.jobs where id = %s",
                    job.id,
                )
            )
        )
        pass_time(conn, pauses[-1] - 1)
        assert dispatch.pick_due(conn, "default")[0] == []
        pass_time(conn, 1.01)
        assert len(dispatch.pick_due(conn, "default")[0]) == 1

    assert pauses == [30, 60, 120, 240, 300, 300, 300, 300, 300]


# ---- The settler, on a real database ----


def _settler(database: Database, worker: UUID) -> tuple[Settler, dict[UUID, State | None], list[Settled]]:
    states: dict[UUID, State | None] = {}
    told: list[Settled] = []

    def settled(ended: Ended, state: State | None) -> None:
        states[ended.verdict.job_id] = state

    return Settler(database, worker, LEASE_S, MAX_CRASHES, settled, lambda s, _: told.append(s)), states, told


def test_the_same_verdict_twice_in_a_batch_counts_once(conn: Connection, database: Database) -> None:
    worker = uuid4()
    retried, done = claimed(conn, worker), claimed(conn, worker, callback_url=URL)
    write, states, _ = _settler(database, worker)
    for said in (verdict(retried, "retry"), verdict(done), verdict(retried, "retry"), verdict(done)):
        write.put(Ended(said, None))

    with database.connect() as mine:
        write.step(mine)

    assert states == {retried.id: "queued", done.id: "succeeded"}
    assert write.flush(0)
    assert broken(conn) == []


@pytest.mark.parametrize("result", ['{"text": "a\\u0000b"}', '{"text": "\\ud800"}', "no JSON"])
def test_a_result_that_cannot_be_stored_fails_its_job_alone(conn: Connection, database: Database, result: str) -> None:
    worker = uuid4()
    jobs = [claimed(conn, worker, callback_url=URL) for _ in range(4)]
    write, states, _ = _settler(database, worker)
    for job in jobs:
        write.put(Ended(verdict(job, result=result if job is jobs[2] else '{"ok": true}'), None))

    with database.connect() as mine:
        write.step(mine)

    assert [states.get(job.id) for job in jobs] == ["succeeded", "succeeded", "failed", "succeeded"]
    error = read(conn, jobs[2]).error
    assert error is not None and error["code"] == "unrecordable"
    assert write.flush(0)
    assert broken(conn) == []


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "retry"])
def test_a_finish_whose_commit_was_not_heard_is_known_to_be_written(
    conn: Connection, database: Database, monkeypatch: pytest.MonkeyPatch, outcome: Any
) -> None:
    worker = uuid4()
    job, taken = claimed(conn, worker, callback_url=URL), claimed(conn, worker)
    crash(conn, taken)
    write, states, _ = _settler(database, worker)
    real = settlement.settle

    def cut(*arguments: Any, **more: Any) -> Settled:
        real(*arguments, **more)
        monkeypatch.setattr(settlement, "settle", real)
        raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(settlement, "settle", cut)
    write.put(Ended(verdict(job, outcome), None))
    with database.connect() as mine:
        with pytest.raises(psycopg.OperationalError):
            write.step(mine)
        write.step(mine)

    assert states[job.id] is not None
    assert write.flush(0)
    assert broken(conn) == []


# ---- What holds everywhere ----


def test_no_statement_asks_for_the_start_of_its_transaction() -> None:
    """`now()` is that: after a long wait for a lock it lies in the past."""
    texts = {m.name: m.sql for m in schema.shipped()}
    texts.update(
        {module.__name__: inspect.getsource(module) for module in (claims, dispatch, intake, leases, settlement)}
    )
    for name, text in texts.items():
        assert "now()" not in text and "current_timestamp" not in text.lower(), name


def test_ids_made_by_the_database_are_in_the_order_of_those_made_outside(conn: Connection) -> None:
    before = prepared().id
    time.sleep(0.002)
    (callback,) = records.children(conn, _end(conn, "failed", callback_url=URL).id)
    time.sleep(0.002)

    assert before < callback.id < prepared().id
    assert (callback.id.version, callback.id.variant) == (7, before.variant)
