"""Failed jobs that nobody has dealt with, by what they died of: looked at, tried again, or laid aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from uuid import UUID

from psycopg import sql

from agentflow.database import Connection
from agentflow.jobs import records
from agentflow.jobs.model import JOB_COLUMNS, Job, Ring, job_from_row
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob

Action = Literal["retry", "discard"]

#: Beyond it a group's letters are not counted: "10 000 or more" says as much.
MOST_COUNTED: Final = 10_000
#: In one request, so that it ends in time; what is left is as it was.
MOST_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters of one organization that died of the same. `example` is the newest of them."""

    organization_id: int
    fingerprint: str
    count: int
    first_at: datetime
    last_at: datetime
    example: Job


@dataclass(frozen=True, slots=True)
class Which:
    """Some dead letters: of a fingerprint, a type, with words in their errors; failed before `until`."""

    fingerprint: str | None = None
    type: str | None = None
    error: str | None = None
    until: datetime | None = None
    job_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Retried:
    """How many became jobs, which could not be and why, and who is to be rung after the commit."""

    done: int
    refused: dict[UUID, str]
    rings: list[Ring]


def groups(conn: Connection, organization_id: int | None, *, limit: int = 100) -> list[Group]:
    """The one that struck last first. Found by steps along the index, not by reading all dead letters."""
    rows = conn.execute(_GROUPS, {"organization": organization_id, "limit": limit, "most": MOST_COUNTED}).fetchall()
    return [Group(row[0], row[1], row[2], row[3], row[4], job_from_row(row[5:])) for row in rows]


_KEY: Final = "j.organization_id, agentflow.fingerprint_1(j.type, j.error)"
_DEAD: Final = "j.state = 'failed' and j.dealt_with is null"
_GROUPS: Final = f"""
with recursive kinds as (
    (select j.organization_id, agentflow.fingerprint_1(j.type, j.error) as fingerprint from agentflow.jobs j
        where {_DEAD} and (%(organization)s::bigint is null or j.organization_id = %(organization)s)
        order by {_KEY} limit 1)
    union all
    select n.* from kinds k cross join lateral (
        select j.organization_id, agentflow.fingerprint_1(j.type, j.error) from agentflow.jobs j
        where {_DEAD} and ({_KEY}) > (k.organization_id, k.fingerprint)
            and (%(organization)s::bigint is null or j.organization_id = %(organization)s)
        order by {_KEY} limit 1
    ) n
), found as (
    select k.organization_id, k.fingerprint, f.finished_at as first_at, l.finished_at as last_at, l.id
    from kinds k cross join lateral (
        select j.finished_at from agentflow.jobs j where {_DEAD} and j.organization_id = k.organization_id
        and agentflow.fingerprint_1(j.type, j.error) = k.fingerprint order by j.finished_at, j.id limit 1
    ) f cross join lateral (
        select j.finished_at, j.id from agentflow.jobs j where {_DEAD} and j.organization_id = k.organization_id
        and agentflow.fingerprint_1(j.type, j.error) = k.fingerprint order by j.finished_at desc, j.id desc limit 1
    ) l order by l.finished_at desc limit %(limit)s
)
select g.organization_id, g.fingerprint, c.n, g.first_at, g.last_at, {JOB_COLUMNS}
from found g join agentflow.jobs j on j.id = g.id cross join lateral (
    select count(*) as n from (select from agentflow.jobs d where d.state = 'failed' and d.dealt_with is null
        and d.organization_id = g.organization_id and agentflow.fingerprint_1(d.type, d.error) = g.fingerprint limit %(most)s) x
) c order by g.last_at desc
"""  # noqa: S608 - only constants are put in


def find(
    conn: Connection,
    organization_id: int | None,
    which: Which,
    *,
    limit: int = MOST_AT_ONCE,
    newest: bool = False,
    to_deal_with: bool = False,
) -> list[Job]:
    """The oldest first, or the `newest`. `to_deal_with`: locked, without those that somebody else is dealing with."""
    where, values = _where(organization_id, which)
    query = sql.SQL("select {} from agentflow.jobs j where {} order by {} limit %(limit)s {}").format(
        sql.SQL(JOB_COLUMNS),
        where,
        sql.SQL("j.finished_at desc, j.id desc" if newest else "j.finished_at, j.id"),
        sql.SQL("for update skip locked" if to_deal_with else ""),
    )
    return [job_from_row(row) for row in conn.execute(query, {**values, "limit": limit}).fetchall()]


def count(conn: Connection, organization_id: int | None, which: Which = Which()) -> int:
    """At most MOST_COUNTED."""
    where, values = _where(organization_id, which)
    row = conn.execute(
        sql.SQL("select count(*) from (select from agentflow.jobs j where {} limit %(limit)s) x").format(where),
        {**values, "limit": MOST_COUNTED},
    ).fetchone()
    return int(row[0]) if row else 0


def _where(organization_id: int | None, which: Which) -> tuple[sql.Composable, dict[str, Any]]:
    clauses = [_DEAD, "(%(organization)s::bigint is null or j.organization_id = %(organization)s)"]
    if which.fingerprint is not None:
        clauses.append("agentflow.fingerprint_1(j.type, j.error) = %(fingerprint)s")
    if which.type is not None:
        clauses.append("j.type = %(type)s")
    if which.error is not None:
        clauses.append(f"j.error is not null and {records.ERROR_WORDS} @@ websearch_to_tsquery('simple', %(error)s)")
    if which.until is not None:
        clauses.append("j.finished_at <= %(until)s")
    if which.job_id is not None:
        clauses.append("j.id = %(job)s")
    values = {
        "organization": organization_id,
        "fingerprint": which.fingerprint,
        "type": which.type,
        "error": which.error,
        "until": which.until,
        "job": which.job_id,
    }
    return sql.SQL(" and ".join(clauses)), values


def retry(
    conn: Connection, jobs: Sequence[Job], *, now: datetime, per_s: float | None, max_payload_bytes: int
) -> Retried:
    """Each as a new job, `per_s` of them a second (None: all at once): the later ones are due later."""
    rings: list[Ring] = []
    refused: dict[UUID, str] = {}
    done = 0
    for job in jobs:
        run_at = now + timedelta(seconds=done / per_s) if per_s else None
        try:
            with conn.transaction():
                rings += records.retry(conn, job, max_payload_bytes=max_payload_bytes, run_at=run_at).rings
        except (InvalidJob, UnknownType, records.NotRetryable) as error:
            refused[job.id] = str(error)
            continue
        done += 1
    return Retried(done, refused, rings)


def discard(conn: Connection, organization_id: int, ids: Sequence[UUID]) -> int:
    """Lay them aside: they are dead letters no longer, and stay until retention takes them. Returns how many."""
    return conn.execute(
        "update agentflow.jobs j set dealt_with = 'discarded' where j.id = any (%(ids)s) and j.organization_id = %(organization)s"
        " and j.state || '' = 'failed' and j.dealt_with is null",
        {"ids": list(ids), "organization": organization_id},
    ).rowcount
