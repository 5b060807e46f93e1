"""The relay reads lanes only as far as their turns go, and picks what it would pick had it read all of them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

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
    if chance.random() < 0.2:
        conn.execute("update agentflow.jobs set head_start_s = 60 where random() < 0.1")


@pytest.mark.parametrize("seed", range(20))
def test_it_picks_what_the_relay_before_it_picked_which_read_every_lane(conn: Connection, seed: int) -> None:
    arranged(conn, random.Random(seed))

    expected = picked(conn, "relay_3")

    assert expected and picked(conn, "relay_4") == expected


def test_an_organization_that_has_done_much_comes_first_with_what_is_critical(conn: Connection) -> None:
    staff(conn, threads=400, demand=50)
    waiting(conn, 1, 60, priority=0)
    for number in (2, 3):
        waiting(conn, number, 500)
    conn.execute("insert into agentflow.lanes (queue, organization_id, virtual_s) values ('default', 1, 1000)")

    assert picked(conn, "relay_4")[0, 1] == 50


def test_threads_are_used_though_those_whose_turn_it_is_have_few(conn: Connection) -> None:
    staff(conn, threads=400, demand=50)
    waiting(conn, 1, 100)
    for number in ORGANIZATIONS[1:]:
        waiting(conn, number, 1)
    conn.execute("insert into agentflow.lanes (queue, organization_id, virtual_s) values ('default', 1, 1000)")

    found = picked(conn, "relay_4")

    assert sum(found.values()) == 50 and found[1, 1] == 50 - len(ORGANIZATIONS[1:])


def test_of_many_deep_lanes_few_rows_are_read(conn: Connection) -> None:
    staff(conn, threads=400, demand=20)
    for number in ORGANIZATIONS:
        waiting(conn, number, 300)
    conn.execute("analyze agentflow.jobs")

    def read_by(function: str) -> int:
        """Buffers of this connection."""
        asked = (
            "select sum(hits + reads)::bigint from pg_stat_get_backend_io(pg_backend_pid()) where object = 'relation'"
        )
        figures: list[Any] = []
        for _ in range(3):  # the first one plans
            before = value(conn, asked)
            picked(conn, function)
            conn.execute("select pg_stat_force_next_flush()")
            figures.append(value(conn, asked) - before)
        return int(min(figures))

    assert dispatch.pick_due(conn, "default")[0]
    assert read_by("relay_4") < read_by("relay_3") / 2
