"""The chunks of a document: rows that stay as they are as long as their text and place do."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from agentflow.database import Connection
from agentflow.knowledge import vectors


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: `text` is `[start, end)` of the document's text, in characters; `key` has 32 bytes."""

    position: int
    key: bytes
    text: str
    start: int
    end: int
    tokens: int
    language: str | None
    place: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Swapped:
    """How many chunks were kept, moved, added and removed. `reworded`: keys whose text has other white space than it had."""

    kept: int
    moved: int
    added: int
    removed: int
    reworded: frozenset[bytes]


def page(conn: Connection, organization_id: int, document_id: UUID, *, start: int = 0, limit: int) -> list[Chunk]:
    """In reading order, from the one with the number `start` on."""
    rows = conn.execute(
        "select position, key, text, start_offset, end_offset, tokens, language, place from agentflow.chunks"
        " where document_id = %s and organization_id = %s and position >= %s order by position limit %s",
        (document_id, organization_id, start, limit),
    ).fetchall()
    return [Chunk(position, bytes(key), *rest) for position, key, *rest in rows]


def swap(conn: Connection, organization_id: int, document_id: UUID, chunks: Sequence[Chunk]) -> Swapped:
    """Put these chunks in the place of those that are there; rows of those that are the same are not touched."""
    rows = conn.execute(
        "select position, key, start_offset, end_offset, tokens, language, place, text from agentflow.chunks"
        " where organization_id = %s and document_id = %s order by position",
        (organization_id, document_id),
    ).fetchall()
    old: dict[bytes, deque[tuple[int, Chunk]]] = defaultdict(deque)
    for position, key, start, end, tokens, language, place, text in rows:
        chunk = Chunk(position, bytes(key), text, start, end, tokens, language, place)
        old[chunk.key].append((position, chunk))
    moved: list[tuple[int, Chunk]] = []
    added: list[Chunk] = []
    reworded: set[bytes] = set()
    kept = 0
    for chunk in chunks:
        if not old[chunk.key]:
            added.append(chunk)
            continue
        position, same = old[chunk.key].popleft()
        if same == chunk:
            kept += 1
        else:
            moved.append((position, chunk))
        if same.text != chunk.text:
            reworded.add(chunk.key)
    left = [each for found in old.values() for each in found]
    _remove(conn, organization_id, document_id, left)
    _move(conn, organization_id, document_id, moved)
    _add(conn, organization_id, document_id, added)
    return Swapped(kept, len(moved), len(added), len(left), frozenset(reworded))


def _remove(conn: Connection, organization_id: int, document_id: UUID, left: Sequence[tuple[int, Chunk]]) -> None:
    conn.execute(
        "delete from agentflow.chunks where organization_id = %s and document_id = %s and position = any (%s)",
        (organization_id, document_id, [position for position, _ in left]),
    )
    vectors.drop_orphans(conn, organization_id, {chunk.key for _, chunk in left})


def _move(conn: Connection, organization_id: int, document_id: UUID, moved: Sequence[tuple[int, Chunk]]) -> None:
    """In two steps: a position is free once the row that had it has gone to its negative."""
    conn.execute(
        "update agentflow.chunks c set position = -1 - m.position, start_offset = m.start_offset, end_offset = m.end_offset,"
        " text = m.text, tokens = m.tokens, language = m.language, place = m.place"
        " from unnest(%s::integer[], %s::integer[], %s::text[], %s::integer[], %s::integer[], %s::integer[], %s::text[],"
        " %s::jsonb[]) m(old, position, text, start_offset, end_offset, tokens, language, place)"
        " where c.organization_id = %s and c.document_id = %s and c.position = m.old",
        ([old for old, _ in moved], *_columns([chunk for _, chunk in moved]), organization_id, document_id),
    )
    conn.execute(
        "update agentflow.chunks set position = -1 - position"
        " where organization_id = %s and document_id = %s and position < 0",
        (organization_id, document_id),
    )


def _add(conn: Connection, organization_id: int, document_id: UUID, added: Sequence[Chunk]) -> None:
    conn.execute(
        "insert into agentflow.chunks (organization_id, document_id, key, position, text, start_offset, end_offset, tokens,"
        " language, place) select %s, %s, * from unnest(%s::bytea[], %s::integer[], %s::text[], %s::integer[],"
        " %s::integer[], %s::integer[], %s::text[], %s::jsonb[])",
        (organization_id, document_id, [chunk.key for chunk in added], *_columns(added)),
    )


def _columns(chunks: Sequence[Chunk]) -> tuple[list[Any], ...]:
    return (
        [chunk.position for chunk in chunks],
        [chunk.text for chunk in chunks],
        [chunk.start for chunk in chunks],
        [chunk.end for chunk in chunks],
        [chunk.tokens for chunk in chunks],
        [chunk.language for chunk in chunks],
        [json.dumps(chunk.place) for chunk in chunks],
    )
