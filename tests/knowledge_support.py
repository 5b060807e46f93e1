"""What the tests of the knowledge base share: documents put into the tables, a job's context without a job, and faults of a
server for embeddings beside those of tests/openrouter_server.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow import settings
from agentflow.calls import Service
from agentflow.database import BoundedConnection
from agentflow.knowledge import vectors
from agentflow.system import System
from tests.http_server import Reply
from tests.openrouter_server import Asked, Fault, ModelServer, model_server, vector

ORGANIZATION = 1


def with_server(environment: dict[str, str], vendor: ModelServer, model: str = "e5", **more: str) -> System:
    """A system whose embeddings come from a server of the test."""
    named = {"EMBEDDINGS_BASE_URL": vendor.url, "EMBEDDINGS_MODEL": model}
    return System.start(settings.load({**environment, **named, **more}), "test")


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server(openrouter=False) as server:
        yield server


@pytest.fixture
def remote(environment: dict[str, str], vendor: ModelServer) -> Iterator[System]:
    """A system whose vectors come from the server."""
    system = with_server(environment, vendor)
    yield system
    system.close()


@dataclass
class Context:
    """A job's context without a job. `at` is called at every check, progress and answer."""

    system: System
    organization_id: int = ORGANIZATION
    at: Callable[[], None] = lambda: None
    measures: dict[str, float] = field(default_factory=dict)
    told: list[tuple[float, str | None]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    @property
    def job(self) -> Any:
        return SimpleNamespace(organization_id=self.organization_id)

    def check(self) -> None:
        self.at()

    def joined_by(self, pid: int | None) -> None:
        pass

    def memory_done(self) -> None:
        pass

    def spent(self, **measures: float) -> None:
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value
        self.at()

    def progress(self, fraction: float, stage: str | None = None) -> None:
        self.told.append((fraction, stage))
        self.at()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class PlacedContext(Context):
    """… whose calls take places among all, as a job's do."""

    def permit(self, service: Service, about: str = "") -> None:
        self.system.calls.permit(service, self.organization_id, f"job:{about}")

    def refused(self, service: Service, retry_after_s: float | None = None) -> None:
        self.system.calls.refused(service, self.organization_id, retry_after_s)

    def exhausted(self, service: Service, for_s: float) -> None:
        self.system.calls.exhausted(service, for_s)


def embed(context: Context, document: UUID) -> dict[str, Any]:
    return vectors.embed_missing(context, document, share_done=0.0, share_end=1.0)  # type: ignore[arg-type]


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def add_document(
    conn: psycopg.Connection,
    texts: Sequence[str],
    *,
    organization_id: int = ORGANIZATION,
    title: str = "a document",
    language: str | None = None,
    places: Sequence[dict[str, Any]] | None = None,
) -> UUID:
    document_id = uuid4()
    conn.execute(
        "insert into agentflow.documents (id, organization_id, source_id, title, kind) values (%s, %s, %s, %s, 'text')",
        (document_id, organization_id, str(document_id), title),
    )
    set_chunks(conn, document_id, texts, organization_id=organization_id, language=language, places=places)
    return document_id


def set_chunks(
    conn: psycopg.Connection,
    document_id: UUID,
    texts: Sequence[str],
    *,
    organization_id: int = ORGANIZATION,
    language: str | None = None,
    places: Sequence[dict[str, Any]] | None = None,
    tokens: int = 100,
) -> list[bytes]:
    """A document's chunks as a new version of it has them; returns the keys of those that it had."""
    rows = conn.execute("delete from agentflow.chunks where document_id = %s returning key", (document_id,)).fetchall()
    places = places or [{"page": number} for number in range(1, len(texts) + 1)]
    conn.cursor().executemany(
        "insert into agentflow.chunks (organization_id, document_id, position, key, text, start_offset, end_offset, tokens,"
        " language, place) values (%s, %s, %s, %s, %s, 0, %s, %s, %s, %s)",
        [
            (organization_id, document_id, n, key_of(text), text, len(text), tokens, language, json.dumps(place))
            for n, (text, place) in enumerate(zip(texts, places, strict=True))
        ],
    )
    return [row[0] for row in rows]


def stored(conn: psycopg.Connection) -> dict[bytes, str | None]:
    """All vectors by their chunk's key; None: it is kept that there is none."""
    return dict(conn.execute("select chunk_key, vector::text from agentflow.vectors order by chunk_key").fetchall())


def embedded_texts(vendor: ModelServer) -> list[str]:
    """Every text that a vector was answered for."""
    return [text for asked in vendor.answered for text in asked.body["input"]]


def answering(make: Callable[[str], list[float]]) -> Fault:
    """An answer whose vectors are made otherwise."""

    def answer(asked: Asked) -> Reply:
        data = [{"index": n, "embedding": make(text)} for n, text in enumerate(asked.body["input"])]
        return Reply(200, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})

    return answer


def not_numbers(asked: Asked) -> Reply:
    """As llama.cpp does: null or NaN for all of a batch with an odd text in it."""
    return answering(lambda text: [float("nan")] * len(vector("")))(asked)


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, nth: int | None) -> Iterator[Callable[[], None]]:
    """Ends the work at its nth statement, check, progress or answer; None: counts them. Gives what notes one."""
    seen = 0

    def note() -> None:
        nonlocal seen
        seen += 1
        if seen == nth:
            raise Killed

    original = BoundedConnection.execute

    def execute(self: BoundedConnection, *arguments: Any, **more: Any) -> Any:
        note()
        return original(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(BoundedConnection, "execute", execute)
        note.count = lambda: seen  # type: ignore[attr-defined]
        yield note
