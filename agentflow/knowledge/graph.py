"""The rows of the graph: what a document says goes in whole, or goes away whole.

All ids are made of the content. Writing the same facts again changes nothing, and a document that is gone leaves the graph as
if it had never been there, but for what people have decided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID, uuid5

from agentflow.database import Connection
from agentflow.knowledge import clusters
from agentflow.knowledge.clusters import Match, Member
from agentflow.knowledge.matching import near_keys
from agentflow.knowledge.names import key_of

_NAMESPACE: Final = UUID("0197a3c0-5d0e-7a51-9b2f-3f1f6c2b7d47")
#: How many decisions away from what was changed groups are looked at. Real ones are two or three wide.
_MOST_ROUNDS: Final = 50


@dataclass(frozen=True, slots=True)
class Entity:
    type: str
    name: str


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a chunk's text, found there: [start, end) in characters."""

    chunk_key: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when something is so: year, month or day in ISO 8601, each possibly open; and where the text says it."""

    valid_from: str | None
    valid_to: str | None
    span: Span


@dataclass(frozen=True, slots=True)
class Mention:
    entity: Entity
    span: Span


@dataclass(frozen=True, slots=True)
class Relation:
    """Both entities must be mentioned in the same document."""

    one: Entity
    predicate: str
    other: Entity
    span: Span
    validity: Validity | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    key: bytes
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Source:
    """A document, as far as the graph needs it. `chunks` in reading order, equal ones once."""

    id: UUID
    organization_id: int
    title: str
    chunks: tuple[Chunk, ...]


def entity_id(organization_id: int, entity: Entity) -> UUID:
    return uuid5(_NAMESPACE, f"{organization_id}\n{entity.type}\n{key_of(entity.name)}")


def edge_id(from_id: UUID, predicate: str, to_id: UUID) -> UUID:
    return uuid5(_NAMESPACE, f"{from_id}\n{predicate}\n{to_id}")


def organization_of(conn: Connection, sees: int | None, document_id: UUID) -> int | None:
    """Whose document it is; None where there is none (a `sees` of None: anybody's)."""
    row = conn.execute(
        "select organization_id from agentflow.documents where id = %(id)s"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)",
        {"id": document_id, "organization": sees},
    ).fetchone()
    return int(row[0]) if row else None


def read_source(conn: Connection, organization_id: int, document_id: UUID) -> Source | None:
    document = conn.execute(
        "select title from agentflow.documents where organization_id = %s and id = %s", (organization_id, document_id)
    ).fetchone()
    if document is None:
        return None
    rows = conn.execute(
        "select key, text, tokens from agentflow.chunks where organization_id = %s and document_id = %s order by position",
        (organization_id, document_id),
    ).fetchall()
    chunks = {bytes(key): Chunk(bytes(key), text, tokens) for key, text, tokens in reversed(rows)}
    return Source(document_id, organization_id, document[0], tuple(reversed(chunks.values())))


# ---- writing ----


def store(
    conn: Connection,
    source: Source,
    mentions: Collection[Mention],
    relations: Collection[Relation],
    *,
    unread: Collection[bytes] = (),
) -> Literal["stored", "gone", "changed"]:
    """These are the facts of the document, in place of those that it had; what it had of the chunks `unread` stays.

    Nothing is written where the document is gone, or has other chunks by now.
    """
    organization = source.organization_id
    lock(conn, organization)
    now = read_source(conn, organization, source.id)
    if now is None:
        return "gone"
    if now.chunks != source.chunks:
        return "changed"
    before = _entities_of(conn, organization, source.id)
    _write_entities(conn, organization, {mention.entity for mention in mentions})
    _write_mentions(conn, source, mentions, list(unread))
    _write_edges(conn, source, relations, list(unread))
    refresh(conn, organization, before | _entities_of(conn, organization, source.id))
    return "stored"


def forget_document(conn: Connection, organization_id: int, document_id: UUID) -> None:
    """Take the document's facts out of the graph, in the transaction that deletes it (before, or it leaves no trace of them)."""
    lock(conn, organization_id)
    touched = _entities_of(conn, organization_id, document_id)
    for table in ("graph_evidence", "graph_mentions"):  # triggers take edges and entities along that nothing is left of
        conn.execute(
            f"delete from agentflow.{table} where organization_id = %s and document_id = %s",  # noqa: S608 - constants
            (organization_id, document_id),
        )
    refresh(conn, organization_id, touched)


def forget_passages(conn: Connection, organization_id: int, document_id: UUID, reworded: Collection[bytes]) -> None:
    """Take out what stood in chunks that the document no longer has, and in those `reworded`, where its offsets mean other
    words now. In the transaction that changed them, which has taken `lock` before it locked the document."""
    touched = _entities_of(conn, organization_id, document_id)
    for table in ("graph_evidence", "graph_mentions"):
        conn.execute(
            f"delete from agentflow.{table} f where f.organization_id = %s and f.document_id = %s"  # noqa: S608 - constants
            " and (f.chunk_key = any(%s) or not exists (select from agentflow.chunks c"
            " where c.organization_id = f.organization_id and c.document_id = f.document_id and c.key = f.chunk_key))",
            (organization_id, document_id, list(reworded)),
        )
    refresh(conn, organization_id, touched)


def refresh(conn: Connection, organization_id: int, entity_ids: Iterable[UUID]) -> None:
    """Bring names, numbers of mentions and groups up to date around these entities, some of which may be gone."""
    ids = sorted(entity_ids)
    conn.execute("select agentflow.graph_recount_1(%s, %s)", (organization_id, ids))
    members, matches = _around(conn, organization_id, ids)
    roots = clusters.roots(members, matches)
    conn.execute(
        "update agentflow.graph_entities e set root_id = r.root_id from unnest(%s::uuid[], %s::uuid[]) r(id, root_id)"
        " where e.organization_id = %s and e.id = r.id and e.root_id <> r.root_id",
        (list(roots.keys()), list(roots.values()), organization_id),
    )


def lock(conn: Connection, organization_id: int) -> None:
    """Until the transaction ends: groups are made of what all writers have written."""
    conn.execute("select agentflow.graph_lock_1(%s)", (organization_id,))


def _entities_of(conn: Connection, organization_id: int, document_id: UUID) -> set[UUID]:
    """The document's entities, and all that mean the same as one of them."""
    rows = conn.execute(
        "select e.id from agentflow.graph_entities e where e.organization_id = %(organization)s and e.root_id in ("
        " select r.root_id from agentflow.graph_mentions m join agentflow.graph_entities r on r.id = m.entity_id"
        " where m.organization_id = %(organization)s and m.document_id = %(document)s)",
        {"organization": organization_id, "document": document_id},
    ).fetchall()
    return {row[0] for row in rows}


def _write_entities(conn: Connection, organization_id: int, entities: set[Entity]) -> None:
    by_id = {entity_id(organization_id, entity): entity for entity in sorted(entities, key=lambda e: (e.type, e.name))}
    known = conn.execute(
        "select id from agentflow.graph_entities where organization_id = %s and id = any(%s)",
        (organization_id, list(by_id)),
    ).fetchall()
    for (id_,) in known:
        del by_id[id_]
    rows = [
        (
            id_,
            e.type,
            key_of(e.name),
            e.name,
            "{" + ",".join(map(str, near_keys(organization_id, e.type, e.name))) + "}",
        )
        for id_, e in by_id.items()
    ]
    conn.execute(
        "insert into agentflow.graph_entities (organization_id, id, type, key, name, root_id, near)"
        " select %s, n.id, n.type, n.key, n.name, n.id, n.near::bigint[]"
        " from unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[]) n(id, type, key, name, near)",
        (organization_id, *_columns(rows, 5)),
    )


def _write_mentions(conn: Connection, source: Source, mentions: Collection[Mention], unread: list[bytes]) -> None:
    organization = source.organization_id
    rows = [
        (entity_id(organization, m.entity), m.span.chunk_key, m.span.start, m.span.end, m.entity.name) for m in mentions
    ]
    values = {"organization": organization, "document": source.id, "unread": unread}
    values |= dict(zip(("entities", "chunks", "starts", "ends", "names"), _columns(rows, 5), strict=True))
    wanted = "unnest(%(entities)s::uuid[], %(chunks)s::bytea[], %(starts)s::integer[], %(ends)s::integer[]"
    conn.execute(
        "insert into agentflow.graph_mentions"  # noqa: S608 - constants
        " (organization_id, document_id, entity_id, chunk_key, start_offset, end_offset, name)"
        f" select %(organization)s, %(document)s, w.* from {wanted}, %(names)s::text[]) w"
        " on conflict (document_id, chunk_key, entity_id, start_offset, end_offset) do nothing",
        values,
    )
    conn.execute(
        "delete from agentflow.graph_mentions m"  # noqa: S608 - constants
        " where m.organization_id = %(organization)s and m.document_id = %(document)s"
        " and m.chunk_key <> all(%(unread)s::bytea[])"
        f" and (entity_id, chunk_key, start_offset, end_offset) not in (select * from {wanted}) w)",
        values,
    )


def _write_edges(conn: Connection, source: Source, relations: Collection[Relation], unread: list[bytes]) -> None:
    organization = source.organization_id
    edges, evidence = {}, []
    for relation in relations:
        one, other = (entity_id(organization, entity) for entity in (relation.one, relation.other))
        id_ = edge_id(one, relation.predicate, other)
        edges[id_] = (id_, one, relation.predicate, other)
        validity, span = relation.validity, relation.span
        when = (
            (validity.valid_from, validity.valid_to, validity.span.start, validity.span.end)
            if validity
            else (None,) * 4
        )
        evidence.append((id_, span.chunk_key, span.start, span.end, *when))
    conn.execute(
        "insert into agentflow.graph_edges (organization_id, id, from_id, predicate, to_id)"
        " select %s, n.* from unnest(%s::uuid[], %s::uuid[], %s::text[], %s::uuid[]) n on conflict (id) do nothing",
        (organization, *_columns(list(edges.values()), 4)),
    )
    names = ("edges", "chunks", "starts", "ends", "valid_froms", "valid_tos", "valid_starts", "valid_ends")
    values = {"organization": organization, "document": source.id, "unread": unread}
    values |= dict(zip(names, _columns(evidence, 8), strict=True))
    wanted = "unnest(%(edges)s::uuid[], %(chunks)s::bytea[], %(starts)s::integer[], %(ends)s::integer[]"
    conn.execute(
        "insert into agentflow.graph_evidence (organization_id, document_id, edge_id, chunk_key, start_offset, end_offset,"  # noqa: S608
        " valid_from, valid_to, valid_start_offset, valid_end_offset)"
        f" select %(organization)s, %(document)s, w.* from {wanted}, %(valid_froms)s::text[], %(valid_tos)s::text[],"
        " %(valid_starts)s::integer[], %(valid_ends)s::integer[]) w"
        " on conflict (document_id, chunk_key, edge_id, start_offset, end_offset) do update set"
        " valid_from = excluded.valid_from, valid_to = excluded.valid_to,"
        " valid_start_offset = excluded.valid_start_offset, valid_end_offset = excluded.valid_end_offset",
        values,
    )
    conn.execute(
        "delete from agentflow.graph_evidence v"  # noqa: S608 - constants
        " where v.organization_id = %(organization)s and v.document_id = %(document)s"
        " and v.chunk_key <> all(%(unread)s::bytea[])"
        f" and (edge_id, chunk_key, start_offset, end_offset) not in (select * from {wanted}) w)",
        values,
    )


def _columns(rows: Sequence[Sequence[object]], width: int) -> list[list[object]]:
    return [[row[n] for row in rows] for n in range(width)]


def _around(conn: Connection, organization_id: int, ids: Sequence[UUID]) -> tuple[list[Member], set[Match]]:
    """The entities that these may mean the same with, however far, and all that was decided of them."""
    seen: set[UUID] = set()
    matches: set[Match] = set()
    frontier = set(ids)
    for _ in range(_MOST_ROUNDS):
        if not frontier:
            break
        rows = conn.execute(
            "select one_id, other_id, same, weak from agentflow.graph_matches"
            " where organization_id = %(organization)s and (one_id = any(%(ids)s) or other_id = any(%(ids)s))",
            {"organization": organization_id, "ids": sorted(frontier)},
        ).fetchall()
        matches |= {Match(*row) for row in rows}
        seen |= frontier
        frontier = {id_ for row in rows if row[2] for id_ in row[:2]} - seen
    members = conn.execute(
        "select id, type, name from agentflow.graph_entities where organization_id = %s and id = any(%s)",
        (organization_id, sorted(seen)),
    ).fetchall()
    return [Member(*row) for row in members], matches
