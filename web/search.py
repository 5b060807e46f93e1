"""Search in the knowledge base."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, Field

from agentflow.knowledge import search as knowledge
from agentflow.knowledge.search import Unsearchable
from agentflow.knowledge.words import Filters
from web import jobs, problems
from web.api import Call, Query, Routes, View
from web.problems import Refused, invalid

routes = Routes("knowledge search")

_MOST_DOCUMENTS: Final = 100
_LANGUAGE: Final = r"^[a-z]{2,3}$"


class SearchQuery(Query):
    q: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(jobs.storable)] = Field(
        description="What is looked for: a question, a few words, a name or number"
    )
    limit: Annotated[int, Field(ge=1, le=50)] = 10
    mode: Literal["hybrid", "vector", "text"] = Field("hybrid", description="By meaning and words, or by one of them")
    language: Annotated[str, Field(pattern=_LANGUAGE)] | None = Field(
        None, description="Only chunks in this language (ISO 639-1)"
    )
    document: Annotated[str, Field(min_length=1, max_length=37 * _MOST_DOCUMENTS)] | None = Field(
        None, description=f"Only these documents: ids, separated by commas, {_MOST_DOCUMENTS} at most"
    )


class Highlight(View):
    start: int = Field(description="In characters of `text`")
    end: int = Field(description="The first character behind it")


class Scores(View):
    """Why a hit stands where it does."""

    fused: float = Field(description="The sum of what both lists give; the order of the hits")
    vector_rank: int | None = Field(description="Place by meaning, from 1; null: not among the nearest")
    distance: float | None = Field(description="Cosine distance of the vectors, 0 (the same) to 2")
    text_rank: int | None = Field(description="Place by words, from 1; null: none of them is there")
    matched: float | None = Field(description="Share of the question's words, the rare ones weighing more")


class HitView(View):
    document_id: UUID
    source_id: str
    title: str
    kind: str
    position: int = Field(description="Which chunk of the document, from 0")
    text: str
    highlights: list[Highlight] = Field(
        description="Words of the question, whatever their endings; the text is not escaped"
    )
    place: dict[str, Any] = Field(
        description="Where it stands: `page`, `heading`, `sheet`, `row`, `slide`, `start_s` …"
    )
    start_offset: int = Field(description="In characters of the document's text")
    end_offset: int
    language: str | None
    scores: Scores


class SearchResult(View):
    hits: list[HitView] = Field(description="The best first; of chunks with the same text one")
    model: str | None = Field(description="Whose vectors were compared; null: none were")
    problem: str | None = Field(description="Why a hybrid search went by words alone; null: it did not")


@routes.get("/api/knowledge/search", {200: SearchResult}, query=SearchQuery, problems=(409,))
def search_knowledge(call: Call, query: SearchQuery) -> SearchResult:
    """Search by meaning and by words.

    Both lists are fused by reciprocal rank. Where vectors cannot be had, a hybrid search goes by words alone and says why in
    `problem`; `mode=vector` then answers 409 (something has to be installed or set) or 503 (try again).
    """
    filters = Filters(query.language, _documents(query.document))
    try:
        found = knowledge.search(
            call.system, call.organization_id, query.q, limit=query.limit, filters=filters, mode=query.mode
        )
    except Unsearchable as error:
        headers = None if error.lasting else {"Retry-After": str(problems.RETRY_AFTER_S)}
        raise Refused(409 if error.lasting else 503, str(error), headers=headers) from None
    return SearchResult(hits=[_view(hit) for hit in found.hits], model=found.model, problem=found.problem)


def _documents(named: str | None) -> tuple[UUID, ...]:
    try:
        ids = tuple(UUID(each.strip()) for each in named.split(",")) if named is not None else ()
    except ValueError:
        raise invalid("document", "must be ids of documents, separated by commas", "query") from None
    if len(ids) > _MOST_DOCUMENTS:
        raise invalid("document", f"names more than {_MOST_DOCUMENTS}", "query")
    return ids


def _view(hit: knowledge.Hit) -> HitView:
    scores = Scores(
        fused=hit.score,
        vector_rank=hit.vector_rank,
        distance=hit.distance,
        text_rank=hit.text_rank,
        matched=hit.matched,
    )
    marked = [Highlight(start=start, end=end) for start, end in hit.highlights]
    shared = HitView.model_fields.keys() - {"highlights", "scores"}
    return HitView(highlights=marked, scores=scores, **{name: getattr(hit, name) for name in shared})
