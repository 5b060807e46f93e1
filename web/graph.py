"""The graph of an organization's documents: things, how they are connected, where it says so, and which names were merged."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Final, TypeVar
from uuid import UUID

from pydantic import AfterValidator, Field

from agentflow.jobs.requests import NewJob
from agentflow.knowledge import graph, graph_matches, graph_queries, graph_types
from agentflow.knowledge.graph_matches import DecidedBy, Merge
from agentflow.knowledge.graph_queries import MAX_DEPTH, MAX_LENGTH, Edge, Evidence, Thing
from agentflow.knowledge.graph_types import GraphTypes
from agentflow.models import NotConfigured
from web import jobs
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.problems import Refused

routes = Routes("graph")

Shown = TypeVar("Shown", bound=View)

TYPE: Final = "extract_graph"

_Text = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(jobs.storable)]


class EntityQuery(Query):
    q: _Text | None = Field(None, description="Words of its names, or how they begin")
    type: _Text | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class EntityView(View):
    id: UUID
    organization_id: int
    type: str
    name: str = Field(description="What it is called most of all")
    names: list[str] = Field(description="All that it is called, beginning with `name`")
    mentions: int


class EntityList(View):
    entities: list[EntityView] = Field(description="By id")
    next_cursor: str | None


class EdgeView(View):
    id: UUID
    from_id: UUID
    predicate: str
    to_id: UUID


class NeighbourhoodQuery(Query):
    depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1
    limit: Annotated[int, Field(ge=1, le=500)] = Field(100, description="Entities beside the one in the middle")


class NeighbourhoodView(View):
    entities: list[EntityView]
    edges: list[EdgeView] = Field(description="Those between these entities")
    truncated: bool = Field(description="There is more within this depth")


class PathQuery(Query):
    max_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)] = Field(4, description="In edges")


class PathView(View):
    entities: list[EntityView] = Field(description="From the first to the last; empty where there is no path")
    edges: list[EdgeView] = Field(description="One less; each may lead either way")
    truncated: bool = Field(description="None was found, but not all could be searched")


class KeyframeView(View):
    """A video's picture nearest to the time at which it is said or shown."""

    time_s: float
    key: str
    url: str | None


class ValidityView(View):
    valid_from: str | None = Field(description="Year, month or day, as exactly as the text says it")
    valid_to: str | None
    quote: str = Field(description="The words that say so")


class EvidenceView(View):
    document_id: UUID
    document_title: str
    document_kind: str
    quote: str = Field(description="The words of the document, verbatim")
    before: str = Field(description="What stands before them")
    after: str
    chunk: int = Field(description="Number of the chunk, from 0")
    start_offset: int = Field(description="Of the quote in the chunk, in characters")
    end_offset: int
    place: dict[str, Any] = Field(description="`page`, `heading`, `sheet`, `row`, `slide`, or `start_s` and `end_s`")
    validity: ValidityView | None
    keyframe: KeyframeView | None


class ExplanationView(View):
    edge: EdgeView
    from_entity: EntityView
    to_entity: EntityView
    evidence: list[EvidenceView] = Field(description="In the order of documents and their text; at most 100")


class ExtractionRequest(Body):
    second_pass: bool = Field(False, description="Ask once more for what was missed: more facts, twice the cost")


class ExtractionCreated(View):
    task_id: UUID = Field(description="A job: `GET /api/jobs/{id}`")
    document_id: UUID
    status: str = "queued"


class NameView(View):
    id: UUID
    type: str
    name: str


class MergeView(View):
    id: UUID
    one: NameView
    other: NameView
    decided_by: DecidedBy
    undone: bool = Field(description="A person said that they are not the same")
    decided_at: datetime


class MergeQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class MergeList(View):
    merges: list[MergeView] = Field(description="By id")
    next_cursor: str | None


class TypeView(View):
    name: str
    description: str


class TypesView(View):
    entities: list[TypeView]
    relations: list[TypeView]


# ---- looking ----


@routes.get("/api/graph/entities", {200: EntityList}, query=EntityQuery)
def search(call: Call, query: EntityQuery) -> EntityList:
    """List who and what the documents speak of, or find some by name."""
    after = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = graph_queries.search(
            conn, call.sees, words=query.q, type_=query.type, after=after, limit=query.limit + 1
        )
    page = found[: query.limit]
    return EntityList(
        entities=[_entity(thing) for thing in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get("/api/graph/entities/<uuid:entity_id>", {200: EntityView}, problems=(404,))
def show(call: Call, entity_id: UUID) -> EntityView:
    """Look at one. The id of a merged one shows what it was merged into."""
    return _entity(find(call, entity_id))


@routes.get(
    "/api/graph/neighbourhood/<uuid:entity_id>", {200: NeighbourhoodView}, query=NeighbourhoodQuery, problems=(404,)
)
def neighbourhood(call: Call, entity_id: UUID, query: NeighbourhoodQuery) -> NeighbourhoodView:
    """See what is around an entity, up to three steps away."""
    thing = find(call, entity_id)
    with call.system.database.connection() as conn:
        found = graph_queries.neighbourhood(conn, thing, depth=query.depth, limit=query.limit)
    return NeighbourhoodView(
        entities=[_entity(each) for each in found.things],
        edges=[_edge(each) for each in found.edges],
        truncated=found.truncated,
    )


@routes.get("/api/graph/path/<uuid:from_id>/<uuid:to_id>", {200: PathView}, query=PathQuery, problems=(404,))
def path(call: Call, from_id: UUID, to_id: UUID, query: PathQuery) -> PathView:
    """Find the shortest way from one entity to another."""
    one, other = find(call, from_id), find(call, to_id)
    with call.system.database.connection() as conn:
        found = graph_queries.path(conn, one, other, max_length=query.max_length)
    return PathView(
        entities=[_entity(each) for each in found.things],
        edges=[_edge(each) for each in found.edges],
        truncated=found.truncated,
    )


@routes.get("/api/graph/explain/<uuid:edge_id>", {200: ExplanationView}, problems=(404,))
def explain(call: Call, edge_id: UUID) -> ExplanationView:
    """See which documents say so, where, and in which words; of a video with the picture to it."""
    with call.system.database.connection() as conn:
        found = graph_queries.edge(conn, call.sees, edge_id)
        if found is None:
            raise Refused(404, f"there is no edge {edge_id}")
        edge, one, other = found
        evidence = graph_queries.evidence(conn, one.organization_id, edge)
    return ExplanationView(
        edge=_edge(edge),
        from_entity=_entity(one),
        to_entity=_entity(other),
        evidence=[_evidence(call, one.organization_id, each) for each in evidence],
    )


# ---- making ----


@routes.post(
    "/api/graph/documents/<uuid:document_id>",
    {202: ExtractionCreated},
    body=ExtractionRequest,
    scope="submit",
    problems=(404, 409),
)
def extract(call: Call, document_id: UUID, body: ExtractionRequest) -> Answer:
    """Go through a document for its entities and relations, again or for the first time. 409: no model is configured."""
    with call.system.transaction() as transaction:
        organization = graph.organization_of(transaction.conn, call.sees, document_id)
        if organization is None:
            raise Refused(404, f"there is no document {document_id}")
        try:
            call.system.models.endpoint("chat")
        except NotConfigured as error:
            raise Refused(409, f"the graph is made by a language model, which is {error}") from None
        payload = {"document_id": str(document_id), "second_pass": body.second_pass}
        job = transaction.submit(organization, NewJob(type=TYPE, payload=payload)).job
    return Answer(ExtractionCreated(task_id=job.id, document_id=document_id), 202, {"Location": f"/api/jobs/{job.id}"})


@routes.get("/api/graph/merges", {200: MergeList}, query=MergeQuery)
def merges(call: Call, query: MergeQuery) -> MergeList:
    """List which names were taken for one, and which merges were undone."""
    after = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = graph_matches.merges(conn, call.sees, after=after, limit=query.limit + 1)
    page = found[: query.limit]
    return MergeList(
        merges=[_merge(each) for each in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.post("/api/graph/merges/<uuid:merge_id>/undo", {200: MergeView}, scope="manage", problems=(404,))
def undo(call: Call, merge_id: UUID) -> MergeView:
    """Say that two names do not mean the same. They are not merged again, whatever a model says later."""
    return _set_same(call, merge_id, False)


@routes.post("/api/graph/merges/<uuid:merge_id>/redo", {200: MergeView}, scope="manage", problems=(404,))
def redo(call: Call, merge_id: UUID) -> MergeView:
    """Say that two names mean the same after all."""
    return _set_same(call, merge_id, True)


@routes.get("/api/graph/types", {200: TypesView})
def types(call: Call) -> TypesView:
    """See which types of entities and relations are looked for."""
    with call.system.database.connection() as conn:
        return _types(graph_types.read(conn, call.organization_id))


@routes.put("/api/graph/types", {200: TypesView}, body=GraphTypes, scope="manage")
def set_types(call: Call, body: GraphTypes) -> TypesView:
    """Say which types of entities and relations are looked for from now on."""
    with call.system.database.transaction() as conn:
        graph_types.write(conn, call.organization_id, body)
    return _types(body)


def _set_same(call: Call, merge_id: UUID, same: bool) -> MergeView:
    with call.system.database.transaction() as conn:
        merge = graph_matches.set_same(conn, call.sees, merge_id, same)
    if merge is None:
        raise Refused(404, f"there is no merge {merge_id}")
    return _merge(merge)


# ---- views ----


def find(call: Call, entity_id: UUID) -> Thing:
    """Raises Refused with 404."""
    with call.system.database.connection() as conn:
        thing = graph_queries.get(conn, call.sees, entity_id)
    if thing is None:
        raise Refused(404, f"there is no entity {entity_id}")
    return thing


def _entity(thing: Thing) -> EntityView:
    return _view(EntityView, thing)


def _edge(edge: Edge) -> EdgeView:
    return _view(EdgeView, edge)


def _view(view: type[Shown], row: object) -> Shown:
    return view(**{name: getattr(row, name) for name in view.model_fields})


def _evidence(call: Call, organization_id: int, each: Evidence) -> EvidenceView:
    begin, end = each.start_offset, each.end_offset
    validity = None
    if each.valid_start_offset is not None:
        words = each.text[each.valid_start_offset : each.valid_end_offset]
        validity = ValidityView(valid_from=each.valid_from, valid_to=each.valid_to, quote=words)
    return EvidenceView(
        document_id=each.document_id,
        document_title=each.document_title,
        document_kind=each.document_kind,
        quote=each.text[begin:end],
        before=each.text[:begin],
        after=each.text[end:],
        chunk=each.position,
        start_offset=begin,
        end_offset=end,
        place=each.place,
        validity=validity,
        keyframe=_keyframe(call, organization_id, each.keyframe),
    )


def _keyframe(call: Call, organization_id: int, found: dict[str, Any] | None) -> KeyframeView | None:
    if found is None:
        return None
    key, url = str(found["key"]), None
    if key.startswith(f"o/{organization_id}/"):
        with suppress(ValueError):  # not a key after all
            url = call.system.links.sign(key)
    return KeyframeView(time_s=float(found["time_s"]), key=key, url=url)


def _merge(merge: Merge) -> MergeView:
    return MergeView(
        id=merge.id,
        one=_view(NameView, merge.one),
        other=_view(NameView, merge.other),
        decided_by=merge.decided_by,
        undone=merge.undone,
        decided_at=merge.decided_at,
    )


def _types(types: GraphTypes) -> TypesView:
    return TypesView(
        entities=[_view(TypeView, each) for each in types.entities],
        relations=[_view(TypeView, each) for each in types.relations],
    )
