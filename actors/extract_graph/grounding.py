"""What a model found, as far as the text bears it out: every fact has its place in the text, or is dropped and counted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from actors.extract_graph.reading import Found, FoundEntity, FoundRelation
from agentflow.jobs.text import is_storable
from agentflow.knowledge import matching
from agentflow.knowledge.graph import Chunk, Entity, Mention, Relation, Span, Validity
from agentflow.knowledge.graph_types import GraphTypes
from agentflow.knowledge.names import key_of

_ELLIPSES: Final = re.compile(r"^[\s.…]+|[\s…]+$|\.{2,}$")
#: Models write these as they like, and mean what stands in the text.
_ALIKE: Final = ("\"'«»“”„‘’`", "-‐‑‒–—−")
_DATE: Final = re.compile(r"([0-9]{4})(?:-(?:0[1-9]|1[0-2])(?:-(?:0[1-9]|[12][0-9]|3[01]))?)?")
_MOST_NAME_CHARS: Final = 200


class _Unfounded(Exception):
    """The text does not bear a fact out; the word says why."""


class Grounding:
    """Gathers the facts of one document. `dropped` counts by reason what the text does not bear out."""

    def __init__(self, types: GraphTypes) -> None:
        self.types: Final = types
        self.mentions: set[Mention] = set()
        self.dropped: Counter[str] = Counter()
        self._relations: dict[tuple[Entity, str, Entity, Span], Relation] = {}
        self._nearby: defaultdict[bytes, set[Entity]] = defaultdict(set)

    @property
    def relations(self) -> list[Relation]:
        return list(self._relations.values())

    def add(self, chunks: Sequence[Chunk], found: Found) -> None:
        """The facts that were found in these chunks, which the model saw as passages 1, 2, 3 …"""
        for entity in found.entities:
            try:
                mention = self._mention(chunks, entity)
            except _Unfounded as reason:
                self.dropped[str(reason)] += 1
            else:
                self.mentions.add(mention)
                self._nearby[mention.span.chunk_key].add(mention.entity)
        for each in found.relations:
            try:
                relation = self._relation(chunks, each)
            except _Unfounded as reason:
                self.dropped[str(reason)] += 1
            else:
                self._relations[relation.one, relation.predicate, relation.other, relation.span] = relation

    def _mention(self, chunks: Sequence[Chunk], found: FoundEntity) -> Mention:
        if found.type not in self.types.entity_names:
            raise _Unfounded("unknown_type")
        if not key_of(found.name) or len(found.name) > _MOST_NAME_CHARS or not is_storable(found.name):
            raise _Unfounded("no_name")
        chunk, span = _located(chunks, found.quote, found.passage, found.start)
        quote = chunk.text[span.start : span.end]
        if not matching.occurs(found.type, found.name, quote):
            raise _Unfounded("name_not_in_quote")
        return Mention(Entity(found.type, _as_spelled(found.name, quote)), span)

    def _relation(self, chunks: Sequence[Chunk], found: FoundRelation) -> Relation:
        if found.predicate not in self.types.relation_names:
            raise _Unfounded("unknown_type")
        chunk, span = _located(chunks, found.quote, found.passage, found.start)
        # Of several with one name (a person and a company), the one that this chunk speaks of.
        one, other = (_named(name, self._nearby[chunk.key]) for name in (found.subject, found.object))
        if one is None or other is None or one == other:
            raise _Unfounded("end_not_in_text")
        quote = chunk.text[span.start : span.end]
        if not any(matching.occurs(entity.type, entity.name, quote) for entity in (one, other)):
            raise _Unfounded("name_not_in_quote")
        try:
            validity = _validity(chunk, found)
        except _Unfounded:
            self.dropped["date_not_in_text"] += 1
            validity = None
        return Relation(one, found.predicate, other, span, validity)


def _validity(chunk: Chunk, found: FoundRelation) -> Validity | None:
    """Only what can be read off: the quote has to hold the years."""
    begin, end = found.valid_from or None, found.valid_to or None
    if begin is None and end is None:
        return None
    _, span = _located([chunk], found.valid_quote or "", 1, -1)
    quote = chunk.text[span.start : span.end]
    for date in (begin, end):
        if date is not None and not ((parsed := _DATE.fullmatch(date)) and parsed[1] in quote):
            raise _Unfounded("date_not_in_text")
    if begin and end and end < begin[: len(end)]:
        raise _Unfounded("date_not_in_text")
    return Validity(begin, end, span)


def find(text: str, quote: str, near: int = 0) -> tuple[int, int] | None:
    """Where the quote stands in the text, [start, end); of several places the one nearest to `near`. None: nowhere.

    Any white space stands for any other, any quotation mark and dash for any other; words have to be whole.
    """
    words = _ELLIPSES.sub("", quote).split()
    if not words:
        return None
    pattern = r"\s+".join("".join(map(_pattern, word)) for word in words)
    before, after = (r"(?<!\w)" if words[0][0].isalnum() else "", r"(?!\w)" if words[-1][-1].isalnum() else "")
    places = [match.span() for match in re.finditer(before + pattern + after, text)]
    return min(places, key=lambda place: abs(place[0] - near), default=None)


def _pattern(letter: str) -> str:
    alike = next((letters for letters in _ALIKE if letter in letters), None)
    return f"[{re.escape(alike)}]" if alike else re.escape(letter)


def _located(chunks: Sequence[Chunk], quote: str, passage: int, start: int) -> tuple[Chunk, Span]:
    """The passage that the model names first: it only hints, like the offset."""
    named = passage - 1
    for number in sorted(range(len(chunks)), key=lambda n: (abs(n - named), n)):
        place = find(chunks[number].text, quote, max(0, start) if number == named else 0)
        if place is not None:
            return chunks[number], Span(chunks[number].key, *place)
    raise _Unfounded("quote_not_in_text")


def _as_spelled(name: str, quote: str) -> str:
    """The name as the text has it, where that is but another spelling."""
    name = " ".join(name.split())
    place = find(quote.casefold(), name.casefold()) if len(quote.casefold()) == len(quote) else None
    spelled = " ".join(quote[slice(*place)].split()) if place else name
    return spelled if key_of(spelled) == key_of(name) else name


def _named(name: str, entities: Iterable[Entity]) -> Entity | None:
    """The entity that a relation calls by this name, perhaps in another form. None: there is none, or it is not clear which."""
    entities = sorted(entities, key=lambda entity: (entity.type, entity.name))
    key = key_of(name)
    for entity in entities:
        if key_of(entity.name) == key:
            return entity
    alike = [e for e in entities if matching.compare(e.type, e.name, name) in ("same", "weak")]
    return alike[0] if len(alike) == 1 else None
