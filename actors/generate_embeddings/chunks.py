"""A document's text, and the pieces of it that are found.

A chunk never crosses a heading, a page, a slide, a sheet or a part: what changes on one page changes that page's chunks alone.
Within such a section it ends where a paragraph or a sentence ends, chosen by the content around and not by counting from the
start, so that an insertion moves few of the cuts after it. A table's header is written again above the first row of each chunk,
into the document's own text: `text[start:end]` is the chunk, to the letter.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from actors.generate_embeddings import language, sentences, tokens
from actors.generate_embeddings.passages import Passage

#: Part of every chunk's key: another name, and all of them are new.
CHUNKER: Final = "sections-1"
_SECTION: Final = ("page", "slide", "sheet", "part")
_WORD: Final = re.compile(r"\S+\s*")
#: How good it is to end after a unit.
_NEVER, _INSIDE, _SENTENCE, _PARAGRAPH = range(4)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text` is `[start, end)` of the document's text, in characters; `key` its SHA-256 with the chunker's name."""

    position: int
    key: str
    text: str
    start: int
    end: int
    tokens: int
    language: str | None
    place: dict[str, Any]


@dataclass(slots=True)
class _Unit:
    """What is not cut: a sentence, a row, a piece of one that is too long."""

    text: str
    gap: str  # between the one before and this
    tokens: int
    rank: int
    place: Mapping[str, Any]
    header: str | None = None
    start: int = -1  # once it is written


@dataclass(slots=True)
class _Section:
    place: dict[str, Any]
    units: list[_Unit] = field(default_factory=list)
    only_headings: bool = True


def name(size: int, overlap: int) -> str:
    """What stands in the document's row: cut in another way, it has to be cut again."""
    return f"{CHUNKER}/{size}/{overlap}"


def key_of(text: str) -> str:
    """The same for texts that differ in white space, or in how an accent is spelt."""
    normalized = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(f"{CHUNKER}\n{normalized}".encode()).hexdigest()


def cut(passages: Iterable[Passage], *, size: int, overlap: int) -> tuple[str, list[Chunk]]:
    """The text and its chunks, of at most `size` tokens each, the last `overlap` of which a neighbour may repeat."""
    writer = _Writer()
    found: list[Chunk] = []
    for section in _sections(passages, size):
        section.units[0].gap = "\n\n"
        for units, new_from in _grouped(section.units, size, overlap):
            start, end = writer.write(units, new_from)
            text = writer.slice(start, end)
            place = section.place | _place(units)
            found.append(
                Chunk(len(found), key_of(text), text, start, end, tokens.count(text), language.of(text), place)
            )
    return writer.text(), found


def _sections(passages: Iterable[Passage], size: int) -> Iterator[_Section]:
    heading: list[tuple[int, str]] = []
    section: _Section | None = None
    for passage in passages:
        if not passage.text:
            continue
        within = {name: passage.place[name] for name in _SECTION if name in passage.place}
        if passage.style == "heading":
            heading = [each for each in heading if each[0] < passage.level] + [(passage.level, passage.text)]
        path = list(passage.place.get("heading") or (text for _, text in heading))
        place = within | ({"heading": path} if path else {})
        if section is not None and (section.place != place or passage.style == "heading"):
            # A heading right below another one opens the same section: alone it would be a chunk that says nothing.
            if section.only_headings and {k: v for k, v in section.place.items() if k != "heading"} == within:
                section.place = place
            else:
                yield section
                section = None
        section = section or _Section(place)
        section.only_headings = section.only_headings and passage.style == "heading"
        section.units += _units(passage, size)
    if section is not None:
        yield section


def _units(passage: Passage, size: int) -> Iterator[_Unit]:
    text, gap = passage.text, "\n" if passage.tight or passage.style == "row" else "\n\n"
    header = passage.header
    if header is not None and tokens.count(header) > size // 2:
        header = None  # too much of each chunk would be the same
    room = size - (tokens.count(header) if header else 0)
    spans = list(sentences.spans(text)) if passage.style == "text" else [(0, len(text))]
    end_rank = {"heading": _NEVER, "text": _PARAGRAPH, "row": _SENTENCE}[passage.style]
    pieces = [(piece, is_whole) for span in spans for piece, is_whole in _fitting(text, *span, room)]
    ends = [end for (_, end), _ in pieces]
    for number, ((start, end), is_whole) in enumerate(pieces):
        rank = end_rank if end == ends[-1] else _SENTENCE if is_whole else _INSIDE
        before = gap if number == 0 else text[ends[number - 1] : start]
        yield _Unit(text[start:end], before, tokens.count(text[start:end]), rank, passage.place, header)


def _fitting(text: str, start: int, end: int, room: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """A span, or pieces of it that fit, and whether the span ends there."""
    if tokens.count(text[start:end]) <= room:  # as nearly all do: word by word, each were counted twice more
        yield (start, _trimmed(text, start, end)), True
        return
    at, used = start, 0
    for word_start, word_end in _words(text, start, end, room):
        cost = tokens.count(text[word_start:word_end])
        if used and used + cost > room:
            yield (at, _trimmed(text, at, word_start)), False
            at, used = word_start, 0
        used += cost
    yield (at, _trimmed(text, at, end)), True


def _trimmed(text: str, start: int, end: int) -> int:
    """The end without the white space before it. Of the span alone: with all before it a text would take its square."""
    return start + len(text[start:end].rstrip())


def _words(text: str, start: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    """Words with the white space after them; one that does not fit (base64, a script without blanks) in pieces."""
    for match in _WORD.finditer(text, start, end):
        word_start, word_end = match.span()
        while tokens.count(text[word_start:word_end]) > room:
            yield word_start, word_start + room
            word_start += room
        yield word_start, word_end


def _grouped(units: Sequence[_Unit], size: int, overlap: int) -> Iterator[tuple[Sequence[_Unit], int]]:
    """Runs of units for one chunk each, and the index in the run of the first that no chunk before holds."""
    first = previous = 0
    while first < len(units):
        begin = _repeated(units, previous, first, min(overlap, size - units[first].tokens))
        used = sum(unit.tokens for unit in units[begin:first])
        if begin == first and (header := units[first].header):
            used += tokens.count(header)
        ends: list[tuple[int, int]] = []  # the index after a unit, and the tokens up to there
        for index in range(first, len(units)):
            used += units[index].tokens
            if used > size and ends:
                break
            ends.append((index + 1, used))
        end = ends[-1][0]
        if end < len(units):
            enough = [index for index, total in ends if total * 2 >= size] or [end]
            end = max(enough, key=lambda index: (units[index - 1].rank, _lot(units[index - 1].text), index))
        yield units[begin:end], first - begin
        previous, first = first, end


def _repeated(units: Sequence[_Unit], previous: int, first: int, overlap: int) -> int:
    """From where the chunk of `first` repeats the one before it, which begins at `previous`. Rows are not repeated: their
    header is."""
    begin, used = first, 0
    if units[first].header is None:
        while begin - 1 > previous and units[begin - 1].header is None and used + units[begin - 1].tokens <= overlap:
            begin -= 1
            used += units[begin].tokens
    return begin


def _lot(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class _Writer:
    """The document's text, as it grows."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0

    def write(self, units: Sequence[_Unit], new_from: int) -> tuple[int, int]:
        """Add the new units of a chunk; returns where the chunk begins and ends."""
        begin = None
        for index, unit in enumerate(units[new_from:], new_from):
            gap = unit.gap
            if index == 0 and unit.header is not None:
                begin = self._add(gap or "\n", unit.header)
                gap = "\n"
            unit.start = self._add(gap, unit.text)
        start = begin if begin is not None else units[0].start
        return start, self._length

    def slice(self, start: int, end: int) -> str:
        """A piece of what was written last."""
        kept: list[str] = []
        at = self._length
        for part in reversed(self._parts):
            if at <= start:
                break
            at -= len(part)
            kept.append(part)
        return "".join(reversed(kept))[start - at : end - at]

    def text(self) -> str:
        return "".join(self._parts)

    def _add(self, gap: str, text: str) -> int:
        if not self._length:
            gap = ""
        self._parts += [gap, text]
        start = self._length + len(gap)
        self._length = start + len(text)
        return start


def _place(units: Sequence[_Unit]) -> dict[str, Any]:
    """From the first to the last of what stands in a chunk."""
    found: dict[str, Any] = {}
    for name_ in ("line", "shot", "thumbnail"):
        found |= next(({name_: unit.place[name_]} for unit in units if name_ in unit.place), {})
    for first, last in (("row", "row_end"), ("start_s", "end_s")):
        values = [unit.place[first] for unit in units if first in unit.place]
        ends = [unit.place.get(last, unit.place[first]) for unit in units if first in unit.place]
        if values:
            found |= {first: min(values), last: max(ends)}
    return found
