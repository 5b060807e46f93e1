"""Two schedulers through an hour at sixty times the speed: libfaketime turns the clock that the calendar goes by, which is
Postgres', over the hour in which Berlin's clocks are put forward."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest

from agentflow import schema
from agentflow.prove.ports import free_port
from agentflow.schedules.when import When
from tests import postgres15
from tests.calendar_support import jobs_of, made, ticks_of
from tests.processes import eventually, started

SPEED = 60
START = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
END = START + timedelta(hours=1)

#: As `python -m scheduler`, looking as often in a second of Postgres' as else in one of the machine's.
PROGRAM = f"""
import sys
from scheduler import __main__, calendar, schedule
schedule.LOOK_EVERY_S /= {SPEED}
calendar.ASK_EVERY_S /= {SPEED}
sys.exit(__main__.main())
"""


@pytest.mark.long
def test_two_schedulers_through_an_hour_at_sixty_times_the_speed_make_each_tick_once(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    with postgres15.cluster() as postgres:
        # Timeouts that Postgres keeps by its clock come sixty times sooner, too.
        postgres.make("authentication_timeout = 600s", "timezone = UTC", "autovacuum = off")
        with monkeypatch.context() as fast:
            fast.setenv("LD_PRELOAD", str(library))
            fast.setenv("FAKETIME", f"@{START:%Y-%m-%d %H:%M:%S} x{SPEED}")
            fast.setenv("TZ", "UTC")
            postgres.run("pg_ctl", "-D", postgres.data, "-W", "-l", postgres.folder / "log", "start")
        with psycopg.connect(_reachable(postgres), autocommit=True) as conn:
            schema.migrate(conn)
            every = made(conn, When(every_s=300), name="every five minutes")
            tens = made(conn, When(cron="*/10 * * * *"), name="each ten minutes")
            night = made(conn, When(cron="30 2 * * *", time_zone="Europe/Berlin"), name="in the hour that is left out")
            _run(environment, postgres, tmp_path, conn)
            ended = _now(conn)

            assert ended >= END
            for schedule, first, seconds in ((every, every.next_at, 300), (tens, tens.next_at, 600)):
                assert first is not None
                ticks = [row for row in ticks_of(conn, "user") if row[0] == str(schedule.id)]
                covered = [row[1] + timedelta(seconds=seconds) * n for row in ticks for n in range(1 + row[3])]
                assert covered == [first + timedelta(seconds=seconds) * n for n in range(len(covered))]
                assert covered[-1] <= ended and covered[-1] >= END - timedelta(seconds=seconds)
                assert sorted(jobs_of(conn, schedule.id)) == sorted(row[4] for row in ticks)
            (at_night,) = [row for row in ticks_of(conn, "user") if row[0] == str(night.id)]
            assert at_night[1] == datetime(2026, 3, 29, 1, tzinfo=UTC)  # 03:00 there: 02:30 does not exist
            assert jobs_of(conn, night.id) == [at_night[4]]

            grid = [row[1] for row in ticks_of(conn, "clean_up.failed")]
            assert len(grid) >= 5 and grid[-1] >= END - timedelta(minutes=10)
            assert {later - tick for tick, later in pairwise(grid)} == {timedelta(minutes=10)}
            logs = "".join((tmp_path / f"{name}.log").read_text() for name in ("one", "two", "three"))
            ran = sum("schedule ran" in line and "clean_up.failed" in line for line in logs.splitlines())
            assert len(grid) - 1 <= ran <= len(grid)  # one was killed, maybe in the middle


def _run(environment: dict[str, str], postgres: postgres15.Cluster, logs: Path, conn: psycopg.Connection) -> None:
    """Until the hour is over: two at any time, of which one is killed half-way and replaced."""
    program = [sys.executable, "-c", PROGRAM]

    def scheduler(name: str) -> object:
        given = {**environment, "DATABASE_URL": postgres.by_socket, "PORT": str(free_port())}
        return started(program, given, logs / f"{name}.log")

    with scheduler("one") as one, scheduler("two"):  # type: ignore[attr-defined]
        eventually(lambda: _now(conn) > START + timedelta(minutes=30), within_s=120)
        one.kill()
        with scheduler("three"):  # type: ignore[attr-defined]
            eventually(lambda: _now(conn) > END, within_s=120)


def _now(conn: psycopg.Connection) -> datetime:
    row = conn.execute("select clock_timestamp()").fetchone()
    assert row is not None
    found: datetime = row[0]
    return found


def _reachable(postgres: postgres15.Cluster) -> str:
    def reachable() -> bool:
        try:
            psycopg.connect(postgres.by_socket).close()
        except psycopg.OperationalError:
            return False
        return True

    eventually(reachable, within_s=60)
    return postgres.by_socket
