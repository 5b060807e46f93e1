"""Who comes before others of its class and organization: jobs with a head start, as if they had been due so many seconds sooner,
and those that are back from the line of an outside service's limit."""

from __future__ import annotations

import dataclasses
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.jobs import dispatch, intake, records, registry
from agentflow.jobs.model import HEAD_STARTS, HeadStart, Job
from agentflow.jobs.registry import Payload
from agentflow.jobs.requests import InvalidJob, NewJob
from agentflow.system import System
from tests.core_support import prepared
from tests.web_support import client, problem, run

Connection = psycopg.Connection
__all__ = ["client"]
ONE, TWO = 1, 2


def due(
    conn: Connection, ago_s: float, head_start_s: HeadStart = 0, *, organization: int = ONE, priority: int = 1
) -> Job:
    """A job that is due since so many seconds, and that nobody has rung for."""
    request = dataclasses.replace(prepared(priority=priority), head_start_s=head_start_s)
    job = intake.submit(conn, organization, request).job
    conn.execute(
        "update agentflow.jobs set sent_at = null, sends = 0, wake_at = now() - make_interval(secs => %s) where id = %s",
        (ago_s, job.id),
    )
    return job


def back(conn: Connection, ago_s: float, reason: str, head_start_s: HeadStart = 0) -> Job:
    """A job that was parked for this, until so many seconds ago."""
    job = due(conn, ago_s, head_start_s)
    conn.execute("update agentflow.jobs set wait_reason = %s where id = %s", (reason, job.id))
    return job


def order(conn: Connection, how: str) -> list[UUID]:
    """One after the other: each round has room for one."""
    found: list[UUID] = []
    for _ in range(50):
        if not (ids := round_of(conn, how, room=1)):
            break
        found += ids
        conn.execute(
            "update agentflow.jobs set state = 'cancelled', finished_at = now(), wake_at = null where id = %s",
            (found[-1],),
        )
    return found


def round_of(conn: Connection, how: str, room: int) -> list[UUID]:
    if how == "poll":
        rings, _ = dispatch.poll(conn, "default", room, 0, ["test"])
    else:
        conn.execute(
            "create or replace function agentflow.window_1(p_queue text) returns integer language sql stable"
            f" as 'select {room}'"
        )
        rings, _ = dispatch.pick_due(conn, "default")
    return [ring.job_id for ring in rings]


@pytest.fixture(params=["relay", "poll"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_who_has_a_head_start_comes_before_those_who_wait_less_than_it(conn: Connection, how: str) -> None:
    old, middle, young = due(conn, 100), due(conn, 20), due(conn, 1)
    ahead, further = due(conn, 2, 30), due(conn, 1, 60)

    assert order(conn, how) == [job.id for job in (old, further, ahead, middle, young)]


def test_an_old_job_is_not_starved_by_new_ones_with_a_head_start(conn: Connection, how: str) -> None:
    old = due(conn, 700)
    for _ in range(30):
        due(conn, 0, 600)

    assert order(conn, how)[0] == old.id


def test_classes_come_first_whatever_the_head_start(conn: Connection, how: str) -> None:
    ahead, critical = due(conn, 50, 600), due(conn, 1, priority=0)

    assert order(conn, how) == [critical.id, ahead.id]


def test_of_equal_head_starts_the_one_that_was_due_first_comes_first(conn: Connection, how: str) -> None:
    jobs = [due(conn, 30 - n, 15) for n in range(10)]

    assert order(conn, how) == [job.id for job in jobs]


def test_who_is_not_due_gets_nothing_by_a_head_start(conn: Connection, how: str) -> None:
    due(conn, -60, 600)
    now = due(conn, 1)

    assert order(conn, how) == [now.id]


def test_a_head_start_takes_no_turn_from_another_organization(conn: Connection, how: str) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    ahead = {due(conn, 1, 600).id for _ in range(10)}
    others = {due(conn, 5, organization=TWO).id for _ in range(10)}

    turns = order(conn, how)

    assert len(others & set(turns[:10])) >= 4
    assert {*turns} == ahead | others


@pytest.mark.parametrize("reason", ["limit", "rate_limit", "model_limit"])
def test_who_is_back_from_the_line_of_a_limit_comes_before_those_who_have_no_place_yet(
    conn: Connection, how: str, reason: str
) -> None:
    fresh, ahead = due(conn, 500), due(conn, 2, 600)
    later, sooner, not_yet = (back(conn, ago_s, reason) for ago_s in (1, 3, -60))
    critical = due(conn, 0, priority=0)

    assert order(conn, how) == [job.id for job in (critical, sooner, later, ahead, fresh)]
    assert records.get(conn, None, not_yet.id).state == "queued"  # type: ignore[union-attr]


@pytest.mark.parametrize("head_start_s", [0, 5])
def test_who_is_back_takes_one_place_of_a_round(conn: Connection, how: str, head_start_s: HeadStart) -> None:
    both, fresh = back(conn, 900, "limit", head_start_s), due(conn, 5)

    assert {*round_of(conn, how, room=2)} == {both.id, fresh.id}


def test_who_has_a_head_start_takes_one_place_of_a_round(conn: Connection, how: str) -> None:
    ahead, fresh = due(conn, 900, 5), due(conn, 5)

    assert {*round_of(conn, how, room=2)} == {ahead.id, fresh.id}


def test_who_waited_for_something_else_comes_in_the_order_of_time(conn: Connection, how: str) -> None:
    fresh, busy = due(conn, 5), back(conn, 1, "busy")

    assert order(conn, how) == [fresh.id, busy.id]


def test_the_table_and_the_code_know_the_same_head_starts(conn: Connection) -> None:
    for seconds in HEAD_STARTS:
        due(conn, 0, seconds)
    with pytest.raises(psycopg.errors.CheckViolation):
        due(conn, 0, 7)  # type: ignore[arg-type]


# ---- who says so ----


def test_a_request_may_name_one_and_another_try_keeps_it(client: FlaskClient, system: System, conn: Connection) -> None:
    made = client.post("/api/jobs", json={"type": "web_echo", "head_start_s": 60})
    wrong = client.post("/api/jobs", json={"type": "web_echo", "head_start_s": 61})
    of_then = client.post("/api/jobs", json={"type": "web_echo", "then": [{"type": "web_echo", "head_start_s": 5}]})

    assert (made.status_code, made.json["head_start_s"]) == (202, 60)
    assert problem(wrong, 422)["errors"][0]["field"] == "head_start_s"
    assert "head start" in problem(of_then, 422)["detail"]
    run(system, conn, made.json["id"], "failed", error={"message": "no"})
    assert client.post(f"/api/jobs/{made.json['id']}/retry").json["head_start_s"] == 60


def test_a_type_may_have_one_and_a_request_another(system: System, conn: Connection) -> None:
    if not registry.known("test_ahead"):
        registry.job("test_ahead", payload=Payload, head_start_s=30)(lambda context, payload: None)

    jobs = [system.submit(ONE, NewJob("test_ahead", {}, head_start_s=seconds)).job for seconds in (None, 0, 120)]

    assert [records.get(conn, None, job.id).head_start_s for job in jobs] == [30, 0, 120]  # type: ignore[union-attr]
    with pytest.raises(InvalidJob, match="head_start_s: must be one of 0, 5"):
        system.submit(ONE, NewJob("test_ahead", {}, head_start_s=7))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_start_s is one of"):
        registry.job("test_wrong", payload=Payload, head_start_s=7)(lambda context, payload: None)  # type: ignore[arg-type]
