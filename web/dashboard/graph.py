"""The graph of the documents: a picture of who and what they speak of, what is behind each edge, which names were merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.knowledge import graph_matches, graph_queries, graph_types
from agentflow.knowledge.graph_queries import MAX_DEPTH, MAX_LENGTH, Edge, Neighbourhood, Path, Thing
from agentflow.knowledge.graph_types import GraphTypes
from web import graph as api
from web import knowledge as documents_api
from web.api import validated
from web.cursors import cursor_of, read_cursor
from web.dashboard import fields, places
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import say

pages = Pages()

PAGE: Final = 50
#: Things in a picture: more than this and nobody reads it.
MOST_CHOICES: Final = (25, 50, 100, 200)
_MOST: Final = 50
#: What is shown of the graph before anybody asks: that of so many documents.
_NEWEST_DOCUMENTS: Final = 5
#: Of the text around a quote, in characters.
_AROUND: Final = 200
_TYPES_CHARACTERS: Final = 30_000
#: As many shapes and colours as the style sheet and the icons have.
KINDS: Final = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """`kinds`: the shape and colour of each type. `around`: the thing that the rest is seen from."""

    things: list[Thing]
    edges: list[Edge]
    truncated: bool
    kinds: dict[str, int]
    around: Thing | None = None

    @property
    def names(self) -> dict[UUID, Thing]:
        return {thing.id: thing for thing in self.things}


def _picture(found: Neighbourhood | Path, around: Thing | None = None) -> Picture:
    return Picture(found.things, found.edges, found.truncated, kinds_of(found.things), around)


def kinds_of(things: Iterable[Thing]) -> dict[str, int]:
    return {name: number % KINDS for number, name in enumerate(sorted({thing.type for thing in things}))}


# ---- looking ----


@pages.get("/knowledge/graph")
def knowledge_graph(visit: Visit) -> Response:
    """Things by name; or what the newest documents say, or the one that is named."""
    words, type_ = fields.asked("q"), fields.asked("type")
    values: dict[str, Any] = {"asked": {"q": words, "type": type_}, **_choices(visit), **_evidence_asked(visit)}
    if words or type_:
        cursor = request.args.get("cursor")
        after = read_cursor(cursor) if cursor else None
        # By words through all organizations; all that are of a type only in one, whose index they are read from.
        sees = visit.sees if words else visit.organization_id
        with visit.system.database.connection() as conn:
            found = graph_queries.search(
                conn, sees, words=words or None, type_=type_ or None, after=after, limit=PAGE + 1
            )
        if len(found) == 1 and cursor is None:
            return visit.go("knowledge_thing", entity_id=found[0].id)
        values["found"] = found[:PAGE]
        values["more"] = cursor_of(found[PAGE - 1].id) if len(found) > PAGE else None
        values["kinds"] = kinds_of(found)
        return visit.page("graph_names.html", **values)
    named, organization_id, title = _documents_asked(visit)
    picture = None
    if organization_id is not None:
        with visit.system.database.connection() as conn:
            picture = _picture(graph_queries.of_documents(conn, organization_id, named, limit=values["most"]))
    return visit.page("graph.html", **values, picture=picture, title=title)


def _documents_asked(visit: Visit) -> tuple[list[UUID], int | None, str | None]:
    """Of which documents the graph is wanted, whose they are (None: there is none yet), and the title of the one."""
    named = fields.id_asked("document")
    if named is not None:
        document = documents_api.find(visit, named)
        return [document.id], document.organization_id, document.title
    with visit.system.database.connection() as conn:
        newest = graph_queries.latest(conn, visit.sees, limit=_NEWEST_DOCUMENTS)
    if not newest:
        return [], None, None
    owner = newest[0][1]
    return [id_ for id_, organization_id in newest if organization_id == owner], owner, None


@pages.get("/knowledge/graph/<uuid:entity_id>")
def knowledge_thing(visit: Visit, entity_id: UUID) -> Response:
    """What is around a thing, or how it is connected with another."""
    thing = api.find(visit, entity_id)
    choices = _choices(visit)
    depth = fields.number_asked("depth", least=1, most=MAX_DEPTH, default=1)
    to, problem, way = fields.asked("to"), None, None
    with visit.system.database.connection() as conn:
        if to:
            way, problem = _way(conn, thing, to)
        found = way or graph_queries.neighbourhood(conn, thing, depth=depth, limit=choices["most"])
    picture = _picture(found, thing)
    if request.args.get("part") == "panel":
        return visit.part("graph_thing.html", thing=thing, picture=picture)
    return visit.page(
        "graph.html", asked={"q": "", "type": ""}, **choices, **_evidence_asked(visit), picture=picture, title=thing.name,
        thing=thing, depth=depth, depths=range(1, MAX_DEPTH + 1), to=to, problem=problem, way=way,
    )  # fmt: skip


def _way(conn: Any, thing: Thing, to: str) -> tuple[Path | None, str | None]:
    """The shortest to the thing with this name, or why there is none."""
    found = graph_queries.search(conn, thing.organization_id, words=to, limit=PAGE)
    same = [each for each in found if to.casefold() in map(str.casefold, each.names)]
    other = next(iter(same or found), None)
    if other is None:
        return None, say("Nothing is called {name}.", name=to)
    way = graph_queries.path(conn, thing, other, max_length=MAX_LENGTH)
    if not way.things:
        return None, say("No way leads from {one} to {other}.", one=thing.name, other=other.name)
    return way, None


@pages.get("/knowledge/edges/<uuid:edge_id>")
def knowledge_edge(visit: Visit, edge_id: UUID) -> Response:
    """Which documents say so, in which words, and where."""
    values = _explained(visit, edge_id)
    if request.args.get("part") == "panel":
        return visit.part("graph_evidence.html", **values)
    return visit.page("graph_edge.html", **values)


def _evidence_asked(visit: Visit) -> dict[str, Any]:
    """Of the edge that the address names, for its place beside the picture."""
    edge_id = fields.id_asked("edge")
    return {"explained": _explained(visit, edge_id) if edge_id is not None else None}


def _explained(visit: Visit, edge_id: UUID) -> dict[str, Any]:
    found = api.explain(visit, edge_id)
    return {
        "explanation": found,
        "around": _AROUND,
        "place_in_words": places.in_words,
        "timecode": places.timecode,
    }


def _choices(visit: Visit) -> dict[str, Any]:
    with visit.system.database.connection() as conn:
        types = graph_types.read(conn, visit.organization_id)
    most = fields.number_asked("most", least=MOST_CHOICES[0], most=MOST_CHOICES[-1], default=_MOST)
    return {"types": types.entity_names, "most": most, "most_choices": MOST_CHOICES}


# ---- names that were taken for one ----


@pages.get("/knowledge/names")
def knowledge_names(visit: Visit) -> Response:
    cursor = request.args.get("cursor")
    after = read_cursor(cursor) if cursor else None
    with visit.system.database.connection() as conn:
        found = graph_matches.merges(conn, visit.sees, after=after, limit=PAGE + 1)
    more = cursor_of(found[PAGE - 1].id) if len(found) > PAGE else None
    return visit.page("graph_merges.html", merges=found[:PAGE], more=more, cursor=cursor)


@pages.post("/knowledge/names/<uuid:merge_id>/undo", scope="manage")
def undo_merge(visit: Visit, merge_id: UUID) -> Response:
    merge = api.undo(visit, merge_id)
    said = say("{one} and {other} are two again, and stay so.", one=merge.one.name, other=merge.other.name)
    return visit.go("knowledge_names", cursor=request.form.get("cursor"), said=said)


@pages.post("/knowledge/names/<uuid:merge_id>/redo", scope="manage")
def redo_merge(visit: Visit, merge_id: UUID) -> Response:
    merge = api.redo(visit, merge_id)
    said = say("{one} and {other} are one.", one=merge.one.name, other=merge.other.name)
    return visit.go("knowledge_names", cursor=request.form.get("cursor"), said=said)


# ---- types ----


@pages.get("/knowledge/types")
def knowledge_types(visit: Visit) -> Response:
    return visit.page("graph_types.html", types=api.types(visit), lines=_lines)


@pages.post("/knowledge/types", scope="manage")
def set_graph_types(visit: Visit) -> Response:
    kinds = {name: _types(fields.given(name, _TYPES_CHARACTERS) or "") for name in ("entities", "relations")}
    wanted = validated(lambda: GraphTypes.model_validate(kinds), "body")
    api.set_types(visit, wanted)
    return visit.go("knowledge_types", said=say("These types are looked for from now on."))


def _lines(types: Iterable[Any]) -> str:
    return "\n".join(f"{each.name}: {each.description}" if each.description else each.name for each in types)


def _types(text: str) -> tuple[dict[str, str], ...]:
    """Of lines such as `person: a human being who is named`."""
    lines = [line for line in text.splitlines() if line.strip()]
    return tuple(
        {"name": name.strip(), "description": description.strip()}
        for name, _, description in (line.partition(":") for line in lines)
    )
