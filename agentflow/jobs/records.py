"""Looking at jobs, cancelling them, and trying a dead letter again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg import sql

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs.intake import Submitted, submit
from agentflow.jobs.model import JOB_COLUMNS, Attempt, Job, Ring, State, job_from_row
from agentflow.jobs.requests import InvalidJob, NewJob, Prepared, prepare
from agentflow.jobs.statistics import id_floor

#: Sees every organization's rows (the operator's key).
EVERY_ORGANIZATION = None
#: As the index over them has it.
ERROR_WORDS: Final = (
    "to_tsvector('simple', coalesce(j.error ->> 'code', '') || ' ' || left(coalesce(j.error ->> 'message', ''), 4000))"
)
#: Of the newest errors so many are read for words before the index of words is asked.
_NEWEST_ERRORS: Final = 1000
#: A page of a hundred results of 4 MB each would be the end of a small instance.
_LISTED: Final = JOB_COLUMNS.replace("j.payload", "'{}'::jsonb").replace("j.result", "null::jsonb")


def get(conn: Connection, organization_id: int | None, job_id: UUID) -> Job | None:
    row = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.jobs j where j.id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)",
        {"id": job_id, "organization": organization_id},
    ).fetchone()
    return job_from_row(row) if row else None


def count_open(conn: Connection) -> int:
    """How many jobs are queued or running, of all organizations."""
    row = conn.execute("select count(*) from agentflow.jobs where state in ('queued', 'running')").fetchone()
    return int(row[0]) if row else 0


@dataclass(frozen=True, slots=True)
class Filter:
    state: State | None = None
    type: str | None = None
    correlation_id: str | None = None
    batch_id: UUID | None = None
    parent_id: UUID | None = None
    retry_of: UUID | None = None
    queue: str | None = None
    #: Words of the error, as a search engine takes them: "a phrase", or, -without.
    error: str | None = None
    #: By the moment that the id was made at, which of `then` jobs is that of their chain.
    since: datetime | None = None
    until: datetime | None = None


def search(
    conn: Connection, organization_id: int | None, wanted: Filter, *, before: UUID | None = None, limit: int = 50
) -> list[Job]:
    """Jobs without payload and result, the newest first by id; `before` is the last id of the page before.

    Good for browsing, not for "what is new".
    """
    clauses: list[sql.Composable] = [sql.SQL("true")]
    values: dict[str, Any] = {"limit": limit, "before": before, "organization": organization_id}
    if organization_id is not None:
        clauses.append(sql.SQL("j.organization_id = %(organization)s"))
    if before is not None:
        clauses.append(sql.SQL("j.id < %(before)s"))
    for name in ("state", "type", "correlation_id", "batch_id", "parent_id", "retry_of", "queue"):
        if (value := getattr(wanted, name)) is not None:
            clauses.append(sql.SQL("j.{} = {}").format(sql.Identifier(name), sql.Placeholder(name)))
            values[name] = value
    for name, comparison in (("since", ">="), ("until", "<")):
        if (moment := getattr(wanted, name)) is not None:
            clauses.append(sql.SQL(f"j.id {comparison} %({name})s"))
            values[name] = id_floor(moment.timestamp())
    if wanted.error is not None:
        return _search_words(conn, clauses, values, wanted.error, limit)
    return _found(conn, sql.SQL("agentflow.jobs"), clauses, values)


def _search_words(
    conn: Connection, clauses: list[sql.Composable], values: dict[str, Any], words: str, limit: int
) -> list[Job]:
    """Words that very many errors share fill a page from the newest ones; all others are few, and found by the words' index."""
    clauses.append(sql.SQL("j.error is not null"))
    these_words = sql.SQL(f"{ERROR_WORDS} @@ websearch_to_tsquery('simple', %(error)s)")
    values |= {"error": words, "newest": _NEWEST_ERRORS}
    newest = sql.SQL("(select * from agentflow.jobs j where {} order by j.id desc limit %(newest)s)")
    found = _found(conn, newest.format(sql.SQL(" and ").join(clauses)), [these_words], values)
    if len(found) == limit:
        return found
    return _found(conn, sql.SQL("agentflow.jobs"), [*clauses, these_words], values)


def _found(conn: Connection, among: sql.Composable, clauses: list[sql.Composable], values: dict[str, Any]) -> list[Job]:
    query = sql.SQL("select {} from {} j where {} order by j.id desc limit %(limit)s").format(
        sql.SQL(_LISTED), among, sql.SQL(" and ").join(clauses)
    )
    return [job_from_row(row) for row in conn.execute(query, values).fetchall()]


def arguments(
    conn: Connection, organization_id: int | None, ids: list[UUID], names: Sequence[str]
) -> dict[UUID, dict[str, Any]]:
    """Of listed jobs, these fields of their payloads."""
    rows = conn.execute(
        "select j.id, (select jsonb_object_agg(f.key, f.value) from jsonb_each(j.payload) f where f.key = any (%(names)s))"
        " from agentflow.jobs j where j.id = any (%(ids)s)"
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)",
        {"ids": ids, "organization": organization_id, "names": list(names)},
    ).fetchall()
    return {row[0]: row[1] or {} for row in rows}


def attempts(conn: Connection, job_id: UUID, organization_id: int | None = EVERY_ORGANIZATION) -> list[Attempt]:
    """The ended attempts of a job, the first one first."""
    rows = conn.execute(
        "select a.fence, a.attempt, a.worker, a.started_at, a.ended_at, a.outcome, a.error, a.usage from agentflow.job_attempts a"
        " join agentflow.jobs j on j.id = a.job_id where j.id = %(id)s"
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s) order by a.fence",
        {"id": job_id, "organization": organization_id},
    ).fetchall()
    return [Attempt(*row) for row in rows]


def children(conn: Connection, job_id: UUID, organization_id: int | None = EVERY_ORGANIZATION) -> list[Job]:
    rows = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.jobs j where j.parent_id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s) order by j.id",
        {"id": job_id, "organization": organization_id},
    ).fetchall()
    return [job_from_row(row) for row in rows]


def newest(
    conn: Connection, organization_id: int, type_: str, payload: dict[str, Any], states: tuple[State, ...]
) -> Job | None:
    """The newest job of this type in one of these states with this in its payload, if one is still kept."""
    row = conn.execute(
        f"select {JOB_COLUMNS} from agentflow.jobs j where j.organization_id = %s and j.type = %s"  # noqa: S608 - constants
        " and j.state || '' = any (%s) and j.payload @> %s::jsonb order by j.created_at desc limit 1",
        (organization_id, type_, list(states), json.dumps(payload)),
    ).fetchone()
    return job_from_row(row) if row else None


def older(conn: Connection, job: Job, *, most: int = 1000) -> int:
    """How many jobs of its type and organization, parked ones too, have waited longer than this one; `most` at the most."""
    row = conn.execute(
        "select count(*) from (select from agentflow.jobs where organization_id = %s and queue = %s and state = 'queued'"
        " and type = %s and id < %s limit %s) x",
        (job.organization_id, job.queue, job.type, job.id, most),
    ).fetchone()
    return int(row[0]) if row else 0


def by_ids(conn: Connection, organization_id: int | None, ids: Sequence[UUID]) -> list[Job]:
    """Those of these jobs that are there, without payload and result."""
    rows = conn.execute(
        f"select {_LISTED} from agentflow.jobs j where j.id = any (%(ids)s)"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)",
        {"ids": list(ids), "organization": organization_id},
    ).fetchall()
    return [job_from_row(row) for row in rows]


def line(conn: Connection, organization_id: int | None, keys: Sequence[str], *, limit: int) -> list[Job]:
    """Jobs that are queued under these concurrency keys, in the order in which they get its slots; without their results."""
    rows = conn.execute(
        "select j.* from unnest(%(keys)s::text[]) k(key) cross join lateral ("  # noqa: S608 - constants
        f" select {JOB_COLUMNS.replace('j.result', 'null::jsonb')} from agentflow.jobs j"
        " where j.concurrency_key = k.key and j.state = 'queued'"
        # By `is true`, or it would be looked for among all that the organization ever had, and not along the line.
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s) is true"
        " order by j.run_at, j.id limit %(limit)s) j order by j.run_at, j.id limit %(limit)s",
        {"keys": list(keys), "organization": organization_id, "limit": limit},
    ).fetchall()
    return [job_from_row(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Link:
    """A job of a chain, `depth` steps behind its first; `job` is None as long as the one before it has not succeeded."""

    id: UUID
    type: str
    job: Job | None
    depth: int = 0


def chains(conn: Connection, organization_id: int | None, first: list[UUID]) -> dict[UUID, list[Link]]:
    """By the id of its first job, each chain with all its `then` jobs, in their order. Those that were cleaned up are missing."""
    planned: dict[UUID, list[tuple[UUID, str, int]]] = {}
    for id_, type_, then in conn.execute(
        "select j.id, j.type, j.then_jobs from agentflow.jobs j where j.id = any (%(ids)s)"
        " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)",
        {"ids": first, "organization": organization_id},
    ).fetchall():
        planned[id_] = [(id_, type_, 0), *_planned(then)]
    ids = [id_ for links in planned.values() for id_, _, _ in links]
    jobs = {job.id: job for job in by_ids(conn, organization_id, ids)}
    return {
        id_: [Link(each, type_, jobs.get(each), depth) for each, type_, depth in links]
        for id_, links in planned.items()
    }


def _planned(then: list[dict[str, Any]] | None, depth: int = 1) -> list[tuple[UUID, str, int]]:
    found: list[tuple[UUID, str, int]] = []
    for child in then or ():
        found += [(UUID(child["id"]), child["type"], depth), *_planned(child.get("then"), depth + 1)]
    return found


def first_of_chain(conn: Connection, job: Job, *, most: int = 50) -> UUID:
    """The id of the job whose `then` jobs this one is among, or its own. At most so many steps back are looked at."""
    row = conn.execute(
        "with recursive before as (select j.id, j.parent_id, 1 as n from agentflow.jobs j"
        " where j.id = %(id)s and j.organization_id = %(organization)s"
        " union all select p.id, p.parent_id, b.n + 1 from before b join agentflow.jobs p on p.id = b.parent_id"
        " where p.organization_id = %(organization)s and p.then_jobs is not null and b.n < %(most)s)"
        " select id from before order by n desc limit 1",
        {"id": job.id, "organization": job.organization_id, "most": most},
    ).fetchone()
    return row[0] if row else job.id


def run_now(conn: Connection, organization_id: int, job_id: UUID) -> Ring | None:
    """Let a queued job that waits for a time go first thing. None: it does not wait for one. Pauses, caps and keys hold it as
    before."""
    row = conn.execute(
        "update agentflow.jobs j set run_at = clock_timestamp(), wake_at = clock_timestamp(), sent_at = null, sends = 0,"
        " wait_reason = null where j.id = %(id)s and j.organization_id = %(organization)s and j.state || '' = 'queued'"
        " and j.run_at > clock_timestamp() returning j.id, j.queue, j.type, j.priority",
        {"id": job_id, "organization": organization_id},
    ).fetchone()
    return Ring(*row) if row else None


def cancel(conn: Connection, organization_id: int, job_id: UUID) -> tuple[State | None, list[UUID]]:
    """Cancel a queued job, ask for the end of a running one. Returns its state now (None: no such job) and ids to ring."""
    row = conn.execute("select * from agentflow.cancel_1(%s, %s)", (organization_id, job_id)).fetchone()
    return (row[0], row[1] or []) if row else (None, [])


def rings_for(conn: Connection, ids: list[UUID]) -> list[Ring]:
    """Of ids that a transition answered; the next in line of a key may be another organization's job."""
    if not ids:
        return []
    rows = conn.execute("select id, queue, type, priority from agentflow.jobs where id = any (%s)", (ids,)).fetchall()
    return [Ring(*row) for row in rows]


class NotRetryable(Exception):
    """Only a job that failed or was cancelled can be tried again."""


def retry(conn: Connection, job: Job, *, max_payload_bytes: int, run_at: datetime | None = None) -> Submitted:
    """Submit a dead letter's work as a new job that points to it; the old row stays and is one no longer. Raises NotRetryable."""
    if job.state not in ("failed", "cancelled"):
        raise NotRetryable(f"job {job.id} is {job.state}; only a failed or cancelled job can be retried")
    new = NewJob(
        type=job.type,
        payload=job.payload,
        priority=job.priority,
        head_start_s=job.head_start_s,
        max_attempts=job.max_attempts,
        time_limit_s=job.time_limit_s,
        correlation_id=job.correlation_id,
        callback_url=job.callback_url,
        retry_of=job.id,
        run_at=run_at,
    )
    prepared = prepare(new, organization_id=job.organization_id, max_payload_bytes=max_payload_bytes, public_only=False)
    submitted = submit(conn, job.organization_id, _with_the_rest(conn, job, prepared))
    conn.execute(
        "update agentflow.jobs j set dealt_with = 'retried' where j.id = %s and j.organization_id = %s"
        " and j.state || '' = 'failed'",
        (job.id, job.organization_id),
    )
    return submitted


def _with_the_rest(conn: Connection, job: Job, prepared: Prepared) -> Prepared:
    """The key and the `then` jobs of the old row, the latter with new ids."""
    row = conn.execute(
        "select j.then_jobs, k.key, k.slots from agentflow.jobs j"
        " left join agentflow.concurrency_keys k on k.key = j.concurrency_key where j.id = %s and j.organization_id = %s",
        (job.id, job.organization_id),
    ).fetchone()
    if row is None:
        raise InvalidJob("id", "the job was cleaned up meanwhile")

    def renew(children: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**c, "id": str(new_id()), "then": renew(c["then"]) if c.get("then") else None} for c in children]

    return dataclasses.replace(
        prepared,
        then_jobs=json.dumps(renew(row[0])) if row[0] else None,
        concurrency=(row[1], row[2]) if row[1] else None,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    id: UUID
    total: int
    succeeded: int
    failed: int
    cancelled: int
    created_at: datetime
    finished_at: datetime | None
    callback_url: str | None


def get_batch(conn: Connection, organization_id: int | None, batch_id: UUID) -> Batch | None:
    row = conn.execute(
        "select id, total, succeeded, failed, cancelled, created_at, finished_at, callback_url"
        " from agentflow.batches where id = %(id)s"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)",
        {"id": batch_id, "organization": organization_id},
    ).fetchone()
    return Batch(*row) if row else None
