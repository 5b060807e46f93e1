"""The graph of documents: whatever the model says, what is stored is what the texts bear out, once and with its place."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from actors.extract_graph import grounding, resolution
from actors.extract_graph.reading import Found
from agentflow.database import BoundedConnection
from agentflow.errors import Permanent
from agentflow.jobs import claims, records
from agentflow.knowledge import graph, graph_matches, graph_types
from agentflow.knowledge.graph_types import GraphTypes
from agentflow.knowledge.names import key_of
from agentflow.models.asking import AT_ONCE, Asking
from agentflow.system import System
from agentflow.worker.running import JobContext, Running
from tests import graph_support as support
from tests import openrouter_server as faults
from tests import test_names
from tests.graph_support import (
    BOLT,
    FACTS,
    ORGANIZATION,
    THINGS,
    Fact,
    Runs,
    Teller,
    add_document,
    dump,
    local,
    place,
    texts,
)
from tests.openrouter_server import Asked, ModelServer, model_server
from tests.processes import eventually, worker


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server(openrouter=False) as server:
        server.reply = Teller()
        yield server


@pytest.fixture
def runs(system: System, conn: psycopg.Connection, vendor: ModelServer) -> Iterator[Runs]:
    runs = Runs(system, conn, **local(vendor))
    yield runs
    runs.system.close()


def stored_facts(conn: psycopg.Connection, teller: Teller) -> set[tuple[str, str, str, str | None]]:
    """The edges between things, as what the names mean."""
    rows = conn.execute(
        "select f.type, array_agg(distinct f.name), e.predicate, t.type, array_agg(distinct t.name), v.valid_from"
        " from agentflow.graph_edges e join agentflow.graph_evidence v on v.edge_id = e.id"
        " join agentflow.graph_entities a on a.id = e.from_id join agentflow.graph_entities f on f.root_id = a.root_id"
        " join agentflow.graph_entities b on b.id = e.to_id join agentflow.graph_entities t on t.root_id = b.root_id"
        " group by e.id, f.type, t.type, v.valid_from"
    ).fetchall()
    found = set()
    for from_type, from_names, predicate, to_type, to_names, valid_from in rows:
        ones = {teller.thing(from_type, name) for name in from_names}
        others = {teller.thing(to_type, name) for name in to_names}
        (one,), (other,) = ones, others
        assert one and other
        found.add((one.name, predicate, other.name, valid_from))
    return found


def assert_is_gold(conn: psycopg.Connection, teller: Teller) -> None:
    """Each thing once, under no name that is another's; each fact, no other, each with its words."""
    stored = support.things(conn)
    meant = [{teller.thing(type_, name) for name in names} for type_, names in stored]
    assert all(len(each) == 1 for each in meant), [s for s, m in zip(stored, meant, strict=True) if len(m) != 1]
    assert sorted(str(thing) for (thing,) in meant) == sorted(str(thing) for thing in THINGS)
    gold = {(fact.one.name, fact.predicate, fact.other.name) for fact in FACTS}
    facts = stored_facts(conn, teller)
    assert {fact[:3] for fact in facts} == gold
    dated = {(f.one.name, f.predicate, f.other.name, f.valid_from) for f in FACTS if f.valid_from}
    assert {fact for fact in facts if fact[3]} == dated
    sentences = {fact.sentence for fact in FACTS}
    for table in ("graph_mentions", "graph_evidence"):
        found = {" ".join(quote.split()) for quote in support.quotes(conn, table)}
        assert sentences <= found
        assert all(any(quote in sentence for sentence in sentences) for quote in found), found - sentences


def test_what_the_model_says_truly_is_the_graph(runs: Runs, conn: psycopg.Connection, vendor: ModelServer) -> None:
    teller = vendor.reply = Teller()
    document = add_document(conn, texts())

    result = runs.run(document)

    assert_is_gold(conn, teller)
    assert (result["status"], result["dropped"], result["failed"]) == ("done", {}, [])
    assert result["relations"] == len(FACTS)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_model_that_errs_what_the_text_bears_out_is_the_graph(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer, seed: int
) -> None:
    teller = vendor.reply = Teller(share=0.3, seed=seed)
    vendor.fault(faults.broken_json(), when=lambda asked: zlib.crc32(asked.text.encode()) % 10 < 3, times=100)
    first, second = texts()[:5], texts()[5:]

    results = [runs.run(add_document(conn, chunks)) for chunks in (first, second)]

    assert teller.mistakes == 0.3 * 3 * len(FACTS)
    assert sum(sum(result["dropped"].values()) for result in results) >= 0.3 * teller.mistakes
    assert_is_gold(conn, teller)


def test_a_second_run_pays_nothing_and_changes_nothing(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer
) -> None:
    vendor.reply = Teller(share=0.3)
    documents = [add_document(conn, chunks) for chunks in (texts()[:5], texts()[5:])]
    first = [runs.run(document) for document in documents]
    before, asked = dump(conn), len(vendor.asked)

    second = [runs.run(document) for document in documents]

    assert dump(conn) == before
    assert len(vendor.asked) == asked
    for one, other in zip(first, second, strict=True):
        assert {**one, "names": None} == {**other, "names": None}
        assert other["names"]["asked"] == other["names"]["same"] == 0


def test_the_order_of_documents_makes_no_other_graph(runs: Runs, conn: psycopg.Connection) -> None:
    documents = [add_document(conn, chunks) for chunks in (texts()[:3], texts()[3:7], texts()[7:])]
    for document in documents:
        runs.run(document)
    before = dump(conn)
    conn.execute("delete from agentflow.graph_matches")
    conn.execute("delete from agentflow.graph_entities")

    for document in reversed(documents):
        runs.run(document)

    assert dump(conn) == before


# ---- ends before the end ----


class Cut(BaseException):
    """What a stop raises."""


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13])
def test_a_run_that_ends_anywhere_is_made_up_for_by_the_next(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After so many statements that write: a kill lets go of what was not committed."""
    vendor.reply = Teller(share=0.3)
    chunks = texts()[:4]
    whole = add_document(conn, chunks)
    runs.run(whole)
    before = dump(conn)
    with conn.transaction():
        graph.forget_document(conn, ORGANIZATION, whole)
    assert not any(dump(conn).values())
    conn.execute("delete from agentflow.model_answers")
    asked = len(vendor.asked)
    writes = itertools.count(1)
    execute = BoundedConnection.execute

    def cut(self: BoundedConnection, query: Any, *parameters: Any, **more: Any) -> Any:
        if (
            re.match(r"\s*(insert|update|delete)", str(query))
            and "agentflow.jobs" not in str(query)
            and next(writes) == after
        ):
            raise Cut
        return execute(self, query, *parameters, **more)

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(BoundedConnection, "execute", cut)
        runs.run(whole)
    runs.run(whole)

    assert dump(conn) == before
    questions = [each.text for each in vendor.asked[asked:]]
    assert len(questions) - len(set(questions)) <= AT_ONCE  # answered, and not yet kept when the end came


def test_workers_that_are_killed_half_way_leave_the_same_graph(
    environment: dict[str, str],
    runs: Runs,
    conn: psycopg.Connection,
    vendor: ModelServer,
    tmp_path: Path,
) -> None:
    """One while the text is read, one while names are compared; the third comes to the end."""
    vendor.reply = Teller(share=0.3)
    document = add_document(conn, texts())
    runs.run(document)
    before = dump(conn)
    with conn.transaction():
        graph.forget_document(conn, ORGANIZATION, document)
    conn.execute("delete from agentflow.model_answers")
    asked = len(vendor.asked)
    slow = threading.Event()
    tell = vendor.reply
    one_of_them = threading.Lock()  # several questions are asked at once

    def reply(each: Asked) -> Any:
        nonlocal halves
        with one_of_them:
            hold = (each.schema, halves) in (("found", 0), ("verdict", 1)) and len(vendor.answered) - asked >= 3
            halves += hold
        if hold:
            slow.set()
            released.wait(60)
        return tell(each)

    halves, released = 0, threading.Event()
    vendor.reply = reply
    job = runs.submit(document)
    environment = {**environment, **local(vendor), "JOB_LEASE": "3", "JOB_LEASE_RENEW": "1"}

    for number in range(2):
        with worker(environment, tmp_path / f"{number}.log") as process:
            assert slow.wait(120)
            process.kill()
            slow.clear()
    released.set()
    with worker(environment, tmp_path / "last.log"):
        ended = eventually(
            lambda: now if (now := records.get(conn, None, job.id)) and now.terminal else None, within_s=120
        )

    assert ended.state == "succeeded", ended.error
    assert [each.outcome for each in records.attempts(conn, job.id)] == ["crashed", "crashed", "succeeded"]
    assert dump(conn) == before


# ---- deleting ----


@pytest.mark.parametrize("by", ["the program", "a cascade"])
def test_a_deleted_document_leaves_the_graph_as_if_it_had_never_been(
    runs: Runs, conn: psycopg.Connection, by: str
) -> None:
    stays = add_document(conn, texts()[:6])
    runs.run(stays)
    before = dump(conn)
    goes = add_document(conn, texts()[4:])
    runs.run(goes)
    assert dump(conn) != before

    with conn.transaction():
        if by == "the program":
            graph.forget_document(conn, ORGANIZATION, goes)
        conn.execute("delete from agentflow.documents where id = %s", (goes,))

    assert dump(conn) == before
    conn.execute("delete from agentflow.documents where id = %s", (stays,))
    assert not any(dump(conn).values())


def test_a_page_that_was_changed_takes_its_facts_along_and_only_it_is_asked_for_again(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer
) -> None:
    chunks = texts(each=1)
    document = add_document(conn, chunks)
    runs.run(document)
    asked = len([each for each in vendor.asked if each.schema == "found"])
    support.write_chunks(conn, document, [*chunks[:5], "Nothing of interest.", *chunks[6:]])

    runs.run(document)

    again = len([each for each in vendor.asked if each.schema == "found"]) - asked
    assert 1 <= again <= 3 < asked
    evidence = " ".join(" ".join(quote.split()) for quote in support.quotes(conn, "graph_evidence"))
    assert FACTS[5].sentence not in evidence
    assert all(fact.sentence in evidence for fact in FACTS if fact != FACTS[5])


def test_a_document_that_went_or_changed_meanwhile_gets_no_facts(runs: Runs, conn: psycopg.Connection) -> None:
    document = add_document(conn, texts())
    source = graph.read_source(conn, ORGANIZATION, document)
    assert source is not None
    support.write_chunks(conn, document, texts()[:3])

    changed = graph.store(conn, source, [], [])
    conn.execute("delete from agentflow.documents where id = %s", (document,))
    gone = graph.store(conn, source, [], [])

    assert (changed, gone) == ("changed", "gone")
    with pytest.raises(Permanent, match="There is no document"):
        runs.run(document)


# ---- merges ----


def test_an_undone_merge_is_not_made_again(runs: Runs, conn: psycopg.Connection, vendor: ModelServer) -> None:
    document = add_document(conn, texts())
    runs.run(document)
    merge = next(
        m for m in graph_matches.merges(conn, ORGANIZATION) if {m.one.name, m.other.name} == {"Bolt", "Bolt GmbH"}
    )
    with conn.transaction():
        undone = graph_matches.set_same(conn, ORGANIZATION, merge.id, False)
    assert undone is not None and undone.undone

    conn.execute("delete from agentflow.model_answers")
    runs.run(document)
    with conn.transaction():
        graph.forget_document(conn, ORGANIZATION, document)
    runs.run(add_document(conn, [*texts(), "More."]))

    names = {names for type_, names in support.things(conn)}
    assert {frozenset({"Bolt"}), frozenset({"Bolt GmbH"})} <= names
    with conn.transaction():
        graph_matches.set_same(conn, ORGANIZATION, merge.id, True)
    assert frozenset({"Bolt", "Bolt GmbH"}) in {names for type_, names in support.things(conn)}
    assert graph_matches.set_same(conn, 2, merge.id, False) is None


@pytest.mark.long
def test_two_hundred_labelled_pairs_are_merged_through_the_whole(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer
) -> None:
    """What tests/test_names.py measures on the names alone, with the tables' keys, limits and groups, and the model over HTTP."""
    means = test_names.meaning()

    def verdict(asked: Asked) -> dict[str, bool]:
        type_ = re.search(r"same (\w+)\?", asked.text)[1]  # type: ignore[index]
        one, other = (re.search(rf'^{n}\. (.*) \("', asked.text, re.M)[1] for n in (1, 2))  # type: ignore[index]
        return {"same": means[type_, one] == means[type_, other]}

    vendor.reply = verdict
    source = graph.read_source(conn, ORGANIZATION, add_document(conn, [name for _, name in means]))
    assert source is not None
    mentions = {
        graph.Mention(graph.Entity(type_, name), graph.Span(hashlib.sha256(name.encode()).digest(), 0, len(name)))
        for type_, name in means
    }
    assert graph.store(conn, source, mentions, []) == "stored"
    (job,), _ = claims.claim(conn, [runs.submit(source.id).id], uuid4(), 600.0)

    result = resolution.resolve(
        Asking(JobContext(Running(job, time.monotonic() + 600), runs.system), runs.system.models),
        source,
        lambda _: None,
    )

    rows = conn.execute("select type, key, root_id from agentflow.graph_entities").fetchall()
    roots = {(type_, key): root for type_, key, root in rows}
    of = {name: roots[name[0], key_of(name[1])] for name in means}
    found = Counter((of[p.type, p.one] == of[p.type, p.other], p.same) for p in test_names.PAIRS)
    f1 = 2 * found[True, True] / (2 * found[True, True] + found[True, False] + found[False, True])
    print(f"F1 {f1:.3f}, {result}")
    assert f1 >= 0.95
    assert len(vendor.asked) == result["asked"] <= 0.2 * result["compared"]


def test_names_that_only_an_embedding_takes_for_alike_go_to_the_model(
    system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = place("Leningrad", "Saint Petersburg")
    facts = [Fact(BOLT, "located_in", night, ("Bolt", name), f"Bolt has a hall in {name}.") for name in night.names]
    towards = {"Leningrad": [1.0, 0.1], "Saint Petersburg": [1.0, 0.15], "Bolt": [0.0, 1.0]}
    monkeypatch.setattr(faults, "vector", lambda text: towards[text])
    with model_server(openrouter=False) as vendor:
        vendor.reply = teller = Teller(facts)
        runs = Runs(system, conn, **local(vendor), EMBEDDINGS_MODEL="e")
        document = add_document(conn, [fact.sentence for fact in facts])

        result = runs.run(document)
        again = runs.run(document)
        runs.system.close()

    assert teller.compared == [("Leningrad", "Saint Petersburg")] or teller.compared == [
        ("Saint Petersburg", "Leningrad")
    ]
    assert ("place", frozenset(night.names)) in support.things(conn)
    assert (result["names"]["asked"], again["names"]["asked"]) == (1, 0)
    assert len([asked for asked in vendor.asked if asked.path.endswith("/embeddings")]) == 1


# ---- what is asked, and what of it counts ----


def test_a_second_pass_finds_what_the_first_missed(runs: Runs, conn: psycopg.Connection, vendor: ModelServer) -> None:
    vendor.reply = teller = Teller(missed_at_first=FACTS[::3])
    once, twice = add_document(conn, texts()), add_document(conn, texts(), title="Other")

    without = runs.run(once)
    again = runs.run(twice, second_pass=True)

    assert without["relations"] == len(FACTS) - len(FACTS[::3])
    assert again["relations"] == len(FACTS)
    assert_is_gold(conn, teller)


def test_the_types_of_an_organization_are_asked_for_and_no_others_count(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer
) -> None:
    kinds = [{"name": "place"}, {"name": "organization"}]
    types = GraphTypes.model_validate({"entities": kinds, "relations": [{"name": "located_in"}]})
    graph_types.write(conn, ORGANIZATION, types)

    result = runs.run(add_document(conn, texts()))

    schema = vendor.asked[0].body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["entities"]["items"]["properties"]["type"]["enum"] == ["place", "organization"]
    assert schema["properties"]["relations"]["items"]["properties"]["predicate"]["enum"] == ["located_in"]
    assert "works_for" not in vendor.asked[0].text
    assert {type_ for type_, _ in support.things(conn)} == {"place", "organization"}
    assert result["dropped"]["unknown_type"] > 0


def test_what_is_refused_leaves_the_rest_and_what_it_had_before(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer
) -> None:
    document = add_document(conn, texts(each=1))
    first = runs.run(document)
    before = dump(conn)
    conn.execute("delete from agentflow.model_answers")
    refused = FACTS[0].sentence.split()[-1]
    vendor.fault(faults.refused(), when=lambda asked: asked.schema == "found" and refused in asked.text, times=100)

    second = runs.run(document)

    assert (first["status"], second["status"]) == ("done", "partial")
    assert {each["code"] for each in second["failed"]} == {"model_refused"}
    assert dump(conn) == before


def test_where_everything_is_refused_the_job_says_so(runs: Runs, conn: psycopg.Connection, vendor: ModelServer) -> None:
    vendor.fault(faults.no_credit(), times=1000)

    with pytest.raises(Permanent, match="no credit"):
        runs.run(add_document(conn, texts()))

    assert not any(dump(conn).values())


def test_without_a_model_the_job_says_what_to_set(system: System, conn: psycopg.Connection) -> None:
    with pytest.raises(Permanent, match="set OPENROUTER_API_KEY or LLM_BASE_URL"):
        Runs(system, conn).run(add_document(conn, texts()))


@pytest.mark.parametrize(
    ("text", "quote", "near", "found"),
    [
        ("a  big\n cat", "big cat", 0, "big\n cat"),
        ("he said «yes» — twice", 'said "yes" - twice', 0, "said «yes» — twice"),
        ("cat. A cat. One cat.", "cat", 11, "cat"),
        ("concatenate", "cat", 0, None),
        ("one two", "two three", 0, None),
        ("It ends here.", "… ends here...", 0, "ends here"),
        ("anything", "", 0, None),
        ("anything", " … ", 0, None),
    ],
)
def test_a_quote_is_found_letter_by_letter_or_not(text: str, quote: str, near: int, found: str | None) -> None:
    place = grounding.find(text, quote, near)

    assert (text[slice(*place)] if place else None) == found
    assert place is None or near == 0 or place[0] == 7


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (("1998", None, "in 1998"), ("1998", None)),
        (("1998-05", "2001", "from May 1998 to 2001"), ("1998-05", "2001")),
        (("1998-13", None, "in 1998"), None),
        (("1999", None, "in 1998"), None),
        (("2001", "1998", "from May 1998 to 2001"), None),
        (("1998", None, "since 1998"), None),
        (("1998", None, None), None),
    ],
)
def test_a_date_counts_only_with_words_that_hold_it(given: tuple[Any, ...], kept: tuple[Any, ...] | None) -> None:
    text = "Ann led Acme in 1998, that is from May 1998 to 2001."
    chunk = graph.Chunk(b"k", text, 10)
    where = {"passage": 1, "quote": "Ann led Acme"}
    found = Found.model_validate(
        {
            "entities": [{"name": "Ann", "type": "person", **where}, {"name": "Acme", "type": "organization", **where}],
            "relations": [
                {"subject": "Ann", "predicate": "leads", "object": "Acme", **where}
                | dict(zip(("valid_from", "valid_to", "valid_quote"), given, strict=True))
            ],
        }
    )
    facts = grounding.Grounding(graph_types.DEFAULT)

    facts.add([chunk], found)

    (relation,) = facts.relations
    validity = relation.validity
    assert ((validity.valid_from, validity.valid_to) if validity else None) == kept
    assert (facts.dropped["date_not_in_text"] == 1) == (kept is None)


def test_one_organizations_names_are_not_anothers(runs: Runs, conn: psycopg.Connection) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    runs.run(add_document(conn, texts()))
    mine = dump(conn)

    runs.run(add_document(conn, texts(), organization_id=2), organization_id=2)

    both = dump(conn)
    assert all(len(both[table]) == 2 * len(mine[table]) for table in mine)
    shared = (
        "select count(distinct organization_id) from agentflow.graph_entities group by root_id order by 1 desc limit 1"
    )
    assert conn.execute(shared).fetchone() == (1,)
