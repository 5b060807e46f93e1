"""The graph of documents: whatever the model says, what is stored is what the texts bear out, once and with its place."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from agentflow.system import System
from tests import graph_support as support
from tests import openrouter_server as faults
from tests.graph_support import FACTS, THINGS, Runs, Teller, add_document, dump, local, texts
from tests.openrouter_server import ModelServer, model_server


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


@pytest.mark.parametrize("seed", range(4))
def test_of_a_model_that_errs_what_the_text_bears_out_is_the_graph(
    runs: Runs, conn: psycopg.Connection, vendor: ModelServer, seed: int
) -> None:
    teller = vendor.reply = Teller(share=0.3, seed=seed)
    vendor.fault(faults.broken_json(), when=lambda asked: hash(asked.text) % 3 == 0, times=4)
    first, second = texts()[:5], texts()[5:]

    results = [runs.run(add_document(conn, chunks)) for chunks in (first, second)]

    assert teller.mistakes >= 0.2 * 3 * len(FACTS)
    assert sum(sum(result["dropped"].values()) for result in results) > 0.1 * 3 * len(FACTS)
    assert_is_gold(conn, teller)
    dumped = dump(conn)
    assert dumped["graph_edges"]
