"""Forgetting webhooks: the rows with all that came in them go, and what each of them led to can still be told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from agentflow.database import Connection
from agentflow.jobs import flights
from agentflow.jobs.retention import BATCH
from agentflow.webhooks.events import first_id_of

_LEG: Final = (
    "e.id, e.organization_id, coalesce((select l.flight from agentflow.flight_log l where l.id = e.job_id),"  # noqa: S608
    f" (select {flights.FLIGHT_OF_JOB} from agentflow.jobs j where j.id = e.job_id), e.job_id, e.id) as flight,"
    " 'event' as kind, e.type, coalesce(e.outcome, e.verdict) as state, null::text as code, 0 as attempts,"
    " e.received_at as created_at, null::timestamptz as started_at, e.handled_at as ended_at, null::uuid as parent_id,"
    " null::uuid as retry_of, null::uuid as event_id, null::uuid as document_id, null::uuid as video_id,"
    " null::uuid as schedule_id, e.endpoint_id"
)


def delete_events(conn: Connection, *, days: float, limit: int = BATCH) -> int:
    """Events that were received so long ago, but for those whose job is still to run. Returns how many.

    What they were is remembered in slim rows (agentflow.jobs.flights).
    """
    row = conn.execute(
        "with old as materialized (select e.id from agentflow.webhook_events e where e.id < %s"  # noqa: S608 - constants
        " and not exists (select from agentflow.jobs j where j.id = e.job_id and j.state in ('queued', 'running'))"
        " order by e.id limit %s for update skip locked), gone as ("
        f"delete from agentflow.webhook_events e using old where e.id = old.id returning {_LEG}"
        f"), remembered as ({flights.REMEMBER}) select count(*) from gone",
        (first_id_of(datetime.now(UTC) - timedelta(days=days)), limit),
    ).fetchone()
    return row[0] if row else 0
