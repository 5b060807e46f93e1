"""Videos: hand one in as an upload or a URL, have it analysed, and see how that goes."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID, uuid5

from flask import request
from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator

from agentflow import analysis, videos
from agentflow.ids import new_id
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import documents
from agentflow.storage import StorageError
from agentflow.system import Transaction
from agentflow.videos import Video
from web import jobs, knowledge, outlook, uploads
from web.api import Answer, Body, Call, Query, Routes, View, read_json
from web.problems import Refused

routes = Routes("videos")

TYPE: Final = "analyze_video"
#: The words that callers of this API know since its first version.
WORDS: Final = {
    "queued": "queued",
    "running": "processing",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
_UPLOADS: Final = ("multipart/form-data", "application/octet-stream", "video/*")
_NAMESPACE: Final = UUID("0197a3c0-5d0e-7a51-9b2f-3f1f6c2b7d10")

Url = Annotated[str, Field(min_length=1, max_length=4096, description="http(s), a public address")]


class VideoByUrl(Body):
    """A video that lies elsewhere. It is downloaded when it is analysed."""

    url: Url


class AnalyzeRequest(Body):
    """Which video: one of the two."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["video_id"]}, {"required": ["url"]}],
            "examples": [{"url": "https://example.com/film.mp4"}],
        }
    )

    # Left out, but never null: the default is not checked, and stands in no schema.
    video_id: UUID = Field(default_factory=lambda: None, description="From `POST /api/videos`")  # type: ignore[assignment]
    url: Url = Field(default_factory=lambda: None)  # type: ignore[assignment]
    index: bool = Field(
        False, description="Make a document of the knowledge base, `video:<video_id>`, of what was said and seen"
    )
    graph: bool = Field(False, description="With `index`: extract entities and relations from it, too")

    @model_validator(mode="after")
    def _one(self) -> AnalyzeRequest:
        if (self.video_id is None) == (self.url is None):
            raise ValueError("give either video_id or url")
        if self.graph and not self.index:
            raise ValueError("graph needs index=true: it is extracted from the document")
        return self


class UploadQuery(Query):
    filename: Annotated[str, Field(max_length=255), AfterValidator(jobs.storable)] | None = Field(
        None, description="The name of a file that is sent as the bare body"
    )


class VideoCreated(View):
    video_id: UUID
    status: str = "registered"
    filename: str | None
    size_bytes: int | None


class VideoView(View):
    id: UUID
    source: str = Field(description="`upload` or `url`")
    url: str | None
    filename: str | None
    content_type: str | None
    size_bytes: int | None
    created_at: datetime


class TaskCreated(View):
    task_id: UUID
    status: str = "queued"
    message: str
    video_id: UUID
    document_id: UUID | None = Field(description="With `index`: see `/api/knowledge/documents/{document_id}`")


def _part(**properties: Any) -> dict[str, Any]:
    """The schema of something that a model said, or did not."""
    words = ["done", "partial", "failed", "none", "not_configured"]
    status = {"type": "string", "enum": words, "description": "`none`: the video has nothing of that kind"}
    reason = {"type": "string", "description": "Why not all of it is there; without a model, what to set"}
    said = {"status": status, "reason": reason, "code": {"type": ["string", "null"]}, **properties}
    return {"type": "object", "properties": said, "required": ["status"]}


def _items(**properties: Any) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "object", "properties": properties}}


_TEXT: Final = {"type": "string"}
_SECONDS: Final = {"type": "number", "description": "Seconds from the first picture"}
_FILE: Final = {"type": "object", "properties": {"file": _TEXT, "key": _TEXT, "url": _TEXT}}
_SPAN: Final = {"start_s": _SECONDS, "end_s": _SECONDS}
#: What models add to the analysis. Each has a `status` of its own; one that fails leaves the others.
_SAID_BY_MODELS: Final = {
    "captions": _part(items=_items(shot={"type": "integer"}, status=_TEXT, caption=_TEXT, reason=_TEXT)),
    "screen_text": _part(
        items=_items(shot={"type": "integer"}, time_s=_SECONDS, text={"type": "array", "items": _TEXT})
    ),
    "transcript": _part(
        language={"type": ["string", "null"]},
        segments=_items(**_SPAN, text=_TEXT),
        missing=_items(**_SPAN, reason=_TEXT),
        words=_FILE,
        subtitles=_FILE,
    ),
    "chapters": _part(items=_items(**_SPAN, title=_TEXT, summary=_TEXT)),
    "summary": _part(short=_TEXT, long=_TEXT),
    "tags": _part(items={"type": "array", "items": _TEXT}),
}


def _result_schema() -> dict[str, Any]:
    schema = analysis.json_schema()
    return {**schema, "properties": {**schema["properties"], **_SAID_BY_MODELS}}


class TaskStatus(View):
    """How an analysis goes. Which of the times is there depends on the status."""

    task_id: UUID
    video_id: UUID | None
    status: str = Field(description="queued, processing, completed, failed or cancelled")
    progress: float | None = Field(description="0 to 1")
    stage: str | None
    waiting: outlook.WaitingView | None = Field(description="Why it waits and where it stands, while it is queued")
    estimate: outlook.EstimateView | None = Field(description="When it will start and end, until it has ended")
    result: Annotated[Any, WithJsonSchema({"anyOf": [_result_schema(), {"type": "null"}]})]
    error: str | None
    error_code: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    cancelled_at: datetime | None


@routes.post(
    "/api/videos",
    {201: VideoCreated},
    body=VideoByUrl,
    other_bodies={
        "multipart/form-data": {
            "type": "object",
            "properties": {uploads.FIELD: {"type": "string", "format": "binary"}},
            "required": [uploads.FIELD],
            "additionalProperties": False,
        },
        "application/octet-stream": {"type": "string", "format": "binary"},
        "video/*": {"type": "string", "format": "binary"},
    },
    query=UploadQuery,
    scope="submit",
    problems=(408,),
    max_body_bytes=1 << 62,  # UPLOAD_MAX_BYTES is looked at below
)
def create(call: Call, query: UploadQuery) -> Answer:
    """Hand in a video: as a form with the part `file`, as the bare body, or as JSON with its URL.

    An upload goes straight into storage; one that is cut off leaves nothing. UPLOAD_MAX_BYTES is the limit.
    """
    kind = request.mimetype
    if kind == "application/json":
        video = _create_url(call, read_json(VideoByUrl))
    elif kind in ("multipart/form-data", "application/octet-stream") or kind.startswith("video/"):
        video = _create_upload(call, kind, query.filename)
    elif not request.content_length and "Transfer-Encoding" not in request.headers:
        raise Refused(400, "the body is missing: a video, or JSON with its url")
    else:
        raise Refused(
            415,
            "the body must be multipart/form-data with a file, a video/* or application/octet-stream, or JSON with a url",
            headers={"Accept": ", ".join((*_UPLOADS, "application/json"))},
        )
    return Answer(
        VideoCreated(video_id=video.id, filename=video.filename, size_bytes=video.size_bytes),
        201,
        {"Location": f"/api/videos/{video.id}"},
    )


@routes.get("/api/videos/<uuid:video_id>", {200: VideoView}, problems=(404,))
def show(call: Call, video_id: UUID) -> VideoView:
    """Look at a video that was handed in."""
    video = _find(call, video_id)
    return VideoView(
        id=video.id,
        source="upload" if video.storage_key else "url",
        url=video.source_url,
        filename=video.filename,
        content_type=video.content_type,
        size_bytes=video.size_bytes,
        created_at=video.created_at,
    )


@routes.post(
    "/api/videos/analyze",
    {202: TaskCreated},
    body=AnalyzeRequest,
    headers=jobs.BatchHeaders,
    scope="submit",
    problems=(404, 409),
)
def analyze(call: Call, body: AnalyzeRequest, headers: jobs.BatchHeaders) -> Answer:
    """Have a video analysed: one that was handed in, or one at a URL."""
    key = headers.idempotency_key
    if body.url is not None:
        _check(call, body.url)
    knowledge.check_graph(call, body.graph)
    with call.system.transaction() as transaction:
        if body.url is not None:
            # The same key makes the same video, so that the repeated request is the same job.
            video_id = uuid5(_NAMESPACE, f"{call.organization_id}:{key}") if key is not None else None
            video = videos.create_url(transaction.conn, call.organization_id, body.url, video_id=video_id)
            if video.source_url != body.url:
                raise Refused(409, f"idempotency key {key!r} was used for another request")
        else:
            found = videos.get(transaction.conn, call.sees, body.video_id, keep=True)
            if found is None:
                raise _unknown(body.video_id)
            video = found
        new = NewJob(type=TYPE, payload={"video_id": str(video.id), "index": body.index}, idempotency_key=key)
        if body.index:
            job, document_id = _indexed(transaction, video, new, graph=body.graph)
        else:
            job, document_id = transaction.submit(video.organization_id, new).job, None
    return Answer(
        TaskCreated(task_id=job.id, message="The video will be analysed.", video_id=video.id, document_id=document_id),
        202,
        {"Location": f"/api/videos/task/{job.id}/status"},
    )


@routes.get("/api/videos/task/<uuid:task_id>/status", {200: TaskStatus}, query=jobs.WaitQuery, problems=(404,))
def status(call: Call, task_id: UUID, query: jobs.WaitQuery) -> TaskStatus:
    """See how an analysis goes, or wait for its end."""
    job, _ = call.services.seats.wait(jobs.find(call, task_id), query.wait)
    if job is None or job.type != TYPE:
        raise Refused(404, f"there is no task {task_id}")
    progress, stage = job.progress, job.stage
    if (live := call.services.seats.progress(job)) is not None:
        progress, stage = live
    error = job.error or {}
    waiting, estimate = outlook.of(call, job, progress)
    return TaskStatus(
        task_id=job.id,
        video_id=_video_id(job.payload),
        status=WORDS[job.state],
        progress=progress,
        stage=stage,
        waiting=waiting,
        estimate=estimate,
        result=jobs.with_links(call, job.result, job.organization_id),
        error=error.get("message", "the analysis failed") if job.state == "failed" else None,
        error_code=error.get("code") if job.state == "failed" else None,
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.finished_at if job.state == "succeeded" else None,
        failed_at=job.finished_at if job.state == "failed" else None,
        cancelled_at=job.finished_at if job.state == "cancelled" else None,
    )


def _indexed(transaction: Transaction, video: Video, new: NewJob, *, graph: bool) -> tuple[Job, UUID]:
    """The document is there from the beginning, so that it can be looked at; the job that reads it follows the analysis."""
    document = documents.of_video(transaction.conn, video.organization_id, video.id, title=video.filename)
    then = (documents.reading(document.id, graph=graph),)
    submitted = transaction.submit(video.organization_id, dataclasses.replace(new, then=then))
    if submitted.created:
        documents.ask(transaction.conn, document, chain_id=submitted.job.id, job_id=None)
    return submitted.job, document.id


def _create_url(call: Call, body: VideoByUrl) -> Video:
    _check(call, body.url)
    with call.system.database.transaction() as conn:
        return videos.create_url(conn, call.organization_id, body.url)


def _create_upload(call: Call, kind: str, filename: str | None) -> Video:
    """The file first, then its row: a row without a file would be an accepted video that is lost."""
    system, organization_id = call.system, call.organization_id
    with system.database.connection() as conn:
        conn.execute("select 1")  # better now than after 2 GB
    video_id = new_id()
    most = system.settings.upload_max_bytes

    def key_of(name: str | None) -> str:
        return videos.upload_key(organization_id, video_id, name)

    if kind == "multipart/form-data":
        stored = uploads.store_form(system.storage, most, key_of)
    else:
        stored = uploads.store_raw(system.storage, filename, kind, most, key_of)
    try:
        with system.database.transaction() as conn:
            return videos.create_upload(
                conn,
                organization_id,
                video_id,
                storage_key=stored.key,
                filename=stored.filename,
                content_type=stored.content_type,
                size_bytes=stored.size_bytes,
            )
    except BaseException:
        with suppress(StorageError):
            system.storage.delete(stored.key)
        raise


def _check(call: Call, url: str) -> None:
    jobs.check_url(url, "url", call.system.settings)


def _find(call: Call, video_id: UUID) -> Video:
    with call.system.database.connection() as conn:
        video = videos.get(conn, call.sees, video_id)
    if video is None:
        raise _unknown(video_id)
    return video


def _unknown(video_id: UUID) -> Refused:
    return Refused(404, f"there is no video {video_id}")


def _video_id(payload: dict[str, Any]) -> UUID | None:
    try:
        return UUID(payload["video_id"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
