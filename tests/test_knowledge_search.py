"""Search by meaning and by words, in two languages; marks, filters, tenancy, the index, and what happens without vectors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import organizations
from agentflow.knowledge import embedding_models, search, vector_index
from agentflow.knowledge.search import Filters, Found, Mode, fused
from agentflow.system import System
from tests import openrouter_server as faults
from tests.knowledge_support import ORGANIZATION, Context, add_document, answering, embed, remote
from tests.openrouter_server import ModelServer, model_server
from tests.web_support import client, problem
from web import create_app

__all__ = ["client", "remote"]

#: What a text is about, as a direction: so that the tests know what is near to what.
TOPICS = {"dog": 0, "собак": 0, "puppy": 0, "invoice": 1, "счёт": 1, "payment": 1, "bread": 2, "хлеб": 2, "oven": 2}


def meaning(text: str) -> list[float]:
    """Mostly its topic, and a little of the text itself."""
    chance = random.Random(text)
    vector = [chance.random() / 10 for _ in range(8)]
    for word, topic in TOPICS.items():
        if word in text.lower():
            vector[topic] += 1.0
    return vector


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server(openrouter=False) as server:
        server.fault(answering(meaning), times=100_000)
        yield server


def texts(found: Found) -> list[str]:
    return [hit.text for hit in found.hits]


def find(system: System, question: str, mode: Mode = "hybrid", **options: Any) -> Found:
    return search.search(system, ORGANIZATION, question, mode=mode, **options)


# ---- what is found ----


def test_words_are_found_whatever_their_endings_in_both_languages_at_once(
    system: System, conn: psycopg.Connection
) -> None:
    add_document(
        conn, ["The dogs were sleeping.", "Собаки спали в саду.", "Цены на гречку выросли, the price was rising."]
    )

    assert texts(find(system, "sleeps a dog", "text")) == ["The dogs were sleeping."]
    assert texts(find(system, "собаку, спать", "text")) == ["Собаки спали в саду."]
    assert texts(find(system, "rises цена", "text")) == ["Цены на гречку выросли, the price was rising."]
    assert texts(find(system, "the of und", "text")) == []


@pytest.mark.parametrize("question", ["AF-4017", "af 4017", "4017", "error 4017"])
def test_a_number_behind_a_hyphen_is_found_with_and_without_it(
    system: System, conn: psycopg.Connection, question: str
) -> None:
    add_document(conn, ["Error AF-4017 means a missing field.", "Error AF-4018 means a missing page."])

    assert texts(find(system, question, "text"))[0] == "Error AF-4017 means a missing field."


def test_a_rare_word_counts_more_than_common_ones(system: System, conn: psycopg.Connection) -> None:
    common = [f"The report of the month number {n}." for n in range(50)]
    add_document(conn, [*common, "Zanzibar."])

    found = find(system, "monthly report Zanzibar", "text").hits[0]

    assert found.text == "Zanzibar." and found.matched is not None and found.matched > 0.9
    assert [hit.text_rank for hit in find(system, "monthly report Zanzibar", "text").hits] == list(range(1, 11))


def test_meaning_finds_what_has_other_words_and_words_find_what_has_no_meaning(
    remote: System, conn: psycopg.Connection
) -> None:
    document = add_document(conn, ["The puppy is in the garden.", "Bread needs an oven.", "Reference QX-77 is closed."])
    embed(Context(remote), document)

    by_meaning, by_words = find(remote, "Where is the dog?").hits[0], find(remote, "QX-77").hits[0]

    assert by_meaning.text == "The puppy is in the garden."
    assert (by_meaning.vector_rank, by_meaning.text_rank, by_meaning.matched) == (1, None, None)
    assert by_meaning.distance is not None and by_meaning.distance < 0.1
    assert by_words.text == "Reference QX-77 is closed."
    assert (by_words.text_rank, by_words.matched) == (1, 1.0)


def test_both_lists_are_fused_by_rank_and_a_hit_by_little_of_the_question_does_not_count() -> None:
    a, b, c, d = ((UUID(int=n), 0) for n in range(4))

    ranked = dict(fused({a: 0.1, b: 0.2}, {b: 1.0, c: 0.5, d: 0.1}))

    assert list(ranked) == [b, a, c]
    assert ranked[b] == pytest.approx(1 / 62 + 1 / 61)
    assert ranked[c] == pytest.approx(0.5 / 62)


def test_marked_words_stand_where_the_offsets_say_and_no_markup_comes_from_the_text(
    system: System, conn: psycopg.Connection
) -> None:
    text = "<b>Invoices</b> & bills \ue000of\ue001 AF-12: «счета» за май; 5 < 6, the invoice\u00a0is due."
    add_document(conn, [text])

    (hit,) = find(system, "invoice счёт счета 12", "text").hits

    assert hit.text == text
    assert [text[start:end] for start, end in hit.highlights] == ["Invoices", "12", "счета", "invoice"]


def test_of_chunks_with_the_same_text_one_is_shown(remote: System, conn: psycopg.Connection) -> None:
    for _ in range(3):
        embed(Context(remote), add_document(conn, ["The dog sleeps.", "A payment came."]))

    assert sorted(texts(find(remote, "dog"))) == ["A payment came.", "The dog sleeps."]


def test_a_text_that_stands_in_very_many_documents_crowds_no_other_out(
    remote: System, conn: psycopg.Connection
) -> None:
    for _ in range(search.CANDIDATES + 5):
        last = add_document(conn, ["The dog sleeps."])
    embed(Context(remote), last)
    embed(Context(remote), add_document(conn, ["A puppy is awake."]))

    assert sorted(texts(find(remote, "dog", "vector"))) == ["A puppy is awake.", "The dog sleeps."]
    assert sorted(texts(find(remote, "dogs awake", "text"))) == ["A puppy is awake.", "The dog sleeps."]
    (hit,) = [hit for hit in find(remote, "dog").hits if hit.text == "The dog sleeps."]
    assert hit.text_rank == 1 and hit.vector_rank is not None  # the same one of them in both lists


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_filters_keep_to_a_language_and_to_documents(remote: System, conn: psycopg.Connection, mode: Mode) -> None:
    english = add_document(conn, ["A dog 5", "Another dog 5"], language="en")
    russian = add_document(conn, ["Собака 5"], language="ru")
    for document in (english, russian):
        embed(Context(remote), document)

    def documents(filters: Filters) -> set[UUID]:
        return {hit.document_id for hit in find(remote, "dog 5", mode, filters=filters).hits}

    assert documents(Filters()) == {english, russian}
    assert documents(Filters(language="ru")) == {russian}
    assert documents(Filters(documents=(english,))) == {english}
    assert documents(Filters(language="ru", documents=(english,))) == set()
    assert documents(Filters(documents=(uuid4(),))) == set()


@pytest.mark.parametrize(
    "question", ["'", "a' | b & !c:*", "\\", '"', "<->", "%s %(x)s", "🦊", "\ue000", "-", "x" * 1000]
)
def test_no_question_is_a_syntax_error(remote: System, conn: psycopg.Connection, question: str) -> None:
    embed(Context(remote), add_document(conn, ["A dog's life: a' | b & !c:* \\ \" %s 🦊"]))

    assert len(find(remote, question).hits) == 1


# ---- the index ----


@pytest.fixture
def many(remote: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> System:
    """As many as an index is made for, which are few here."""
    monkeypatch.setattr(vector_index, "MANY", 300)
    subjects = ("dog", "invoice", "bread")
    embed(
        Context(remote),
        add_document(conn, [f"{subjects[n % 3]} number {n}" for n in range(400)], language="en"),
    )
    return remote


def test_an_organization_with_many_chunks_gets_an_index_that_finds_the_same(
    many: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = embedding_models.every(conn)
    assert vector_index.exists(conn, ORGANIZATION, model.id)
    conn.execute("analyze agentflow.vectors")
    explained: list[str] = []
    original = search._read

    def read(pooled: Any, query: str, given: Any) -> Any:
        explained.extend(row[0] for row in pooled.execute(f"explain {query}".encode(), given).fetchall())
        return original(pooled, query, given)

    monkeypatch.setattr(search, "_read", read)
    questions = ["a puppy", "payment of an invoice 17", "oven"]

    by_index = [find(many, question, "vector").hits for question in questions]

    name = vector_index.name_of(ORGANIZATION, model.id)
    assert sum(name in line for line in explained) == len(questions)
    conn.execute(f"drop index agentflow.{name}".encode())
    exact = [find(many, question, "vector").hits for question in questions]
    for one, other in zip(by_index, exact, strict=True):
        # Among so many that are nearly the same, the index rounds otherwise: as near, if not the same ones.
        assert [hit.distance for hit in one] == pytest.approx([hit.distance for hit in other], abs=2e-3)
        assert one[0].text.split()[0] == other[0].text.split()[0]


def test_a_rare_language_is_found_past_the_index(many: System, conn: psycopg.Connection) -> None:
    embed(Context(many), add_document(conn, ["хлеб и печь"], language="ru"))

    found = find(many, "dog", "vector", filters=Filters(language="ru"))

    assert texts(found) == ["хлеб и печь"]


def test_an_index_whose_making_was_killed_is_made_anew(many: System, conn: psycopg.Connection) -> None:
    (model,) = embedding_models.every(conn)
    name = f"agentflow.{vector_index.name_of(ORGANIZATION, model.id)}"
    conn.execute("update pg_index set indisvalid = false where indexrelid = %s::regclass", (name,))
    assert len(find(many, "dog", "vector").hits) == 10  # exact meanwhile

    assert vector_index.ensure(many, ORGANIZATION, model)

    assert vector_index.exists(conn, ORGANIZATION, model.id)
    assert not vector_index.ensure(many, ORGANIZATION, model)


# ---- over HTTP ----


def test_the_answer_says_what_was_found_where_and_why(remote: System, conn: psycopg.Connection) -> None:
    client = operator(remote)
    document = add_document(
        conn,
        ["The dog sleeps.", "A payment came."],
        title="Notes",
        places=[{"page": 3, "heading": ["Pets"]}, {"page": 4}],
    )
    embed(Context(remote), document)

    said = client.get("/api/knowledge/search?q=sleeping+dog&limit=1").json

    assert said == {
        "hits": [
            {
                "document_id": str(document),
                "source_id": str(document),
                "title": "Notes",
                "kind": "text",
                "position": 0,
                "text": "The dog sleeps.",
                "highlights": [{"start": 4, "end": 7}, {"start": 8, "end": 14}],
                "place": {"page": 3, "heading": ["Pets"]},
                "start_offset": 0,
                "end_offset": 15,
                "language": None,
                "scores": {
                    "fused": pytest.approx(2 / 61, abs=1e-5),
                    "vector_rank": 1,
                    "distance": pytest.approx(0.0, abs=0.1),
                    "text_rank": 1,
                    "matched": 1.0,
                },
            }
        ],
        "model": "server/e5",
        "problem": None,
    }


def test_another_organization_finds_nothing_of_it(remote: System, conn: psycopg.Connection) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (7700001, 'other', 'Other')")
    embed(Context(remote), add_document(conn, ["The dog sleeps."]))
    mine = add_document(conn, ["Their own dog."], organization_id=7700001)
    embed(Context(remote, organization_id=7700001), mine)
    theirs = create_app(remote).test_client()
    _, key = organizations.create_key(conn, 7700001, "test", ["read"])
    theirs.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"

    for mode in ("hybrid", "vector", "text"):
        hits = theirs.get(f"/api/knowledge/search?q=dog&mode={mode}").json["hits"]
        assert [hit["text"] for hit in hits] == ["Their own dog."], mode
    assert theirs.get("/api/knowledge/search?q=sleeps&mode=text").json["hits"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "q"),
        ("q=", "q"),
        ("q=a%00b", "q"),
        ("q=a&limit=0", "limit"),
        ("q=a&limit=51", "limit"),
        ("q=a&mode=all", "mode"),
        ("q=a&language=English", "language"),
        ("q=a&document=1,2", "document"),
        ("q=a&documents=1", "documents"),
    ],
)
def test_a_wrong_parameter_is_named(client: FlaskClient, query: str, field: str) -> None:
    said = problem(client.get(f"/api/knowledge/search?{query}"), 422)

    assert said["errors"][0]["field"] == field


def test_while_the_models_server_is_away_words_are_searched_and_it_is_said(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    client = operator(remote)
    embed(Context(remote), add_document(conn, ["The dog sleeps.", "A payment came."]))
    vendor.heal()
    vendor.fault(faults.status(503, "down"), times=2)

    said = client.get("/api/knowledge/search?q=dog").json
    refused = client.get("/api/knowledge/search?q=dog&mode=vector")

    assert [hit["text"] for hit in said["hits"]] == ["The dog sleeps."]
    assert said["model"] is None and said["problem"].startswith("server/e5: the model server failed with status 503")
    assert problem(refused, 503)["detail"] == said["problem"] and refused.headers["Retry-After"]


def test_without_pgvector_words_are_searched_and_it_is_said_what_to_install(
    client: FlaskClient, conn: psycopg.Connection
) -> None:
    add_document(conn, ["The dog sleeps."])
    conn.execute("drop table agentflow.vectors; drop extension vector")
    conn.execute(
        "create or replace function agentflow.prepare_vectors_1() returns text language sql as"
        " $$ select 'extension \"vector\" is not available' $$"
    )

    said = client.get("/api/knowledge/search?q=dog").json

    assert [hit["text"] for hit in said["hits"]] == ["The dog sleeps."]
    assert "pgvector 0.8" in said["problem"] and "is not available" in said["problem"]
    assert "pgvector 0.8" in problem(client.get("/api/knowledge/search?q=dog&mode=vector"), 409)["detail"]


def test_before_the_first_document_nothing_is_found_and_nothing_is_started(client: FlaskClient, system: System) -> None:
    assert client.get("/api/knowledge/search?q=dog").json == {"hits": [], "model": None, "problem": None}
    assert system.embeddings.encoder_pid is None


def operator(system: System) -> FlaskClient:
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {system.admin_key()}"
    return client
