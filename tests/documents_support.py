"""Documents in tests: jobs of the knowledge base run in this process, on the real database, storage and child processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest

from actors.generate_embeddings import child
from agentflow.errors import JobError
from agentflow.jobs import claims, records, registry
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Payload, job
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import documents
from agentflow.knowledge.documents import Document, Source
from agentflow.system import System
from agentflow.worker.running import JobContext, Running
from tests import web_support

FILES: Final = Path(__file__).parent / "documents"
ORGANIZATION: Final = 1


#: What `analyze_video` answers, as far as it is text.
ANALYSIS: dict[str, Any] = {
    "video": {"duration_s": 60.0},
    "shots": [
        {"index": 0, "start_s": 0.0, "end_s": 20.0, "keyframe": {"key": "o/1/shot-0.jpg"}},
        {"index": 1, "start_s": 20.0, "end_s": 60.0, "keyframe": {"key": "o/1/shot-1.jpg"}},
    ],
    "summary": {"status": "done", "short": "A ferry.", "long": "A film about a ferry in the ice."},
    "chapters": {"items": [{"start_s": 0.0, "end_s": 30.0, "title": "Начало"}, {"start_s": 30.0, "end_s": 60.0, "title": "Ice"}]},
    "transcript": {
        "language": "ru",
        "segments": [
            {"start_s": 1.0, "end_s": 4.0, "text": "Паром выходит из порта рано утром."},
            {"start_s": 4.0, "end_s": 9.0, "text": "На борту девять человек."},
            {"start_s": 31.0, "end_s": 35.0, "text": "The ice is a metre thick."},
        ],
    },
    "captions": {"items": [{"shot": 1, "caption": "A red ship breaks the ice."}, {"shot": 0, "status": "failed"}]},
    "screen_text": {"items": [{"shot": 0, "time_s": 2.0, "text": ["ПОРТ", "Выход 3"]}]},
    "subtitles": [
        {"language": "rus", "cues": [{"start_s": 1.0, "end_s": 4.0, "text": "Паром выходит"}]},
        {"language": "eng", "cues": [{"start_s": 1.0, "end_s": 4.0, "text": "The ferry leaves port."}]},
    ],
}  # fmt: skip


class OfDocument(Payload):
    document_id: UUID


if not registry.known("extract_graph"):  # a worker's package may not have it yet

    @job("extract_graph", payload=OfDocument)
    def extract_graph(context: Any, payload: OfDocument) -> None:
        """Stands for the job that follows."""


@pytest.fixture
def quick_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child process does, in this one and without its bounds: starting it takes longer than its work."""

    def run(running: Running, target: str, arguments: dict[str, Any], _on_note: Any = None) -> Any:
        assert target == "actors.generate_embeddings.child:read"
        return child.read(report=running.report, **arguments)

    monkeypatch.setattr(child, "_bound", lambda *_: None)
    monkeypatch.setattr("agentflow.worker.child.run", run)


def hand_in(system: System, source_id: str, data: bytes, *, filename: str | None = None) -> tuple[Document, Job]:
    """A file and the job that reads it, as the API makes them."""
    key = documents.upload_key(ORGANIZATION, filename)
    system.storage.put_bytes(key, data)
    with system.transaction() as transaction:
        source = Source(storage_key=key, filename=filename, size_bytes=len(data))
        document, old = documents.hand_in(transaction.conn, ORGANIZATION, source_id, source, title=None)
        made = transaction.submit(ORGANIZATION, documents.reading(document.id, graph=False)).job
        documents.ask(transaction.conn, document, chain_id=made.id, job_id=made.id)
    if old is not None:
        system.storage.delete(old)
    return document, made


def again(system: System, document: Document) -> Job:
    """Another job for a document, which nobody handed in."""
    return system.submit(ORGANIZATION, NewJob("generate_embeddings", {"document_id": str(document.id)})).job


def perform(
    system: System, conn: psycopg.Connection, wanted: Job, *, watch: Callable[[Running], None] = lambda _: None
) -> Any:
    """One attempt of a job, as a worker makes it, without writing its end. Returns what the function returned."""
    (taken,), _ = claims.claim(conn, [wanted.id], uuid4(), 600.0)
    return attempt(system, taken, watch=watch)


def attempt(system: System, taken: Job, *, watch: Callable[[Running], None] = lambda _: None) -> Any:
    job_type = registry.get(taken.type)
    payload = job_type.payload.model_validate(taken.payload, strict=False)
    running = Running(taken, time.monotonic() + 600)
    watch(running)
    return running.call(lambda: job_type.function(JobContext(running, system), payload))


def finish(system: System, conn: psycopg.Connection, wanted: Job) -> Any:
    """A job from its claim to its end in the database; a failure is returned."""
    taken = web_support.claim(conn, wanted.id)
    try:
        result = attempt(system, taken)
    except JobError as error:
        web_support.finish(system, conn, taken, "failed", error={"code": error.code, "message": str(error)})
        return error
    web_support.finish(system, conn, taken, result=result)
    return result


def rows(conn: psycopg.Connection, document_id: UUID) -> list[tuple[Any, ...]]:
    """The chunks, as they are stored."""
    return conn.execute(
        "select position, key, text, start_offset, end_offset, tokens, language, place from agentflow.chunks"
        " where document_id = %s order by position",
        (document_id,),
    ).fetchall()


def text_of(conn: psycopg.Connection, document_id: UUID) -> str:
    row = conn.execute("select text from agentflow.documents where id = %s", (document_id,)).fetchone()
    assert row is not None
    return str(row[0])


def whole(conn: psycopg.Connection, document_id: UUID) -> tuple[Any, ...]:
    """Everything about a document that does not depend on when and by whom it was read."""
    row = conn.execute(
        "select title, kind, language, content_hash, size_bytes, text, chunker, version, facts, error"
        " from agentflow.documents where id = %s",
        (document_id,),
    ).fetchone()
    assert row is not None
    return (*row, rows(conn, document_id))


def read(conn: psycopg.Connection, wanted: Job) -> Job:
    found = records.get(conn, ORGANIZATION, wanted.id)
    assert found is not None
    return found
