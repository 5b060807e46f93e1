"""Schedules that organizations make: what to do, and when. A row says when it ticks next; who fires it moves that on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from psycopg import errors
from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.schedules import ticks
from agentflow.schedules.when import When

_COLUMNS: Final = (
    "id, organization_id, name, cron, every_s, once_at, time_zone, type, payload, jitter_s, enabled, starts_at, next_at,"
    " created_at"
)


class NameTaken(Exception):
    """The organization has a schedule of this name."""


class TooMany(Exception):
    """The organization has as many schedules as it may have."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One row. `next_at` is None while it is paused, and when nothing is to come."""

    id: UUID
    organization_id: int
    name: str
    cron: str | None
    every_s: int | None
    once_at: datetime | None
    time_zone: str
    type: str
    payload: dict[str, Any]
    jitter_s: int
    enabled: bool
    starts_at: datetime
    next_at: datetime | None
    created_at: datetime

    @property
    def when(self) -> When:
        return When(self.cron, self.every_s, self.once_at, self.time_zone, self.starts_at)

    @property
    def said(self) -> str:
        """When it ticks, in a few words for people."""
        if self.cron is not None:
            return f"{self.cron} ({self.time_zone})"
        return f"every {self.every_s} s" if self.every_s is not None else f"once, {self.once_at:%Y-%m-%d %H:%M:%S %Z}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an organization asks for; checked by its caller."""

    name: str
    when: When
    type: str
    payload: dict[str, Any]
    jitter_s: int = 0
    enabled: bool = True


def now(conn: Connection) -> datetime:
    """By the database's clock, which all processes share."""
    row = conn.execute("select clock_timestamp()").fetchone()
    assert row is not None  # noqa: S101 - a select of one row
    moment: datetime = row[0]
    return moment


def create(conn: Connection, organization_id: int, wanted: Wanted, *, most: int) -> Schedule:
    """Raises NameTaken; TooMany when the organization has `most` already."""
    # Two requests at once are counted one after the other.
    conn.execute("select from agentflow.organizations where id = %s for no key update", (organization_id,))
    row = conn.execute(
        "select count(*) from agentflow.schedules where organization_id = %s", (organization_id,)
    ).fetchone()
    if row is not None and row[0] >= most:
        raise TooMany(f"there are {row[0]} schedules already, and at most {most} (SCHEDULES_MOST) are allowed")
    return _written(
        conn,
        f"insert into agentflow.schedules as s (id, organization_id, {_WRITTEN}) values (%(id)s, %(organization)s,"  # noqa: S608
        f" {_VALUES}) returning {_COLUMNS}",
        new_id(),
        organization_id,
        *_from_now(conn, wanted),
    )


def update(conn: Connection, schedule: Schedule, wanted: Wanted) -> Schedule:
    """Put other wishes in the place of a schedule's. One that ticks at other times now, or again, begins anew: nothing that it
    missed is made up for. Raises NameTaken."""
    same = replace(wanted.when, starts_at=schedule.starts_at)
    goes_on = same == schedule.when and wanted.enabled == schedule.enabled
    return _written(
        conn,
        f"update agentflow.schedules s set ({_WRITTEN}) = ({_VALUES})"  # noqa: S608 - constants
        f" where id = %(id)s and organization_id = %(organization)s returning {_COLUMNS}",
        schedule.id,
        schedule.organization_id,
        *((replace(wanted, when=same), schedule.next_at) if goes_on else _from_now(conn, wanted)),
    )


def _from_now(conn: Connection, wanted: Wanted) -> tuple[Wanted, datetime | None]:
    moment = now(conn)
    when = replace(wanted.when, starts_at=moment)
    return replace(wanted, when=when), when.after(moment) if wanted.enabled else None


_WRITTEN: Final = (
    "name, cron, every_s, once_at, time_zone, type, payload, jitter_s, enabled, starts_at, next_at, wake_at"
)
_VALUES: Final = (
    "%(name)s, %(cron)s, %(every)s, %(once)s, %(zone)s, %(type)s, %(payload)s, %(jitter)s, %(enabled)s, %(starts)s,"
    " %(next)s, %(wake)s"
)


def _written(
    conn: Connection, statement: str, id: UUID, organization_id: int, wanted: Wanted, next_at: datetime | None
) -> Schedule:
    when = wanted.when
    try:
        with conn.transaction():
            row = conn.execute(
                statement.encode(),
                {
                    "id": id,
                    "organization": organization_id,
                    "name": wanted.name,
                    "cron": when.cron,
                    "every": when.every_s,
                    "once": when.once_at,
                    "zone": when.time_zone,
                    "type": wanted.type,
                    "payload": Jsonb(wanted.payload),
                    "jitter": wanted.jitter_s,
                    "enabled": wanted.enabled,
                    "starts": when.starts_at,
                    "next": next_at,
                    "wake": _jittered(next_at, wanted.jitter_s),
                },
            ).fetchone()
    except errors.UniqueViolation:
        raise NameTaken(f"there is a schedule {wanted.name!r} already") from None
    assert row is not None  # noqa: S101 - the row is held by the caller's transaction
    return Schedule(*row)


def get(conn: Connection, organization_id: int | None, schedule_id: UUID, *, hold: bool = False) -> Schedule | None:
    """None where there is no such schedule, or it is another organization's (None sees all).

    `hold`: nobody changes it until the transaction ends.
    """
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.schedules where id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)"
        + (" for update" if hold else ""),
        {"id": schedule_id, "organization": organization_id},
    ).fetchone()
    return Schedule(*row) if row else None


def named(conn: Connection, organization_id: int, name: str) -> Schedule | None:
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.schedules where organization_id = %s and name = %s",  # noqa: S608 - constants
        (organization_id, name),
    ).fetchone()
    return Schedule(*row) if row else None


def search(
    conn: Connection, organization_id: int | None, *, before: UUID | None = None, limit: int = 1000
) -> list[Schedule]:
    """The newest first; of one organization, or (None) of all."""
    rows = conn.execute(
        f"select {_COLUMNS} from agentflow.schedules"  # noqa: S608 - constants
        " where (%(organization)s::bigint is null or organization_id = %(organization)s)"
        " and (%(before)s::uuid is null or id < %(before)s) order by id desc limit %(limit)s",
        {"organization": organization_id, "before": before, "limit": limit},
    ).fetchall()
    return [Schedule(*row) for row in rows]


def delete(conn: Connection, organization_id: int, schedule_id: UUID) -> bool:
    """With its history; jobs that it made stay. False: there is no such schedule."""
    deleted = conn.execute(
        "delete from agentflow.schedules where id = %s and organization_id = %s", (schedule_id, organization_id)
    ).rowcount
    ticks.forget(conn, organization_id, schedule_id)
    return deleted > 0


def any_due(conn: Connection) -> bool:
    row = conn.execute("select exists (select from agentflow.schedules where wake_at <= clock_timestamp())").fetchone()
    return bool(row and row[0])


def hold_due(conn: Connection) -> tuple[Schedule, datetime] | None:
    """A schedule that is due and that nobody else holds, held until the transaction ends, and the time; None: there is none."""
    row = conn.execute(
        f"select {_COLUMNS}, clock_timestamp() from agentflow.schedules where wake_at <= clock_timestamp()"  # noqa: S608
        " order by wake_at limit 1 for update skip locked"
    ).fetchone()
    return (Schedule(*row[:-1]), row[-1]) if row else None


def move_on(conn: Connection, schedule: Schedule, next_at: datetime | None) -> None:
    conn.execute(
        "update agentflow.schedules set next_at = %s, wake_at = %s where id = %s and organization_id = %s",
        (next_at, _jittered(next_at, schedule.jitter_s), schedule.id, schedule.organization_id),
    )


def _jittered(moment: datetime | None, jitter_s: int) -> datetime | None:
    return moment + timedelta(seconds=random.uniform(0, jitter_s)) if moment is not None else None
