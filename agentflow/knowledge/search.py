"""Search in the knowledge base: by meaning (vectors) and by words (`words`: Postgres full text), fused by reciprocal rank.

Each finds what the other cannot: a question in other words than its answer, and a name or number that means nothing. A list
gives a hit 1 / (60 + rank), as in Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion" (SIGIR 2009). A hit by words counts by
how much of the question it has, rare words more than common ones, and only from a share of that on: of a long question nearly
every text has some word, and should not stand beside the first by meaning for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

from agentflow import log
from agentflow.database import Connection
from agentflow.errors import JobError
from agentflow.knowledge import embedding_models, vector_index, vectors, words
from agentflow.knowledge.embedding import Refused, Unpaid
from agentflow.knowledge.embedding_models import EmbeddingModel
from agentflow.knowledge.words import CANDIDATES, NO_FILTERS, Filters, Place
from agentflow.models.client import Caller

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

Mode = Literal["hybrid", "vector", "text"]

_RANK_OFFSET: Final = 60
#: What the index looks at before it is sure of its nearest, and the most when a filter throws many away.
_BREADTH: Final = 640
_WIDEST: Final = 40_000
#: Private characters around words that are found; in a text itself they are replaced before.
_MARKS: Final = ("\ue000", "\ue001")


class Unsearchable(Exception):
    """Vectors were asked for, and there are none to be had. `lasting`: until somebody does something."""

    def __init__(self, why: str, *, lasting: bool) -> None:
        super().__init__(why)
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk. Ranks count from 1 and are None where that list does not have it; `distance` is 0 (same) to 2, `matched` the
    share of the question's words, the rare ones weighing more; `highlights` are [start, end) in `text`, in characters."""

    document_id: UUID
    source_id: str
    title: str
    kind: str
    position: int
    text: str
    language: str | None
    place: dict[str, Any]
    start_offset: int
    end_offset: int
    score: float
    vector_rank: int | None
    distance: float | None
    text_rank: int | None
    matched: float | None
    highlights: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Found:
    """`model` made the vectors that were compared; `problem` says why a search by both went by words alone."""

    hits: list[Hit]
    model: str | None
    problem: str | None


def search(
    system: System,
    organization_id: int,
    question: str,
    *,
    limit: int = 10,
    filters: Filters = NO_FILTERS,
    mode: Mode = "hybrid",
    caller: Caller | None = None,
) -> Found:
    """The best chunks of an organization for a question, the best first; of chunks with the same text one.

    Where vectors cannot be had (no pgvector, the model's server is away), a hybrid search goes by words and says so; a
    search by vectors raises Unsearchable.
    """
    model: EmbeddingModel | None = None
    by_meaning: dict[Place, float] = {}
    problem = None
    if mode != "text":
        try:
            model, by_meaning = _by_meaning(system, organization_id, question, filters, caller or Unpaid())
        except Unsearchable as error:
            if mode == "vector":
                raise
            problem = str(error)
    by_words: dict[Place, float] = {}
    with system.database.transaction() as conn:
        stems = words.stems(conn, question)
        least_share = words.LEAST_SHARE if by_meaning else 0.0
        if mode != "vector":
            by_words = words.search(conn, organization_id, stems, filters, least_share)
        ranked = fused(by_meaning, by_words, least_share)
        hits = _hits(conn, organization_id, [place for place, _ in ranked[: 2 * limit]], stems)
    chosen = []
    seen: set[str] = set()
    vector_ranks, text_ranks = _ranks(by_meaning), _ranks(by_words)
    for place, score in ranked[: 2 * limit]:
        row = hits.get(place)  # None: deleted in this moment
        if row is not None and row["text"] not in seen:
            seen.add(row["text"])
            chosen.append(
                Hit(
                    **row,
                    score=round(score, 6),
                    vector_rank=vector_ranks.get(place),
                    distance=by_meaning.get(place),
                    text_rank=text_ranks.get(place),
                    matched=by_words.get(place),
                )
            )
    return Found(chosen[:limit], model.title if model else None, problem)


def fused(
    by_meaning: Mapping[Place, float], by_words: Mapping[Place, float], least_share: float = words.LEAST_SHARE
) -> list[tuple[Place, float]]:
    """Both lists, each in its order, as one. Values of the second are shares of the question, 0 to 1."""
    scores: dict[Place, float] = {}
    for place, rank in _ranks(by_meaning).items():
        scores[place] = 1 / (_RANK_OFFSET + rank)
    for place, rank in _ranks(by_words).items():
        if by_words[place] >= least_share:
            scores[place] = scores.get(place, 0.0) + by_words[place] / (_RANK_OFFSET + rank)
    # Of two with the same score, the one that has the words.
    return sorted(scores.items(), key=lambda item: (-item[1], -by_words.get(item[0], 0.0), item[0]))


def _ranks(places: Iterable[Place]) -> dict[Place, int]:
    return {place: rank for rank, place in enumerate(places, 1)}


# ---- by meaning ----


def _by_meaning(
    system: System, organization_id: int, question: str, filters: Filters, caller: Caller
) -> tuple[EmbeddingModel | None, dict[Place, float]]:
    """Distances, the nearest first. Raises Unsearchable."""
    while True:
        with system.database.connection() as conn:
            if why := vectors.why_not(conn):
                raise Unsearchable(str(vectors.NoVectors(why)), lasting=True)
            model = embedding_models.of_state(conn, "active")
        if model is None:
            return None, {}  # nothing was ever indexed
        try:
            vector = system.embeddings.question(caller, model, question)
        except JobError as error:
            logger.warning("a question got no vector", model=model.title, code=error.code)
            raise Unsearchable(f"{model.title}: {error}", lasting=error.code == "not_configured") from error
        if isinstance(vector, Refused):
            raise Unsearchable(f"{model.title}: {vector.message}", lasting=True)
        with system.database.transaction() as conn:
            found = _nearest(conn, organization_id, model, vector, filters)
            if len(found) == CANDIDATES or embedding_models.of_state(conn, "active") == model:
                return model, found
        # Else another model took its place meanwhile, and its vectors are being deleted.


def _nearest(
    conn: Connection, organization_id: int, model: EmbeddingModel, vector: str, filters: Filters
) -> dict[Place, float]:
    given = {"organization": organization_id, "vector": vector, "most": CANDIDATES, **filters.parameters}
    if _prepare(conn, organization_id, model) and not filters.documents:
        near = _read(conn, _nearest_query(organization_id, model, filters, by_index=True), given)
        if len(near) == CANDIDATES or filters == NO_FILTERS:
            return near
    # Exact: of few vectors, of some documents, or in a language that is rare here.
    return _read(conn, _nearest_query(organization_id, model, filters, by_index=False), given)


def _prepare(conn: Connection, organization_id: int, model: EmbeddingModel) -> bool:
    """Set the transaction up; whether there is an index. With sorting made dear, the index is used even where the planner
    believes that sorting all vectors is cheaper."""
    vector_index.find_types(conn)
    conn.execute(
        "select set_config('hnsw.ef_search', %s, true), set_config('hnsw.iterative_scan', 'strict_order', true),"
        " set_config('hnsw.max_scan_tuples', %s, true), set_config('enable_sort', 'off', true)",
        (str(_BREADTH), str(_WIDEST)),
    )
    return vector_index.exists(conn, organization_id, model.id)


def _nearest_query(organization_id: int, model: EmbeddingModel, filters: Filters, *, by_index: bool) -> str:
    """Places and distances; of chunks with the same text the first is meant.

    Numbers stand in the text itself: the index is for these alone, and the planner has to see that they are meant. Without
    the cast no index fits, and all are looked at. Places are sorted as a pair, which no index is in the order of: where sorting
    is dear, all chunks would be gone through in that order.
    """
    vector = f"v.vector::halfvec({model.dimensions:d})" if by_index else "v.vector"
    chunk = f"c.organization_id = %(organization)s and c.key = v.chunk_key{filters.condition}"
    matching = f" and exists (select from agentflow.chunks c where {chunk})" if filters.condition else ""
    return f"""
with near as materialized (
    select v.chunk_key, {vector} <=> %(vector)s::halfvec({model.dimensions:d}) as distance
    from agentflow.vectors v
    where v.organization_id = {organization_id:d} and v.model_id = {model.id:d} and v.vector is not null{matching}
        and v.organization_id = %(organization)s
    order by distance limit %(most)s
)
select first.document_id, first.position, v.distance from near v cross join lateral (
    select c.document_id, c.position from agentflow.chunks c where {chunk} order by (c.document_id, c.position) limit 1
) first order by v.distance
"""  # noqa: S608 - numbers, and conditions of ours


def _read(conn: Connection, query: str, given: Mapping[str, Any]) -> dict[Place, float]:
    # Not prepared: a plan for any organization would have to do without the index of one.
    rows = conn.execute(query.encode(), given, prepare=False).fetchall()
    return {(document_id, position): float(distance) for document_id, position, distance in rows}


# ---- what is shown ----


def _hits(
    conn: Connection, organization_id: int, places: Sequence[Place], stems: Sequence[str]
) -> dict[Place, dict[str, Any]]:
    """The rest of each hit, by place. Words are marked by Postgres, which knows their stems; offsets are made of the marks."""
    rows = conn.execute(
        "select d.id, d.source_id, d.title, d.kind, c.position, c.text, c.language, c.place, c.start_offset, c.end_offset,"
        " ts_headline('pg_catalog.russian', regexp_replace(translate(c.text, %(marks)s, '??'), '-(?=\\d)', ' ', 'g'),"
        " (select coalesce(string_agg(quote_literal(w), ' | '), '') from unnest(%(words)s::text[]) w)::tsquery,"
        " %(options)s) from unnest(%(documents)s::uuid[], %(positions)s::integer[]) p(document_id, position)"
        " join agentflow.chunks c on c.document_id = p.document_id and c.position = p.position"
        " join agentflow.documents d on d.id = c.document_id where c.organization_id = %(organization)s",
        {
            "organization": organization_id,
            "words": list(stems),
            "marks": "".join(_MARKS),
            "options": f"HighlightAll=true, StartSel={_MARKS[0]}, StopSel={_MARKS[1]}",
            "documents": [place[0] for place in places],
            "positions": [place[1] for place in places],
        },
    ).fetchall()
    names = ("document_id", "source_id", "title", "kind", "position", "text", "language", "place")
    found = {}
    for row in rows:
        marked = row[10]
        shown = dict(zip((*names, "start_offset", "end_offset"), row[:10], strict=True))
        found[row[0], row[4]] = {**shown, "highlights": highlights(marked)}
    return found


def highlights(marked: str) -> list[tuple[int, int]]:
    """Where the marked words stand in the text without its marks."""
    found: list[tuple[int, int]] = []
    length = 0
    for piece in marked.split(_MARKS[0]):
        word, ended, rest = piece.partition(_MARKS[1])
        if ended:
            found.append((length, length + len(word)))
        length += len(word) + len(rest)
    return found
