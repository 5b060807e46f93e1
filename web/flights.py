"""Flight records: what led to a job, a webhook, a file or an edge of the graph, and what came of it."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from pydantic import Field

from agentflow.flights import records
from agentflow.flights.telling import Kind, Record
from agentflow.jobs.text import is_storable
from web.api import Call, Routes, View
from web.problems import Refused

routes = Routes("flights")


class EntryView(View):
    kind: Kind
    id: str = Field(description="Of a file its storage key")
    cause: str | None = Field(description="The `id` of what caused it, as far as that is known")
    depth: int = Field(description="Steps below the first cause")
    name: str = Field(description="The type of a job, the title of a document …")
    state: str | None = Field(description="Of a job its state; of a webhook its outcome, else `pending` or its verdict")
    code: str | None = Field(description="Of the error that a job failed of")
    attempts: int
    began_at: datetime
    ended_at: datetime | None
    kept: bool = Field(description="False: it was deleted by retention, and this is what is remembered of it")


class FlightView(View):
    kind: Kind
    id: str
    traces: list[str] = Field(description="The ids under which logs and Sentry know it")
    entries: list[EntryView] = Field(description="What was caused stands below its cause, the earliest first")
    truncated: bool = Field(description="There is more than is told")


@routes.get("/api/jobs/<uuid:job_id>/flight", {200: FlightView}, problems=(404,))
def of_job(call: Call, job_id: UUID) -> FlightView:
    """See what led to a job, and what came of it. Also of one that retention has deleted, for `RETAIN_FLIGHT_DAYS`."""
    with call.system.database.connection() as conn:
        return _view(records.of_job(conn, call.sees, job_id), f"job {job_id}")


@routes.get("/api/webhook-events/<uuid:event_id>/flight", {200: FlightView}, problems=(404,))
def of_event(call: Call, event_id: UUID) -> FlightView:
    """See what came of a webhook. Also of one that retention has deleted, for `RETAIN_FLIGHT_DAYS`."""
    with call.system.database.connection() as conn:
        return _view(records.of_event(conn, call.sees, event_id), f"webhook event {event_id}")


@routes.get("/api/graph/edges/<uuid:edge_id>/flight", {200: FlightView}, problems=(404,))
def of_edge(call: Call, edge_id: UUID) -> FlightView:
    """See where an edge of the graph came from: documents, the jobs that read them, and what led to those."""
    with call.system.database.connection() as conn:
        return _view(records.of_edge(conn, call.sees, edge_id), f"edge {edge_id}")


@routes.get("/api/artefacts/<path:key>/flight", {200: FlightView}, problems=(404,))
def of_artefact(call: Call, key: str) -> FlightView:
    """See what led to a stored file, by its key as results have it."""
    if not is_storable(key):
        raise Refused(404, "there is no such file")
    with call.system.database.connection() as conn:
        return _view(records.of_artefact(conn, call.sees, key), "such file")


def _view(record: Record | None, what: str) -> FlightView:
    if record is None:
        raise Refused(404, f"there is no {what}")
    return FlightView(
        kind=record.kind,
        id=record.id,
        traces=[each.hex for each in record.flights],
        entries=[
            EntryView(**{name: getattr(each, name) for name in EntryView.model_fields}) for each in record.entries
        ],
        truncated=record.truncated,
    )
