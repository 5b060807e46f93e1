"""The picture and the table of the states of a job (ops/states.md) say what the database allows."""

from __future__ import annotations

import itertools
import re
from typing import Any
from uuid import uuid4

import psycopg

from agentflow.jobs import leases, records
from agentflow.jobs.model import STATES, TERMINAL, Job, Outcome, State, Verdict
from tests import core_support as core
from tests.mutations import mutate_function
from tests.processes import ROOT

STATES_FILE = ROOT / "ops" / "states.md"

Move = tuple[str, str, str]


def moves_in_the_table() -> set[Move]:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \|", STATES_FILE.read_text(), re.MULTILINE)
    return {row for row in rows if row[0] != "from"}


def moves_in_the_picture() -> set[Move]:
    return set(re.findall(r"^ +(\w+) --> (\w+): (\w+)$", STATES_FILE.read_text(), re.MULTILINE))


def job_in(
    conn: psycopg.Connection, state: State, *, asked_to_cancel: bool, last_attempt: bool, crashes: int
) -> Job | None:
    """A job in that state; None where there is none like that."""
    job = core.submit(conn, max_attempts=1 if last_attempt else 5)
    if crashes:
        conn.execute("update agentflow.jobs set crashes = %s where id = %s", (crashes, job.id))
    if state != "queued":
        (job,) = core.claim(conn, uuid4(), job)
    if asked_to_cancel:
        if state != "running":
            return None
        records.cancel(conn, core.ORGANIZATION, job.id)
    if state in TERMINAL and core.finish(conn, job, state) != state:  # type: ignore[arg-type]  # outcomes have these names
        return None
    return core.read(conn, job)


def walked(conn: psycopg.Connection, *, only: str = "") -> set[Move]:
    """What every operation (or one) does to a job in every state."""
    outcomes: tuple[Outcome, ...] = ("succeeded", "failed", "cancelled", "retry", "wait", "handback")

    def finish(outcome: Outcome) -> Any:
        def run(job: Job) -> None:
            worker = job.worker or uuid4()
            core.settle(conn, worker, Verdict(job.id, job.fence, outcome))

        return run

    def rescue(job: Job) -> None:
        conn.execute(
            "update agentflow.jobs set lease_until = clock_timestamp() - interval '1 h' where id = %s and state = 'running'",
            (job.id,),
        )
        leases.rescue(conn, core.rescuer(conn), limit=100, lease_s=core.LEASE_S, max_crashes=core.MAX_CRASHES)

    operations: list[tuple[str, Any]] = [
        ("claim", lambda job: core.claim(conn, uuid4(), job)),
        ("cancel", lambda job: records.cancel(conn, core.ORGANIZATION, job.id)),
        ("rescue", rescue),
        *[("finish", finish(outcome)) for outcome in outcomes],
    ]
    seen = set()
    variants = itertools.product((False, True), (False, True), (0, core.MAX_CRASHES - 1))
    for asked, last, crashes in variants:
        for state, (name, operation) in itertools.product(STATES, operations):
            if only and name != only:
                continue
            job = job_in(conn, state, asked_to_cancel=asked, last_attempt=last, crashes=crashes)
            if job is None:
                continue
            assert job.state == state
            operation(job)
            now = core.read(conn, job).state
            if now != state:
                seen.add((state, now, name))
    return seen


def test_the_diagram_of_states_is_what_the_database_allows(conn: psycopg.Connection) -> None:
    assert walked(conn) == moves_in_the_table()


def test_the_walk_notices_a_transition_that_is_not_in_the_diagram(conn: psycopg.Connection) -> None:
    mutate_function(
        conn,
        "cancel_1",
        ("in ('queued', 'running')", "in ('queued', 'running', 'failed')"),
        ("when j.state = 'queued' then 'cancelled'", "when j.state <> 'running' then 'cancelled'"),
        ("when j.state = 'queued' then clock_timestamp()", "when j.state <> 'running' then clock_timestamp()"),
    )

    assert walked(conn, only="cancel") - moves_in_the_table() == {("failed", "cancelled", "cancel")}


def test_the_picture_of_states_is_the_table() -> None:
    assert moves_in_the_picture() == moves_in_the_table()
    ends = set(re.findall(r"^ +(\w+) --> \[\*\]$", STATES_FILE.read_text(), re.MULTILINE))
    assert ends == TERMINAL
