"""How many workers are wanted: the arithmetic, what is counted, and the gauge."""

from __future__ import annotations

import math
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow import gauges
from agentflow.jobs import forecasts, staffing
from agentflow.jobs.estimates import Durations
from agentflow.jobs.staffing import SOON_S, Kind
from agentflow.settings import Settings
from agentflow.system import System
from tests import core_support as core
from tests.test_metrics import samples

QUICK, LONG = Durations([1.0]), Durations([120.0])


def wanted(*found: Kind, threads: float = 10, limits: dict[str, int] | None = None, **known: Durations) -> int:
    return staffing.wanted(found, known, threads=threads, limits=limits or {})


@pytest.mark.parametrize(
    ("kind", "more", "processes"),
    [
        (Kind("default", "a"), {}, 0),
        (Kind("default", "a", due=1), {"a": QUICK}, 1),
        # 600 jobs of a second are 10 minutes of work: ten threads are through in one.
        (Kind("default", "a", due=600), {"a": QUICK}, 1),
        (Kind("default", "a", due=601), {"a": QUICK}, 2),
        # No more than one thread for each job, however long it takes.
        (Kind("default", "a", due=20), {"a": LONG}, 2),
        (Kind("default", "a", running=21), {"a": LONG}, 3),
        # Two slots of a key keep two threads busy.
        (Kind("gpu", "a", due=500, slots=2), {"a": LONG}, 1),
        (Kind("gpu", "a", due=500, slots=0), {"a": LONG}, 0),
        # Only so many of a type run in one process.
        (Kind("heavy", "a", due=7), {"a": LONG, "limits": {"a": 2}}, 4),
        # What never ran takes as long as the others do.
        (Kind("default", "new", due=601), {"a": QUICK}, 2),
        (Kind("default", "new", due=601), {}, 2),
    ],
)
def test_so_many_processes_are_wanted(kind: Kind, more: dict[str, Any], processes: int) -> None:
    assert wanted(kind, **more) == processes


def test_all_kinds_share_the_threads() -> None:
    work = [Kind("default", "a", due=300), Kind("heavy", "b", due=3), Kind("default", "a", running=4)]

    assert wanted(*work, a=QUICK, b=LONG) == 2  # 5 + 3 + 4 threads
    assert wanted(*work, a=QUICK, b=LONG, limits={"b": 1}) == 3


@given(st.integers(0, 10_000), st.integers(0, 500), st.floats(0.01, 1000), st.integers(1, 50), st.integers(1, 5000))
def test_more_work_never_wants_fewer_and_never_more_than_jobs(
    due: int, running: int, seconds: float, threads: int, more: int
) -> None:
    known = {"a": Durations([seconds])}
    first = wanted(Kind("q", "a", due=due), Kind("q", "a", running=running), threads=threads, **known)
    second = wanted(Kind("q", "a", due=due + more), Kind("q", "a", running=running), threads=threads, **known)

    assert first <= second <= math.ceil((due + more + running) / threads)
    assert second * threads * SOON_S >= min((due + more) * seconds, (due + more) * SOON_S) * 0.999


def test_what_is_due_and_runs_is_counted_and_what_waits_for_a_slot_or_a_time_is_not(conn: psycopg.Connection) -> None:
    due, parked, busy, running = (core.submit(conn) for _ in range(4))
    conn.execute("update agentflow.jobs set run_at = now() + interval '1 h' where id = %s", (parked.id,))
    conn.execute("update agentflow.jobs set wait_reason = 'busy' where id = %s", (busy.id,))
    core.claim(conn, uuid4(), running)

    found = staffing.kinds(conn, {"default": 1, "heavy": 0})

    assert found == [Kind("default", due.type, due=1.0), Kind("default", due.type, running=1)]


def test_a_keys_slots_come_with_its_jobs(conn: psycopg.Connection) -> None:
    jobs = [core.submit(conn, key="scarce", slots=3) for _ in range(2)]

    assert staffing.kinds(conn, {"default": 2}) == [Kind("default", jobs[0].type, due=2.0, slots=3)]


def test_what_is_beyond_the_looked_at_is_taken_to_be_like_them(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staffing, "_LOOKED_AT", 2)
    jobs = [core.submit(conn) for _ in range(5)]

    assert staffing.kinds(conn, {"default": 5}) == [Kind("default", jobs[0].type, due=5.0)]


def test_the_gauges_say_it_from_what_was_learned(test_settings: Settings, conn: psycopg.Connection) -> None:
    """Of workers with eight threads, of which six are for any job."""
    read = test_settings.model_copy(update={"job_concurrency": 8})
    idle = shown(read)
    jobs = [core.submit(conn) for _ in range(40)]
    forecasts.note_durations(conn, {jobs[0].type: [60.0]})
    busy = shown(read)

    assert (idle["all"], idle["default"], idle["heavy"]) == (1, 0, 0)
    assert (busy["all"], busy["default"], busy["heavy"]) == (7, 7, 0)


def shown(read: Settings) -> dict[str, float]:
    system = System(read, "test")
    try:
        found = samples(gauges.text(system, ask=True))
        queues = {name: found["agentflow_queue_workers_wanted", (("queue", name),)] for name in ("default", "heavy")}
        return {"all": found["agentflow_workers_wanted", ()], **queues}
    finally:
        system.close()
