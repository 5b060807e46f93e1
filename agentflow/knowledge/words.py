"""Search by words: the chunks that have the most of a question, rare words weighing more than common ones.

How common a word is, a sample tells. The common ones only weigh: a list of all chunks that have one is long, and says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection

Place = tuple[UUID, int]

#: Of each list, so many take part.
CANDIDATES: Final = 60


@dataclass(frozen=True, slots=True)
class Filters:
    language: str | None = None
    documents: tuple[UUID, ...] = ()

    @property
    def condition(self) -> str:
        """On a chunk `c`; its parameters are `parameters`."""
        language = " and c.language = %(language)s" if self.language is not None else ""
        return language + (" and c.document_id = any (%(documents)s)" if self.documents else "")

    @property
    def parameters(self) -> dict[str, Any]:
        return {"language": self.language, "documents": list(self.documents)}


NO_FILTERS: Final = Filters()

#: What a hit by words must have of the question. ops/bench/retrieval.py finds the same with anything from 0.33 to 0.6.
LEAST_SHARE: Final = 0.4
#: Words of a question that count; what is longer is no question.
_MOST_WORDS: Final = 24
#: The first by their keys, which are hashes: a fair sample, and always the same rows, so that they are in memory.
_SAMPLE: Final = 300
#: A word in more of the sample than this says little about any of them, and looking at all of them takes long.
_COMMON: Final = 6
#: Of those that have the wanted words so many are looked at, in the order of the table.
_LOOKED_AT: Final = 2000
#: Words of which two must meet in a chunk: so many at most, the rarest.
_MEETING: Final = 8
#: With fewer, one of them is enough of the question.
_FEW: Final = 3


def stems(conn: Connection, question: str) -> list[str]:
    """Without those that say nothing, each once, in the question's order."""
    row = conn.execute(
        "select array(select u.lexeme from unnest(to_tsvector('pg_catalog.russian',"
        " regexp_replace(%s, '-(?=\\d)', ' ', 'g'))) u order by u.positions[1] limit %s)",
        (question, _MOST_WORDS),
    ).fetchone()
    return list(row[0]) if row is not None else []


def search(
    conn: Connection, organization_id: int, words: Sequence[str], filters: Filters, least_share: float
) -> dict[Place, float]:
    """The share of the question that each has, the best first; from `least_share` on none is missing, as far as weights can
    be told from a sample."""
    if not words:
        return {}
    seen, sampled, texts = _seen(conn, organization_id, words)
    if not texts:
        return {}
    common = [word for word in words if sampled == _SAMPLE and seen[word] >= _COMMON]
    wanted = _wanted(seen, [word for word in words if word not in common], alone=least_share == 0.0)
    given = {
        **{"organization": organization_id, "words": list(words), "texts": texts, "looked_at": _LOOKED_AT},
        "frequencies": [round(seen[word] / sampled * texts) if seen[word] else None for word in words],
        **{"most": CANDIDATES, "ranked": 4 * CANDIDATES, **filters.parameters},
    }
    query = _WITH_WORDS.replace("/* filters */", filters.condition).encode()
    rows = conn.execute(query, {**given, "wanted": wanted}).fetchall() if wanted else []
    if not rows and common:
        # Only texts with all of them are looked at.
        rows = conn.execute(query, {**given, "wanted": " & ".join(map(_quoted, common))}).fetchall()
    return {(document_id, position): round(share, 4) for document_id, position, share in rows}


def _seen(conn: Connection, organization_id: int, words: Sequence[str]) -> tuple[dict[str, int], int, int]:
    """In how many of a sample each word is, how many it has, and how many there are in all."""
    given = {"organization": organization_id, "words": list(words), "sample": _SAMPLE}
    rows = conn.execute(_SEEN, given).fetchall()
    sampled, last_key = rows[0][2:]
    seen = {row[0]: row[1] for row in rows}
    if sampled < _SAMPLE:
        return seen, sampled, sampled
    # Keys are spread evenly: where the last of the sample stands says how many there are, to about 6 %.
    part = (int.from_bytes(last_key[:8]) + 1) / 2**64
    return seen, sampled, round(sampled / part)


def _wanted(seen: dict[str, int], rare: Sequence[str], *, alone: bool) -> str:
    """What a chunk must have, as a tsquery: a word that the sample does not have, or two of the others. Of three words that
    are about as rare as each other one is less than LEAST_SHARE."""
    if alone or len(rare) < _FEW:
        return " | ".join(map(_quoted, rare))
    wanted = [_quoted(word) for word in rare if not seen[word]]
    others = [_quoted(word) for word in sorted(rare, key=lambda word: seen[word]) if seen[word]][:_MEETING]
    for at, word in enumerate(others[:-1], 1):
        wanted.append(f"{word} & ({' | '.join(others[at:])})")
    return " | ".join(wanted or others)


def _quoted(word: str) -> str:
    """As it stands in a tsquery."""
    return "'" + word.replace("\\", "\\\\").replace("'", "''") + "'"


_SEEN: Final = """
with sample as materialized (
    select c.key, c.lexemes from agentflow.chunks c where c.organization_id = %(organization)s
    order by c.organization_id, c.key limit %(sample)s
)
select w.word, (select count(*) from sample s where s.lexemes @@ w.query), (select count(*) from sample),
    (select s.key from sample s order by s.key desc limit 1)
from (select word, quote_literal(word)::tsquery as query from unnest(%(words)s::text[]) u(word) offset 0) w
"""
#: Weights are inverse document frequencies, as BM25 has them; a word that the sample does not have is counted among the chunks
#: that are looked at, which are all that have it. Of chunks with the same text the first is meant.
_WITH_WORDS: Final = """
with found as materialized (
    select c.document_id, c.position, c.key, c.lexemes from agentflow.chunks c
    where c.organization_id = %(organization)s and c.lexemes @@ %(wanted)s::tsquery /* filters */ limit %(looked_at)s
), words as materialized (
    select nth, quote_literal(word)::tsquery as query, frequency
    from unnest(%(words)s::text[], %(frequencies)s::bigint[]) with ordinality u(word, frequency, nth)
), had as materialized (
    select f.document_id, f.position, f.key, w.nth
    from found f join words w on f.lexemes @@ w.query
), counted as (
    select w.nth, coalesce(w.frequency, (select count(*) from had h where h.nth = w.nth))::float8 as frequency from words w
), weights as materialized (
    select nth, ln(1 + (greatest(%(texts)s, frequency) - frequency + 0.5) / (frequency + 0.5)) as weight from counted
), weighed as (
    select h.document_id, h.position, h.key, sum(w.weight) as weight from had h join weights w using (nth)
    group by h.document_id, h.position, h.key
), best as (
    select distinct on (key) * from weighed order by key, document_id, position
), heaviest as (
    select * from best order by weight desc, document_id, position limit %(ranked)s
)
select t.document_id, t.position, (t.weight / (select sum(weight) from weights))::double precision as share
from heaviest t join found f using (document_id, position)
order by t.weight desc, ts_rank_cd(f.lexemes, %(wanted)s::tsquery, 1) desc, t.document_id, t.position limit %(most)s
"""
