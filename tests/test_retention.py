"""Forgetting: what is old and beyond the newest goes, in batches, and never what something open still needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow.jobs import batches, intake, records, retention
from agentflow.jobs.retention import BATCH, Keep
from agentflow.system import System
from tests import core_support
from tests.calendar_support import cleaned_up
from tests.core_support import (
    ORGANIZATION,
    child,
    claim,
    claimed,
    finish,
    pass_time,
    prepared,
    submit,
    value,
    verdict,
)
from tests.one_database import database_url, original
from tests.two_at_once import row_locked

__all__ = ["database_url", "original"]

Connection = psycopg.Connection
NOTHING = Keep(hours=0, count=0)
URL = "http://caller.example/done"


def ended(conn: Connection, outcome: Any = "succeeded", **request: Any) -> UUID:
    job = claimed(conn, **request)
    finish(conn, job, outcome)
    return job.id


def ended_many(conn: Connection, number: int, organization_id: int = ORGANIZATION) -> list[UUID]:
    jobs, _ = intake.submit_many(conn, organization_id, [prepared() for _ in range(number)])
    worker = uuid4()
    core_support.settle(conn, worker, *(verdict(job) for job in claim(conn, worker, *jobs)))
    return [job.id for job in jobs]


def left(conn: Connection, organization_id: int = ORGANIZATION) -> list[UUID]:
    query = "select id from agentflow.jobs where organization_id = %s order by created_at, id"
    return [row[0] for row in conn.execute(query, (organization_id,)).fetchall()]


def delete(conn: Connection, keep: Keep, *, succeeded: bool = True, limit: int = BATCH) -> int:
    return retention.delete_jobs(conn, succeeded=succeeded, keep=keep, limit=limit)


# ---- young, or among the newest ----


def test_an_ended_job_is_kept_while_it_is_young(conn: Connection) -> None:
    old = ended(conn)
    pass_time(conn, 7200)
    young = ended(conn)

    assert delete(conn, Keep(hours=1, count=0)) == 1
    assert left(conn) == [young]
    assert old not in left(conn)


def test_the_newest_are_kept_however_old_they_are(conn: Connection) -> None:
    jobs = [ended(conn) for _ in range(5)]
    pass_time(conn, 7200)

    assert delete(conn, Keep(hours=1, count=2)) == 3
    assert left(conn) == jobs[3:]


def test_fewer_than_the_newest_to_keep_are_all_kept(conn: Connection) -> None:
    jobs = [ended(conn) for _ in range(3)]
    pass_time(conn, 7200)

    assert delete(conn, Keep(hours=1, count=4)) == 0
    assert delete(conn, Keep(hours=1, count=3)) == 0
    assert left(conn) == jobs


def test_the_newest_are_counted_for_each_organization(conn: Connection) -> None:
    jobs = {organization: ended_many(conn, 4, organization) for organization in (1, 2, 7)}
    pass_time(conn, 7200)

    assert delete(conn, Keep(hours=1, count=3)) == 3
    assert {organization: left(conn, organization) for organization in jobs} == {o: j[1:] for o, j in jobs.items()}


def test_dead_letters_have_a_rule_of_their_own(conn: Connection) -> None:
    done, failed, cancelled = ended(conn), ended(conn, "failed"), ended(conn, "cancelled")
    pass_time(conn, 7200)

    assert delete(conn, Keep(hours=1, count=0)) == 1
    assert left(conn) == [failed, cancelled]
    assert delete(conn, Keep(hours=1, count=1), succeeded=False) == 1
    assert left(conn) == [cancelled]
    assert done not in left(conn)


def test_delivered_callbacks_do_not_push_out_the_jobs_they_told_of(conn: Connection) -> None:
    """A callback job counts among the newest like any other, by when it was made."""
    for _ in range(6):
        (callback,) = records.children(conn, ended(conn, callback_url=URL))
        (running,) = claim(conn, uuid4(), callback)
        finish(conn, running)
    last = [ended(conn) for _ in range(3)]
    pass_time(conn, 7200)

    while delete(conn, Keep(hours=1, count=3)):
        pass

    assert left(conn) == last


# ---- what something open needs ----


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_stays_while_one_that_it_started_is_open(conn: Connection, state: str) -> None:
    parent = ended(conn, then=[child()], callback_url=URL)
    children = records.children(conn, parent)
    pass_time(conn, 7200)
    worker = uuid4()
    for job in children:
        assert delete(conn, NOTHING) == 0
        if state == "running":
            claim(conn, worker, job)
            assert delete(conn, NOTHING) == 0
        else:
            records.cancel(conn, ORGANIZATION, job.id)
    for row in core_support.rows(conn, "select id, fence from agentflow.jobs where state = 'running'"):
        core_support.settle(conn, worker, core_support.Verdict(row.id, row.fence, "succeeded"))

    assert delete(conn, NOTHING) >= 1
    assert parent not in left(conn)


def test_waiting_and_running_jobs_are_never_deleted(conn: Connection) -> None:
    jobs = [submit(conn).id, claimed(conn).id]
    pass_time(conn, 10**7)

    assert delete(conn, NOTHING) == delete(conn, NOTHING, succeeded=False) == 0
    assert left(conn) == jobs


def test_attempts_go_with_their_job(conn: Connection) -> None:
    worker = uuid4()
    job = claimed(conn, worker)
    finish(conn, job, "retry")
    (job,) = claim(conn, worker, job)
    finish(conn, job, "failed")
    assert value(conn, "select count(*) from agentflow.attempts") == 2

    assert delete(conn, NOTHING, succeeded=False) == 1
    assert value(conn, "select count(*) from agentflow.attempts") == 0


# ---- in batches ----


def test_at_most_a_batch_is_deleted_at_once(conn: Connection) -> None:
    assert BATCH == 1000
    for organization in (1, 2):
        ended_many(conn, 700, organization)

    assert [delete(conn, NOTHING) for _ in range(3)] == [1000, 400, 0]


def test_a_row_that_somebody_holds_is_left_for_later(conn: Connection, connect: Callable[[], Connection]) -> None:
    held, free = ended(conn), ended(conn)
    conn.execute("set lock_timeout = '2s'")

    with row_locked(connect(), core_support.read(conn, held)):
        assert delete(conn, NOTHING) == 1

    assert left(conn) == [held]
    assert free not in left(conn)
    assert delete(conn, NOTHING) == 1


# ---- the other tables ----


def test_an_idempotency_key_outlives_its_job(conn: Connection) -> None:
    new = prepared(idempotency_key="i")
    (job,) = claim(conn, uuid4(), intake.submit(conn, ORGANIZATION, new).job)
    finish(conn, job)
    assert delete(conn, NOTHING) == 1

    assert retention.delete_idempotency_keys(conn, hours=24) == 0
    with pytest.raises(intake.IdempotencyConflict):
        intake.submit(conn, ORGANIZATION, prepared(idempotency_key="i"))

    conn.execute("update agentflow.idempotency_keys set created_at = created_at - interval '25 h'")
    assert retention.delete_idempotency_keys(conn, hours=24) == 1
    assert intake.submit(conn, ORGANIZATION, prepared(idempotency_key="i")).created


def test_a_batch_goes_when_it_has_been_finished_for_long(conn: Connection) -> None:
    open_, finished = (batches.submit(conn, ORGANIZATION, [prepared()]) for _ in range(2))
    (job,) = claim(conn, uuid4(), *finished.ids)
    finish(conn, job)
    assert retention.delete_batches(conn, hours=1) == 0
    conn.execute("update agentflow.batches set created_at = '-infinity', finished_at = finished_at - interval '2 h'")

    assert retention.delete_batches(conn, hours=1) == 1
    assert conn.execute("select id from agentflow.batches").fetchall() == [(open_.id,)]


def test_a_silent_workers_row_stays_while_a_job_names_it(conn: Connection) -> None:
    gone, needed, alive = (core_support.rescuer(conn) for _ in range(3))
    job = claimed(conn, needed)
    conn.execute("update agentflow.workers set seen_at = '-infinity' where id = any (%s)", ([gone, needed],))

    assert retention.delete_workers(conn) == 1
    finish(conn, job)
    assert retention.delete_workers(conn) == 1
    assert conn.execute("select id from agentflow.workers").fetchall() == [(alive,)]


def test_the_schedule_cleans_up_whole_backlogs(system: System, conn: Connection) -> None:
    ended_many(conn, 1001)
    ended_many(conn, 1500)
    ended(conn, "failed")
    pass_time(conn, 30 * 86_400)

    deleted = cleaned_up(system)

    assert (deleted["clean_up.succeeded"], deleted["clean_up.failed"]) == (1501, 0)
    assert len(left(conn)) == 1001  # the newest thousand, and one dead letter
