"""The history of jobs by the minute, and dead letters by what they died of: counted from the rows, whatever happens meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

import scheduler.history
from agentflow.jobs import dead_letters, history, records
from agentflow.jobs.dead_letters import Which
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from scheduler import schedule
from scheduler.calendar import Calendar
from tests.dashboard_support import MINE, THEIRS, TIMEOUT, put_job, tenants, uuid_at
from tests.web_support import claim, finish

__all__ = ["tenants"]


def rows(conn: psycopg.Connection, seconds: int = 60) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select at, organization_id, type, queue, submitted, succeeded, failed, cancelled, pickups, round(pickup_s::numeric, 3),"
        " round(run_s::numeric, 3) from agentflow.job_history where seconds = %s order by 1, 2, 3, 4",
        (seconds,),
    ).fetchall()


def totals(conn: psycopg.Connection, seconds: int = 60) -> tuple[int, ...]:
    row = conn.execute(
        "select coalesce(sum(submitted), 0), coalesce(sum(succeeded), 0), coalesce(sum(failed), 0), coalesce(sum(cancelled), 0)"
        " from agentflow.job_history where seconds = %s",
        (seconds,),
    ).fetchone()
    assert row is not None
    return tuple(map(int, row))


def test_minutes_are_counted_by_organization_type_and_queue(conn: psycopg.Connection) -> None:
    for n in range(30):
        put_job(conn, ("succeeded", "failed", "cancelled")[n % 3], age_s=60 * n + 30, organization_id=1 + n % 2, type=f"t{n % 5}",
                queue="heavy" if n % 7 else "default", waited_s=0.02, ran_s=2.0)  # fmt: skip
    put_job(conn, "queued", age_s=10)
    put_job(conn, "cancelled", age_s=10, started_at=None)

    history.roll_up(conn)

    expected = conn.execute(
        "select date_bin('1 min', at, 'epoch'), organization_id, type, queue, sum(n), sum((s = 'succeeded')::integer),"
        " sum((s = 'failed')::integer), sum((s = 'cancelled')::integer) from ("
        " select created_at as at, organization_id, type, queue, 1 as n, '' as s from agentflow.jobs union all"
        " select finished_at, organization_id, type, queue, 0, state from agentflow.jobs where finished_at is not null) x"
        " group by 1, 2, 3, 4 order by 1, 2, 3, 4"
    ).fetchall()
    assert [row[:8] for row in rows(conn)] == expected and len(expected) > 20
    assert {sum(row[8]) for row in rows(conn) if row[5]} == {1} and {float(row[9]) for row in rows(conn) if row[5]} == {
        0.02
    }
    assert sum(row[8][2] for row in rows(conn)) == 30  # 10 to 30 ms
    for seconds in (600, 3600):
        assert totals(conn, seconds) == totals(conn) == (32, 10, 10, 11)


def test_it_may_be_done_twice_and_takes_in_what_comes_late(conn: psycopg.Connection) -> None:
    put_job(conn, age_s=50)
    history.roll_up(conn)
    before = rows(conn), rows(conn, 3600)

    history.roll_up(conn)
    assert (rows(conn), rows(conn, 3600)) == before

    put_job(conn, age_s=50)  # its transaction took its time
    history.roll_up(conn)
    assert totals(conn) == totals(conn, 600) == totals(conn, 3600) == (2, 2, 0, 0)


def test_what_was_counted_stays_when_its_rows_go(conn: psycopg.Connection) -> None:
    for n in range(5):
        put_job(conn, age_s=30 + n)
    history.roll_up(conn)
    conn.execute("delete from agentflow.jobs")
    put_job(conn, age_s=30)

    history.roll_up(conn)

    assert totals(conn) == totals(conn, 3600) == (5, 5, 0, 0)


def test_a_scheduler_that_was_away_makes_up_for_it_and_one_of_another_time_is_no_trouble(
    conn: psycopg.Connection,
) -> None:
    history.roll_up(conn)
    conn.execute(
        "update agentflow.installation set value = %s where name = 'history'",
        ((datetime.now(UTC) - timedelta(hours=30)).isoformat(),),
    )
    for hours in (1, 5, 29):
        put_job(conn, age_s=hours * 3600)

    history.roll_up(conn)
    assert totals(conn) == totals(conn, 600) == totals(conn, 3600) == (3, 3, 0, 0)

    conn.execute("update agentflow.installation set value = '2100-01-01T00:00:00+00:00' where name = 'history'")
    put_job(conn, age_s=5)
    history.roll_up(conn)
    assert totals(conn) == (4, 4, 0, 0)


def test_jobs_of_a_chain_count_when_they_are_made(system: System, conn: psycopg.Connection) -> None:
    first = system.submit(1, NewJob("ping", {}, then=(NewJob("ping", {}),))).job
    conn.execute(  # as if the chain had been handed in an hour ago, and its ids been made then
        "update agentflow.jobs set then_jobs = jsonb_set(then_jobs, '{0,id}', to_jsonb(%s::text)),"
        " created_at = created_at - interval '1 h'",
        (str(uuid_at(datetime.now(UTC) - timedelta(hours=1))),),
    )
    finish(system, conn, claim(conn, first.id))
    assert len(records.children(conn, first.id)) == 1

    history.roll_up(conn)

    recent = conn.execute(
        "select sum(submitted) from agentflow.job_history where seconds = 60 and at > clock_timestamp() - interval '5 min'"
    )
    assert recent.fetchone() == (1,)


def test_depths_are_the_most_that_was_seen(conn: psycopg.Connection, system: System) -> None:
    waiting = [put_job(conn, "queued", age_s=100, organization_id=MINE) for _ in range(3)]
    put_job(conn, "queued", organization_id=MINE, run_at="2100-01-01", wake_at="2100-01-01")
    put_job(conn, "running", organization_id=THEIRS, queue="heavy")
    history.sample_depths(conn)
    conn.execute("delete from agentflow.jobs where id = any (%s)", (waiting[1:],))
    scheduler.history.Rolling().work(system)

    mine, all_ = history.read(conn, MINE, "1h")[-2:], history.read(conn, None, "24h")[-2:]

    assert max((p.due, p.parked, p.running) for p in mine if p.due is not None) == (3, 1, 0)
    assert max((p.due, p.parked, p.running) for p in all_ if p.due is not None) == (3, 1, 1)
    assert 100 <= max(p.oldest_due_s or 0 for p in mine) < 1000
    assert [len(history.read(conn, MINE, window)) for window in history.WINDOWS] == [60, 144, 168]


def test_quantiles_lie_within_the_bounds_of_their_counts() -> None:
    nothing = [0] * 13
    assert history.quantile(nothing, 0.5) is None
    assert history.quantile([0, 0, 10, *nothing[3:]], 0.5) == pytest.approx(0.02)
    assert history.quantile([90, 0, 0, 0, 0, 10, *nothing[6:]], 0.95) == pytest.approx(0.65)
    assert history.quantile([*nothing[:12], 4], 0.5) == 1000


def test_old_history_is_deleted_by_its_kind_and_the_calendar_does_it(system: System, conn: psycopg.Connection) -> None:
    history.roll_up(conn)
    for seconds in (60, 600, 3600):
        for days in (0.5, 2, 9):
            conn.execute(
                "insert into agentflow.job_history (seconds, at, organization_id, type, queue, pickups)"
                " values (%s, clock_timestamp() - make_interval(secs => %s), 1, 't', 'default', '{}')",
                (seconds, days * 86_400),
            )

    assert history.delete_old(conn, limit=3) == 3 and history.delete_old(conn, limit=3) == 1

    kept = conn.execute("select seconds, count(*) from agentflow.job_history group by 1 order by 1").fetchall()
    assert kept == [(60, 1), (600, 2), (3600, 2)]
    names = {entry.name for entry in schedule.entries(system)}
    assert {"history", "clean_up.history", "clean_up.dashboard_sessions"} <= names


def test_the_calendar_keeps_it(system: System, conn: psycopg.Connection) -> None:
    put_job(conn, age_s=20)
    entry = [each for each in schedule.entries(system) if each.name == "history"]

    Calendar(system, entry, lambda function, *arguments: function(*arguments)).look()

    assert totals(conn) == (1, 1, 0, 0)
    behind_s = history.behind_s(conn)
    assert behind_s is not None and behind_s < 300


def test_the_statements_find_their_rows_by_index(conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, state, error, attempt, fence,"
        " created_at, started_at, finished_at) select agentflow.uuid7_1(), 1 + n % 20, 't' || n % 9, 'default', 5, 60,"
        " case when n % 50 = 0 then 'failed' else 'succeeded' end,"
        """ case when n % 50 = 0 then jsonb_build_object('code', 'c' || n % 7, 'message', 'no answer ' || n) end, 1, 1,"""
        " at, at, at from generate_series(1, 20000) n cross join lateral (select clock_timestamp() - n * interval '20 s' as at) a"
    )
    conn.execute("analyze agentflow.jobs")
    now = datetime.now(UTC)
    span = {"since": now - timedelta(minutes=5), "until": now, "first": uuid_at(now), "last": uuid_at(now)}
    asked: list[tuple[Any, dict[str, Any]]] = [
        (dead_letters._GROUPS, {"organization": None, "limit": 100, "most": 1000}),
        (dead_letters._GROUPS, {"organization": 3, "limit": 100, "most": 1000}),
        (history._COUNT, {**span, "bounds": list(history.PICKUP_BOUNDS)}),
        (history._SAMPLE, {}),
    ]
    for statement, values in asked:
        plan = "\n".join(row[0] for row in conn.execute(f"explain {statement}", values).fetchall())
        assert "Seq Scan on jobs" not in plan, plan


# ---- dead letters ----


def dead(conn: psycopg.Connection, message: str, code: str = "x", **columns: Any) -> UUID:
    return put_job(conn, "failed", error={"code": code, "message": message}, **columns)


def test_dead_letters_of_one_kind_are_one_group(conn: psycopg.Connection, tenants: dict[str, str]) -> None:
    same = [
        dead(conn, "GET https://e.com/a/1 gave 'abc' for 0197b1e2-8c1f-7000-9a51-2f1f35b7a001 after 31 s", age_s=300),
        dead(conn, "GET https://e.com/b/2 gave 'x y' for 0197b1e2-8c1f-7000-9a51-2f1f35b7a002 after 7 s", age_s=200),
    ]
    for other in (
        {"message": "GET nothing"},
        {"message": "GET nothing", "code": "y"},
        {"message": "GET nothing", "type": "other"},
        {"message": "GET nothing", "organization_id": MINE},
    ):
        dead(conn, **other, age_s=20)
    put_job(conn, "failed", error=None, age_s=10)
    put_job(conn, "succeeded")

    groups = dead_letters.groups(conn, None)

    assert len(groups) == 6 and sum(group.count for group in groups) == 7
    (group,) = [each for each in groups if each.count == 2]
    assert group.example.id == same[1] and group.first_at < group.last_at
    assert groups == sorted(groups, key=lambda each: each.last_at, reverse=True)
    assert [each.organization_id for each in dead_letters.groups(conn, MINE)] == [MINE]
    assert (
        dead_letters.count(conn, None) == 7 and dead_letters.count(conn, 1, Which(fingerprint=group.fingerprint)) == 2
    )


def test_what_was_tried_again_or_laid_aside_is_no_dead_letter(system: System, conn: psycopg.Connection) -> None:
    first, second, third = (put_job(conn, "failed", error=TIMEOUT) for _ in range(3))
    with system.transaction() as transaction:
        job = records.get(transaction.conn, 1, first)
        assert job is not None
        records.retry(transaction.conn, job, max_payload_bytes=10_000)
        assert dead_letters.discard(transaction.conn, MINE, [second]) == 0  # not theirs
        assert dead_letters.discard(transaction.conn, 1, [second]) == 1

    (group,) = dead_letters.groups(conn, 1)

    assert (group.count, group.example.id) == (1, third)
    assert records.get(conn, 1, first) is not None and records.get(conn, 1, second) is not None


def test_two_who_deal_with_a_group_at_once_do_each_letter_once(system: System, conn: psycopg.Connection) -> None:
    for _ in range(4):
        put_job(conn, "failed", error=TIMEOUT)

    with system.transaction() as mine, system.transaction() as theirs:
        taken = dead_letters.find(mine.conn, 1, Which(), to_deal_with=True, limit=3)
        left = dead_letters.find(theirs.conn, 1, Which(), to_deal_with=True)

    assert (len(taken), len(left)) == (3, 1) and not {job.id for job in taken} & {job.id for job in left}


def test_what_cannot_be_tried_again_is_named_and_holds_nothing_up(system: System, conn: psycopg.Connection) -> None:
    unknown, good = put_job(conn, "failed", type="gone", error=TIMEOUT), put_job(conn, "failed", error=TIMEOUT)
    now = datetime.now(UTC)
    with system.transaction() as transaction:
        found = dead_letters.find(transaction.conn, 1, Which(), to_deal_with=True)
        retried = dead_letters.retry(transaction.conn, found, now=now, per_s=0.1, max_payload_bytes=10_000)

    assert retried.done == 1 and list(retried.refused) == [unknown] and "gone" in retried.refused[unknown]
    assert dict(conn.execute("select id, dealt_with from agentflow.jobs where state = 'failed'").fetchall()) == {
        unknown: None,
        good: "retried",
    }


@pytest.mark.parametrize("organization", [1, None])
def test_words_are_found_among_the_newest_errors_and_among_all(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, organization: int | None
) -> None:
    monkeypatch.setattr(records, "_NEWEST_ERRORS", 3)
    needle, *common = [dead(conn, "a needle"), *(dead(conn, "the same again") for _ in range(5))]

    def found(words: str, **more: Any) -> list[UUID]:
        return [job.id for job in records.search(conn, organization, records.Filter(error=words), **more)]

    ids = sorted(common, reverse=True)
    assert found("same", limit=2) == ids[:2]
    assert found("same", limit=2, before=ids[1]) == ids[2:4]
    assert found("same", limit=4) == ids[:4]  # more than are among the newest
    assert found("same") == ids
    assert found("needle", limit=1) == [needle]
    assert found("nothing") == []


def test_an_error_of_any_length_and_kind_is_written_and_found(conn: psycopg.Connection) -> None:
    long = dead(conn, "word " * 400_000 + "needle")
    odd = put_job(conn, "failed", error={"message": {"a": [1]}, "code": 5})

    assert {each.id for each in dead_letters.find(conn, 1, Which(error="word"))} == {long}
    assert len(dead_letters.groups(conn, 1)) == 2
    assert odd in {each.id for each in dead_letters.find(conn, 1, Which())}
