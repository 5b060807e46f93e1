"""A document's facts when it is handed in again without its graph: what its text no longer bears out leaves."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from agentflow.jobs.model import Job
from agentflow.knowledge import documents, graph
from agentflow.knowledge.documents import Content, Document
from agentflow.knowledge.graph import Entity, Mention, Relation, Source, Span
from agentflow.system import System
from tests.core_support import value
from tests.documents_support import ORGANIZATION, finish, hand_in, quick_child
from tests.graph_support import dump, quotes
from tests.two_at_once import Background

__all__ = ["quick_child"]

pytestmark = pytest.mark.usefixtures("quick_child")

HUGHES, ACME, ATLAS = Entity("person", "Margaret Hughes"), Entity("organization", "Acme"), Entity("product", "Atlas 3")
FOUNDED, MAKES = "Margaret Hughes founded Acme.", "Acme makes Atlas 3."
BEFORE = ("It was long ago.", "Nobody wrote it down.")
PAGES = [f"# Past\n\nNobody wrote it down. {FOUNDED}", f"# Present\n\nIt is well known. {MAKES}"]


def book(*pages: str) -> bytes:
    return "\n\n".join(pages).encode()


def read(system: System, conn: psycopg.Connection, *pages: str, filename: str = "book.md") -> tuple[Document, Source]:
    """The document as this version has it."""
    document, job = hand_in(system, "book", book(*pages), filename=filename)
    assert finish(system, conn, job)["outcome"] == "stored"
    source = graph.read_source(conn, ORGANIZATION, document.id)
    assert source is not None
    return document, source


def store(conn: psycopg.Connection, source: Source) -> str:
    """The facts of the pages, as far as the version has them."""
    mentions, relations = [], []
    for one, predicate, other, words in ((HUGHES, "founded", ACME, FOUNDED), (ACME, "makes", ATLAS, MAKES)):
        for chunk in source.chunks:
            if (start := chunk.text.find(words)) >= 0:
                span = Span(chunk.key, start, start + len(words))
                mentions += [Mention(one, span), Mention(other, span)]
                relations.append(Relation(one, predicate, other, span))
    with conn.transaction():
        return graph.store(conn, source, mentions, relations)


def test_facts_of_a_passage_that_is_gone_leave_and_the_others_stay_as_they_are(
    system: System, conn: psycopg.Connection
) -> None:
    _, source = read(system, conn, PAGES[1])
    store(conn, source)
    expected = dump(conn)
    _, source = read(system, conn, *PAGES)
    store(conn, source)
    assert len(quotes(conn, "graph_evidence")) == 2

    read(system, conn, "# Past\n\nNothing is known of it.", PAGES[1])

    assert dump(conn) == expected
    assert quotes(conn, "graph_evidence") == [MAKES]


def test_a_passage_with_other_white_space_is_the_same_passage_and_its_old_offsets_mean_nothing(
    system: System, conn: psycopg.Connection
) -> None:
    text = "\n".join((*BEFORE, FOUNDED))
    _, source = read(system, conn, text, filename="book.txt")
    store(conn, source)
    assert quotes(conn, "graph_evidence") == [FOUNDED]

    _, after = read(system, conn, text.replace("\n", "\n\n"), filename="book.txt")

    assert [chunk.key for chunk in after.chunks] == [chunk.key for chunk in source.chunks]
    assert after.chunks[0].text.find(FOUNDED) != source.chunks[0].text.find(FOUNDED)
    assert {table: rows for table, rows in dump(conn).items() if rows} == {}
    assert store(conn, after) == "stored" and quotes(conn, "graph_evidence") == [FOUNDED]


def replaced(conn: psycopg.Connection, document: Document, job: Job) -> None:
    """The new version, without any passage of the old one."""
    content = Content("", [], "markdown", None, b"x" * 32, 0, "none", {})
    done = documents.replace(conn, ORGANIZATION, document.id, job_id=job.id, content=content, title="book")
    assert done is not None and done.removed > 0


def test_facts_that_come_while_the_next_version_is_stored_are_not_those_of_that_version(
    system: System, conn: psycopg.Connection, connect: Callable[[], psycopg.Connection]
) -> None:
    _, source = read(system, conn, *PAGES)
    document, job = hand_in(system, "book", book("# Other"), filename="book.md")

    with conn.transaction():
        replaced(conn, document, job)
        late = Background(connect(), lambda theirs: store(theirs, source))
        assert late.waits(connect())

    assert late.result(60.0) == "changed"
    assert value(conn, "select count(*) from agentflow.graph_mentions") == 0


def test_facts_that_come_before_the_next_version_is_stored_leave_with_it(
    system: System, conn: psycopg.Connection, connect: Callable[[], psycopg.Connection]
) -> None:
    _, source = read(system, conn, *PAGES)
    document, job = hand_in(system, "book", book("# Other"), filename="book.md")

    with conn.transaction():
        assert store(conn, source) == "stored"

        def next_version(theirs: psycopg.Connection) -> None:
            with theirs.transaction():
                replaced(theirs, document, job)

        late = Background(connect(), next_version)
        assert late.waits(connect())
    late.result(60.0)

    assert value(conn, "select count(*) from agentflow.graph_mentions") == 0
    assert value(conn, "select count(*) from agentflow.graph_entities") == 0
