"""Prompts in Postgres: written before a server hears of them, so that whoever takes up a job knows what may run already.

A job has one live prompt at most, and a slot of a server one prompt (both unique indexes). Each change names the state that it
comes from: who acts on what he knew a while ago changes nothing. `ops/runbook.md` says what operators see of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.jobs.model import Job

State = Literal[
    "taken",
    "sending",
    "sent",
    "done",
    "collected",
    "failed",
    "interrupted",
    "timed_out",
    "cancelled",
    "gone",
    "lost",
    "unsent",
    "given_up",
]

_LIVE: Final = "('taken', 'sending', 'sent', 'done', 'collected')"
_COLUMNS: Final = (
    "r.prompt_id, r.organization_id, r.job_id, r.server, r.state, r.found,"
    " extract(epoch from clock_timestamp() - coalesce(r.sent_at, r.taken_at))::float8"
)


@dataclass(frozen=True, slots=True)
class Render:
    """`age_s`: since it was sent, or taken; `found` as history.Ended.as_json has it, where it is done; the job's result, where
    its files were collected."""

    prompt_id: UUID
    organization_id: int
    job_id: UUID
    server: str
    state: State
    found: dict[str, Any] | None
    age_s: float


def live(conn: Connection, job: Job) -> Render | None:
    """The prompt of this job that is not given up: one that was begun, or one that ended well, whose job has still to."""
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.renders r"  # noqa: S608 - constants
        f" where r.organization_id = %s and r.job_id = %s and r.state in {_LIVE}",
        (job.organization_id, job.id),
    ).fetchone()
    return Render(*row) if row else None


def move(
    conn: Connection,
    render: Render,
    state: State,
    *,
    come_from: Collection[State],
    problem: str | None = None,
    found: dict[str, Any] | None = None,
) -> bool:
    """Write the next state; False where it is not in one of those any more. Its slot is free once it is neither taken,
    sending nor sent."""
    return (
        conn.execute(
            "update agentflow.renders set state = %(state)s, problem = coalesce(%(problem)s, problem),"
            " found = coalesce(%(found)s, found),"
            " sent_at = case when %(state)s = 'sending' then clock_timestamp() else sent_at end,"
            " ended_at = case when %(state)s in ('sending', 'sent') then null else coalesce(ended_at, clock_timestamp()) end"
            " where organization_id = %(organization)s and prompt_id = %(id)s and state = any (%(come_from)s)",
            {
                "state": state,
                "problem": problem,
                "found": Jsonb(found) if found is not None else None,
                "organization": render.organization_id,
                "id": render.prompt_id,
                "come_from": list(come_from),
            },
        ).rowcount
        > 0
    )


@dataclass(frozen=True, slots=True)
class Collected:
    """A render whose files are in storage: the first of its outputs, and how many there are, as the job's result has them."""

    job_id: UUID
    organization_id: int
    server: str
    ended_at: datetime
    outputs: list[dict[str, Any]]
    number: int
    workflow: str | None
    version: int | None
    seconds: float | None
    cached: bool


def collected(
    conn: Connection, organization_id: int | None, *, before: UUID | None = None, limit: int = 24, outputs: int = 4
) -> list[Collected]:
    """The newest first, by job; `before` is the last job of the page before. Of each so many outputs."""
    rows = conn.execute(
        "select r.job_id, r.organization_id, r.server, r.ended_at,"
        " coalesce(jsonb_path_query_array(r.found, '$.outputs[0 to $most]', jsonb_build_object('most', %(outputs)s - 1)), '[]'),"
        " case when jsonb_typeof(r.found -> 'outputs') = 'array' then jsonb_array_length(r.found -> 'outputs') else 0 end,"
        " r.found #>> '{provenance,workflow}', (r.found #>> '{provenance,version}')::integer, (r.found ->> 'seconds')::float8,"
        " coalesce((r.found ->> 'cached')::boolean, false)"
        " from agentflow.renders r where r.state = 'collected'"
        " and (%(organization)s::bigint is null or r.organization_id = %(organization)s)"
        " and (%(before)s::uuid is null or r.job_id < %(before)s) order by r.job_id desc limit %(limit)s",
        {"organization": organization_id, "before": before, "limit": limit, "outputs": outputs},
    ).fetchall()
    return [Collected(*row) for row in rows]


def at_work(conn: Connection, organization_id: int | None, *, limit: int = 100) -> list[Render]:
    """Prompts that have a slot, by server; without what was found."""
    rows = conn.execute(
        f"select {_COLUMNS.replace('r.found', 'null::jsonb')} from agentflow.renders r"  # noqa: S608 - constants
        " where r.state in ('taken', 'sending', 'sent')"
        " and (%(organization)s::bigint is null or r.organization_id = %(organization)s)"
        " order by r.server, r.slot limit %(limit)s",
        {"organization": organization_id, "limit": limit},
    ).fetchall()
    return [Render(*row) for row in rows]


def abandoned(conn: Connection, server: str, limit: int = 20) -> list[Render]:
    """Prompts of a server that nobody waits for: their job has ended, or has given them up while the server was away."""
    rows = conn.execute(
        f"select {_COLUMNS} from agentflow.renders r join agentflow.jobs j on j.id = r.job_id"  # noqa: S608 - constants
        " where r.server = %(server)s and (r.state = 'given_up'"
        " or r.state in ('taken', 'sending', 'sent') and j.state not in ('queued', 'running'))"
        " order by r.taken_at limit %(limit)s",
        {"server": server, "limit": limit},
    ).fetchall()
    return [Render(*row) for row in rows]
