"""Many organizations on one system: whose turn it is, what each may have at once, and what is paused."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow.errors import Wait
from agentflow.jobs import dispatch, intake, leases, records, rules
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.limits import Window
from agentflow.system import System
from agentflow.worker.admission import Admission
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.core_support import LEASE_S, claim, column, finish, prepared, rows, submit
from tests.processes import eventually, worker

Connection = psycopg.Connection
ONE, TWO, THREE = 1, 2, 3


@pytest.fixture
def organizations(conn: Connection) -> None:
    """Three of them, and a worker with twenty threads."""
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two'), (3, 'three', 'Three')")
    staff(conn, threads=20, demand=100)


def staff(conn: Connection, *, threads: int, demand: int) -> None:
    facts: dict[str, Any] = {"kind": "worker", "host": "h", "pid": 1, "version": "0", "queues": ["default"]}
    facts |= {"threads": threads, "demand": {"default": demand}, "memory_bytes": None, "busy": 0}
    leases.announce_worker(conn, uuid4(), facts, lease_s=LEASE_S)


def waiting(conn: Connection, organization_id: int, count: int, *, type_: str = "test", **request: Any) -> list[Job]:
    """Due jobs that nobody has rung for, the first one first."""
    checked = [prepared(**request) for _ in range(count)]
    of_type = [dataclasses.replace(p, new=dataclasses.replace(p.new, type=type_)) for p in checked]
    made, _ = intake.submit_many(conn, organization_id, of_type)
    conn.execute(
        "update agentflow.jobs set sent_at = null, sends = 0, wake_at = run_at where state = 'queued' and sent_at is not null"
    )
    return made


def ring(conn: Connection) -> list[UUID]:
    return [ring.job_id for ring in dispatch.pick_due(conn, "default")[0]]


def whose(conn: Connection, ids: list[UUID]) -> Counter[int]:
    found = rows(conn, "select organization_id as o from agentflow.jobs where id = any (%s)", ids)
    return Counter(row.o for row in found)


def all_end(conn: Connection, ids: list[UUID]) -> None:
    for job in claim(conn, uuid4(), *ids):
        finish(conn, job)


# ---- whose turn it is ----


@pytest.mark.usefixtures("organizations")
def test_an_organization_with_costly_jobs_gets_fewer_of_them_through(conn: Connection) -> None:
    staff(conn, threads=80, demand=0)
    waiting(conn, ONE, 1000)
    waiting(conn, TWO, 1000)
    dispatch.charge(conn, {("default", ONE): (100, 3.0), ("default", TWO): (100, 1.0)})

    through: Counter[int] = Counter()
    for _ in range(8):
        rung = ring(conn)
        through += whose(conn, rung)
        all_end(conn, rung)

    assert 2.0 < through[TWO] / through[ONE] < 4.0


@pytest.mark.usefixtures("organizations")
def test_a_weight_is_a_share(conn: Connection) -> None:
    staff(conn, threads=80, demand=0)
    conn.execute("update agentflow.organizations set weight = 4 where id = 2")
    waiting(conn, ONE, 1000)
    waiting(conn, TWO, 1000)

    through: Counter[int] = Counter()
    for _ in range(10):
        rung = ring(conn)
        through += whose(conn, rung)
        all_end(conn, rung)

    assert 3.0 < through[TWO] / through[ONE] < 5.0


@pytest.mark.usefixtures("organizations")
def test_who_comes_back_from_idleness_has_the_next_turns_but_not_those_it_did_not_ask_for(conn: Connection) -> None:
    waiting(conn, ONE, 2000)
    waiting(conn, TWO, 2000)
    for _ in range(10):
        all_end(conn, ring(conn))
    waiting(conn, THREE, 1000)

    rung = whose(conn, ring(conn))

    assert rung[THREE] >= 20  # at once
    assert rung[ONE] > 0 and rung[TWO] > 0  # and not alone


@pytest.mark.usefixtures("organizations")
def test_what_is_taken_back_is_charged_once_and_has_its_place_in_the_line_again(conn: Connection) -> None:
    virtual = (
        "select virtual_s from agentflow.lanes where organization_id <> 0 order by organization_id"  # 0: the clock
    )
    conn.execute("update agentflow.workers set demand = '{\"default\": 20}'")
    for organization in (ONE, TWO):
        waiting(conn, organization, 30)
    rung = ring(conn)
    charged = [row.virtual_s for row in rows(conn, virtual)]
    assert max(charged) > 0

    for _ in range(3):
        dispatch.take_back(conn, rung, 0.0)
        assert set(ring(conn)) == set(rung)

    assert [row.virtual_s for row in rows(conn, virtual)] == charged
    sends = rows(conn, "select distinct sends from agentflow.jobs where sent_at is not null")
    assert [row.sends for row in sends] == [2]


def test_one_organization_alone_has_everything(conn: Connection) -> None:
    staff(conn, threads=20, demand=100)
    waiting(conn, ONE, 300)

    rung = ring(conn)

    assert len(rung) == 100
    assert rows(conn, "select * from agentflow.lanes") == []


@pytest.mark.usefixtures("organizations")
def test_no_organization_gets_all_threads_with_long_jobs(conn: Connection) -> None:
    dispatch.charge(conn, {("default", ONE): (100, 500.0)})
    waiting(conn, ONE, 100)

    first = ring(conn)
    claim(conn, uuid4(), *first)
    second = ring(conn)

    assert len(first) == 12  # four fifths of the fifteen that are not kept for critical jobs
    assert second == []
    mine = waiting(conn, TWO, 1)
    assert ring(conn) == [mine[0].id]


@pytest.mark.usefixtures("organizations")
@pytest.mark.parametrize(("begun", "more"), [("-1 h", 0), ("+1 h", 8)])
def test_short_jobs_have_the_next_ones_before_their_threads_until_one_takes_long(
    conn: Connection, begun: str, more: int
) -> None:
    dispatch.charge(conn, {("default", ONE): (100, 4.0)})
    conn.execute("update agentflow.lanes set cost_s = 0.08")
    waiting(conn, ONE, 200)

    first = ring(conn)
    claim(conn, uuid4(), *first[:12])
    conn.execute("update agentflow.lanes set cost_s = 0.04")
    conn.execute(
        "update agentflow.jobs set started_at = clock_timestamp() + %s::interval where state = 'running'", (begun,)
    )

    assert len(first) == 12 + 7  # its threads, and what those do in 50 ms
    assert len(ring(conn)) == more


@pytest.mark.usefixtures("organizations")
def test_low_is_not_starved_by_ones_own_default_jobs(conn: Connection) -> None:
    low = {job.id for job in waiting(conn, ONE, 50, priority=2)}
    waiting(conn, ONE, 500)
    waiting(conn, TWO, 500)

    rung = ring(conn)

    assert 1 <= len(low.intersection(rung)) <= 12


# ---- pauses ----


def test_a_paused_organization_waits_and_the_others_do_not(conn: Connection) -> None:
    mine, theirs = waiting(conn, ONE, 5), waiting(conn, TWO, 5)

    rules.pause(conn, "organization", "", TWO)
    during = ring(conn)
    rules.resume(conn, "organization", "", TWO)
    after = ring(conn)

    assert set(during) == {job.id for job in mine}
    assert set(after) == {job.id for job in theirs}


def test_a_paused_queue_rings_for_nothing(conn: Connection) -> None:
    jobs = waiting(conn, ONE, 5)

    rules.pause(conn, "queue", "default", rules.EVERY)
    during = dispatch.pick_due(conn, "default")
    rules.resume(conn, "queue", "default", rules.EVERY)

    assert during == ([], 5.0)
    assert set(ring(conn)) == {job.id for job in jobs}


@pytest.mark.parametrize("organization_id", [rules.EVERY, ONE])
def test_jobs_of_a_paused_type_are_put_aside_and_others_behind_them_go_on(
    conn: Connection, organization_id: int
) -> None:
    paused, others = waiting(conn, ONE, 300, type_="paused"), waiting(conn, ONE, 3)
    rules.pause(conn, "type", "paused", organization_id)

    rung: list[UUID] = []
    for _ in range(30):
        found, due_in_s = dispatch.pick_due(conn, "default")
        rung += [ring.job_id for ring in found]
        if not found and due_in_s != 0.0:
            break

    assert set(rung) == {job.id for job in others}
    assert column(conn, paused[0], "wait_reason") == "paused"
    assert rules.resume(conn, "type", "paused", organization_id) == 300
    assert set(ring(conn)) <= {job.id for job in paused}


def test_what_two_pauses_hold_waits_for_the_second(conn: Connection) -> None:
    waiting(conn, ONE, 2, type_="paused")
    rules.pause(conn, "type", "paused", ONE)
    rules.pause(conn, "type", "paused", rules.EVERY)
    ring(conn)

    rules.resume(conn, "type", "paused", ONE)

    assert ring(conn) == []
    assert rules.resume(conn, "type", "paused", rules.EVERY) == 2


def test_resuming_what_is_not_paused_says_so(conn: Connection) -> None:
    assert rules.resume(conn, "queue", "default", rules.EVERY) is None
    assert rules.pause(conn, "queue", "default", rules.EVERY) is True
    assert rules.pause(conn, "queue", "default", rules.EVERY) is False


# ---- caps ----


def test_the_cap_of_a_type_lets_so_many_run_and_the_next_in_order_when_one_ends(conn: Connection) -> None:
    capped = waiting(conn, ONE, 40, type_="capped")
    others = waiting(conn, ONE, 2)
    rules.set_cap(conn, rules.EVERY, "capped", 3)

    rung: list[UUID] = []
    for _ in range(10):
        rung += ring(conn)
    running = claim(conn, uuid4(), *rung)

    assert set(rung) == {job.id for job in [*capped[:3], *others]}
    assert ring(conn) == []
    finish(conn, next(job for job in running if job.id == capped[1].id))
    assert ring(conn) == [capped[3].id]
    assert ring(conn) == []


def test_an_organizations_own_cap_goes_before_that_for_all(conn: Connection) -> None:
    rules.set_cap(conn, rules.EVERY, "capped", 1)
    rules.set_cap(conn, TWO, "capped", 4)
    waiting(conn, ONE, 10, type_="capped")
    waiting(conn, TWO, 10, type_="capped")

    rung = whose(conn, [*ring(conn), *ring(conn)])

    assert rung == {ONE: 1, TWO: 4}


def test_a_cap_that_is_taken_away_holds_nobody_any_more(conn: Connection) -> None:
    rules.set_cap(conn, ONE, "capped", 1)
    jobs = waiting(conn, ONE, 10, type_="capped")
    first = ring(conn)

    rules.set_cap(conn, ONE, "capped", None)

    assert set(ring(conn)) == {job.id for job in jobs} - set(first)


def test_the_cap_of_an_organization_is_for_all_of_its_types(conn: Connection) -> None:
    rules.set_cap(conn, ONE, "", 3)
    waiting(conn, ONE, 5, type_="this")
    waiting(conn, ONE, 5, type_="that")
    waiting(conn, TWO, 5)

    rung = ring(conn)
    claim(conn, uuid4(), *rung)

    assert whose(conn, rung) == {ONE: 3, TWO: 5}
    assert ring(conn) == []


# ---- in a worker's process ----


def test_long_jobs_of_one_organization_leave_threads_of_the_process_to_others(
    conn: Connection, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many messages were rung for before anybody knew that they are long."""
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    admission = Admission(system.database, system.rules, system.calls, threads=16)
    job = submit(conn)
    now = time.monotonic()
    with ExitStack() as all_at_once:
        for _ in range(12):  # nobody knows yet
            all_at_once.enter_context(admission.admitted(job))
        monkeypatch.setattr(time, "monotonic", lambda: now + 5.0)
    with ExitStack() as running:
        for _ in range(10):  # four fifths of the twelve that are not kept for critical jobs
            running.enter_context(admission.admitted(job))
        for _ in range(3):
            with pytest.raises(Wait) as refused, admission.admitted(job):
                pass
            assert refused.value.reason == "busy"
            admission.done(job, 0.001)
        with (
            admission.admitted(dataclasses.replace(job, organization_id=TWO)),
            admission.admitted(dataclasses.replace(job, priority="critical")),
        ):
            """Others, and what is critical."""

    with admission.admitted(job):
        """They have ended, and were short: those that wait for such wait no longer for more of them."""
    with ExitStack() as running:
        for _ in range(12):
            running.enter_context(admission.admitted(job))


def test_one_that_runs_for_long_says_as_much_before_it_ends(
    conn: Connection, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    admission = Admission(system.database, system.rules, system.calls, threads=2)
    job = submit(conn)
    with admission.admitted(job), admission.admitted(job):
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.0)
        with pytest.raises(Wait), admission.admitted(job):
            pass


# ---- through a worker ----


def state(system: System, job: Job) -> tuple[str, str | None, int]:
    with system.database.connection() as conn:
        found = records.get(conn, None, job.id)
    assert found is not None
    return found.state, found.wait_reason, found.attempt


@pytest.fixture(params=["rung for", "polling"])
def environment(request: pytest.FixtureRequest, environment: dict[str, str]) -> dict[str, str]:
    """With a broker, and with Postgres alone."""
    if request.param == "polling":
        del environment["REDIS_URL"]
    return environment


def test_a_message_that_is_older_than_the_pause_runs_nothing(
    system: System, conn: Connection, environment: dict[str, str], tmp_path: Path
) -> None:
    job = system.submit(ONE, NewJob("ping", {})).job  # rung for already
    rules.pause(conn, "type", "ping", ONE)

    with worker(environment, tmp_path / "worker.log"):
        eventually(lambda: state(system, job) == ("queued", "paused", 0))
        rules.resume(conn, "type", "ping", ONE)
        eventually(lambda: state(system, job)[0] == "succeeded")


def test_a_capped_type_never_runs_more_at_once_and_all_of_it_ends(
    system: System, conn: Connection, environment: dict[str, str], tmp_path: Path
) -> None:
    rules.set_cap(conn, ONE, "test_stamped", 2)
    jobs = [system.submit(ONE, NewJob("test_stamped", {"sleep_ms": 150})).job for _ in range(14)]

    with worker(environment, tmp_path / "worker.log"):
        eventually(lambda: all(state(system, job)[0] == "succeeded" for job in jobs), within_s=60)

    stamps = rows(conn, "select result ->> 'began' as began, result ->> 'ended' as ended from agentflow.jobs")
    changes = sorted([(float(s.began), 1) for s in stamps] + [(float(s.ended), -1) for s in stamps])
    at_once = [sum(change for _, change in changes[: n + 1]) for n in range(len(changes))]
    assert max(at_once) <= 2
    assert {state(system, job)[2] for job in jobs} == {1}


def test_a_limit_that_the_operator_set_is_kept_by_the_workers(
    system: System, conn: Connection, environment: dict[str, str], tmp_path: Path
) -> None:
    rules.set_limit(conn, rules.EVERY, "type:ping", [Window(3, 3600)])
    jobs = [system.submit(ONE, NewJob("ping", {})).job for _ in range(6)]

    wanted = [("queued", "limit", 0)] * 3 + [("succeeded", None, 1)] * 3
    with worker(environment, tmp_path / "worker.log"):
        eventually(lambda: sorted(state(system, job) for job in jobs) == wanted)
