"""When a schedule ticks: cron lines by a place's clocks, on days when those change too; intervals; single moments."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from agentflow.schedules.when import InvalidWhen, When

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 3, 27, 12, tzinfo=UTC)


def local(when: When, start: datetime, number: int) -> list[str]:
    """The next ticks by the clocks of the schedule's zone, with their distance from UTC in hours."""
    zone = ZoneInfo(when.time_zone)
    return [f"{tick.astimezone(zone):%d %H:%M %z}"[:-2] for tick in when.following(start, number)]


def test_a_fixed_hour_that_the_clocks_leave_out_ticks_once_at_the_next_moment() -> None:
    night = When(cron="30 2 * * *", time_zone="Europe/Berlin")

    assert local(night, NOW, 3) == ["28 02:30 +01", "29 03:00 +02", "30 02:30 +02"]


def test_a_fixed_hour_that_comes_twice_ticks_the_first_time_only() -> None:
    night = When(cron="30 2 * * *", time_zone="Europe/Berlin")

    assert local(night, datetime(2026, 10, 24, 12, tzinfo=UTC), 2) == ["25 02:30 +02", "26 02:30 +01"]
    in_the_second_of_the_two_hours = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)
    assert local(night, in_the_second_of_the_two_hours, 1) == ["26 02:30 +01"]


def test_two_fixed_minutes_in_the_hour_that_is_left_out_are_one_tick() -> None:
    night = When(cron="0,30 2 * * *", time_zone="Europe/Berlin")

    assert local(night, NOW + timedelta(days=1), 3) == ["29 03:00 +02", "30 02:00 +02", "30 02:30 +02"]


def test_a_line_for_every_hour_goes_by_time_that_passes() -> None:
    hourly = When(cron="15 * * * *", time_zone="Europe/Berlin")

    ticks = [
        *hourly.following(datetime(2026, 10, 24, 22, 59, tzinfo=UTC), 5),
        *hourly.following(datetime(2026, 3, 28, 23, 59, tzinfo=UTC), 5),
    ]

    assert {tick.minute for tick in ticks} == {15}
    assert {later - tick for tick, later in pairwise(ticks[:5])} == {timedelta(hours=1)}
    assert {later - tick for tick, later in pairwise(ticks[5:])} == {timedelta(hours=1)}


def test_a_line_means_the_clocks_of_its_place() -> None:
    assert When(cron="0 8 * * *").after(NOW) == datetime(2026, 3, 28, 8, tzinfo=UTC)
    assert When(cron="0 8 * * *", time_zone="America/New_York").after(NOW) == datetime(2026, 3, 28, 12, tzinfo=UTC)
    # By seven days, Monday is 1 and Sunday 0 or 7, as in any crontab.
    assert When(cron="0 0 * * 1").after(NOW) == datetime(2026, 3, 30, tzinfo=UTC)
    assert When(cron="0 0 * * 0").after(NOW) == When(cron="0 0 * * sun").after(NOW) == datetime(2026, 3, 29, tzinfo=UTC)


def test_an_interval_is_counted_from_its_start_and_does_not_drift() -> None:
    start = NOW + timedelta(microseconds=7)
    every = When(every_s=90, starts_at=start)

    assert every.after(start) == start + timedelta(seconds=90)
    assert every.after(start + timedelta(seconds=89.9)) == start + timedelta(seconds=90)
    assert every.after(start + timedelta(seconds=90)) == start + timedelta(seconds=180)
    assert every.after(start + timedelta(seconds=1000)) == start + timedelta(seconds=1080)
    assert every.after(start - timedelta(days=1)) == start + timedelta(seconds=90)


def test_once_is_once() -> None:
    once = When(once_at=NOW.astimezone(BERLIN))

    assert once.after(NOW - timedelta(seconds=1)) == NOW
    assert once.after(NOW) is None
    assert once.following(NOW - timedelta(days=1), 5) == [NOW]


def test_ticks_that_were_missed_are_counted() -> None:
    assert When(cron="0 * * * *").missed(NOW, NOW + timedelta(minutes=59)) == 0
    assert When(cron="0 * * * *").missed(NOW, NOW + timedelta(hours=5)) == 5
    assert When(cron="* * * * *").missed(NOW, NOW + timedelta(days=30), most=50) == 50
    assert When(every_s=60, starts_at=NOW).missed(NOW, NOW + timedelta(days=30)) == 43_200
    assert When(once_at=NOW).missed(NOW, NOW + timedelta(days=30)) == 0


@pytest.mark.parametrize(
    ("when", "field", "problem"),
    [
        (When(), "cron", "give one of"),
        (When(cron="* * * * *", every_s=60), "cron", "give one of"),
        (When(cron="* * * *"), "cron", "five fields"),
        (When(cron="* * * * * *"), "cron", "five fields"),
        (When(cron="61 * * * *"), "cron", "bad minute"),
        (When(cron="0 0 30 2 *"), "cron", "bad day-of-month"),
        (When(cron="1" * 300), "cron", "longer than"),
        (When(cron="* * * * *", time_zone="Mars/Olympus"), "time_zone", "name of a time zone"),
        (When(cron="* * * * *", time_zone="../../etc/passwd"), "time_zone", "name of a time zone"),
        (When(cron="* * * * *", time_zone="Europe"), "time_zone", "name of a time zone"),
        (When(every_s=59), "every_s", "at least 60"),
        (When(once_at=NOW), "at", "past"),
    ],
)
def test_what_is_no_time_is_refused_by_its_field(when: When, field: str, problem: str) -> None:
    with pytest.raises(InvalidWhen, match=problem) as refused:
        when.check(NOW, min_interval_s=60)

    assert refused.value.field == field


def test_a_line_may_not_tick_more_often_than_is_allowed() -> None:
    with pytest.raises(InvalidWhen, match="ticks after 60 s; at least 300 s"):
        When(cron="0,1 3 * * *").check(NOW, min_interval_s=300)

    When(cron="*/5 * * * *").check(NOW, min_interval_s=300)
    When(cron="0 0 29 2 *").check(NOW, min_interval_s=300)
