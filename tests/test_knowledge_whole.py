"""The knowledge base as its callers see it: gunicorn, a worker and two servers for models; from files to answers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.core_support import value
from tests.graph_support import FACTS, Fact, Teller, dump
from tests.knowledge_support import embedded_texts
from tests.openrouter_server import ModelServer, model_server
from tests.processes import eventually, worker
from tests.web_support import Web, gunicorn, problem

URL = "/api/knowledge/documents"
ENGLISH = [fact for fact in FACTS if fact.sentence.isascii()]


def pdf(pages: Sequence[str]) -> bytes:
    """A file with these texts in Helvetica, a line of the page for each of theirs."""
    fixed = 3
    kids = b" ".join(b"%d 0 R" % (fixed + 1 + 2 * n) for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, text in enumerate(pages):
        drawn = b"".join(b"(%s) Tj T* " % line.encode() for line in text.splitlines())
        drawn = b"BT /F1 10 Tf 14 TL 50 800 Td " + drawn + b"ET"
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >>"
            b" /Contents %d 0 R >>" % (fixed + 2 + 2 * n),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        ]
    file, places = io.BytesIO(), []
    file.write(b"%PDF-1.4\n")
    for number, content in enumerate(objects, 1):
        places.append(file.tell())
        file.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    table = file.tell()
    file.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    file.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    file.write(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table))
    return file.getvalue()


def page(number: int, *facts: Fact) -> str:
    """Some lines about nothing that another page says, and the facts."""
    lines = [f"Line {n} of page {number} is about matter {number * 100 + n}, and about no other." for n in range(14)]
    return "\n".join([*lines[:7], *(fact.sentence for fact in facts), *lines[7:]])


@dataclass
class Whole:
    web: Web
    chat: ModelServer
    embeddings: ModelServer

    def hand_in(self, source_id: str, data: bytes, **fields: str) -> dict[str, Any]:
        """Returns the document as it is when its chain has ended."""
        answer = self.web.http.post(URL, files={"file": ("book.pdf", data)}, data={"source_id": source_id, **fields})
        assert answer.status_code == 202, answer.text
        return self.ready(answer.json()["document_id"])

    def ready(self, document_id: str, within_s: float = 120.0) -> dict[str, Any]:
        """Looks until the chain has ended: its progress never went back."""
        seen = [0.0]

        def ended() -> dict[str, Any] | None:
            document = self.get(f"{URL}/{document_id}")
            assert document["status"] != "failed", document
            seen.append(document["progress"])
            return document if document["status"] == "ready" else None

        document: dict[str, Any] = eventually(ended, within_s=within_s)
        assert seen == sorted(seen) and seen[-1] == 1.0
        return document

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        answer = self.web.http.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def embedded(self) -> list[str]:
        """The passages of pages for which vectors were answered."""
        return [text for text in embedded_texts(self.embeddings) if "Line" in text]

    def edges(self, name: str) -> dict[str, str]:
        """What is said of a thing: by predicate, the last edge."""
        (thing,) = (e for e in self.get("/api/graph/entities", q=name)["entities"] if name in e["names"])
        return {e["predicate"]: e["id"] for e in self.get(f"/api/graph/neighbourhood/{thing['id']}")["edges"]}


@pytest.fixture
def whole(environment: dict[str, str], tmp_path: Path) -> Iterator[Whole]:
    with ExitStack() as stack:
        chat, embeddings = (stack.enter_context(model_server(openrouter=False)) for _ in range(2))
        chat.reply = Teller()
        environment |= {"LLM_BASE_URL": chat.url, "LLM_MODEL": "m", "LLM_TIMEOUT": "30"}
        environment |= {"EMBEDDINGS_BASE_URL": embeddings.url, "EMBEDDINGS_MODEL": "e5"}
        web = stack.enter_context(gunicorn(environment, tmp_path))
        stack.enter_context(worker(environment, tmp_path / "worker.log"))
        yield Whole(web, chat, embeddings)


def test_a_file_is_found_explained_changed_and_forgotten(whole: Whole, conn: psycopg.Connection) -> None:
    founded = next(fact for fact in ENGLISH if fact.predicate == "founded")
    moved, sold = (fact for fact in ENGLISH if fact.names[0] == "Acme Corporation")
    pages = [page(1, sold), page(2), page(3, founded), page(4, moved)]

    document = whole.hand_in("book", pdf(pages), graph="true")

    assert [step["type"] for step in document["jobs"]] == ["generate_embeddings", "extract_graph"]
    keys = value(conn, "select count(distinct key) from agentflow.chunks")
    assert value(conn, "select count(*) from agentflow.vectors") == keys >= len(pages)
    hit = whole.get("/api/knowledge/search", q="who founded Acme Corporation")["hits"][0]
    assert founded.sentence in " ".join(hit["text"].split())
    assert (hit["document_id"], hit["place"]["page"]) == (document["id"], 3)
    edges = whole.edges("Acme Corporation")
    assert edges.keys() == {"founded", "makes", "located_in"}
    (evidence,) = whole.get(f"/api/graph/explain/{edges['founded']}")["evidence"]
    assert " ".join(evidence["quote"].split()) == founded.sentence
    assert (evidence["document_id"], evidence["place"]["page"]) == (document["id"], 3)

    # Without its graph: what the page no longer says is not said in the graph either; the rest is left.
    pages[2] = page(3)
    again = whole.hand_in("book", pdf(pages))

    assert (again["id"], again["version"], len(again["jobs"])) == (document["id"], 2, 1)
    assert whole.edges("Acme Corporation").keys() == {"makes", "located_in"}
    problem(whole.web.http.get(f"/api/graph/explain/{edges['founded']}"), 404)
    assert whole.get("/api/graph/entities", q="Hughes")["entities"] == []

    assert whole.web.http.delete(f"{URL}/{document['id']}").status_code == 204

    assert whole.get("/api/knowledge/search", q="who founded Acme Corporation")["hits"] == []
    assert value(conn, "select count(*) from agentflow.chunks") == 0
    assert value(conn, "select count(*) from agentflow.vectors") == 0
    assert {table: rows for table, rows in dump(conn).items() if rows} == {}


@pytest.mark.parametrize("length", [120, pytest.param(500, marks=pytest.mark.long)])
def test_of_a_long_file_with_one_page_changed_only_that_page_is_embedded(
    whole: Whole, conn: psycopg.Connection, length: int
) -> None:
    pages = [page(number) for number in range(1, length + 1)]
    first = whole.hand_in("book", pdf(pages))
    asked = whole.embedded()
    assert len(asked) == first["chunks"] >= length

    pages[length // 2] = pages[length // 2].replace("matter", "question")
    second = whole.hand_in("book", pdf(pages))

    fresh = whole.embedded()[len(asked) :]
    assert second["version"] == 2 and 1 <= len(fresh) <= 3
    assert all("question" in text for text in fresh)
    assert value(conn, "select count(*) from agentflow.vectors") == second["chunks"]
    assert whole.hand_in("book", pdf(pages))["version"] == 2
    assert whole.embedded() == asked + fresh
