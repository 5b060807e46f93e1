"""Files into the knowledge base: text by a reader of its kind in a child process, cut into chunks, each with its vector.

A document whose content is the same as before is not read again, and its vectors are looked at all the same: that makes a
second run of a job, after whatever ended the first, do what was left. A job in whose place another was put (the document was
handed in again meanwhile) writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from actors.generate_embeddings import chunks as cutting
from actors.generate_embeddings import sources
from agentflow import log
from agentflow.errors import Permanent, Wait
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Memory, Payload, job
from agentflow.knowledge import documents, vectors
from agentflow.knowledge.chunks import Chunk
from agentflow.knowledge.documents import Busy, Content, Document, Replaced
from agentflow.system import System
from agentflow.worker.running import JobContext

#: Where each step ends, as a share of the whole.
_FETCHED, _READ, _STORED = 0.05, 0.3, 0.32
_BUSY_S: Final = 5.0
_ENCODER_BYTES: Final = 180 << 20
_READER_BYTES, _READER_MOST_BYTES, _UNPACKED = 80 << 20, 300 << 20, 5

logger = log.get(__name__)


class GenerateEmbeddings(Payload):
    document_id: UUID


def _size_of(system: System, running: Job) -> int | None:
    with system.database.connection() as conn:
        found = documents.get(conn, running.organization_id, UUID(running.payload["document_id"]))
    return found.size_bytes if found is not None else None


def _guess(size: int | None) -> int:
    """The reader, which unpacks, and then the local model, if nobody uses it yet."""
    return max(_ENCODER_BYTES, min(_READER_MOST_BYTES, _READER_BYTES + _UNPACKED * (size or 0)))


@job(
    "generate_embeddings",
    payload=GenerateEmbeddings,
    queue="heavy",
    time_limit_s=3600.0,
    process_limit=lambda settings: settings.document_concurrency,
    memory=Memory(guess=_guess, input_bytes=_size_of),
)
def generate_embeddings(context: JobContext, payload: GenerateEmbeddings) -> dict[str, Any]:
    """Read a document, cut it into chunks, and compute the vectors that they lack."""
    try:
        with context.system.database.transaction() as conn:
            document = documents.take(conn, payload.document_id, context.job)
    except Busy:
        raise Wait(_BUSY_S, "document_busy", message="another job is reading this document") from None
    if document is None:
        logger.info("the document is gone", document_id=str(payload.document_id))
        return {"document_id": str(payload.document_id), "outcome": "gone"}
    try:
        outcome = _stored(context, document)
    except Permanent as error:
        if not _note(context, document, error):
            return {"document_id": str(document.id), "outcome": "superseded"}
        raise
    said = {"document_id": str(document.id), **outcome}
    if outcome["outcome"] != "superseded":
        said["vectors"] = vectors.embed_missing(context, document.id, share_done=_STORED, share_end=1.0)
    return said


def _stored(context: JobContext, document: Document) -> dict[str, Any]:
    """Bring text and chunks of the document up to date, and say what that was."""
    settings = context.system.settings
    chunker = cutting.name(settings.chunk_tokens, settings.chunk_overlap_tokens)
    with tempfile.TemporaryDirectory(prefix="agentflow-document-") as name:
        folder = Path(name)
        context.progress(0.0, "fetch")
        local = sources.bring(context, document, folder)
        size_bytes = local.path.stat().st_size
        if size_bytes > settings.document_max_bytes:
            raise Permanent(
                f"The document has {size_bytes} bytes; at most {settings.document_max_bytes} are read"
                " (DOCUMENT_MAX_BYTES): split it.",
                code="too_large",
            )
        with local.path.open("rb") as file:
            content_hash = hashlib.file_digest(file, "sha256").digest()
        if document.read_at is not None and (document.content_hash, document.chunker) == (content_hash, chunker):
            with context.system.database.connection() as conn:
                documents.unchanged(conn, document.organization_id, document.id, context.job.id)
            return {"outcome": "unchanged", "version": document.version, "chunks": document.chunk_count}
        context.sized(size_bytes)
        found = context.run_child(
            "actors.generate_embeddings.child:read",
            source=str(local.path),
            out=str(folder / "read.json"),
            kind=local.kind,
            name=local.name,
            content_type=local.content_type,
            size=settings.chunk_tokens,
            overlap=settings.chunk_overlap_tokens,
            max_unpacked_bytes=settings.document_unpacked_bytes,
            max_characters=settings.document_max_characters,
            memory_mb=settings.document_memory_mb,
            cpu_s=settings.document_cpu_seconds,
            share_done=_FETCHED,
            share_end=_READ,
        )
        read = json.loads((folder / "read.json").read_text(encoding="utf-8"))
    chunks = [Chunk(**{**chunk, "key": bytes.fromhex(chunk["key"])}) for chunk in read["chunks"]]
    facts, title = found["facts"], document.title
    if title == document.default_title:
        title = facts.get("title") or local.name or title
    content = Content(read["text"], chunks, found["kind"], found["language"], content_hash, size_bytes, chunker, facts)
    context.progress(_READ, "store")
    replaced = _replace(context, document, content, title)
    if replaced is None:
        return {"outcome": "superseded"}
    return {
        "outcome": "stored",
        "version": replaced.version,
        "chunks": len(chunks),
        "kept": replaced.kept,
        "moved": replaced.moved,
        "added": replaced.added,
        "removed": replaced.removed,
    }


def _replace(context: JobContext, document: Document, content: Content, title: str) -> Replaced | None:
    with context.system.database.transaction() as conn:
        return documents.replace(
            conn,
            document.organization_id,
            document.id,
            job_id=context.job.id,
            content=content,
            title=title,
        )


def _note(context: JobContext, document: Document, error: Permanent) -> bool:
    """Keep in the document's row why it cannot be read. False: that is another job's matter now."""
    with context.system.database.transaction() as conn:
        if not documents.still_writes(conn, document.organization_id, document.id, context.job.id):
            return False
        described = {"code": error.code, "message": str(error)}
        documents.failed(conn, document.organization_id, document.id, context.job.id, described)
    return True
