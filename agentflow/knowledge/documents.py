"""Documents that were handed in, and the chunks that they were cut into.

A document is named by its organization's `source_id`: handed in again, it is a new version of the same. Of many jobs for one
document the row's `job_id` says which may write: whoever hands a version in puts its job there, and a job that was asked for
otherwise takes its place once the one before has ended. So an older version that is finished late writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import graph, vectors
from agentflow.knowledge.chunks import Chunk, swap
from agentflow.videos import SUFFIX

#: The kind of a document that was not read yet.
UNKNOWN: Final = "unknown"

_NAMES: Final = (
    *("id", "organization_id", "source_id", "title", "kind", "language", "storage_key", "filename", "content_type"),
    *("source_url", "video_id", "content_hash", "size_bytes", "chunker", "version", "facts", "job_id", "chain_id"),
    *("error", "created_at", "updated_at", "read_at"),
)
_COLUMNS: Final = ", ".join(f"d.{name}" for name in _NAMES)
_COUNT: Final = (
    "(select count(*) from agentflow.chunks c where c.document_id = d.id and c.organization_id = d.organization_id)"
)
_SEEN: Final = "(%(organization)s::bigint is null or d.organization_id = %(organization)s)"


@dataclass(frozen=True, slots=True)
class Document:
    """One row of agentflow.documents without its text. One of `storage_key`, `source_url` and `video_id` is its source."""

    id: UUID
    organization_id: int
    source_id: str
    title: str
    kind: str
    language: str | None
    storage_key: str | None
    filename: str | None
    content_type: str | None
    source_url: str | None
    video_id: UUID | None
    content_hash: bytes | None
    size_bytes: int | None
    chunker: str | None
    version: int
    facts: dict[str, Any]
    job_id: UUID | None
    chain_id: UUID | None
    error: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime
    read_at: datetime | None
    chunk_count: int

    @property
    def default_title(self) -> str:
        """What it is called where neither the caller nor the file says so."""
        return default_title(self.source_id, self.filename, self.source_url)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a document's content is: an upload or a text in storage, a URL, or the analysis of a video."""

    storage_key: str | None = None
    filename: str | None = None
    content_type: str | None = None
    size_bytes: int | None = None
    source_url: str | None = None
    video_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What was read: the text to which the offsets of the chunks refer, and where it came from."""

    text: str
    chunks: Sequence[Chunk]
    kind: str
    language: str | None
    content_hash: bytes
    size_bytes: int
    chunker: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of the chunks: left as they were, put elsewhere, new, gone."""

    version: int
    kept: int
    moved: int
    added: int
    removed: int


class Busy(Exception):
    """Another job that has not ended may write this document."""


def default_title(source_id: str, filename: str | None, url: str | None) -> str:
    return filename or url or source_id


def video_source_id(video_id: UUID) -> str:
    """What the document of a video is called if its caller does not say."""
    return f"video:{video_id}"


def upload_key(organization_id: int, filename: str | None) -> str:
    """Where a new file lies. Of the caller's name only a harmless suffix is kept: the name itself stands in the row."""
    suffix = PurePosixPath(filename or "").suffix.lower()
    return f"o/{organization_id}/documents/{new_id()}{suffix if SUFFIX.fullmatch(suffix) else ''}"


def reading(document_id: UUID, *, graph: bool) -> NewJob:
    """The job that reads a document and computes its vectors; with `graph` the one for its graph follows."""
    payload = {"document_id": str(document_id)}
    then = (NewJob("extract_graph", payload),) if graph else ()
    return NewJob("generate_embeddings", payload, then=then)


def hand_in(
    conn: Connection, organization_id: int, source_id: str, source: Source, *, title: str | None
) -> tuple[Document, str | None]:
    """Make the document, or give it a new source, and lock it. Returns it and the key of a file that it no longer has.

    What was read from the source before stays searchable until the new one was read.
    """
    conn.execute(
        "insert into agentflow.documents (id, organization_id, source_id, title, kind) values (%s, %s, %s, '', %s)"
        " on conflict (organization_id, source_id) do nothing",
        (new_id(), organization_id, source_id, UNKNOWN),
    )
    before = conn.execute(
        "select id, storage_key from agentflow.documents where organization_id = %s and source_id = %s for update",
        (organization_id, source_id),
    ).fetchone()
    assert before is not None  # noqa: S101 - made above, or there already
    row = conn.execute(
        "update agentflow.documents d set title = %(title)s, storage_key = %(key)s, filename = %(filename)s,"  # noqa: S608
        " content_type = %(content_type)s, source_url = %(url)s, video_id = %(video)s,"
        " size_bytes = coalesce(%(size)s, size_bytes), updated_at = clock_timestamp()"
        f" where d.id = %(id)s and d.organization_id = %(organization)s returning {_COLUMNS}, {_COUNT}",
        {
            "id": before[0],
            "organization": organization_id,
            "title": title or default_title(source_id, source.filename, source.source_url),
            "key": source.storage_key,
            "filename": source.filename,
            "content_type": source.content_type,
            "url": source.source_url,
            "video": source.video_id,
            "size": source.size_bytes,
        },
    ).fetchone()
    assert row is not None  # noqa: S101 - locked above
    return Document(*row), before[1] if before[1] != source.storage_key else None


def of_video(conn: Connection, organization_id: int, video_id: UUID, *, title: str | None) -> Document:
    """The document of a video's analysis, made if there is none."""
    known = search(conn, organization_id, source_id=video_source_id(video_id), limit=1)
    if known and known[0].video_id == video_id:
        return known[0]
    return hand_in(conn, organization_id, video_source_id(video_id), Source(video_id=video_id), title=title)[0]


def ask(conn: Connection, document: Document, *, chain_id: UUID, job_id: UUID | None) -> None:
    """Name the first job of the chain that makes this version, and the job that may write it, where that is known."""
    conn.execute(
        "update agentflow.documents set chain_id = %s, job_id = coalesce(%s, job_id), error = null"
        " where id = %s and organization_id = %s",
        (chain_id, job_id, document.id, document.organization_id),
    )


def take(conn: Connection, document_id: UUID, job: Job) -> Document | None:
    """The document, for the job that will write it. None: there is none (any more). Raises Busy."""
    found = conn.execute(
        "select job_id from agentflow.documents where id = %s and organization_id = %s for update",
        (document_id, job.organization_id),
    ).fetchone()
    if found is None:
        return None
    if found[0] != job.id:
        other = records.get(conn, job.organization_id, found[0]) if found[0] is not None else None
        if other is not None and not other.terminal:
            raise Busy
        conn.execute(
            "update agentflow.documents set job_id = %(job)s,"
            " chain_id = case when chain_id = %(parent)s then chain_id else %(job)s end"
            " where id = %(id)s and organization_id = %(organization)s",
            {"job": job.id, "parent": job.parent_id, "id": document_id, "organization": job.organization_id},
        )
    return get(conn, job.organization_id, document_id)


def get(conn: Connection, organization_id: int | None, document_id: UUID) -> Document | None:
    """None where there is no such document, or it is another organization's (an organization of None sees all)."""
    row = conn.execute(
        f"select {_COLUMNS}, {_COUNT} from agentflow.documents d where d.id = %(id)s and {_SEEN}",  # noqa: S608
        {"id": document_id, "organization": organization_id},
    ).fetchone()
    return Document(*row) if row else None


def with_file(conn: Connection, organization_id: int, storage_key: str) -> Document | None:
    """The document whose file this is."""
    row = conn.execute(
        f"select {_COLUMNS}, {_COUNT} from agentflow.documents d where d.storage_key = %(key)s and {_SEEN} limit 1",  # noqa: S608
        {"key": storage_key, "organization": organization_id},
    ).fetchone()
    return Document(*row) if row else None


def search(
    conn: Connection,
    organization_id: int | None,
    *,
    source_id: str | None = None,
    before: UUID | None = None,
    limit: int = 50,
) -> list[Document]:
    """The newest first by id; `before` is the last id of the page before."""
    rows = conn.execute(
        f"select {_COLUMNS}, {_COUNT} from agentflow.documents d where {_SEEN}"  # noqa: S608
        " and (%(source)s::text is null or d.source_id = %(source)s)"
        " and (%(before)s::uuid is null or d.id < %(before)s) order by d.id desc limit %(limit)s",
        {"organization": organization_id, "source": source_id, "before": before, "limit": limit},
    ).fetchall()
    return [Document(*row) for row in rows]


def replace(
    conn: Connection, organization_id: int, document_id: UUID, *, job_id: UUID, content: Content, title: str
) -> Replaced | None:
    """Swap text and chunks in the caller's transaction; rows of chunks that are still the same are not touched.

    None: the document is gone, or another job has been put in this one's place.
    """
    if _was_read(conn, organization_id, document_id):
        # Facts of the version before may be written at this moment. Before the document, as a deletion does.
        graph.lock(conn, organization_id)
    found = conn.execute(
        "select job_id from agentflow.documents where id = %s and organization_id = %s for update",
        (document_id, organization_id),
    ).fetchone()
    if found is None or found[0] != job_id:
        return None
    swapped = swap(conn, organization_id, document_id, content.chunks)
    if swapped.removed or swapped.reworded:
        graph.forget_passages(conn, organization_id, document_id, swapped.reworded)
    row = conn.execute(
        "update agentflow.documents d set title = %(title)s, kind = %(kind)s, language = %(language)s,"
        " content_hash = %(hash)s, size_bytes = %(size)s, text = %(text)s, chunker = %(chunker)s, facts = %(facts)s,"
        " version = d.version + (d.read_at is not null)::integer, error = null, read_at = clock_timestamp(),"
        " updated_at = clock_timestamp() where d.id = %(id)s and d.organization_id = %(organization)s returning d.version",
        {
            "id": document_id,
            "organization": organization_id,
            "title": title,
            "kind": content.kind,
            "language": content.language,
            "hash": content.content_hash,
            "size": content.size_bytes,
            "text": content.text,
            "chunker": content.chunker,
            "facts": json.dumps(content.facts),
        },
    ).fetchone()
    assert row is not None  # noqa: S101 - locked above
    return Replaced(row[0], swapped.kept, swapped.moved, swapped.added, swapped.removed)


def _was_read(conn: Connection, organization_id: int, document_id: UUID) -> bool:
    row = conn.execute(
        "select read_at is not null from agentflow.documents where id = %s and organization_id = %s",
        (document_id, organization_id),
    ).fetchone()
    return row == (True,)


def still_writes(conn: Connection, organization_id: int, document_id: UUID, job_id: UUID) -> bool:
    """Whether no other job has been put in this one's place, and the document is there."""
    found = get(conn, organization_id, document_id)
    return found is not None and found.job_id == job_id


def unchanged(conn: Connection, organization_id: int, document_id: UUID, job_id: UUID) -> None:
    """What was handed in is what is stored: an error of an earlier attempt is over."""
    conn.execute(
        "update agentflow.documents set error = null where id = %s and organization_id = %s and job_id = %s",
        (document_id, organization_id, job_id),
    )


def failed(conn: Connection, organization_id: int, document_id: UUID, job_id: UUID, error: dict[str, Any]) -> None:
    """Why the job could not read it. What was read before stays."""
    conn.execute(
        "update agentflow.documents set error = %s, updated_at = clock_timestamp()"
        " where id = %s and organization_id = %s and job_id = %s",
        (json.dumps(error), document_id, organization_id, job_id),
    )


def delete(conn: Connection, organization_id: int, document_id: UUID) -> bool:
    """Remove a document with its chunks, its facts, and the vectors that no other document needs. False: there is none."""
    graph.forget_document(conn, organization_id, document_id)
    conn.execute(
        "select 1 from agentflow.documents where id = %s and organization_id = %s for update",
        (document_id, organization_id),
    )
    keys = conn.execute(
        "select distinct key from agentflow.chunks where document_id = %s and organization_id = %s",
        (document_id, organization_id),
    ).fetchall()
    deleted = conn.execute(
        "delete from agentflow.documents where id = %s and organization_id = %s", (document_id, organization_id)
    ).rowcount
    vectors.drop_orphans(conn, organization_id, {bytes(row[0]) for row in keys})
    return deleted > 0
