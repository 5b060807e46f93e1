"""DOCX: paragraphs, headings by their outline level, tables row by row, footnotes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import docx
from docx.document import Document
from docx.oxml.ns import qn
from lxml import etree

from actors.generate_embeddings.passages import Passage, is_header, one_line, row

_TEXT: Final = qn("w:t")
_BLANKS: Final = frozenset(map(qn, ("w:tab", "w:br", "w:cr")))
_HYPHEN: Final = qn("w:noBreakHyphen")
#: Deleted by a tracked change, the other spelling of a drawing, or a text of its own.
_LEFT_OUT: Final = frozenset(
    (
        *map(qn, ("w:del", "w:moveFrom", "w:txbxContent")),
        "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
    )
)
_BODY_LEVEL: Final = 9


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    document = docx.Document(str(path))
    properties = document.core_properties
    for name, said in (("title", properties.title), ("author", properties.author)):
        if said:
            facts[name] = one_line(said)
    yield from _blocks(document.element.body, _levels(document))
    for part in document.part.package.iter_parts():
        if part.partname in ("/word/footnotes.xml", "/word/endnotes.xml"):
            notes = etree.fromstring(part.blob, etree.XMLParser(resolve_entities=False, no_network=True))
            yield from _blocks(notes, {})


def _blocks(element: Any, levels: dict[str, int]) -> Iterator[Passage]:
    """In the order of the file; content controls, footnotes and inserted paragraphs are gone into."""
    for child in element:
        if child.tag == qn("w:p"):
            yield from _paragraph(child, levels)
        elif child.tag == qn("w:tbl"):
            yield from _table(child)
        elif child.tag not in _LEFT_OUT and isinstance(child.tag, str):
            yield from _blocks(child, levels)


def _paragraph(element: Any, levels: dict[str, int]) -> Iterator[Passage]:
    text = one_line("".join(_pieces(element)))
    level = _level(element.pPr, levels) if text else None
    if level is not None:
        yield Passage(text, "heading", level + 1)
    elif text:
        is_item = element.pPr is not None and element.pPr.numPr is not None
        yield Passage(text, tight=is_item)
    for box in element.iter(qn("w:txbxContent")):
        if not any(above.tag in _LEFT_OUT for above in box.iterancestors()):
            yield from _blocks(box, levels)


def _pieces(element: Any) -> Iterator[str]:
    for child in element:
        if child.tag == _TEXT:
            yield child.text or ""
        elif child.tag in _BLANKS:
            yield " "
        elif child.tag == _HYPHEN:
            yield "-"
        elif child.tag not in _LEFT_OUT:
            yield from _pieces(child)


def _table(element: Any) -> Iterator[Passage]:
    header = None
    for number, each in enumerate(element.iter(qn("w:tr")), 1):
        cells = [" ".join("".join(_pieces(p)) for p in cell.iter(qn("w:p"))) for cell in each.iter(qn("w:tc"))]
        text = row(cells)
        if text:
            yield Passage(text, "row", place={"row": number}, header=header)
        if number == 1 and is_header(cells):
            header = text


def _levels(document: Document) -> dict[str, int]:
    """Outline level of each paragraph style, from 0; a style inherits it. Ids are translated in other languages, names not."""
    found: dict[str, int] = {}
    for style in document.styles.element.findall(qn("w:style")):
        each: Any = style
        for _ in range(20):
            name = (each.name_val or "").lower()
            level = each.find(f"{qn('w:pPr')}/{qn('w:outlineLvl')}")
            if level is not None:
                found[style.styleId] = int(level.get(qn("w:val")))
            elif name.startswith("heading ") and name[8:].isdigit():
                found[style.styleId] = int(name[8:]) - 1
            elif name == "title":
                found[style.styleId] = 0
            based_on = each.base_style
            if style.styleId in found or based_on is None:
                break
            each = based_on
    return found


def _level(properties: Any, levels: dict[str, int]) -> int | None:
    if properties is None:
        return None
    own = properties.find(qn("w:outlineLvl"))
    level = int(own.get(qn("w:val"))) if own is not None else levels.get(properties.style or "")
    return level if level is not None and 0 <= level < _BODY_LEVEL else None
