"""Which entities may mean the same, what was decided of them, and how to take that back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID, uuid5

from agentflow.database import Connection
from agentflow.knowledge import graph
from agentflow.knowledge.clusters import Match, Member

DecidedBy = Literal["names", "model", "person"]

_NAMESPACE: Final = UUID("0197a3c0-5d0e-7a51-9b2f-3f1f6c2b7d48")
#: So many of the nearest are looked at for each entity.
_NEAREST: Final = 32
_QUOTE_CHARS: Final = 300
#: Neighbours by embedding are looked for among so many entities of a type: a scan, a few milliseconds.
_MOST_SCANNED: Final = 5000


@dataclass(frozen=True, slots=True)
class Merge:
    """Two entities that were taken for one. `undone`: a person said that they are not."""

    id: UUID
    organization_id: int
    one: Member
    other: Member
    decided_by: DecidedBy
    undone: bool
    decided_at: datetime


def match_id(one: UUID, other: UUID) -> UUID:
    return uuid5(_NAMESPACE, f"{min(one, other)}\n{max(one, other)}")


def near_pairs(conn: Connection, organization_id: int, document_id: UUID) -> list[tuple[Member, Member]]:
    """Each entity of the document with those whose names look like its own, each pair once, the first by id first."""
    mine = conn.execute(
        "select e.id, e.type, e.name, e.near from agentflow.graph_entities e where e.organization_id = %(organization)s"
        " and e.id in (select m.entity_id from agentflow.graph_mentions m"
        "  where m.organization_id = %(organization)s and m.document_id = %(document)s)",
        {"organization": organization_id, "document": document_id},
    ).fetchall()
    pairs = set()
    # One by one: of keys that it does not see, as in a join, the planner thinks that a hundredth of the table has them.
    for id_, type_, name, near in mine:
        rows = conn.execute(
            "select o.id, o.type, o.name from agentflow.graph_entities o"
            " where o.organization_id = %(organization)s and o.near && %(near)s::bigint[]"
            " and o.type = %(type)s and o.id <> %(id)s"
            " order by (select count(*) from unnest(o.near) k where k = any(%(near)s::bigint[])) desc, o.id limit %(nearest)s",
            {"organization": organization_id, "near": near, "type": type_, "id": id_, "nearest": _NEAREST},
        ).fetchall()
        pairs |= {_ordered(Member(id_, type_, name), Member(*row)) for row in rows}
    return sorted(pairs, key=lambda pair: (pair[0].id, pair[1].id))


def decided(conn: Connection, organization_id: int, pairs: Collection[tuple[Member, Member]]) -> set[UUID]:
    """The ids of the matches among these pairs of which something was decided already."""
    rows = conn.execute(
        "select id from agentflow.graph_matches where organization_id = %s and id = any(%s)",
        (organization_id, [match_id(one.id, other.id) for one, other in pairs]),
    ).fetchall()
    return {row[0] for row in rows}


def quotes(conn: Connection, organization_id: int, entity_ids: Collection[UUID]) -> dict[UUID, str]:
    """Where each of them is mentioned: the shortest quote."""
    rows = conn.execute(
        "select distinct on (m.entity_id) m.entity_id,"
        " substr(c.text, m.start_offset + 1, least(m.end_offset - m.start_offset, %(most)s))"
        " from agentflow.graph_mentions m join agentflow.chunks c on c.organization_id = m.organization_id"
        " and c.document_id = m.document_id and c.key = m.chunk_key"
        " where m.organization_id = %(organization)s and m.entity_id = any(%(ids)s)"
        " order by m.entity_id, m.end_offset - m.start_offset, m.document_id, m.chunk_key, m.start_offset",
        {"organization": organization_id, "ids": list(entity_ids), "most": _QUOTE_CHARS},
    ).fetchall()
    return dict(rows)


def decide(conn: Connection, organization_id: int, found: Sequence[tuple[Match, DecidedBy]]) -> None:
    """Keep what was decided. What was decided before stays, first of all what a person has undone."""
    graph.lock(conn, organization_id)
    rows = [(match_id(m.one_id, m.other_id), m.one_id, m.other_id, m.same, m.weak, by) for m, by in found]
    conn.execute(
        "insert into agentflow.graph_matches (organization_id, id, one_id, other_id, same, weak, decided_by)"
        " select %s, n.* from unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::boolean[], %s::boolean[], %s::text[]) n"
        # One of the two may be gone by now, with the document that had it.
        "(id, one_id, other_id, same, weak, decided_by) where (select count(*) from agentflow.graph_entities e"
        " where e.organization_id = %s and e.id in (n.one_id, n.other_id)) = 2"
        " on conflict (id) do nothing",
        (organization_id, *([row[n] for row in rows] for n in range(6)), organization_id),
    )
    graph.refresh(conn, organization_id, {id_ for match, _ in found for id_ in (match.one_id, match.other_id)})


def merges(conn: Connection, sees: int | None, *, after: UUID | None = None, limit: int = 50) -> list[Merge]:
    """By id. `sees` None: of all organizations."""
    return _merges(conn, sees, None, after, limit)


def set_same(conn: Connection, sees: int | None, merge_id: UUID, same: bool) -> Merge | None:
    """A person's word: they mean the same, or not. No run of a job says otherwise later. None: there is no such merge."""
    found = _merges(conn, sees, merge_id, None, 1)
    if not found:
        return None
    merge = found[0]
    graph.lock(conn, merge.organization_id)
    conn.execute(
        "update agentflow.graph_matches set same = %s, weak = false, decided_by = 'person', decided_at = clock_timestamp()"
        " where organization_id = %s and id = %s",
        (same, merge.organization_id, merge_id),
    )
    graph.refresh(conn, merge.organization_id, {merge.one.id, merge.other.id})
    return _merges(conn, merge.organization_id, merge_id, None, 1)[0]


def _merges(conn: Connection, sees: int | None, merge_id: UUID | None, after: UUID | None, limit: int) -> list[Merge]:
    rows = conn.execute(
        "select m.id, m.organization_id, a.id, a.type, a.name, b.id, b.type, b.name, m.decided_by, not m.same, m.decided_at"
        " from agentflow.graph_matches m join agentflow.graph_entities a on a.id = m.one_id"
        " join agentflow.graph_entities b on b.id = m.other_id"
        " where (%(organization)s::bigint is null or m.organization_id = %(organization)s)"
        " and (m.same or m.decided_by = 'person')"
        " and (%(id)s::uuid is null or m.id = %(id)s) and (%(after)s::uuid is null or m.id > %(after)s)"
        " order by m.id limit %(limit)s",
        {"organization": sees, "id": merge_id, "after": after, "limit": limit},
    ).fetchall()
    return [Merge(row[0], row[1], Member(*row[2:5]), Member(*row[5:8]), *row[8:]) for row in rows]


def _ordered(one: Member, other: Member) -> tuple[Member, Member]:
    return (one, other) if one.id < other.id else (other, one)


# ---- embeddings of names ----


def without_embedding(conn: Connection, organization_id: int, document_id: UUID, embedder: str) -> list[Member]:
    """The document's entities whose names this embedder has not seen."""
    rows = conn.execute(
        "select distinct e.id, e.type, e.name from agentflow.graph_mentions m"
        " join agentflow.graph_entities e on e.id = m.entity_id"
        " where m.organization_id = %s and m.document_id = %s and e.embedder is distinct from %s order by e.id",
        (organization_id, document_id, embedder),
    ).fetchall()
    return [Member(*row) for row in rows]


def keep_embeddings(conn: Connection, organization_id: int, embedder: str, vectors: dict[UUID, bytes]) -> None:
    conn.execute(
        "update agentflow.graph_entities e set embedding = v.embedding, embedder = %s"
        " from unnest(%s::uuid[], %s::bytea[]) v(id, embedding) where e.organization_id = %s and e.id = v.id",
        (embedder, list(vectors.keys()), list(vectors.values()), organization_id),
    )


def embedded(
    conn: Connection, organization_id: int, document_id: UUID, embedder: str
) -> list[tuple[Member, bytes, bool]]:
    """Entities of the types that the document has, with their embeddings, and whether it mentions them; its own first."""
    rows = conn.execute(
        "with mine as (select distinct entity_id as id from agentflow.graph_mentions"
        "  where organization_id = %(organization)s and document_id = %(document)s)"
        " select e.id, e.type, e.name, e.embedding, e.id in (select id from mine) from agentflow.graph_entities e"
        " where e.organization_id = %(organization)s and e.embedder = %(embedder)s and e.type in ("
        "  select t.type from mine join agentflow.graph_entities t on t.id = mine.id)"
        " order by 5 desc, e.mentions desc, e.id limit %(limit)s",
        {
            "organization": organization_id,
            "document": document_id,
            "embedder": embedder,
            "limit": _MOST_SCANNED,
        },
    ).fetchall()
    return [(Member(*row[:3]), bytes(row[3]), row[4]) for row in rows]
