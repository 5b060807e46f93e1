"""TXT: paragraphs between blank lines, each with the line on which it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.generate_embeddings import encodings
from actors.generate_embeddings.passages import Passage, lines


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    text, facts["encoding"] = encodings.decode(path.read_bytes())
    gathered: list[str] = []
    begun = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.strip():
            if not gathered:
                begun = number
            gathered.append(line)
        elif gathered:
            yield Passage(lines("\n".join(gathered)), place={"line": begun})
            gathered = []
