"""What the benchmarks of the knowledge base share: a system of its own in a temporary folder, and chunks put into it."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from idle import ROOT

sys.path.insert(0, str(ROOT))
from agentflow import settings
from agentflow.system import System

ORGANIZATION = 1
RESULTS = ROOT / "ops/bench/results"


@contextmanager
def own_system(home: Path | None = None) -> Iterator[System]:
    """In a folder that stays; without one, in a temporary one."""
    folder = home or Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    system = System.start(settings.load({"AGENTFLOW_HOME": str(folder)}), "bench")
    system.database.answer_timeout_s = 600.0  # a busy machine is no outage
    try:
        yield system
    finally:
        system.close(wait_stopped_s=30)
        if home is None:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Context:
    """A job's context without a job."""

    system: System
    measures: dict[str, float] = field(default_factory=dict)
    job: Any = field(default_factory=lambda: SimpleNamespace(organization_id=ORGANIZATION))

    def check(self) -> None:
        pass

    def spent(self, **measures: float) -> None:
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value

    def progress(self, fraction: float, stage: str | None = None) -> None:
        pass

    def joined_by(self, pid: int | None) -> None:
        pass

    def memory_done(self) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing is to be waited for")


def add_document(system: System, title: str, texts: Sequence[str], language: str | None = None) -> UUID:
    """A document whose chunks are these texts."""
    document_id = uuid4()
    with system.database.transaction() as conn:
        conn.execute(
            "insert into agentflow.documents (id, organization_id, source_id, title, kind, read_at)"
            " values (%s, %s, %s, %s, 'text', clock_timestamp())",
            (document_id, ORGANIZATION, title, title),
        )
        conn.execute(
            "insert into agentflow.chunks (organization_id, document_id, position, key, text, start_offset, end_offset,"
            " tokens, language, place) select %s, %s, n.position - 1, sha256(convert_to(n.text, 'UTF8')), n.text, 0,"
            " length(n.text), length(n.text) / 4 + 1, %s, '{}' from unnest(%s::text[]) with ordinality n(text, position)",
            (ORGANIZATION, document_id, language, list(texts)),
        )
    return document_id


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
