"""The calendar: what is due happens once, however many look, late rather than never; alarms, canaries, schedules of users."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow import health, scraping, settings
from agentflow.errors import Permanent
from agentflow.jobs import rules
from agentflow.jobs.requests import NewJob
from agentflow.schedules import canaries, firing, records, ticks
from agentflow.schedules.ticks import KEPT, Tick
from agentflow.schedules.when import When
from agentflow.storage import StorageError
from agentflow.system import System, Transaction
from scheduler import canary, clean_up, schedule
from scheduler.calendar import Calendar, Done, Due, Entry, every, latest
from tests.calendar_support import (
    Connection,
    calendar,
    jobs_of,
    looked,
    made,
    overdue,
    ticks_of,
)
from tests.one_database import database_url, original
from tests.processes import ROOT, eventually
from tests.web_support import run

__all__ = ["database_url", "original"]

HOUR = When(every_s=3600)


@pytest.fixture
def systems(environment: dict[str, str]) -> Iterator[list[System]]:
    """Two schedulers' systems."""
    both = [System.start(settings.load(environment), "test") for _ in range(2)]
    yield both
    for each in both:
        each.close()


def at_once(*workers: Callable[[], Any]) -> None:
    """All at the same moment, each in a thread."""
    gate = threading.Barrier(len(workers))

    def started(work: Callable[[], Any]) -> None:
        gate.wait(30)
        work()

    threads = [threading.Thread(target=started, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def pings(name: str = "test", due: Due | None = None, *, asks: bool = False) -> Entry:
    """An entry that hands a ping in."""

    def submit(transaction: Transaction, tick: Tick) -> Any:
        return transaction.submit(1, NewJob("ping", {}, correlation_id=f"{name}:{tick.subject}")).job

    return Entry(name, due or every(60), submit=submit, asks=asks)


def clock(moments: list[datetime]) -> Callable[[Connection], datetime]:
    """The database's clock, set by a test: the last of `moments`."""
    return lambda _conn: moments[-1]


# ---- ticks ----


def test_two_schedulers_through_an_hour_make_each_tick_once(
    systems: list[System], conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look at the same moments, every 20 s of an hour."""
    start = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
    now = [start]
    monkeypatch.setattr(records, "now", clock(now))
    worked: list[str] = []
    entries = [
        pings("minutely"),
        Entry("work", every(600), work=lambda _system: Done({"deleted": worked.append("x") or 0})),
    ]
    calendars = [calendar(system, entries) for system in systems]

    for seconds in range(0, 3600, 20):
        now.append(start + timedelta(seconds=seconds))
        at_once(*(partial(looked, each) for each in calendars))

    minutes = [row[1] for row in ticks_of(conn, "minutely")]
    assert minutes == [start + timedelta(minutes=n) for n in range(60)]
    assert len({row[4] for row in ticks_of(conn, "minutely")}) == 60
    (jobs,) = conn.execute("select count(*) from agentflow.jobs where correlation_id = 'minutely:'").fetchone() or (0,)
    assert jobs == 60
    assert [row[1] for row in ticks_of(conn, "work")] == [start + timedelta(minutes=10 * n) for n in range(6)]
    assert len(worked) == 6


def test_what_was_missed_while_nobody_looked_is_made_up_for_once(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    now = [start]
    monkeypatch.setattr(records, "now", clock(now))
    looked(calendar(system, [pings()]))

    now.append(start + timedelta(hours=7, seconds=5))
    after = calendar(system, [pings()])
    looked(after)
    looked(after)

    assert [row[1] for row in ticks_of(conn, "test")] == [start, start + timedelta(hours=7)]


def test_a_tick_that_could_not_be_handed_in_whole_is_not_claimed(system: System, conn: Connection) -> None:
    """As when the process dies between the claim and the job: one transaction holds both."""

    def dies(transaction: Transaction, tick: Tick) -> Any:
        transaction.submit(1, NewJob("ping", {}))
        raise psycopg.OperationalError("the connection is lost")

    assert not calendar(system, [replace(pings(), submit=dies)]).look()
    assert ticks_of(conn, "test") == []

    looked(calendar(system, [pings()]))
    ((_, _, outcome, _, job),) = ticks_of(conn, "test")
    assert outcome == "submitted"
    assert conn.execute("select id from agentflow.jobs").fetchall() == [(job,)]


DYING = """
import os, signal, sys
import actors
from agentflow import settings
from agentflow.schedules import firing, ticks
from agentflow.system import System

claim = ticks.claim
def claim_and_die(conn, tick):
    assert claim(conn, tick)
    print("claimed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
ticks.claim = claim_and_die
firing.fire_due(System.start(settings.current(), "test"))
"""


def test_a_scheduler_that_is_killed_between_claim_and_job_leaves_the_tick_to_the_next(
    system: System, environment: dict[str, str], conn: Connection
) -> None:
    mine = made(conn, HOUR)
    due = overdue(conn, mine.id, 10)
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}

    killed = subprocess.run(
        [sys.executable, "-c", DYING], cwd=ROOT, env={**keep, **environment}, capture_output=True, text=True, timeout=60
    )

    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "claimed\n"), killed.stderr
    # The server notices in its own time that nobody is there, and lets the schedule go.
    eventually(lambda: firing.fire_due(system))
    assert not firing.fire_due(system)
    ((_, at, outcome, missed, job),) = ticks_of(conn, "user")
    assert (at, outcome, missed) == (due, "submitted", 0)
    assert jobs_of(conn, mine.id) == [job]


def test_a_database_that_is_away_over_several_ticks_costs_none_of_the_schedules_its_tick(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    now = [start]
    monkeypatch.setattr(records, "now", clock(now))
    entries = [pings("one"), pings("two", every(300))]
    looking = calendar(system, entries)
    looked(looking)
    with monkeypatch.context() as away:
        away.setattr(system.database, "connection", _away)
        for minutes in range(1, 20):
            now.append(start + timedelta(minutes=minutes))
            assert not looking.look()

    now.append(start + timedelta(minutes=20, seconds=30))
    looked(looking)
    looked(looking)

    for name in ("one", "two"):
        assert [row[1] for row in ticks_of(conn, name)] == [start, start + timedelta(minutes=20)]


def _away() -> Any:
    raise psycopg.OperationalError("the database is away")


def test_entries_may_be_made_by_what_the_database_says_is_due(system: System, conn: Connection) -> None:
    """As those for the accounts of a CRM: each in its own rhythm, for its organization."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    accounts = [Tick("", at, "account 7"), Tick("", at + timedelta(seconds=90), "account 9")]
    looking = calendar(system, [pings("sync", lambda _conn, _now: accounts, asks=True)])

    looked(looking)
    accounts[0] = replace(accounts[0], at=at + timedelta(minutes=5))
    looking._asked_at = float("-inf")
    looked(looking)
    looked(calendar(system, [pings("sync", lambda _conn, _now: accounts, asks=True)]))

    assert [(row[0], row[1]) for row in ticks_of(conn, "sync")] == [
        ("account 7", at),
        ("account 9", at + timedelta(seconds=90)),
        ("account 7", at + timedelta(minutes=5)),
    ]


def test_an_entry_that_fails_to_say_what_is_due_does_not_hold_up_the_others(system: System, conn: Connection) -> None:
    def broken(_conn: Connection, _now: datetime) -> list[Tick]:
        raise KeyError("account")

    looking = calendar(system, [pings("broken", broken, asks=True), pings()])
    looked(looking)

    assert len(ticks_of(conn, "test")) == 1
    assert looking.alarms() == ["broken does not say what is due: KeyError"]


def test_an_entry_that_cannot_be_handed_in_is_an_alarm_until_it_can(system: System, conn: Connection) -> None:
    errors = [KeyError("account")]

    def submit(transaction: Transaction, tick: Tick) -> Any:
        if errors:
            raise errors.pop()
        return transaction.submit(1, NewJob("ping", {})).job

    looking = calendar(system, [replace(pings("broken"), submit=submit), pings()])
    looked(looking)
    assert len(ticks_of(conn, "test")) == 1 and ticks_of(conn, "broken") == []
    assert looking.alarms() == ["broken could not be handed in: 'account'"]

    looked(looking)
    assert len(ticks_of(conn, "broken")) == 1 and looking.alarms() == []


def test_work_that_is_not_over_is_not_begun_again(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    begun: list[tuple[Any, ...]] = []
    looking = calendar(system, [Entry("work", every(60), work=lambda _system: Done())])
    looking._at_once = lambda function, *arguments: begun.append((function, arguments))
    looked(looking)
    now.append(now[-1] + timedelta(minutes=1))
    looked(looking)
    assert len(begun) == 1

    function, arguments = begun[0]
    function(*arguments)
    looked(looking)
    assert len(begun) == 2
    assert len(ticks_of(conn, "work")) == 2


def test_of_each_schedule_the_last_ticks_are_kept(conn: Connection) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    other = Tick("test", start, "other")
    with conn.transaction():
        assert ticks.claim(conn, other)
        for n in range(KEPT + 20):
            assert ticks.claim(conn, Tick("test", start + timedelta(minutes=n)))
            assert not ticks.claim(conn, Tick("test", start + timedelta(minutes=n)))

    kept = [row[1] for row in ticks_of(conn, "test") if row[0] == ""]
    assert (len(kept), kept[0]) == (KEPT, start + timedelta(minutes=20))
    conn.execute("update agentflow.ticks set claimed_at = claimed_at - interval '40 days'")
    assert ticks.delete_old(conn, days=30) == KEPT  # all but the newest
    assert len(ticks_of(conn, "test")) == 1


# ---- user-defined schedules ----


def test_two_schedulers_fire_a_schedule_once_and_it_goes_on(systems: list[System], conn: Connection) -> None:
    mine = [made(conn, HOUR, name=f"s{n}", payload={"sleep_ms": n}) for n in range(20)]
    due = {each.id: overdue(conn, each.id, 5) for each in mine}

    def fire_all(system: System) -> None:
        while firing.fire_due(system):
            pass

    at_once(*(lambda system=system: fire_all(system) for system in systems))  # type: ignore[misc]

    assert {UUID(row[0]): row[1] for row in ticks_of(conn, "user")} == due
    for each in mine:
        assert len(jobs_of(conn, each.id)) == 1
        now = records.get(conn, None, each.id)
        assert now is not None and now.next_at == due[each.id] + timedelta(hours=1)


def test_ticks_that_a_schedule_missed_are_made_up_for_by_one(system: System, conn: Connection) -> None:
    mine = made(conn, HOUR)
    due = overdue(conn, mine.id, 5 * 3600 + 60)

    assert firing.fire_due(system) and not firing.fire_due(system)

    ((_, at, _, missed, job),) = ticks_of(conn, "user")
    assert (at, missed) == (due, 5)
    assert jobs_of(conn, mine.id) == [job]
    after = records.get(conn, 1, mine.id)
    assert after is not None and after.next_at == due + timedelta(hours=6)


def test_one_for_a_single_moment_is_over_after_it(system: System, conn: Connection) -> None:
    mine = made(conn, When(once_at=datetime.now(UTC) + timedelta(days=1)))
    overdue(conn, mine.id, 1)
    conn.execute("update agentflow.schedules set once_at = next_at")

    assert firing.fire_due(system) and not firing.fire_due(system)

    after = records.get(conn, 1, mine.id)
    assert after is not None and after.enabled and after.next_at is None


def test_a_schedule_whose_type_changed_is_refused_each_time_and_goes_on(system: System, conn: Connection) -> None:
    mine = made(conn, HOUR, payload={"sleep_minutes": 1})
    healthy = made(conn, HOUR, name="healthy")
    overdue(conn, mine.id, 20)
    overdue(conn, healthy.id, 10)

    while firing.fire_due(system):
        pass

    refused, fired = (ticks.history(conn, 1, each.id)[0] for each in (mine, healthy))
    assert (refused.outcome, fired.outcome) == ("refused", "submitted")
    assert "sleep_minutes" in (refused.facts or {})["error"]
    after = records.get(conn, 1, mine.id)
    assert after is not None and after.next_at is not None and after.next_at > datetime.now(UTC)


def test_jitter_delays_a_tick_and_not_the_times(conn: Connection) -> None:
    mine = made(conn, HOUR, jitter_s=600)

    row = conn.execute("select extract(epoch from wake_at - next_at) from agentflow.schedules").fetchone()
    assert row is not None and 0 <= row[0] < 600
    assert mine.next_at == mine.starts_at + timedelta(hours=1)


def test_paused_schedules_do_not_tick_and_resume_from_now(system: System, conn: Connection) -> None:
    mine = made(conn, HOUR)
    overdue(conn, mine.id, 7200)
    found = records.get(conn, 1, mine.id)
    assert found is not None
    wanted = records.Wanted(found.name, found.when, found.type, found.payload)
    with conn.transaction():
        paused = records.update(conn, found, replace(wanted, enabled=False))
    assert (paused.enabled, paused.next_at) == (False, None)
    assert not firing.fire_due(system)

    with conn.transaction():
        resumed = records.update(conn, paused, wanted)
    assert not firing.fire_due(system)
    assert resumed.next_at == resumed.starts_at + timedelta(hours=1) and resumed.next_at > datetime.now(UTC)


def test_a_new_name_does_not_move_a_schedules_times(conn: Connection) -> None:
    mine = made(conn, HOUR)

    with conn.transaction():
        renamed = records.update(conn, mine, records.Wanted("renamed", HOUR, mine.type, {}))

    assert renamed == replace(mine, name="renamed")


# ---- clean-up ----


def test_clean_up_that_cannot_keep_up_says_so_until_it_can(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [5, 5, 2]
    entry = Entry("clean_up.things", every(60), work=clean_up.in_batches(lambda _conn: left.pop(0), batch=5))
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    monkeypatch.setattr(clean_up, "BUDGET_S", 0.0)
    looking = calendar(system, [entry])
    health.of(system).also(looking.alarms)

    looked(looking)

    assert left == [5, 2]
    assert looking.alarms() == ["clean_up.things cannot keep up with what there is to do"]
    assert ticks.latest(conn)[0].outcome == "behind" and ticks.latest(conn)[0].behind_s > 0
    document, ready = health.report(system, "scheduler")
    assert (document["status"], document["degraded"], ready) == ("degraded", looking.alarms(), True)
    shown = scraping.text(system).decode()
    assert float(_sample(shown, 'agentflow_cleanup_behind_seconds{what="things"}')) > 0

    monkeypatch.setattr(clean_up, "BUDGET_S", 60.0)
    now.append(now[-1] + timedelta(minutes=1))
    looked(looking)

    assert left == [] and looking.alarms() == []
    assert [row[2] for row in ticks_of(conn, "clean_up.things")] == ["behind", "done"]
    assert ticks.latest(conn)[0].behind_s == 0
    assert float(_sample(scraping.text(system).decode(), 'agentflow_cleanup_deleted_total{what="things"}')) >= 12


def _sample(shown: str, name: str) -> str:
    return next(line.rpartition(" ")[2] for line in shown.splitlines() if line.startswith(name))


@pytest.mark.parametrize("error", [StorageError("the bucket says no"), Permanent("no"), ZeroDivisionError("oh")])
def test_work_that_fails_is_an_alarm_and_is_done_again(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    errors = [error]

    def work(_system: System) -> Done:
        if errors:
            raise errors.pop()
        return Done()

    looking = calendar(system, [Entry("work", every(60), work=work)])
    looked(looking)
    assert looking.alarms() == [f"work failed: {error}"]

    now.append(now[-1] + timedelta(minutes=1))
    looked(looking)

    assert looking.alarms() == []
    assert [row[2] for row in ticks_of(conn, "work")] == ["failed", "done"]


# ---- the canary ----


def serve(conn: Connection, *queues: str) -> UUID:
    worker = uuid4()
    conn.execute(
        "insert into agentflow.workers (id, kind, host, pid, version, queues, threads) values (%s, 'worker', 'h', 1, '', %s, 1)",
        (worker, list(queues)),
    )
    return worker


def later(looking: Calendar, now: list[datetime], seconds: float) -> None:
    """Look again, so much later."""
    now.append(now[-1] + timedelta(seconds=seconds))
    looking._asked_at = float("-inf")
    looked(looking)


def test_a_canary_goes_through_each_queue_that_is_served_and_its_round_trip_is_kept(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    serve(conn, "default", "heavy")
    looking = calendar(system, canary.entries(system.rules, 60))
    looked(looking)

    jobs = dict(conn.execute("select queue, id from agentflow.jobs").fetchall())
    assert set(jobs) == {"default", "heavy"}
    run(system, conn, jobs["default"])
    conn.execute("update agentflow.jobs set created_at = finished_at - interval '7 s' where state = 'succeeded'")
    later(looking, now, 60)

    default, heavy = sorted(canaries.states(conn), key=lambda each: each.queue)
    # The one that came back was measured and is gone; another is on its way. The other queue's is waited for.
    assert (default.round_trip_s, heavy.state, heavy.round_trip_s) == (7.0, "waiting", None)
    assert heavy.at == now[0] and default.at == now[-1]
    left = conn.execute("select queue, count(*) from agentflow.jobs group by 1 order by 1").fetchall()
    assert left == [("default", 1), ("heavy", 1)]
    assert looking.alarms() == []
    assert float(_sample(scraping.text(system).decode(), 'agentflow_canary_round_trip_seconds{queue="default"}')) == 7.0


def test_a_canary_that_does_not_come_back_is_an_alarm_until_it_does(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    looking = calendar(system, canary.entries(system.rules, 60))
    looked(looking)
    later(looking, now, 60)
    assert looking.alarms() == []

    conn.execute("update agentflow.ticks set claimed_at = claimed_at - interval '130 s'")
    later(looking, now, 60)

    assert looking.alarms() == ["the canary of queue default does not come back"]
    assert float(_sample(scraping.text(system).decode(), 'agentflow_canary_away_seconds{queue="default"}')) > 120
    ((job,),) = conn.execute("select id from agentflow.jobs").fetchall()  # they do not pile up

    run(system, conn, job, "failed", error={"code": "no", "message": "No."})
    later(looking, now, 1)
    assert [each.state for each in canaries.states(conn)] == ["waiting"]  # the next one is on its way
    ((job,),) = conn.execute("select id from agentflow.jobs").fetchall()
    run(system, conn, job)
    later(looking, now, 1)
    assert looking.alarms() == []
    assert [each.state for each in canaries.states(conn)] == ["well"]


def test_a_canary_that_failed_is_an_alarm(system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(records, "now", clock(now))
    looking = calendar(system, canary.entries(system.rules, 60))
    looked(looking)
    ((job,),) = conn.execute("select id from agentflow.jobs").fetchall()
    run(system, conn, job, "failed", error={"code": "no", "message": "No."})

    later(looking, now, 10)

    assert looking.alarms() == ["the canary of queue default failed"]


def test_what_is_paused_gets_no_canary(system: System, conn: Connection) -> None:
    serve(conn, "default", "heavy")
    gone = serve(conn, "gpu")
    conn.execute("update agentflow.workers set stopped_at = clock_timestamp() where id = %s", (gone,))
    rules.pause(conn, "queue", "heavy", rules.EVERY)

    looked(calendar(system, canary.entries(system.rules, 60)))

    assert conn.execute("select queue from agentflow.jobs").fetchall() == [("default",)]


def test_without_an_interval_there_is_no_canary(system: System) -> None:
    assert canary.entries(system.rules, 0) == []


# ---- the process ----


def test_a_running_schedule_notices_a_new_schedule_and_its_end(system: System, conn: Connection) -> None:
    running = schedule.start(system, [])
    try:
        mine = made(conn, HOUR)
        overdue(conn, mine.id, 1)
        eventually(lambda: jobs_of(conn, mine.id))
        assert health.report(system, "scheduler")[0]["degraded"] == []
        with conn.transaction():
            assert records.delete(conn, 1, mine.id)
        assert ticks_of(conn, "user") == []
    finally:
        running.shutdown()


def test_each_entry_of_the_schedule_runs(system: System, conn: Connection) -> None:
    """All of them, on an empty installation, and again: nothing is left to be done."""
    looking = calendar(system, schedule.entries(system))
    looked(looking)

    outcomes = {row.schedule: row.outcome for row in ticks.latest(conn)}
    listed = {entry.name for entry in schedule.entries(system)}
    assert set(outcomes) == listed - {
        "kommo.incremental",
        "kommo.reconcile",
        "webhooks",
    }  # nothing is there to tick for
    assert set(outcomes.values()) == {"done"}
    assert looking.alarms() == []


def test_ticks_lie_on_a_grid_that_is_the_same_for_all() -> None:
    moment = datetime(2026, 3, 1, 10, 7, 33, 5, tzinfo=UTC)

    assert latest(moment, 600) == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert latest(moment, 60) == datetime(2026, 3, 1, 10, 7, tzinfo=UTC)
    assert latest(latest(moment, 60), 60) == datetime(2026, 3, 1, 10, 7, tzinfo=UTC)
