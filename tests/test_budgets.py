"""Budgets of a day: what attempts use up is counted once and exactly, and whoever has used up a budget waits until midnight UTC
or a larger one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from agentflow.jobs import budgets, dispatch, records, rules, usage
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.jobs.usage import Usage
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.core_support import claim, claimed, column, pass_time, rows, settle, submit, verdict
from tests.openrouter_server import KEY, ModelServer, model_server
from tests.processes import eventually, worker

Connection = psycopg.Connection
ONE, TWO = 1, 2
PATIENCE_S = 90.0


@pytest.fixture(autouse=True)
def organizations(conn: Connection) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")


def days(conn: Connection, organization_id: int = ONE) -> dict[str, float]:
    found = rows(
        conn,
        "select measure, amount::float8 as amount from agentflow.usage_days where organization_id = %s",
        organization_id,
    )
    return {row.measure: row.amount for row in found}


def spend(conn: Connection, organization_id: int = ONE, **measures: float) -> frozenset[int]:
    job = submit(conn, organization_id)
    return usage.record(conn, [Usage(job.id, 1, measures)])


def ring(conn: Connection, how: str) -> list[object]:
    rings, _ = dispatch.pick_due(conn, "default") if how == "relay" else dispatch.poll(conn, "default", 8, 2, ["test"])
    return [ring.job_id for ring in rings]


def due(conn: Connection, organization_id: int) -> Job:
    """A job that nobody has rung for."""
    job = submit(conn, organization_id)
    conn.execute("update agentflow.jobs set sent_at = null, sends = 0, wake_at = run_at where id = %s", (job.id,))
    return job


# ---- counting ----


def test_totals_of_attempts_add_up_in_the_day_whatever_order_they_come_in(conn: Connection) -> None:
    job = submit(conn)

    for measures in ({"usd": 1.0}, {"usd": 2.5, "gpu_s": 1}, {"usd": 2.5, "gpu_s": 1}, {"usd": 1.0}):
        usage.record(conn, [Usage(job.id, 1, measures), Usage(uuid4(), 1, {"usd": 9.0})])
    usage.record(conn, [Usage(job.id, 2, {"usd": 0.5}), Usage(submit(conn, TWO).id, 1, {"usd": 4.0})])

    assert days(conn) == {"usd": 3.0, "gpu_s": 1.0}
    assert days(conn, TWO) == {"usd": 4.0}


def test_tokens_are_those_of_both_directions(conn: Connection) -> None:
    spend(conn, tokens_in=100, tokens_out=20)

    assert days(conn) == {"tokens_in": 100, "tokens_out": 20, "tokens": 120}


def test_many_writers_of_one_attempt_count_it_once(conn: Connection, database_url: str) -> None:
    job = submit(conn)

    def write(totals: range) -> None:
        with psycopg.connect(database_url, autocommit=True) as own:
            for total in totals:
                usage.record(own, [Usage(job.id, 1, {"usd": float(total)})])  # type: ignore[arg-type]

    writers = [threading.Thread(target=write, args=(range(n, 61, 3),)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert days(conn) == {"usd": 60.0}


def test_old_days_are_forgotten(conn: Connection) -> None:
    spend(conn, usd=1)
    conn.execute(
        "insert into agentflow.usage_days select day - 500, organization_id, measure, amount from agentflow.usage_days"
    )

    assert budgets.delete_old_days(conn, days=400) == 1
    assert days(conn) == {"usd": 1.0}


# ---- who is over it ----


def test_the_writer_is_told_when_a_budget_is_reached(conn: Connection) -> None:
    rules.set_budget(conn, rules.EVERY, "usd", 1.0)

    assert spend(conn, usd=0.6) == frozenset()
    assert spend(conn, TWO, usd=0.6) == frozenset()
    assert spend(conn, usd=0.4) == {ONE}
    assert spend(conn, gpu_s=1) == {ONE}  # by another measure
    assert rules.read(conn).over_budget == {ONE}


def test_an_organizations_budget_of_the_operator_goes_before_that_for_each_and_its_own_only_narrows_it(
    conn: Connection,
) -> None:
    spend(conn, usd=5)
    spend(conn, TWO, usd=5)

    def over() -> set[int]:
        return set(rules.read(conn).over_budget)

    rules.set_budget(conn, rules.EVERY, "usd", 4)
    assert over() == {ONE, TWO}
    rules.set_budget(conn, TWO, "usd", 100, own=True)
    assert over() == {ONE, TWO}
    rules.set_budget(conn, ONE, "usd", 100)
    assert over() == {TWO}
    with pytest.raises(rules.OperatorsRule):
        rules.set_budget(conn, ONE, "usd", None, own=True)
    rules.set_budget(conn, rules.EVERY, "usd", None)
    assert over() == set()
    rules.set_budget(conn, TWO, "usd", 3, own=True)
    assert over() == {TWO}


@pytest.mark.parametrize("how", ["relay", "poll"])
def test_an_organization_over_its_budget_is_passed_over_until_it_is_raised_or_the_day_ends(
    conn: Connection, how: str
) -> None:
    rules.set_budget(conn, ONE, "usd", 1)
    spend(conn, usd=1)
    conn.execute("delete from agentflow.jobs")
    mine, theirs = due(conn, ONE), due(conn, TWO)

    during = ring(conn, how)
    rules.set_budget(conn, ONE, "usd", 2)
    raised = ring(conn, how)
    spend(conn, usd=1)
    conn.execute("delete from agentflow.jobs")
    later = due(conn, ONE)
    again = ring(conn, how)
    conn.execute("update agentflow.usage_days set day = day - 1")
    tomorrow = ring(conn, how)

    assert (during, raised, again) == ([theirs.id], [mine.id], [])
    assert later.id in tomorrow


def test_a_budget_that_is_used_up_ends_at_midnight_utc(conn: Connection) -> None:
    rules.set_budget(conn, ONE, "usd", 1)
    spend(conn, usd=1)

    reached = budgets.reached(conn, ONE)

    (row,) = rows(
        conn, "select (now() at time zone 'UTC' + make_interval(secs => %s))::timestamp as ends", reached.resets_in_s
    )  # type: ignore[union-attr]
    assert reached is not None and reached.measure == "usd"
    assert min(row.ends.second, 60 - row.ends.second) <= 2 and row.ends.minute in (0, 59) and row.ends.hour in (0, 23)
    assert budgets.reached(conn, TWO) is None


def test_what_was_parked_for_a_budget_is_due_when_it_is_raised(conn: Connection) -> None:
    worker_id = uuid4()
    job = claimed(conn, worker_id)
    rules.set_budget(conn, ONE, "usd", 1)

    settle(conn, worker_id, verdict(job, "wait", 3600.0, reason="budget"))
    assert column(conn, job, "wait_reason") == "budget"

    rules.set_budget(conn, ONE, "usd", 2)

    assert [taken.id for taken in claim(conn, worker_id, job)] == [job.id]


# ---- through a worker ----


@pytest.fixture
def vendor(environment: dict[str, str]) -> Iterator[ModelServer]:
    with model_server() as server:
        environment |= {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": server.url}
        yield server


def ask(system: System, about: str, *, organization: int = ONE, questions: int = 1) -> Job:
    return system.submit(organization, NewJob("test_asker", {"about": about, "questions": questions})).job


def state(conn: Connection, job: Job) -> tuple[str, str | None, int]:
    found = records.get(conn, None, job.id)
    assert found is not None
    return found.state, found.wait_reason, found.attempt


WAITS, DONE = ("queued", "budget", 0), ("succeeded", None, 1)


@pytest.fixture(params=["rung for", pytest.param("polling", marks=pytest.mark.long)])
def tier(request: pytest.FixtureRequest, environment: dict[str, str]) -> None:
    if request.param == "polling":
        del environment["REDIS_URL"]


@pytest.mark.usefixtures("tier")
def test_a_job_that_runs_into_the_budget_waits_and_goes_on_with_a_larger_one(
    system: System, conn: Connection, environment: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    rules.set_budget(conn, ONE, "usd", 0.0003)
    with worker(environment, tmp_path / "worker.log"):
        long = ask(system, "a long story", questions=5)
        eventually(lambda: state(conn, long) == WAITS, within_s=PATIENCE_S)
        assert len(vendor.asked) == 3  # of a ten-thousandth each
        fresh, other = ask(system, "later"), ask(system, "of another", organization=TWO)
        eventually(lambda: state(conn, other) == DONE, within_s=PATIENCE_S)
        # Parked where somebody rang for it; where workers look for jobs themselves it is passed over.
        assert state(conn, fresh) in (WAITS, ("queued", None, 0))
        assert len(vendor.asked) == 4
        assert column(conn, long, "sent_at") is None

        with system.database.transaction() as pooled:
            rules.set_budget(pooled, ONE, "usd", 1)

        eventually(lambda: state(conn, long) == state(conn, fresh) == DONE, within_s=PATIENCE_S)
    assert len(vendor.asked) == 7  # five, one and one: none twice


@pytest.mark.long
def test_at_midnight_everybody_goes_on(
    system: System, conn: Connection, environment: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    rules.set_budget(conn, rules.EVERY, "model_calls", 1)
    with worker(environment, tmp_path / "worker.log"):
        job = ask(system, "two", questions=2)
        eventually(lambda: state(conn, job) == WAITS, within_s=PATIENCE_S)

        conn.execute("update agentflow.usage_days set day = day - 1")
        pass_time(conn, 90_000)

        eventually(lambda: state(conn, job) == DONE, within_s=PATIENCE_S)
