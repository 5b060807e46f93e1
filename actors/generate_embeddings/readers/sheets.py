"""XLSX: row by row, as the sheets show the values that were last computed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl

from actors.generate_embeddings.passages import Passage, is_header, one_line, row


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    # Opened here: by name it takes those alone that end in .xlsx.
    with path.open("rb") as file:
        yield from _sheets(openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False), facts)


def _sheets(book: Any, facts: dict[str, Any]) -> Iterator[Passage]:
    for name, said in (("title", book.properties.title), ("author", book.properties.creator)):
        if said:
            facts[name] = one_line(said)
    facts["sheets"] = [sheet.title for sheet in book.worksheets]
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # many programs write wrong ones, and cells beyond would be lost
        header: str | None = None
        left: int | None = None  # columns that are empty in the first row: the table begins further to the right
        for number, cells in enumerate(sheet.iter_rows(), 1):
            shown = [_shown(cell) for cell in cells]
            if not any(shown):
                continue
            is_first = left is None
            if left is None:
                left = next(index for index, each in enumerate(shown) if each)
            if not any(shown[:left]):
                shown = shown[left:]
            text = row(shown)
            yield Passage(text, "row", place={"sheet": sheet.title, "row": number}, header=header)
            if is_first and is_header(shown):
                header = text


def _shown(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        if str(cell.number_format).rstrip("\"' ").endswith("%"):
            return f"{value * 100:.10g}%"
        return f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ", "minutes") if value.time() != datetime.time() else value.date().isoformat()
    return str(value)
