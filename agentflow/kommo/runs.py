"""The log of syncs. A run is one job, however many attempts and slices it takes; its counts are written with its pages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.ids import new_id

Mode = Literal["incremental", "backfill", "reconcile", "touched"]
RunState = Literal["running", "succeeded", "held", "failed"]
Counts = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Run:
    """`counts` by kind of thing: created, updated, unchanged, deleted …; `calls` of the API, not those of killed workers."""

    id: UUID
    organization_id: int
    account_id: UUID
    job_id: UUID
    mode: Mode
    plan: bool
    state: RunState
    calls: int
    counts: dict[str, dict[str, int]]
    error: str | None
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Latest:
    """Of an account: its last run that was no plan, and the moment up to which all changes are in the mirror."""

    run: Run | None
    read_at: datetime | None


#: A run every five minutes is 9000 rows in these.
KEEP_DAYS: Final = 30
_COLUMNS: Final = ", ".join(Run.__dataclass_fields__)


def open_run(conn: Connection, organization_id: int, account_id: UUID, job_id: UUID, mode: Mode, *, plan: bool) -> Run:
    """The run of this job, made at its first attempt."""
    conn.execute(
        "insert into agentflow.sync_runs (id, organization_id, account_id, job_id, mode, plan)"
        " values (%s, %s, %s, %s, %s, %s) on conflict (job_id) do nothing",
        (new_id(), organization_id, account_id, job_id, mode, plan),
    )
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.sync_runs where organization_id = %s and job_id = %s",  # noqa: S608
        (organization_id, job_id),
    ).fetchone()
    assert row is not None  # noqa: S101 - inserted above
    return Run(*row)


def add(conn: Connection, organization_id: int, run_id: UUID, counts: Counts, calls: int) -> None:
    """Add to the counts, in the transaction that writes what is counted."""
    conn.execute(
        "update agentflow.sync_runs r set calls = calls + %(calls)s, counts = coalesce(("
        "  select jsonb_object_agg(type, of_type) from ("
        "    select type, jsonb_object_agg(what, n) as of_type from ("
        "      select t.key as type, c.key as what, sum(c.value::integer) as n"
        "      from (select r.counts as s union all select %(counts)s::jsonb) both_,"
        "        jsonb_each(both_.s) t, jsonb_each_text(t.value) c group by 1, 2) summed group by type) typed), '{}')"
        " where organization_id = %(organization)s and id = %(run)s",
        {
            "organization": organization_id,
            "run": run_id,
            "calls": calls,
            "counts": Jsonb({type_: dict(what) for type_, what in counts.items()}),
        },
    )


def close(conn: Connection, organization_id: int, run_id: UUID, state: RunState, error: str | None = None) -> Run:
    row = conn.execute(
        "update agentflow.sync_runs set state = %s, error = %s, finished_at = clock_timestamp()"  # noqa: S608 - constants
        f" where organization_id = %s and id = %s returning {_COLUMNS}",
        (state, error, organization_id, run_id),
    ).fetchone()
    assert row is not None  # noqa: S101 - rows of runs go with their account, after its jobs
    return Run(*row)


def note_error(conn: Connection, organization_id: int, run_id: UUID, error: str) -> None:
    """Of an attempt that will be repeated."""
    conn.execute(
        "update agentflow.sync_runs set error = %s where organization_id = %s and id = %s",
        (error, organization_id, run_id),
    )


def delete_old(conn: Connection, *, limit: int) -> int:
    """One batch of runs, and of what was written back, that are older than KEEP_DAYS. Returns how many."""
    return sum(
        conn.execute(
            f"delete from agentflow.{table} where ctid = any (array(select ctid from agentflow.{table}"  # noqa: S608
            f" where {began} < clock_timestamp() - make_interval(days => %s) limit %s))",
            (KEEP_DAYS, limit),
        ).rowcount
        for table, began in (("sync_runs", "started_at"), ("crm_writes", "sent_at"))
    )


def of_account(
    conn: Connection, organization_id: int, account_id: UUID, *, before: UUID | None = None, limit: int = 50
) -> list[Run]:
    """The newest first."""
    rows = conn.execute(
        f"select {_COLUMNS} from agentflow.sync_runs where organization_id = %(organization)s"  # noqa: S608 - constants
        " and account_id = %(account)s and (%(before)s::uuid is null or id < %(before)s) order by id desc limit %(limit)s",
        {"organization": organization_id, "account": account_id, "before": before, "limit": limit},
    ).fetchall()
    return [Run(*row) for row in rows]


def latest(conn: Connection, organization_id: int | None, account_ids: Collection[UUID]) -> dict[UUID, Latest]:
    """By account; of any organization where it is None."""
    rows = conn.execute(
        f"select a.id, whole.started_at, last.* from agentflow.crm_accounts a"  # noqa: S608 - constants
        " left join lateral (select started_at from agentflow.sync_runs r where r.account_id = a.id"
        "  and r.state = 'succeeded' and not r.plan and r.mode in ('incremental', 'reconcile')"
        "  order by r.id desc limit 1) whole on true"
        f" left join lateral (select {_COLUMNS} from agentflow.sync_runs r where r.account_id = a.id and not r.plan"
        "  order by r.id desc limit 1) last on true"
        " where (%(organization)s::bigint is null or a.organization_id = %(organization)s) and a.id = any(%(accounts)s)",
        {"organization": organization_id, "accounts": list(account_ids)},
    ).fetchall()
    return {id_: Latest(Run(*run) if run[0] is not None else None, read_at) for id_, read_at, *run in rows}
