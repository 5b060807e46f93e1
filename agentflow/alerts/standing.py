"""Which alerts are up, in Postgres, so that a scheduler that starts anew goes on where the last one was.

One scheduler at a time watches, by a lease; it tells first and writes down then who was told, so that a message may come twice
after a crash, and none is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection

Status = Literal["pending", "firing", "resolved"]


@dataclass(frozen=True, slots=True)
class Found:
    """A condition that is true now."""

    name: str
    subject: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Standing:
    """`told`: the receivers that know of it."""

    name: str
    subject: Mapping[str, str]
    value: float
    since: datetime
    fired_at: datetime | None
    ended_at: datetime | None
    told: frozenset[str]

    @property
    def status(self) -> Status:
        return "resolved" if self.ended_at is not None else "firing" if self.fired_at is not None else "pending"


def hold(conn: Connection, holder: UUID, for_s: float) -> bool:
    """Become or stay the one that watches, for so long. False: another one does."""
    row = conn.execute(
        "insert into agentflow.alert_watch as w (holder, until)"
        " values (%(holder)s, clock_timestamp() + make_interval(secs => %(s)s))"
        " on conflict (one) do update set holder = excluded.holder, until = excluded.until"
        " where w.holder = excluded.holder or w.until < clock_timestamp() returning 1",
        {"holder": holder, "s": for_s},
    ).fetchone()
    return row is not None


def let_go(conn: Connection, holder: UUID) -> None:
    conn.execute("delete from agentflow.alert_watch where holder = %s", (holder,))


def note(conn: Connection, found: Collection[Found], for_s: Mapping[str, float]) -> list[Standing]:
    """Write down what is so now and what is so no more. Returns all that stand. `for_s`: after how long each fires, by name."""
    with conn.transaction():
        _forget_what_is_over(conn)
        conn.execute(
            "with now_ as materialized (select * from unnest(%(names)s::text[], %(subjects)s::jsonb[], %(values)s::float8[])"
            " n(name, subject, value)), ended as (update agentflow.alerts a set ended_at = clock_timestamp()"
            " where ended_at is null and not exists (select from now_ n where n.name = a.name and n.subject = a.subject))"
            " insert into agentflow.alerts as a (name, subject, value) select name, subject, value from now_"
            " on conflict (name, subject) do update set value = excluded.value, ended_at = null",
            {
                "names": [each.name for each in found],
                "subjects": [Jsonb(dict(each.subject)) for each in found],
                "values": [float(each.value) for each in found],  # gauges are whole numbers, too
            },
        )
        conn.execute(
            "update agentflow.alerts a set fired_at = clock_timestamp() from unnest(%s::text[], %s::float8[]) f(name, for_s)"
            " where a.name = f.name and fired_at is null and ended_at is null"
            " and since <= clock_timestamp() - make_interval(secs => f.for_s)",
            (list(for_s), list(for_s.values())),
        )
        _forget_what_is_over(conn)
    return every(conn)


def _forget_what_is_over(conn: Connection) -> None:
    conn.execute("delete from agentflow.alerts where ended_at is not null and cardinality(told) = 0")


def every(conn: Connection) -> list[Standing]:
    """The oldest first."""
    rows = conn.execute(
        "select name, subject, value, since, fired_at, ended_at, told from agentflow.alerts order by since, name, subject"
    ).fetchall()
    return [_from_row(row) for row in rows]


def _from_row(row: tuple[Any, ...]) -> Standing:
    name, subject, value, since, fired_at, ended_at, told = row
    return Standing(name, subject, value, since, fired_at, ended_at, frozenset(told))


def was_told(conn: Connection, receiver: str, told: Collection[Standing]) -> None:
    """This receiver knows now how these stand."""
    conn.execute(
        "update agentflow.alerts a set told = case when k.ended then array_remove(told, %(receiver)s)"
        " else array_append(array_remove(told, %(receiver)s), %(receiver)s) end"
        " from unnest(%(names)s::text[], %(subjects)s::jsonb[], %(ended)s::boolean[]) k(name, subject, ended)"
        " where a.name = k.name and a.subject = k.subject",
        {
            "receiver": receiver,
            "names": [each.name for each in told],
            "subjects": [Jsonb(dict(each.subject)) for each in told],
            "ended": [each.status == "resolved" for each in told],
        },
    )


def forget_receivers(conn: Connection, known: Collection[str]) -> None:
    """Of receivers that are no longer set: what only they knew of is over without a word."""
    conn.execute(
        "update agentflow.alerts set told = array(select t from unnest(told) t where t = any (%(known)s))"
        " where not told <@ %(known)s::text[]",
        {"known": list(known)},
    )
