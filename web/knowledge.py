"""Documents of the knowledge base: hand one in, see how its chain of jobs goes, remove it."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID, uuid4

from flask import Response, request
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from agentflow import videos
from agentflow.jobs import records
from agentflow.jobs.model import State
from agentflow.jobs.records import Link
from agentflow.knowledge import documents
from agentflow.knowledge.documents import Document, Source
from agentflow.models import NotConfigured
from agentflow.storage import StorageError
from web import jobs, uploads
from web.api import Answer, Body, Call, Query, Routes, View, read_json, validated
from web.cursors import cursor_of, read_cursor
from web.jobs import JobError
from web.problems import Refused, invalid

routes = Routes("knowledge")

#: Of the whole chain's time, roughly.
_WEIGHTS: Final = {"analyze_video": 6.0, "generate_embeddings": 3.0, "extract_graph": 4.0}
_TEXT_TYPE: Final = "text/plain"

Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(jobs.storable)]
Status = Literal["queued", "processing", "ready", "failed", "cancelled"]


class _Named(Body):
    source_id: Name | None = Field(
        None,
        description="Your name for it: handed in again, it is a new version of the same document, and only what changed is"
        " computed. Left out: the URL, `video:<video_id>`, else a new document",
    )
    title: Name | None = Field(None, description="Left out: as the file calls itself, or as it is named")


class DocumentRequest(_Named):
    """Where the content is: one of the three."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["url"]}, {"required": ["text"]}, {"required": ["video_id"]}],
            "examples": [{"url": "https://example.com/handbook.pdf", "source_id": "handbook"}],
        }
    )

    # Left out, but never null: the default is not checked, and stands in no schema.
    url: Annotated[str, Field(min_length=1, max_length=4096, description="http(s), a public address")] = Field(
        default_factory=lambda: None  # type: ignore[assignment]
    )
    text: Annotated[str, Field(min_length=1), AfterValidator(jobs.storable)] = Field(
        default_factory=lambda: None,  # type: ignore[assignment]
        description="Plain text, Markdown, CSV or HTML: its content says which",
    )
    video_id: UUID = Field(default_factory=lambda: None, description="A video that was analysed")  # type: ignore[assignment]
    graph: bool = Field(False, description="Extract entities and relations, too, as soon as the vectors are there")

    @model_validator(mode="after")
    def _one(self) -> DocumentRequest:
        if sum(each is not None for each in (self.url, self.text, self.video_id)) != 1:
            raise ValueError("give one of url, text and video_id")
        return self


class FormFields(Query):
    """The texts of a form, beside its file."""

    source_id: Name | None = None
    title: Name | None = None
    graph: Literal["true", "false"] = "false"


class ListQuery(Query):
    source_id: Name | None = Field(None, description="Only the document with this name")
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class DocumentCreated(View):
    document_id: UUID
    source_id: str
    job_id: UUID
    status: str = "queued"
    message: str


class StepView(View):
    id: UUID
    type: str
    state: State | Literal["waiting"] = Field(description="`waiting`: for the job before it to succeed")
    progress: float | None = Field(description="0 to 1")
    stage: str | None


class DocumentView(View):
    """A document, and how far the chain of jobs is that was asked for last."""

    id: UUID
    organization_id: int
    source_id: str
    title: str
    source: Literal["upload", "url", "video"]
    url: str | None
    video_id: UUID | None
    kind: str = Field(
        description="pdf, docx, pptx, xlsx, html, markdown, text, csv, video; `unknown` until it was read"
    )
    language: str | None = Field(description="ISO 639-1 of most of the text")
    size_bytes: int | None
    version: int = Field(description="Raised whenever other content was stored")
    chunks: int
    searchable: bool = Field(description="What was read, of this version or the one before, can be found")
    facts: dict[str, Any] = Field(
        description="What the file says of itself: `pages`, `author`, `encoding`, `characters` …"
    )
    status: Status
    progress: float = Field(description="0 to 1, of the whole chain")
    stage: str | None
    error: JobError | None
    jobs: list[StepView] = Field(description="The chain, as far as its jobs are still kept")
    created_at: datetime
    updated_at: datetime
    read_at: datetime | None


class DocumentList(View):
    documents: list[DocumentView] = Field(description="The newest first")
    next_cursor: str | None


@routes.post(
    "/api/knowledge/documents",
    {202: DocumentCreated},
    body=DocumentRequest,
    other_bodies={
        "multipart/form-data": {
            "type": "object",
            "properties": {
                uploads.FIELD: {"type": "string", "format": "binary"},
                "source_id": {"type": "string", "minLength": 1, "maxLength": 500},
                "title": {"type": "string", "minLength": 1, "maxLength": 500},
                "graph": {"type": "boolean"},
            },
            "required": [uploads.FIELD],
            "additionalProperties": False,
        },
    },
    scope="submit",
    problems=(404, 408, 409),
    max_body_bytes=1 << 62,  # DOCUMENT_MAX_BYTES is looked at below
)
def create(call: Call) -> Answer:
    """Hand in a document: a form with the part `file`, or JSON with a URL, a text, or a video that was analysed.

    PDF, DOCX, PPTX, XLSX, HTML, Markdown, TXT and CSV are read. What cannot be (a password, pages that are pictures, damage,
    an archive that unpacks to far more) fails its job, and `error` of the document says what would help. DOCUMENT_MAX_BYTES
    is the limit.
    """
    if request.mimetype == "multipart/form-data":
        return _create_upload(call)
    if request.mimetype != "application/json" and request.content_length:
        raise Refused(
            415,
            "the body must be multipart/form-data with a file, or JSON with url, text or video_id",
            headers={"Accept": "multipart/form-data, application/json"},
        )
    return create_from(call, read_json(DocumentRequest))


@routes.get("/api/knowledge/documents", {200: DocumentList}, query=ListQuery)
def search(call: Call, query: ListQuery) -> DocumentList:
    """List documents, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = documents.search(conn, call.sees, source_id=query.source_id, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return DocumentList(
        documents=views(call, page),
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get("/api/knowledge/documents/<uuid:document_id>", {200: DocumentView}, problems=(404,))
def show(call: Call, document_id: UUID) -> DocumentView:
    """Look at a document, and at how far its chain of jobs is."""
    (view,) = views(call, [find(call, document_id)])
    return view


@routes.delete("/api/knowledge/documents/<uuid:document_id>", {204: "It is gone"}, scope="manage", problems=(404,))
def delete(call: Call, document_id: UUID) -> Response:
    """Remove a document with its file, its chunks, their vectors and the facts taken from it; its jobs are cancelled."""
    document = find(call, document_id)
    system, organization_id = call.system, document.organization_id
    for link in _chains(call, [document])[document.id]:
        # The analysis of a video was asked for by itself.
        if link.job is not None and not link.job.terminal and link.type != "analyze_video":
            system.cancel(organization_id, link.id)
    if document.storage_key is not None:
        system.storage.delete(document.storage_key)  # first: a row can be deleted again, a forgotten file not
    with system.database.transaction() as conn:
        if not documents.delete(conn, organization_id, document_id):
            raise _unknown(document_id)
    return Response(status=204)


def create_from(call: Call, body: DocumentRequest) -> Answer:
    check_graph(call, body.graph)
    if body.text is not None:
        return _create_text(call, body)
    if body.url is not None:
        jobs.check_url(body.url, "url", call.system.settings)
        source, source_id = Source(source_url=body.url), body.source_id or body.url
        return _hand_in(call, call.organization_id, source_id[:500], source, title=body.title, graph=body.graph)
    with call.system.database.connection() as conn:
        video = videos.get(conn, call.sees, body.video_id)
        if video is None:
            raise Refused(404, f"there is no video {body.video_id}")
        payload = {"video_id": str(video.id)}
        if records.newest(conn, video.organization_id, "analyze_video", payload, ("succeeded",)) is None:
            raise Refused(
                409, "this video has no analysis that is still kept: POST /api/videos/analyze with index=true does both"
            )
    source_id = body.source_id or documents.video_source_id(video.id)
    title = body.title or video.filename
    return _hand_in(call, video.organization_id, source_id, Source(video_id=video.id), title=title, graph=body.graph)


def _create_upload(call: Call) -> Answer:
    """The file first, then its row: a row without a file would be an accepted document that is lost."""
    system, organization_id = call.system, call.organization_id
    with system.database.connection() as conn:
        conn.execute("select 1")  # better now than after the upload
    stored = uploads.store_form(
        system.storage,
        system.settings.document_max_bytes,
        lambda name: documents.upload_key(organization_id, name),
        fields=FormFields.model_fields,
    )
    source = Source(
        storage_key=stored.key,
        filename=stored.filename,
        content_type=stored.content_type,
        size_bytes=stored.size_bytes,
    )
    try:
        given = validated(lambda: FormFields.model_validate_strings(stored.fields), "body")
        graph = given.graph == "true"
        check_graph(call, graph)
        source_id = given.source_id or f"upload:{uuid4()}"
        return _hand_in(call, organization_id, source_id, source, title=given.title, graph=graph)
    except BaseException:
        _drop(call, stored.key)
        raise


def _create_text(call: Call, body: DocumentRequest) -> Answer:
    data = body.text.encode()
    if not body.text.strip():
        raise invalid("text", "is empty")
    key = documents.upload_key(call.organization_id, None)
    call.system.storage.put_bytes(key, data, content_type=_TEXT_TYPE)
    source = Source(storage_key=key, content_type=_TEXT_TYPE, size_bytes=len(data))
    try:
        source_id = body.source_id or f"text:{uuid4()}"
        return _hand_in(call, call.organization_id, source_id, source, title=body.title, graph=body.graph)
    except BaseException:
        _drop(call, key)
        raise


def _hand_in(
    call: Call, organization_id: int, source_id: str, source: Source, *, title: str | None, graph: bool
) -> Answer:
    with call.system.transaction() as transaction:
        document, old_key = documents.hand_in(transaction.conn, organization_id, source_id, source, title=title)
        job = transaction.submit(organization_id, documents.reading(document.id, graph=graph)).job
        documents.ask(transaction.conn, document, chain_id=job.id, job_id=job.id)
    if old_key is not None:
        _drop(call, old_key)
    return Answer(
        DocumentCreated(
            document_id=document.id, source_id=source_id, job_id=job.id, message="The document will be read."
        ),
        202,
        {"Location": f"/api/knowledge/documents/{document.id}"},
    )


def _drop(call: Call, key: str) -> None:
    with suppress(StorageError):
        call.system.storage.delete(key)


def check_graph(call: Call, graph: bool) -> None:
    """Raises Refused with 409 where a graph is wanted and no model is there to read it."""
    if graph:
        try:
            call.system.models.endpoint("chat")
        except NotConfigured as error:
            raise Refused(409, f"a graph needs a model: {error}") from None


def find(call: Call, document_id: UUID) -> Document:
    """Raises Refused with 404."""
    with call.system.database.connection() as conn:
        document = documents.get(conn, call.sees, document_id)
    if document is None:
        raise _unknown(document_id)
    return document


def _unknown(document_id: UUID) -> Refused:
    return Refused(404, f"there is no document {document_id}")


def _chains(call: Call, found: list[Document]) -> dict[UUID, list[Link]]:
    """By document."""
    first = [document.chain_id or document.job_id for document in found]
    with call.system.database.connection() as conn:
        chains = records.chains(conn, call.sees, [each for each in first if each is not None])
    return {document.id: chains.get(each, []) if each else [] for document, each in zip(found, first, strict=True)}


def views(call: Call, found: list[Document]) -> list[DocumentView]:
    chains = _chains(call, found)
    return [_view(call, document, chains[document.id]) for document in found]


def _view(call: Call, document: Document, chain: list[Link]) -> DocumentView:
    steps = [_step(call, link) for link in chain]
    status, error = _status(document, chain)
    done = 0.0
    for step in steps:
        share = 1.0 if step.state == "succeeded" else step.progress or 0.0
        done += _WEIGHTS.get(step.type, 1.0) * share
    whole = sum(_WEIGHTS.get(step.type, 1.0) for step in steps)
    return DocumentView(
        id=document.id,
        organization_id=document.organization_id,
        source_id=document.source_id,
        title=document.title,
        source="video" if document.video_id else "url" if document.source_url else "upload",
        url=document.source_url,
        video_id=document.video_id,
        kind=document.kind,
        language=document.language,
        size_bytes=document.size_bytes,
        version=document.version,
        chunks=document.chunk_count,
        searchable=document.read_at is not None,
        facts=document.facts,
        status=status,
        progress=1.0 if status == "ready" else done / whole if whole else 0.0,
        stage=next((step.stage for step in steps if step.state == "running"), None),
        error=JobError(code=error.get("code"), message=error.get("message", "it failed")) if error else None,
        jobs=steps,
        created_at=document.created_at,
        updated_at=document.updated_at,
        read_at=document.read_at,
    )


def _step(call: Call, link: Link) -> StepView:
    if link.job is None:
        return StepView(id=link.id, type=link.type, state="waiting", progress=None, stage=None)
    progress, stage = link.job.progress, link.job.stage
    if (live := call.services.seats.progress(link.job)) is not None:
        progress, stage = live
    return StepView(id=link.id, type=link.type, state=link.job.state, progress=progress, stage=stage)


def _status(document: Document, chain: list[Link]) -> tuple[Status, dict[str, Any] | None]:
    """Of the chain as a whole, and why it failed."""
    states = [link.job.state for link in chain if link.job is not None]
    for link in chain:
        if link.job is not None and link.job.state == "failed":
            return "failed", link.job.error or {}
    if "cancelled" in states:
        return "cancelled", None
    if not chain:  # it ended so long ago that its jobs were cleaned up
        if document.error is not None:
            return "failed", document.error
        return "ready" if document.read_at is not None else "queued", None
    if len(states) == len(chain) and set(states) == {"succeeded"}:
        return "ready", None
    return "processing" if {"running", "succeeded"} & set(states) else "queued", None
