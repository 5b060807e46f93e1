"""What readers make of a file: its text in reading order, piece by piece, each with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from agentflow.errors import Permanent

#: NUL and other controls, halves of surrogate pairs, and what marks a soft hyphen or a character without a meaning.
_UNWANTED: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u00ad\u200b\u2060\ufeff\ufffe\uffff\ud800-\udfff]")
_BLANKS: Final = re.compile(r"[^\S\n]+")
_AROUND_BREAKS: Final = re.compile(r" ?\n ?")


@dataclass(frozen=True, slots=True)
class Passage:
    """A heading, a paragraph or a table's row.

    `place` holds what applies: page, slide, line, row (from 1), sheet, part, start_s, end_s. A `tight` passage follows the
    one before it without a blank line. `header` is the text of a row's table header, for rows below it.
    """

    text: str
    style: Literal["heading", "text", "row"] = "text"
    level: int = 1  # of a heading; 1 is the highest
    place: Mapping[str, Any] = field(default_factory=dict)
    tight: bool = False
    header: str | None = None


def one_line(text: str) -> str:
    """Without what cannot be seen, each run of white space a single blank."""
    return " ".join(_UNWANTED.sub("", text).split())


def lines(text: str) -> str:
    """The same, line breaks kept."""
    text = _UNWANTED.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _AROUND_BREAKS.sub("\n", _BLANKS.sub(" ", text)).strip()


def row(cells: list[str]) -> str:
    """A row of a table as one line; empty cells at its end are left out."""
    kept = [one_line(cell) for cell in cells]
    while kept and not kept[-1]:
        kept.pop()
    return " | ".join(kept)


def is_header(cells: list[str]) -> bool:
    """Whether the first row of a table names its columns: at least two cells, and none is empty or begins like a number."""
    named = [one_line(cell) for cell in cells]
    while named and not named[-1]:
        named.pop()
    return len(named) > 1 and all(cell and not re.match(r"[-+(]?\d", cell) for cell in named)


def refused(code: str, message: str) -> Permanent:
    """A file that cannot be read, whoever tries: what is wrong with it, and what would help."""
    return Permanent(message, code=code)
