"""CSV, whatever separates its cells."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.generate_embeddings import encodings
from actors.generate_embeddings.kinds import delimiter_of
from actors.generate_embeddings.passages import Passage, is_header, row


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    csv.field_size_limit(min(sys.maxsize, 1 << 31))
    text, facts["encoding"] = encodings.decode(path.read_bytes())
    facts["delimiter"] = delimiter = delimiter_of(text[: 1 << 16]) or ","
    header: str | None = None
    number = 0
    for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 1):
        line = row(cells)
        if line:
            yield Passage(line, "row", place={"row": number}, header=header)
        if number == 1 and is_header(cells):
            header = line
    facts["rows"] = number
