"""Flights: all that one cause set off, which is to say the jobs of one trace (agentflow/traces.py).

Of what retention deletes a slim row stays in agentflow.flight_log. It is written by the statement that deletes (REMEMBER), so
intake, claim and finish pay nothing for it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.statistics import id_floor

Kind = Literal["job", "event"]

BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Leg:
    """A job or a webhook of a flight. `kept`: its own row is there still. Of a webhook `state` is its outcome or verdict."""

    id: UUID
    organization_id: int
    flight: UUID
    kind: Kind
    type: str | None
    state: str
    code: str | None
    attempts: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    parent_id: UUID | None
    retry_of: UUID | None
    event_id: UUID | None
    document_id: UUID | None
    video_id: UUID | None
    schedule_id: UUID | None
    endpoint_id: UUID | None
    kept: bool


_NAMES: Final = [name for name in Leg.__dataclass_fields__ if name != "kept"]
#: The trace of a row of agentflow.jobs, under the alias j, as an id.
FLIGHT_OF_JOB: Final = "coalesce(left(j.trace, 32)::uuid, j.id)"
#: What a leg is, of a row of agentflow.jobs under the alias j.
LEG_OF_JOB: Final = (
    f"j.id, j.organization_id, {FLIGHT_OF_JOB} as flight, 'job' as kind, j.type, j.state, j.error ->> 'code' as code,"
    " j.attempt as attempts, j.created_at, j.started_at, j.finished_at as ended_at, j.parent_id, j.retry_of,"
    " agentflow.named_id_1(j.payload, 'event_id') as event_id, agentflow.named_id_1(j.payload, 'document_id') as document_id,"
    " agentflow.named_id_1(j.payload, 'video_id') as video_id,"
    " case when starts_with(j.correlation_id, 'schedule:') then agentflow.as_uuid_1(substr(j.correlation_id, 10)) end"
    " as schedule_id, null::uuid as endpoint_id"
)
#: Keeps the legs in `gone`, a part of the same statement. Who sent what was refused nobody knows: it led to nothing.
REMEMBER: Final = (
    f"insert into agentflow.flight_log ({', '.join(_NAMES)}) select {', '.join(_NAMES)} from gone where state <> 'refused'"  # noqa: S608
    " on conflict (id) do nothing"
)


def get(conn: Connection, organization_id: int | None, id_: UUID) -> Leg | None:
    """The job, or what is remembered of a job or a webhook of this id."""
    found = _found(conn, organization_id, "j.id = %(id)s", "l.id = %(id)s", {"id": id_}, limit=2)
    return found[0] if found else None


def by_ids(conn: Connection, organization_id: int, ids: Collection[UUID], *, limit: int) -> list[Leg]:
    if not ids:
        return []
    return _found(
        conn, organization_id, "j.id = any (%(ids)s)", "l.id = any (%(ids)s)", {"ids": list(ids)}, limit=limit
    )


def of_flights(conn: Connection, organization_id: int, flights: Collection[UUID], *, limit: int) -> list[Leg]:
    """All legs of these flights, the first ones first; at most `limit`."""
    if not flights:
        return []
    values = {"flights": list(flights), "traces": [each.hex for each in flights]}
    begun = by_ids(conn, organization_id, flights, limit=limit)
    rest = _found(
        conn,
        organization_id,
        "j.trace is not null and left(j.trace, 32) = any (%(traces)s)",
        "l.flight = any (%(flights)s)",
        values,
        limit=limit,
    )
    return _once([*begun, *rest])[:limit]


def retries(conn: Connection, organization_id: int, ids: Collection[UUID], *, limit: int) -> list[Leg]:
    """The jobs that do the work of these once more."""
    if not ids:
        return []
    asked = "retry_of = any (%(ids)s)"
    return _found(conn, organization_id, f"j.{asked}", f"l.{asked}", {"ids": list(ids)}, limit=limit)


def on_video(conn: Connection, organization_id: int, video_id: UUID, *, limit: int) -> list[Leg]:
    """The jobs that worked on a video."""
    values = {"video": video_id, "text": str(video_id)}
    live = "j.payload ? 'video_id' and j.payload ->> 'video_id' = %(text)s"
    return _found(conn, organization_id, live, "l.video_id = %(video)s", values, limit=limit)


def files(conn: Connection, organization_id: int, ids: Collection[UUID], *, most: int) -> dict[UUID, list[str]]:
    """The storage keys that results of these jobs name, at most so many of each; not those of results beyond a megabyte."""
    rows = conn.execute(
        "select j.id, (select array_agg(f.key) from (select distinct k #>> '{}' as key from jsonb_path_query(j.result,"
        " 'strict $.**.key ? (@.type() == \"string\")', silent => true) k where starts_with(k #>> '{}', %(root)s)"
        " order by 1 limit %(most)s) f) from agentflow.jobs j where j.id = any (%(ids)s)"
        " and j.organization_id = %(organization)s and pg_column_size(j.result) < 1000000",
        {"ids": list(ids), "organization": organization_id, "root": f"o/{organization_id}/", "most": most},
    ).fetchall()
    return {row[0]: row[1] for row in rows if row[1]}


def delete_old(conn: Connection, *, days: float, limit: int = BATCH) -> int:
    """Legs of so long ago. Returns how many were deleted."""
    return conn.execute(
        "with old as materialized (select id from agentflow.flight_log where id < %s order by id limit %s"
        " for update skip locked) delete from agentflow.flight_log l using old where l.id = old.id",
        (id_floor(time.time() - days * 86_400), limit),
    ).rowcount


def _found(
    conn: Connection, organization_id: int | None, live: str, remembered: str, values: dict[str, Any], *, limit: int
) -> list[Leg]:
    """By a condition on j, the jobs, and one on l, the log; by id, which is to say by time."""
    whose = "(%(organization)s::bigint is null or {0}.organization_id = %(organization)s)"
    names = ", ".join(f"l.{name}" for name in _NAMES)
    rows = conn.execute(
        f"(select {LEG_OF_JOB}, true as kept from agentflow.jobs j where {live} and {whose.format('j')}"  # noqa: S608 - constants
        " order by j.id limit %(limit)s)"
        f" union all (select {names}, false from agentflow.flight_log l where {remembered} and {whose.format('l')}"
        " order by l.id limit %(limit)s)",
        {**values, "organization": organization_id, "limit": limit},
    ).fetchall()
    return _once(Leg(*row) for row in rows)[:limit]


def _once(legs: Iterable[Leg]) -> list[Leg]:
    """By id; of a leg that is both kept and remembered the row itself."""
    found: dict[UUID, Leg] = {}
    for leg in legs:
        if leg.id not in found or leg.kept:
            found[leg.id] = leg
    return [found[id_] for id_ in sorted(found)]
