"""PDF, by PDFium: the text of each page, its lines put together to paragraphs, with the outline's headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pypdfium2 as pdfium
from pypdfium2.raw import FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY

from actors.generate_embeddings.passages import Passage, one_line, refused

#: PDFium marks the hyphen at a line's end by U+FFFE or U+0002.
_HYPHEN: Final = re.compile("(?<=[^\\W\\d_])[-\u00ad\u2010\ufffe\x02]$")
_BULLET: Final = re.compile(r"([•▪‣–—*·-]|\(?\d{1,3}[.)]|\(?[a-zа-я]\))\s")
_ENDED: Final = re.compile(r"[.!?…:;][\"'»”’)\]]*$")
#: The last line of a paragraph is so much shorter than the page's longest ones.
_SHORT: Final = 0.8
_FACTS: Final = {"Title": "title", "Author": "author"}


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    try:
        document = pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        if error.err_code in (FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY):
            raise refused("encrypted", "The PDF has a password: save it without one.") from error
        raise
    facts["pages"] = len(document)
    for name, fact in _FACTS.items():
        if said := one_line(document.get_metadata_value(name)):
            facts[fact] = said
    headings = _headings(document)
    path_now: list[str] = []
    empty = 0
    for number in range(1, len(document) + 1):
        path_now = headings.get(number, path_now)
        place = {"page": number} | ({"heading": path_now} if path_now else {})
        page = document[number - 1]
        text_page = page.get_textpage()
        text = text_page.get_text_bounded()
        text_page.close()
        page.close()
        found = [paragraph for each in _paragraphs(text) if (paragraph := one_line(each))]
        empty += not found
        for paragraph in found:
            yield Passage(paragraph, place=place)
    if empty:
        facts["pages_without_text"] = empty
    if empty == len(document):
        raise refused(
            "scanned",
            "The PDF has pictures of pages and no text: put a text layer in (by ocrmypdf, for one) and hand that in.",
        )


def _headings(document: pdfium.PdfDocument) -> dict[int, list[str]]:
    """By page: the path of the last bookmark that points to it."""
    found: dict[int, list[str]] = {}
    stack: list[str] = []
    for bookmark in document.get_toc():
        target = bookmark.get_dest()
        page = target.get_index() if target is not None else None
        stack = [*stack[: bookmark.level], one_line(bookmark.get_title())]
        if page is not None:
            found[page + 1] = [title for title in stack if title]
    return found


def _paragraphs(text: str) -> list[str]:
    """PDF knows lines only: a paragraph ends with a sentence in a line that is short, or where a list's next item begins."""
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    full = lengths[len(lengths) * 9 // 10] * _SHORT if lengths else 0
    found: list[str] = []
    is_open = False
    for line in lines:
        if line and is_open and not _BULLET.match(line):
            hyphen = _HYPHEN.search(found[-1]) if line[0].isalpha() else None
            found[-1] = found[-1][: hyphen.start()] + line if hyphen else f"{found[-1]} {line}"
        elif line:
            found.append(line)
        is_open = bool(line) and (len(line) >= full or not _ENDED.search(line))
    return found
