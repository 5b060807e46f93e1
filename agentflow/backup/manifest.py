"""What a backup says of itself: what it is of, and the checksum of each of its parts. Written last: without it there is none."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from agentflow.backup.errors import Damaged

FORMAT: Final = 1


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Table(_Said):
    """The rows of a table, in the text form of COPY. `size`: bytes as they are stored; `sha256` of the same. Without rows there
    is no part."""

    name: str
    columns: tuple[str, ...]
    rows: int
    size: int
    sha256: str


class Numbers(_Said):
    """The last number that a column with numbers of its own has given out."""

    table: str
    column: str
    last: int


class Files(_Said):
    """`count` and `size` (bytes) of the files; `sha256` of the list of them."""

    count: int
    size: int
    sha256: str


class Manifest(_Said):
    """`tables` in an order in which each comes after those that it refers to. `sealed_under`: the ids of the keys that
    credentials are encrypted under; `unsealed`: how many are not encrypted. `gone`: files that rows name and that were not in
    storage."""

    format: Literal[1]
    id: str
    taken_at: datetime
    took_s: float
    version: str
    installation: str
    migrations: dict[str, str]
    tables: tuple[Table, ...]
    numbers: tuple[Numbers, ...]
    files: Files
    gone: tuple[str, ...]
    sealed_under: tuple[str, ...]
    unsealed: int

    @property
    def filled(self) -> tuple[Table, ...]:
        """The tables that have rows."""
        return tuple(table for table in self.tables if table.rows)

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def size(self) -> int:
        """Bytes of the tables and of all files."""
        return sum(table.size for table in self.tables) + self.files.size


def written(manifest: Manifest) -> bytes:
    said = manifest.model_dump(mode="json")
    return json.dumps({"manifest": said, "sha256": _digest(said)}, indent=1).encode()


def read(text: bytes, name: str) -> Manifest:
    """Raises Damaged, also for one that a newer version has written."""
    try:
        document = json.loads(text)
        said = document["manifest"]
        if said.get("format") != FORMAT:
            raise Damaged(f"backup {name} was made by a newer version of AgentFlow: restore it with that one")
        if document["sha256"] != _digest(said):
            raise Damaged(f"the manifest of backup {name} was changed or is damaged")
        return Manifest.model_validate(said)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise Damaged(f"the manifest of backup {name} cannot be read") from None


def _digest(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
