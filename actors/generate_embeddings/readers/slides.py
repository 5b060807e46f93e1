"""PPTX: each slide's title, its shapes from top to bottom, its notes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pptx
from pptx.enum.shapes import MSO_SHAPE_TYPE

from actors.generate_embeddings.passages import Passage, is_header, one_line, row


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    presentation = pptx.Presentation(str(path))
    properties = presentation.core_properties
    for name, said in (("title", properties.title), ("author", properties.author)):
        if said:
            facts[name] = one_line(said)
    facts["slides"] = len(presentation.slides)
    for number, slide in enumerate(presentation.slides, 1):
        title = slide.shapes.title
        heading = one_line(title.text_frame.text) if title is not None and title.has_text_frame else ""
        place = {"slide": number} | ({"heading": [heading]} if heading else {})
        if heading:
            yield Passage(heading, "heading", place=place)
        for shape in _in_reading_order(slide.shapes):
            if title is None or shape.shape_id != title.shape_id:
                yield from _shape(shape, place)
        if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None:
            yield from _paragraphs(frame, {**place, "part": "notes"})


def _in_reading_order(shapes: Iterable[Any]) -> list[Any]:
    """The file has them in the order in which they were put there."""
    return sorted(shapes, key=lambda shape: (shape.top or 0, shape.left or 0))


def _shape(shape: Any, place: dict[str, Any]) -> Iterator[Passage]:
    if shape.shape_type == MSO_SHAPE_TYPE.GROUP:
        for each in _in_reading_order(shape.shapes):
            yield from _shape(each, place)
    elif getattr(shape, "has_table", False):
        header = None
        for number, each in enumerate(shape.table.rows, 1):
            cells = [cell.text_frame.text for cell in each.cells if not cell.is_spanned]
            text = row(cells)
            if text:
                yield Passage(text, "row", place={**place, "row": number}, header=header)
            if number == 1 and is_header(cells):
                header = text
    elif shape.has_text_frame:
        yield from _paragraphs(shape.text_frame, place)


def _paragraphs(frame: Any, place: dict[str, Any]) -> Iterator[Passage]:
    found = [text for paragraph in frame.paragraphs if (text := one_line(paragraph.text))]
    for number, text in enumerate(found):
        yield Passage(text, place=place, tight=number > 0)
