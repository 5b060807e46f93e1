"""What is asked and answered about renders."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import ConfigDict, Field

from agentflow.comfyui.requests import RenderRequest
from agentflow.jobs.model import Priority, State
from web import outlook
from web.api import Query, View
from web.jobs import JobError, Word


class RenderBody(RenderRequest):
    """What to render: a workflow with values for its parameters, or a whole graph."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["workflow"]}, {"required": ["graph"]}],
            "examples": [{"workflow": "smoke", "parameters": {"width": 128, "colour": 255}}],
        }
    )

    priority: Priority | None = None
    correlation_id: Word | None = Field(None, description="Yours, to find the render by")
    callback_url: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="Gets a POST when the render has ended; http(s), a public address"
    )


class ListQuery(Query):
    state: State | None = None
    correlation_id: Word | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class OutputView(View):
    """A file that came out, or a text."""

    node: str = Field(description="The id of the node that made it")
    kind: str = Field(description="image, video, audio, text or file")
    key: str | None = Field(description="To be used as `artefact` of a further render")
    url: str | None = Field(description="Good for minutes; ask again for a new one")
    thumbnail_key: str | None
    thumbnail_url: str | None
    width: int | None = Field(description="Pixels")
    height: int | None = Field(description="Pixels")
    bytes: int | None
    media_type: str | None


class ProvenanceView(View):
    """Where a render came from: enough to make it again."""

    workflow: str | None = Field(description="Null of a graph that was sent whole")
    version: int | None
    digest: str | None = Field(description="SHA-256 of the workflow's content")
    parameters: dict[str, Any] = Field(description="All values, also those that were not sent")
    seeds: dict[str, int] = Field(description="By parameter; of a graph by `<node id>.<input>`")
    server_version: str | None = Field(description="Of the ComfyUI that rendered it")


class RenderSummary(View):
    id: UUID = Field(description="Also the job's: `POST /api/jobs/{id}/cancel` cancels it")
    organization_id: int
    state: State
    workflow: str | None = Field(description="Null of a graph that was sent whole")
    version: int | None
    pool: str
    progress: float | None = Field(description="0 to 1")
    stage: str | None = Field(description="queued, uploading, rendering or downloading, and more about it")
    error: JobError | None
    correlation_id: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class RenderView(RenderSummary):
    parameters: dict[str, Any] = Field(description="As they were sent, with the seeds that were drawn")
    waiting: outlook.WaitingView | None = Field(description="Why it waits and where it stands, while it is queued")
    estimate: outlook.EstimateView | None = Field(description="When it will start and end, until it has ended")
    outputs: list[OutputView] = Field(description="Empty until it has succeeded")
    provenance: ProvenanceView | None = Field(description="Null until it has succeeded")
    cached: bool | None = Field(description="The server had all of it already and computed nothing anew")
    seconds: float | None = Field(description="How long the server took")


class RenderList(View):
    renders: list[RenderSummary] = Field(description="The newest first")
    next_cursor: str | None
