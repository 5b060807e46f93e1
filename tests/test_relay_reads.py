"""The relay reads lanes only as far as their turns go, and picks what it would pick had it read all of them."""

from __future__ import annotations

import random
from collections import Counter

import psycopg
import pytest

from agentflow.jobs import dispatch
from tests.core_support import rows, value
from tests.test_fairness import staff, waiting

Connection = psycopg.Connection
ORGANIZATIONS = range(1, 13)


@pytest.fixture(autouse=True)
def organizations(conn: Connection) -> None:
    for number in ORGANIZATIONS[1:]:
        conn.execute(
            "insert into agentflow.organizations (id, slug, name, weight) values (%s, %s, %s, %s)",
            (number, f"o{number}", f"O {number}", 1 + number % 3),
        )


def picked(conn: Connection, function: str) -> Counter[tuple[int, int]]:
    """How many of which class and organization, in a round that is taken back."""
    with conn.transaction(force_rollback=True):
        found = [row.job_id for row in rows(conn, f"select * from agentflow.{function}('default')")]  # noqa: S608 - constants
        jobs = rows(conn, "select priority as p, organization_id as o from agentflow.jobs where id = any (%s)", found)
        return Counter((job.p, job.o) for job in jobs)


def arranged(conn: Connection, chance: random.Random) -> None:
    """Some lanes deep and some short, whose owners have done very different amounts of work; caps, or none."""
    staff(conn, threads=chance.choice([4, 40]), demand=chance.choice([16, 50, 200]))
    for number in chance.sample(ORGANIZATIONS, chance.randint(2, 12)):
        for priority in chance.sample([0, 1, 2], chance.randint(1, 3)):
            waiting(conn, number, chance.choice([1, 3, 20, 150]), priority=priority)
        conn.execute(
            "insert into agentflow.lanes (queue, organization_id, virtual_s, cost_s) values ('default', %s, %s, %s)",
            (number, chance.choice([0.0, 0.5, 3.0, 100.0]) + chance.random(), chance.choice([0.001, 0.02, 5.0])),
        )
        if chance.random() < 0.2:
            conn.execute(
                "insert into agentflow.caps (organization_id, type, running) values (%s, '', %s)",
                (number, chance.choice([1, 4, 30])),
            )
    share = chance.choice([0.0, 0.02, 0.3, 1.0])
    if chance.random() < 0.4:
        conn.execute(
            "update agentflow.jobs set head_start_s = (array[5, 60])[1 + (random() < 0.5)::integer] where random() < %s",
            (share,),
        )
    if chance.random() < 0.4:  # parked for a limit: back by now, or not yet
        conn.execute("update agentflow.jobs set wait_reason = 'limit' where random() < %s", (share,))
        conn.execute(
            "update agentflow.jobs set wake_at = wake_at + interval '1 h' where wait_reason = 'limit' and random() < 0.3"
        )


@pytest.mark.parametrize("seed", range(40))
def test_it_picks_what_a_relay_that_reads_every_lane_picks(conn: Connection, seed: int) -> None:
    """But for one or two jobs of a lane that come too soon, where those were short whose turns they were."""
    arranged(conn, random.Random(seed))

    expected, found = picked(conn, "relay_3"), picked(conn, "relay_5")

    assert expected and found.total() == expected.total()
    assert max((found - expected).values(), default=0) <= 2


def test_an_organization_that_has_done_much_comes_first_with_what_is_critical(conn: Connection) -> None:
    staff(conn, threads=400, demand=50)
    waiting(conn, 1, 60, priority=0)
    for number in (2, 3):
        waiting(conn, number, 500)
    conn.execute("insert into agentflow.lanes (queue, organization_id, virtual_s) values ('default', 1, 1000)")

    assert picked(conn, "relay_5")[0, 1] == 50


def test_threads_are_used_though_those_whose_turn_it_is_have_few(conn: Connection) -> None:
    staff(conn, threads=400, demand=50)
    waiting(conn, 1, 100)
    for number in ORGANIZATIONS[1:]:
        waiting(conn, number, 1)
    conn.execute("insert into agentflow.lanes (queue, organization_id, virtual_s) values ('default', 1, 1000)")

    found = picked(conn, "relay_5")

    assert sum(found.values()) == 50 and found[1, 1] == 50 - len(ORGANIZATIONS[1:])


def read_by(conn: Connection, function: str) -> int:
    """Jobs whose rows a round has looked at, those that it stamps among them."""

    def fetched() -> int:
        return int(value(conn, "select idx_tup_fetch from pg_stat_xact_user_tables where relname = 'jobs'"))

    with conn.transaction(force_rollback=True):
        before = fetched()
        assert rows(conn, f"select * from agentflow.{function}('default')")  # noqa: S608 - constants
        return fetched() - before


def test_of_many_deep_lanes_few_rows_are_read(conn: Connection) -> None:
    staff(conn, threads=400, demand=50)
    for number in ORGANIZATIONS:
        waiting(conn, number, 300)
    conn.execute("analyze agentflow.jobs")

    assert read_by(conn, "relay_5") < 6 * 50 < read_by(conn, "relay_3") / 2
    assert dispatch.pick_due(conn, "default")[0]


@pytest.mark.parametrize("back_in", ["-1 s", "1 h"])
def test_jobs_that_are_back_from_a_limit_do_not_have_it_read_all_lanes(conn: Connection, back_in: str) -> None:
    staff(conn, threads=400, demand=50)
    for number in ORGANIZATIONS:
        waiting(conn, number, 300)
    conn.execute("analyze agentflow.jobs")
    conn.execute(
        "update agentflow.jobs set wait_reason = 'limit', wake_at = clock_timestamp() + %s::interval"
        " where id in (select id from agentflow.jobs where organization_id in (1, 5) limit 20)",
        (back_in,),
    )

    assert read_by(conn, "relay_5") < 6 * 50 < read_by(conn, "relay_4") / 2


def test_where_some_lanes_turn_out_short_the_others_are_not_read_to_their_ends(conn: Connection) -> None:
    staff(conn, threads=4000, demand=200)
    for number in ORGANIZATIONS:
        waiting(conn, number, 2000 if number <= 4 else 1)
    conn.execute("analyze agentflow.jobs")

    found = picked(conn, "relay_5")

    assert sum(found.values()) == 200 and len(found) == len(ORGANIZATIONS)
    assert read_by(conn, "relay_5") < read_by(conn, "relay_4")


@pytest.mark.parametrize("demand", [16, 0])
def test_a_round_that_finds_nothing_looks_at_each_lane_once(conn: Connection, demand: int) -> None:
    """With room or without: when the next job is due is known from the same look."""
    staff(conn, threads=400, demand=max(demand, 16))
    for number in ORGANIZATIONS:
        waiting(conn, number, 20)
    conn.execute("update agentflow.jobs set run_at = now() + interval '1 h', wake_at = now() + interval '1 h'")
    if not demand:  # as many are sent as fit into the window
        conn.execute(
            "update agentflow.jobs set sent_at = now(), sends = 1 where id in (select id from agentflow.jobs limit 16)"
        )

    def looks() -> int:
        return int(value(conn, "select idx_scan from pg_stat_xact_user_tables where relname = 'jobs'"))

    with conn.transaction(force_rollback=True):
        before = looks()
        found, due_in_s = dispatch.pick_due(conn, "default")
        assert looks() - before < len(ORGANIZATIONS) + 8

    assert found == [] and due_in_s is not None and 3500 < due_in_s <= 3600
