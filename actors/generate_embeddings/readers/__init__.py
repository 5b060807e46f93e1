"""A reader for each kind of file: `read(path, facts)` gives the passages in reading order, and fills `facts` (pages, author,
encoding …) on the way. What a reader raises that is no `Permanent` means a damaged file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from actors.generate_embeddings.passages import Passage

Reader = Callable[[Path, dict[str, Any]], Iterator[Passage]]

_MODULES: Final = {
    "pdf": "pdf",
    "docx": "word",
    "pptx": "slides",
    "xlsx": "sheets",
    "html": "page",
    "markdown": "markdown",
    "text": "plain",
    "csv": "table",
    "video": "video",
}


def reader_of(kind: str) -> Reader:
    """Imports the libraries of this kind alone."""
    read: Reader = import_module(f"{__name__}.{_MODULES[kind]}").read
    return read
