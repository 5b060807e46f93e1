"""Knowledge: documents with their state and chunks, handed in and removed; and search, with the reason of every hit."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.knowledge import chunks, documents
from agentflow.knowledge import search as searching
from agentflow.knowledge.documents import Document
from agentflow.knowledge.search import Hit, Unsearchable
from agentflow.knowledge.words import Filters
from web import embedding_models as models_api
from web import graph as graph_api
from web import knowledge as api
from web.api import validated
from web.cursors import cursor_of, read_cursor
from web.dashboard import fields, places
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import say

pages = Pages()

PAGE: Final = 50
_CHUNKS: Final = 20
_HITS: Final = 20
_SHOWN_CHARACTERS: Final = 700
_TEXT_BYTES: Final = 1 << 20
_NAME: Final = 200
_MODES: Final = ("hybrid", "vector", "text")


@pages.get("/knowledge")
def knowledge(visit: Visit) -> Response:
    cursor = request.args.get("cursor")
    before = read_cursor(cursor) if cursor else None
    source_id = fields.asked("source_id", 500)
    with visit.system.database.connection() as conn:
        found = documents.search(conn, visit.sees, source_id=source_id or None, before=before, limit=PAGE + 1)
    shown = found[:PAGE]
    values: dict[str, Any] = {
        "documents": api.views(visit, shown),
        "slugs": {each.id: each.slug for each in visit.organizations()} if visit.sees is None else {},
        "older": cursor_of(shown[-1].id) if len(found) > PAGE else None,
        "cursor": cursor,
        "source_id": source_id,
    }
    if request.args.get("part") == "rows":
        return visit.part("knowledge_rows.html", **values)
    return visit.page("knowledge.html", **values, most_bytes=visit.system.settings.document_max_bytes)


@pages.post("/knowledge/documents", scope="submit", max_bytes=_TEXT_BYTES)
def add_document(visit: Visit) -> Response:
    """By its URL, as a text, or a video that was analysed."""
    named = ("url", "text", "video_id", "source_id", "title")
    values: dict[str, Any] = {name: fields.given(name, _TEXT_BYTES) for name in named}
    values = {name: value for name, value in values.items() if value is not None}
    body = validated(
        lambda: api.DocumentRequest.model_validate(
            values | {"graph": request.form.get("graph") == "true"}, strict=False
        ),
        "body",
    )
    return _added(visit, api.create_from(visit, body))


@pages.post("/knowledge/files", scope="submit", max_bytes=None)
def add_file(visit: Visit) -> Response:
    """A form with a file, which goes straight into storage."""
    return _added(visit, api.create(visit))


def _added(visit: Visit, answer: Any) -> Response:
    said = say("The document will be read. This page follows how it goes.")
    return visit.go("knowledge_document", document_id=answer.model.document_id, said=said)


@pages.get("/knowledge/documents/<uuid:document_id>")
def knowledge_document(visit: Visit, document_id: UUID) -> Response:
    document = api.find(visit, document_id)
    (view,) = api.views(visit, [document])
    if request.args.get("part") == "state":
        if view.status in ("ready", "failed", "cancelled"):  # there is more to show now than this part
            return Response(status=204, headers={"HX-Refresh": "true"})
        return visit.part("knowledge_document_state.html", document=view)
    start = fields.number_asked("chunk", least=0, most=1 << 30, default=0)
    with visit.system.database.connection() as conn:
        found = chunks.page(conn, document.organization_id, document_id, start=start, limit=_CHUNKS + 1)
    return visit.page(
        "knowledge_document.html",
        document=view,
        chunks=found[:_CHUNKS],
        pictures={each.position: places.picture(visit, document.organization_id, each.place) for each in found},
        start=start,
        before=max(0, start - _CHUNKS),
        more=found[_CHUNKS].position if len(found) > _CHUNKS else None,
        facts={name: value for name, value in view.facts.items() if name != "keyframes"},  # seen below, by chunk
        download=_link_to_file(visit, document),
        place_in_words=places.in_words,
    )


def _link_to_file(visit: Visit, document: Document) -> str | None:
    if document.storage_key is None:
        return None
    return visit.system.links.sign(document.storage_key, filename=(document.filename or document.title)[:_NAME])


@pages.post("/knowledge/documents/<uuid:document_id>/graph", scope="submit")
def extract_graph(visit: Visit, document_id: UUID) -> Response:
    """Have a model go through it for its entities and relations."""
    wanted = graph_api.ExtractionRequest(second_pass=request.form.get("second_pass") == "true")
    answer: Any = graph_api.extract(visit, document_id, wanted).model
    return visit.go("job", job_id=answer.task_id, said=say("This job makes the graph of the document."))


@pages.post("/knowledge/documents/<uuid:document_id>/remove", scope="manage")
def remove_document(visit: Visit, document_id: UUID) -> Response:
    api.delete(visit, document_id)
    return visit.go(
        "knowledge", said=say("The document is gone, with its chunks and all that was known from it alone.")
    )


# ---- search ----


@pages.get("/knowledge/search")
def knowledge_search(visit: Visit) -> Response:
    question, mode = fields.asked("q", 1000), fields.asked("mode")
    language, document_id = fields.asked("language", 3).lower(), fields.id_asked("document")
    found, problem = None, None
    if question:
        try:
            found = searching.search(
                visit.system,
                visit.organization_id,
                question,
                limit=_HITS,
                filters=Filters(language or None, (document_id,) if document_id else ()),
                mode=next((each for each in ("vector", "text") if each == mode), "hybrid"),
            )
        except Unsearchable as error:
            problem = str(error)
    return visit.page(
        "knowledge_search.html",
        question=question,
        mode=mode,
        modes=_MODES,
        document=document_id,
        language_asked=language,
        found=found,
        problem=problem,
        hits=[_explained(visit, hit) for hit in found.hits] if found else [],
    )


def _explained(visit: Visit, hit: Hit) -> dict[str, Any]:
    """A hit, and why it stands where it does."""
    meaning = (
        say("place {n} by meaning, similarity {share}", n=hit.vector_rank, share=f"{1 - hit.distance:.2f}")
        if hit.vector_rank is not None and hit.distance is not None
        else say("not among the nearest by meaning")
    )
    words = (
        say("place {n} by words, {share} % of the question's", n=hit.text_rank, share=round(100 * hit.matched))
        if hit.text_rank is not None and hit.matched is not None
        else say("none of its words")
    )
    return {
        "hit": hit,
        "pieces": places.pieces(hit.text, hit.highlights, _SHOWN_CHARACTERS),
        "place": places.in_words(hit.place),
        "picture": places.picture(visit, visit.organization_id, hit.place),
        "similarity": max(0.0, 1 - hit.distance) if hit.distance is not None else None,
        "reason": f"{meaning}; {words}",
    }


# ---- the models behind it ----


@pages.get("/knowledge/models", scope="admin")
def knowledge_models(visit: Visit) -> Response:
    found = models_api.list_models(visit)
    return visit.page("knowledge_models.html", found=found)


@pages.post("/knowledge/models", scope="admin")
def switch_model(visit: Visit) -> Response:
    body = validated(lambda: models_api.SwitchRequest(model=fields.given("model", 300) or ""), "body")
    answer: Any = models_api.switch_model(visit, body).model
    return visit.go("job", job_id=answer.job_id, said=say("This job makes the vectors that are missing."))


@pages.post("/knowledge/models/discard", scope="admin")
def discard_model(visit: Visit) -> Response:
    gone = models_api.discard_model(visit).model
    said = say("The switch to {model} is given up.", model=gone) if gone else say("No switch was under way.")
    return visit.go("knowledge_models", said=said)
