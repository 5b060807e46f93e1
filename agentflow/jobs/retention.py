"""Forgetting: ended jobs with their files, idempotency and unique keys, batches, workers' rows. In small batches, never what is
still needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from agentflow.database import Connection
from agentflow.jobs import files, flights, registry
from agentflow.jobs.files import Doomed
from agentflow.jobs.unique import MAX_PERIOD_S

BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Keep:
    """An ended job is kept while it is younger than `hours`, or among the newest `count` of its organization and outcome."""

    hours: float
    count: int


def delete_jobs(conn: Connection, *, succeeded: bool, keep: Keep, limit: int = BATCH) -> int:
    """Delete one batch of succeeded jobs, or of failed and cancelled ones. Returns how many; fewer than `limit`: done.

    A job stays while a job that it started (`then`, its callback) is open. Attempts go with it; its files are doomed; what it was
    is remembered in a slim row (agentflow.jobs.flights).
    """
    states = ["succeeded"] if succeeded else ["failed", "cancelled"]
    with conn.transaction():
        deleted = conn.execute(
            _DELETE_JOBS,
            {
                "states": states,
                "count": keep.count,
                "hours": keep.hours,
                "limit": limit,
                "types": [each.name for each in registry.every() if each.files is not None],
            },
        ).fetchall()
        files.doom(conn, [doomed for row in deleted if row[3] is not None and (doomed := _files_of(*row))])
    return len(deleted)


_DELETE_JOBS: Final = f"""
with recursive organizations as (          -- by skip scan
    (select organization_id from agentflow.jobs order by organization_id limit 1)
    union all
    select n.organization_id from organizations o cross join lateral (
        select j.organization_id from agentflow.jobs j where j.organization_id > o.organization_id
        order by j.organization_id limit 1
    ) n
), newest as (
    select o.organization_id, b.id as oldest_kept from organizations o left join lateral (
        select j.id from agentflow.jobs j where j.organization_id = o.organization_id and j.state = any (%(states)s)
        order by j.id desc offset greatest(%(count)s - 1, 0) limit 1
    ) b on %(count)s > 0
), old as materialized (
    select v.id from newest n cross join lateral (
        select j.id from agentflow.jobs j
        where j.organization_id = n.organization_id and j.state = any (%(states)s)
            and (n.oldest_kept is null and %(count)s = 0 or j.id < n.oldest_kept)
            and j.finished_at < clock_timestamp() - make_interval(secs => %(hours)s * 3600)
            and not exists (
                select from agentflow.jobs c where c.parent_id = j.id and c.state in ('queued', 'running')
            )
        order by j.id limit %(limit)s for update skip locked
    ) v limit %(limit)s
), gone as (
    delete from agentflow.jobs j using old where j.id = old.id
    returning {flights.LEG_OF_JOB}, case when j.type = any (%(types)s) then j.payload end as payload
), remembered as (
    {flights.REMEMBER}
)
select id, organization_id, type, payload from gone
"""  # noqa: S608 - constants


def _files_of(id: Any, organization_id: int, type_: str, payload: dict[str, Any]) -> Doomed | None:
    job_type = registry.get(type_)
    if job_type.files is None:
        return None
    try:
        read = job_type.payload.model_validate_json(json.dumps(payload))
    except ValidationError:  # of an older version's shape: it failed, and left nothing
        return None
    return Doomed(organization_id, f"{job_type.files(organization_id, id, read).rstrip('/')}/")


def delete_idempotency_keys(conn: Connection, *, hours: float, limit: int = BATCH) -> int:
    return conn.execute(
        "with old as materialized (select organization_id, key from agentflow.idempotency_keys"
        " where created_at < clock_timestamp() - make_interval(secs => %s * 3600) limit %s for update skip locked)"
        " delete from agentflow.idempotency_keys k using old where k.organization_id = old.organization_id and k.key = old.key",
        (hours, limit),
    ).rowcount


def delete_unique_keys(conn: Connection, *, limit: int = BATCH) -> int:
    """Keys whose longest period is over and whose job has ended or is gone."""
    return conn.execute(
        "with old as materialized (select u.organization_id, u.type, u.key from agentflow.unique_keys u"
        " where u.accepted_at < clock_timestamp() - make_interval(secs => %s) and not exists (select from agentflow.jobs j"
        " where j.id = u.job_id and j.organization_id = u.organization_id and j.state in ('queued', 'running'))"
        " limit %s for update skip locked)"
        " delete from agentflow.unique_keys k using old"
        " where k.organization_id = old.organization_id and k.type = old.type and k.key = old.key",
        (MAX_PERIOD_S, limit),
    ).rowcount


def delete_batches(conn: Connection, *, hours: float, limit: int = BATCH) -> int:
    return conn.execute(
        "with old as materialized (select id from agentflow.batches"
        " where finished_at < clock_timestamp() - make_interval(secs => %s * 3600)"
        # its callback may still have to be told
        " and not exists (select from agentflow.jobs c where c.parent_id = batches.id and c.state in ('queued', 'running'))"
        " limit %s for update skip locked)"
        " delete from agentflow.batches b using old where b.id = old.id",
        (hours, limit),
    ).rowcount


def delete_workers(conn: Connection, *, hours: float = 24.0) -> int:
    """Rows of worker processes that have been gone for long."""
    return conn.execute(
        "delete from agentflow.workers w where w.seen_at < clock_timestamp() - make_interval(secs => %s * 3600)"
        " and not exists (select from agentflow.jobs j where j.worker = w.id and j.state = 'running')",
        (hours,),
    ).rowcount
