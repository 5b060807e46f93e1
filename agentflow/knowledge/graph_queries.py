"""Looking at the graph: things by name, what is around them, how two are connected, and why an edge is there.

A thing is a group of entities that mean the same; its id is their root's. Of edges between the same two things with the same
predicate the first by id stands for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.knowledge.names import key_of

MAX_DEPTH: Final = 3
MAX_LENGTH: Final = 6
#: Edges that one step looks at. A graph in which one thing has more is answered in part, and says so.
_MOST_EDGES: Final = 5000
_EVIDENCE_AT_ONCE: Final = 100
#: Of the newest documents so many are asked whether they have a graph.
_NEWEST: Final = 200


@dataclass(frozen=True, slots=True)
class Thing:
    """`names` are all that it is called by, `name` the one of most mentions."""

    id: UUID
    organization_id: int
    type: str
    name: str
    names: list[str]
    mentions: int


@dataclass(frozen=True, slots=True)
class Edge:
    id: UUID
    from_id: UUID
    predicate: str
    to_id: UUID


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """`truncated`: there is more within this depth."""

    things: list[Thing]
    edges: list[Edge]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Path:
    """The shortest: `things` one more than `edges`; both empty where there is none. `truncated`: not all was searched."""

    things: list[Thing]
    edges: list[Edge]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where a document says so. Offsets are of characters in the chunk's text; `document_offset` is the chunk's begin in the
    document's. `keyframe` is that of a video nearest to the time of the chunk: its storage key and time."""

    document_id: UUID
    document_title: str
    document_kind: str
    position: int
    place: dict[str, Any]
    text: str
    start_offset: int
    end_offset: int
    document_offset: int
    valid_from: str | None
    valid_to: str | None
    valid_start_offset: int | None
    valid_end_offset: int | None
    keyframe: dict[str, Any] | None


def search(
    conn: Connection,
    sees: int | None,
    *,
    words: str | None = None,
    type_: str | None = None,
    after: UUID | None = None,
    limit: int = 50,
) -> list[Thing]:
    """Things by id, of which a name has words that begin with each of these."""
    asked = " & ".join(f"{word}:*" for word in key_of(words).split()) if words is not None else None
    if asked == "":
        return []
    roots = conn.execute(
        "select distinct root_id from agentflow.graph_entities"
        " where (%(organization)s::bigint is null or organization_id = %(organization)s)"
        " and (%(asked)s::text is null or to_tsvector('simple', key) @@ to_tsquery('simple', %(asked)s))"
        " and (%(type)s::text is null or type = %(type)s)"
        " and (%(after)s::uuid is null or root_id > %(after)s) order by root_id limit %(limit)s",
        {"organization": sees, "asked": asked, "type": type_, "after": after, "limit": limit},
    ).fetchall()
    return sorted(_described(conn, sees, [row[0] for row in roots]).values(), key=lambda thing: thing.id)


def get(conn: Connection, sees: int | None, entity_id: UUID) -> Thing | None:
    """The thing with this id, or the one that this was merged into."""
    row = conn.execute(
        "select root_id from agentflow.graph_entities where id = %(id)s"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)",
        {"id": entity_id, "organization": sees},
    ).fetchone()
    return _described(conn, sees, [row[0]])[row[0]] if row else None


def neighbourhood(conn: Connection, thing: Thing, *, depth: int, limit: int) -> Neighbourhood:
    """At most `limit` things beside the first: those of fewer steps first, of the same number by id of their edge."""
    seen = {thing.id}
    frontier = [thing.id]
    edges: dict[tuple[UUID, str, UUID], Edge] = {}
    truncated = False
    for _ in range(depth):
        found, more = _step(conn, thing.organization_id, frontier)
        truncated |= more
        frontier = []
        for edge in found:
            for end in (edge.from_id, edge.to_id):
                if end not in seen and len(seen) <= limit:
                    seen.add(end)
                    frontier.append(end)
            if edge.from_id in seen and edge.to_id in seen:
                edges.setdefault((edge.from_id, edge.predicate, edge.to_id), edge)
            else:
                truncated = True
        if not frontier:
            break
    described = _described(conn, thing.organization_id, seen)
    return Neighbourhood(list(described.values()), list(edges.values()), truncated)


def latest(conn: Connection, sees: int | None, *, limit: int) -> list[tuple[UUID, int]]:
    """The newest documents of which something is in the graph, with their organizations."""
    return conn.execute(
        "select d.id, d.organization_id from (select id, organization_id from agentflow.documents"
        " where (%(organization)s::bigint is null or organization_id = %(organization)s) order by id desc limit %(newest)s) d"
        " where exists (select from agentflow.graph_evidence v"
        "  where v.organization_id = d.organization_id and v.document_id = d.id)"
        " order by d.id desc limit %(limit)s",
        {"organization": sees, "newest": _NEWEST, "limit": limit},
    ).fetchall()


def of_documents(conn: Connection, organization_id: int, document_ids: Sequence[UUID], *, limit: int) -> Neighbourhood:
    """At most `limit` things that these documents speak of, those of most mentions there first, and what they say of them."""
    given = {"organization": organization_id, "documents": list(document_ids)}
    mentioned = conn.execute(
        "select e.root_id from agentflow.graph_mentions m join agentflow.graph_entities e on e.id = m.entity_id"
        " where m.organization_id = %(organization)s and m.document_id = any(%(documents)s)"
        " group by 1 order by count(*) desc, 1 limit %(limit)s",
        {**given, "limit": limit + 1},
    ).fetchall()
    shown = [row[0] for row in mentioned[:limit]]
    rows = conn.execute(
        "select e.id, f.root_id, e.predicate, t.root_id from (select distinct edge_id from agentflow.graph_evidence"
        "  where organization_id = %(organization)s and document_id = any(%(documents)s)) v"
        " join agentflow.graph_edges e on e.id = v.edge_id"
        " join agentflow.graph_entities f on f.id = e.from_id join agentflow.graph_entities t on t.id = e.to_id"
        " where f.root_id <> t.root_id and f.root_id = any(%(shown)s) and t.root_id = any(%(shown)s)"
        " order by e.id limit %(limit)s",
        {**given, "shown": shown, "limit": _MOST_EDGES},
    ).fetchall()
    edges: dict[tuple[UUID, str, UUID], Edge] = {}
    for edge in (Edge(*row) for row in rows):
        edges.setdefault((edge.from_id, edge.predicate, edge.to_id), edge)
    things = _described(conn, organization_id, shown)
    return Neighbourhood(list(things.values()), list(edges.values()), len(mentioned) > limit)


def path(conn: Connection, one: Thing, other: Thing, *, max_length: int) -> Path:
    """Breadth first from the one, whatever the edges' direction."""
    came_by: dict[UUID, Edge | None] = {one.id: None}
    frontier = [one.id]
    truncated = False
    for _ in range(max_length):
        if other.id in came_by or not frontier:
            break
        found, more = _step(conn, one.organization_id, frontier)
        truncated |= more
        before = set(frontier)
        frontier = []
        for edge in found:
            for here, there in ((edge.from_id, edge.to_id), (edge.to_id, edge.from_id)):
                if here in before and there not in came_by:
                    came_by[there] = edge
                    frontier.append(there)
    if other.id not in came_by:
        return Path([], [], truncated)
    ids, edges = [other.id], []
    while (edge_before := came_by[ids[-1]]) is not None:
        edges.append(edge_before)
        ids.append(edge_before.from_id if edge_before.to_id == ids[-1] else edge_before.to_id)
    described = _described(conn, one.organization_id, ids)
    return Path([described[id_] for id_ in reversed(ids)], edges[::-1], False)


def edge(conn: Connection, sees: int | None, edge_id: UUID) -> tuple[Edge, Thing, Thing] | None:
    """An edge and its two things."""
    row = conn.execute(
        "select e.id, f.root_id, e.predicate, t.root_id, e.organization_id from agentflow.graph_edges e"
        " join agentflow.graph_entities f on f.id = e.from_id join agentflow.graph_entities t on t.id = e.to_id"
        " where e.id = %(id)s and (%(organization)s::bigint is null or e.organization_id = %(organization)s)",
        {"id": edge_id, "organization": sees},
    ).fetchone()
    if row is None:
        return None
    found = Edge(*row[:4])
    described = _described(conn, row[4], [found.from_id, found.to_id])
    return found, described[found.from_id], described[found.to_id]


def evidence(conn: Connection, organization_id: int, edge: Edge) -> list[Evidence]:
    """What is behind an edge and all that say the same of the same two, in the order of documents and their text; at most 100."""
    rows = conn.execute(
        "select distinct on (v.document_id, c.position, v.start_offset, v.end_offset)"
        " v.document_id, d.title, d.kind, c.position, c.place, c.text, v.start_offset, v.end_offset, c.start_offset,"
        " v.valid_from, v.valid_to, v.valid_start_offset, v.valid_end_offset, k.keyframe"
        " from agentflow.graph_entities f join agentflow.graph_edges e"
        "  on e.organization_id = %(organization)s and e.from_id = f.id and e.predicate = %(predicate)s"
        " join agentflow.graph_entities t on t.id = e.to_id and t.root_id = %(to)s"
        " join agentflow.graph_evidence v on v.organization_id = %(organization)s and v.edge_id = e.id"
        " join agentflow.documents d on d.id = v.document_id"
        " join agentflow.chunks c on c.organization_id = %(organization)s and c.document_id = v.document_id"
        "  and c.key = v.chunk_key"
        " left join lateral (select k as keyframe from jsonb_array_elements(d.facts->'keyframes') k"
        "  order by abs((k->>'time_s')::float8 - (c.place->>'start_s')::float8) limit 1) k"
        "  on d.kind = 'video' and c.place ? 'start_s'"
        " where f.organization_id = %(organization)s and f.root_id = %(from)s"
        " order by v.document_id, c.position, v.start_offset, v.end_offset limit %(limit)s",
        {
            "organization": organization_id,
            "from": edge.from_id,
            "predicate": edge.predicate,
            "to": edge.to_id,
            "limit": _EVIDENCE_AT_ONCE,
        },
    ).fetchall()
    return [Evidence(*row) for row in rows]


def of_document(
    conn: Connection, organization_id: int, document_id: UUID, *, limit: int
) -> list[tuple[Edge, str, str]]:
    """The first edges, by id, that a document says, each with the names of its two things."""
    rows = conn.execute(
        "select e.id, f.root_id, e.predicate, t.root_id from (select distinct v.edge_id"
        " from agentflow.graph_evidence v where v.document_id = %(document)s and v.organization_id = %(organization)s"
        " order by 1 limit %(limit)s) v join agentflow.graph_edges e on e.id = v.edge_id"
        " join agentflow.graph_entities f on f.id = e.from_id join agentflow.graph_entities t on t.id = e.to_id order by e.id",
        {"document": document_id, "organization": organization_id, "limit": limit},
    ).fetchall()
    edges = [Edge(*row) for row in rows]
    things = _described(conn, organization_id, {end for each in edges for end in (each.from_id, each.to_id)})
    return [(each, things[each.from_id].name, things[each.to_id].name) for each in edges]


def _step(conn: Connection, organization_id: int, roots: Sequence[UUID]) -> tuple[list[Edge], bool]:
    """All edges of these things to others, by id; and whether there are more than are looked at."""
    rows = conn.execute(
        "with members as materialized (select id from agentflow.graph_entities"
        "  where organization_id = %(organization)s and root_id = any(%(roots)s)),"
        " near as (select e.* from members m join agentflow.graph_edges e"
        "   on e.organization_id = %(organization)s and e.from_id = m.id"
        "  union select e.* from members m join agentflow.graph_edges e"
        "   on e.organization_id = %(organization)s and e.to_id = m.id)"
        " select e.id, f.root_id, e.predicate, t.root_id from near e"
        " join agentflow.graph_entities f on f.id = e.from_id join agentflow.graph_entities t on t.id = e.to_id"
        " where f.root_id <> t.root_id order by e.id limit %(limit)s",
        {"organization": organization_id, "roots": list(roots), "limit": _MOST_EDGES + 1},
    ).fetchall()
    return [Edge(*row) for row in rows[:_MOST_EDGES]], len(rows) > _MOST_EDGES


def _described(conn: Connection, sees: int | None, roots: Iterable[UUID]) -> dict[UUID, Thing]:
    """In the order of `roots`."""
    wanted: Collection[UUID] = list(roots)
    rows = conn.execute(
        "select root_id, min(organization_id), min(type),"
        ' array_agg(name order by mentions desc, length(name) desc, name collate "C"), sum(mentions)::integer'
        " from agentflow.graph_entities"
        " where (%(organization)s::bigint is null or organization_id = %(organization)s) and root_id = any(%(roots)s)"
        " group by root_id",
        {"organization": sees, "roots": wanted},
    ).fetchall()
    found = {
        root: Thing(root, organization, type_, names[0], list(dict.fromkeys(names)), mentions)
        for root, organization, type_, names, mentions in rows
    }
    return {root: found[root] for root in wanted if root in found}
