"""Markdown (CommonMark and its tables): what it shows, without its marks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

from actors.generate_embeddings import encodings
from actors.generate_embeddings.passages import Passage, is_header, lines, one_line, row

_FRONT_MATTER: Final = re.compile(r"\A---\n(.*?)\n(---|\.\.\.)\n", re.S)
_TITLE: Final = re.compile(r"^title:\s*[\"']?(.+?)[\"']?\s*$", re.M)
_COMMENT: Final = re.compile(r"<!--.*?-->|<[^>]+>", re.S)


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    text, facts["encoding"] = encodings.decode(path.read_bytes())
    text = text.replace("\r\n", "\n")
    if front := _FRONT_MATTER.match(text):
        if title := _TITLE.search(front.group(1)):
            facts["title"] = one_line(title.group(1))
        text = "\n" * front.group(0).count("\n") + text[front.end() :]  # so that lines keep their numbers
    yield from _passages(MarkdownIt("commonmark").enable("table").parse(text))


def _passages(found: list[Token]) -> Iterator[Passage]:
    lists, line = 0, 1
    heading: int | None = None
    cells: list[str] | None = None
    header: str | None = None
    in_header = False
    for token in found:
        if token.map:
            line = token.map[0] + 1
        match token.type:
            case "bullet_list_open" | "ordered_list_open":
                lists += 1
            case "bullet_list_close" | "ordered_list_close":
                lists -= 1
            case "heading_open":
                heading = int(token.tag[1:])
            case "table_open":
                header = None
            case "thead_open" | "thead_close":
                in_header = token.type == "thead_open"
            case "tr_open":
                cells = []
            case "tr_close" if cells is not None:
                if text := row(cells):
                    yield Passage(text, "row", place={"line": line}, header=header)
                    header = text if in_header and is_header(cells) else header
                cells = None
            case "fence" | "code_block":
                if text := lines(token.content):
                    yield Passage(text, place={"line": line})
            case "html_block":
                if text := one_line(_COMMENT.sub(" ", token.content)):
                    yield Passage(text, place={"line": line})
            case "inline":
                shown = _shown(token)
                if cells is not None:
                    cells.append(shown)
                elif text := one_line(shown):
                    if heading is not None:
                        yield Passage(text, "heading", heading, {"line": line})
                    else:
                        yield Passage(text, place={"line": line}, tight=lists > 0)
                heading = None


def _shown(inline: Token) -> str:
    pieces = []
    for child in inline.children or ():
        if child.type in ("softbreak", "hardbreak"):
            pieces.append(" ")
        elif child.type in ("text", "code_inline", "image"):
            pieces.append(child.content)  # of a picture: what stands in its place
    return "".join(pieces)
