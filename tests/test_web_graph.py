"""The graph over HTTP and on the command line; and its statements on a large graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import embedded
from agentflow.jobs import records
from agentflow.knowledge import graph, graph_matches, graph_queries, graph_types
from agentflow.knowledge.clusters import Match
from agentflow.system import System
from tests import cli_support, core_support
from tests.cli_support import Command
from tests.graph_support import ORGANIZATION, Runs, Teller, add_document, local, small_graph, texts
from tests.openrouter_server import model_server
from tests.test_query_plans import Plans, plans
from tests.web_support import client, problem
from web import create_app

__all__ = ["client"]

agentflow = cli_support.agentflow


@pytest.fixture
def told(system: System, conn: psycopg.Connection) -> Iterator[UUID]:
    """A document with pages whose graph is there."""
    with model_server(openrouter=False) as vendor:
        vendor.reply = Teller()
        runs = Runs(system, conn, **local(vendor))
        document = add_document(conn, texts())
        runs.run(document)
        runs.system.close()
        yield document


def thing(client: FlaskClient, name: str) -> dict[str, Any]:
    found = [
        e for e in client.get("/api/graph/entities", query_string={"q": name}).json["entities"] if name in e["names"]
    ]
    assert len(found) == 1, found
    return dict(found[0])


def test_things_are_found_by_the_beginnings_of_words_of_any_name(client: FlaskClient, told: UUID) -> None:
    def names(**query: str) -> set[str]:
        return {each["name"] for each in client.get("/api/graph/entities", query_string=query).json["entities"]}

    romashka = thing(client, "Romashka LLC")
    assert set(romashka["names"]) == {"ООО «Ромашка»", "Ромашка", "Romashka LLC"}
    assert names(q="ромаш") == {romashka["name"], "ООО «Ромашка Плюс»"}
    assert names(q="acm") == names(q="Corp") == {thing(client, "Acme")["name"]}
    assert names(q="ATLAS 4") == {"Atlas 4"}
    assert names(type="place") == {thing(client, each)["name"] for each in ("Moscow", "Kazan", "Berlin")}
    assert names(q="acme", type="place") == names(q="nothing") == names(q="«»") == set()
    assert client.get(f"/api/graph/entities/{romashka['id']}").json == romashka


def test_a_list_goes_on_where_the_page_before_ended(client: FlaskClient, told: UUID) -> None:
    whole = client.get("/api/graph/entities").json
    pages, cursor = [], None
    while cursor is not None or not pages:
        query = {"limit": "4", **({"cursor": cursor} if cursor else {})}
        page = client.get("/api/graph/entities", query_string=query).json
        pages.append(page["entities"])
        cursor = page["next_cursor"]

    assert whole["next_cursor"] is None
    assert [each for page in pages for each in page] == whole["entities"]
    assert [len(page) for page in pages] == [4, 4, 4, 2]


def test_around_an_entity_are_things_of_so_many_steps_and_the_edges_between_them(
    client: FlaskClient, told: UUID
) -> None:
    def around(name: str, **query: int) -> tuple[set[str], bool]:
        found = client.get(f"/api/graph/neighbourhood/{thing(client, name)['id']}", query_string=query).json
        ids = {each["id"] for each in found["entities"]}
        assert all({edge["from_id"], edge["to_id"]} <= ids for edge in found["edges"])
        triples = [(edge["from_id"], edge["predicate"], edge["to_id"]) for edge in found["edges"]]
        assert len(triples) == len(set(triples))
        return {each["names"][-1] if "Moscow" in each["names"] else each["name"] for each in found["entities"]}, found[
            "truncated"
        ]

    one, _ = around("David Cheng")
    two, _ = around("David Cheng", depth=2)
    three, _ = around("David Cheng", depth=3)
    few, truncated = around("David Cheng", depth=3, limit=2)

    assert len(one) == 2 and len(two) == 4
    assert one < two < three
    assert "David Chen" not in two and "David Chen" in three
    assert (len(few), truncated) == (3, True)


def test_a_path_is_the_shortest_whichever_way_its_edges_lead(client: FlaskClient, told: UUID) -> None:
    cheng, chen, kazan = (thing(client, name) for name in ("David Cheng", "David Chen", "Kazan"))

    found = client.get(f"/api/graph/path/{cheng['id']}/{chen['id']}").json
    far = client.get(f"/api/graph/path/{cheng['id']}/{kazan['id']}?max_length=6").json
    too_far = client.get(f"/api/graph/path/{cheng['id']}/{kazan['id']}?max_length=2").json
    itself = client.get(f"/api/graph/path/{cheng['id']}/{cheng['id']}").json

    assert [each["name"] for each in found["entities"]][::3] == ["David Cheng", "David Chen"]
    assert [edge["predicate"] for edge in found["edges"]] == ["works_for", "works_with", "works_for"]
    assert len(far["edges"]) == len(far["entities"]) - 1 == 5
    assert too_far == {"entities": [], "edges": [], "truncated": False}
    assert ([each["id"] for each in itself["entities"]], itself["edges"]) == ([cheng["id"]], [])


def test_an_edge_is_explained_by_words_pages_and_dates(client: FlaskClient, told: UUID) -> None:
    acme = thing(client, "Acme")
    edges = client.get(f"/api/graph/neighbourhood/{acme['id']}").json["edges"]
    (founded,) = [edge for edge in edges if edge["predicate"] == "founded"]

    said = client.get(f"/api/graph/explain/{founded['id']}").json

    assert (said["from_entity"]["type"], said["edge"], said["to_entity"]) == ("person", founded, acme)
    (evidence,) = said["evidence"]
    assert " ".join(evidence["quote"].split()) == "Margaret Hughes founded Acme Corporation in 1998."
    assert evidence["before"] + evidence["quote"] + evidence["after"] == texts()[evidence["chunk"]]
    assert evidence["place"] == {"page": evidence["chunk"] + 1}
    assert evidence["document_id"] == str(told)
    assert evidence["validity"] == {"valid_from": "1998", "valid_to": None, "quote": "in 1998"}
    assert evidence["keyframe"] is None


def test_what_several_names_say_is_one_edge_with_all_its_evidence(client: FlaskClient, told: UUID) -> None:
    romashka = thing(client, "Romashka LLC")
    edges = client.get(f"/api/graph/neighbourhood/{romashka['id']}").json["edges"]
    (in_moscow,) = [e for e in edges if (e["from_id"], e["predicate"]) == (romashka["id"], "located_in")]

    evidence = client.get(f"/api/graph/explain/{in_moscow['id']}").json["evidence"]

    assert len(evidence) == 2
    assert any("Moscow" in each["quote"] for each in evidence) and any("Москва" in each["quote"] for each in evidence)


def test_what_is_said_in_a_video_is_shown_by_the_nearest_picture(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    ids = small_graph(conn, ORGANIZATION)
    keyframes = [{"time_s": t, "key": f"o/{ORGANIZATION}/videos/v/shot-{t:.0f}.jpg"} for t in (1.0, 9.0, 21.0)]
    conn.execute(
        "update agentflow.documents set kind = 'video', facts = %s where id = %s",
        (json.dumps({"keyframes": keyframes}), ids["document_id"]),
    )
    conn.execute("update agentflow.chunks set place = %s", (json.dumps({"start_s": 12.5, "end_s": 18.0}),))
    system.storage.put_bytes(keyframes[1]["key"], b"jpeg")  # type: ignore[arg-type]

    (evidence,) = client.get(f"/api/graph/explain/{ids['edge_id']}").json["evidence"]

    assert evidence["place"] == {"start_s": 12.5, "end_s": 18.0}
    assert (evidence["keyframe"]["time_s"], evidence["keyframe"]["key"]) == (9.0, keyframes[1]["key"])
    assert client.get(evidence["keyframe"]["url"]).data == b"jpeg"


def test_a_merge_is_listed_undone_and_made_again(client: FlaskClient, told: UUID) -> None:
    listed = client.get("/api/graph/merges", query_string={"limit": 100}).json["merges"]
    (merge,) = [m for m in listed if {m["one"]["name"], m["other"]["name"]} == {"Bolt", "Bolt GmbH"}]
    first = client.get("/api/graph/merges?limit=1").json

    undone = client.post(f"/api/graph/merges/{merge['id']}/undo").json
    apart = {thing(client, name)["id"] for name in ("Bolt", "Bolt GmbH")}
    redone = client.post(f"/api/graph/merges/{merge['id']}/redo").json

    assert merge["decided_by"] == "names" and not merge["undone"]
    assert (undone["undone"], undone["decided_by"], redone["undone"]) == (True, "person", False)
    assert len(apart) == 2
    assert thing(client, "Bolt") == thing(client, "Bolt GmbH")
    assert first["merges"] == listed[:1] and first["next_cursor"]
    problem(client.post(f"/api/graph/merges/{uuid4()}/undo"), 404)


def test_without_a_model_nothing_is_queued_and_it_says_what_to_set(
    client: FlaskClient, conn: psycopg.Connection
) -> None:
    document = add_document(conn, texts())

    said = problem(client.post(f"/api/graph/documents/{document}", json={}), 409)

    assert "set OPENROUTER_API_KEY or LLM_BASE_URL" in said["detail"]
    assert conn.execute("select count(*) from agentflow.jobs").fetchone() == (0,)
    problem(client.post(f"/api/graph/documents/{uuid4()}", json={}), 404)


def test_with_a_model_the_work_is_handed_in(system: System, conn: psycopg.Connection, client: FlaskClient) -> None:
    changed = {"llm_base_url": "http://127.0.0.1:9/v1", "llm_model": "m"}
    other = System(system.settings.model_copy(update=changed), "test")
    with_model = create_app(other).test_client()
    with_model.environ_base["HTTP_AUTHORIZATION"] = client.environ_base["HTTP_AUTHORIZATION"]
    document = add_document(conn, texts())

    answer = with_model.post(f"/api/graph/documents/{document}", json={"second_pass": True})
    other.close()

    assert answer.status_code == 202
    job = records.get(conn, ORGANIZATION, UUID(answer.json["task_id"]))
    assert job is not None
    assert (job.type, job.payload) == ("extract_graph", {"document_id": str(document), "second_pass": True})
    assert client.get(answer.headers["Location"]).json["state"] == "queued"


def test_types_are_those_of_the_organization(client: FlaskClient, conn: psycopg.Connection) -> None:
    ships = {"entities": [{"name": "ship", "description": "what swims"}], "relations": [{"name": "tows"}]}
    default = client.get("/api/graph/types").json

    changed = client.put("/api/graph/types", json=ships).json

    assert {"person", "organization"} <= {each["name"] for each in default["entities"]}
    assert changed == client.get("/api/graph/types").json
    assert changed["entities"] == ships["entities"]
    for wrong, field in (
        ({**ships, "entities": []}, "entities"),
        ({**ships, "entities": [{"name": "Ship"}]}, "entities.0.name"),
        ({**ships, "relations": [{"name": "a"}, {"name": "a"}]}, ""),
    ):
        said = problem(client.put("/api/graph/types", json=wrong), 422)
        assert field in said["errors"][0]["field"]
    assert graph_types.read(conn, ORGANIZATION).entity_names == ["ship"]


def test_types_on_the_command_line(agentflow: Command, conn: psycopg.Connection, tmp_path: Path) -> None:
    default = agentflow("graph", "types")
    changed = json.loads(default.out)
    changed["entities"] = changed["entities"][:2]
    (tmp_path / "types.json").write_text(json.dumps(changed))
    (tmp_path / "wrong.json").write_text('{"entities": [{"name": "No!"}], "relations": []}')

    written = agentflow("graph", "types", "--file", str(tmp_path / "types.json"))
    wrong = agentflow("graph", "types", "--file", str(tmp_path / "wrong.json"))

    assert json.loads(written.out) == changed == json.loads(agentflow("graph", "types").out)
    assert (wrong.status, "entities.0.name" in wrong.err) == (2, True)
    assert agentflow("graph", "types", "--default").out == default.out
    assert agentflow("graph", "types", "--org", "nobody").status == 2


# ---- plans ----

#: 10,000 entities of which 1,000 are merged into others, 30,000 edges, 500 documents; another organization has as many.
FILL = """
set session_replication_role = replica;
insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two');
insert into agentflow.documents (id, organization_id, source_id, title, kind)
    select md5('d' || o || n)::uuid, o, 'd' || n, 'd', 'text' from generate_series(1, 2) o, generate_series(1, 500) n;
insert into agentflow.graph_entities (organization_id, id, type, key, name, mentions, root_id, near)
    select o, md5(o || 'e' || n)::uuid, 'person', 'name ' || n, 'Name ' || n, 1,
        md5(o || 'e' || case when n % 10 = 0 then n - 1 else n end)::uuid, array[n, n / 7, -n / 11 - 1000000]
    from generate_series(1, 2) o, generate_series(1, 10000) n;
insert into agentflow.graph_mentions (organization_id, document_id, chunk_key, entity_id, start_offset, end_offset, name)
    select o, md5('d' || o || 1 + n % 500)::uuid, '\\x00', md5(o || 'e' || n)::uuid, 0, 1, 'Name ' || n
    from generate_series(1, 2) o, generate_series(1, 10000) n;
insert into agentflow.graph_edges (organization_id, id, from_id, predicate, to_id)
    select o, md5(o || 'k' || n)::uuid, md5(o || 'e' || 1 + n % 10000)::uuid, 'knows', md5(o || 'e' || 1 + n * 7 % 9973)::uuid
    from generate_series(1, 2) o, generate_series(1, 30000) n;
insert into agentflow.graph_evidence (organization_id, document_id, chunk_key, edge_id, start_offset, end_offset)
    select o, md5('d' || o || 1 + n % 500)::uuid, '\\x00', md5(o || 'k' || n)::uuid, 0, 1
    from generate_series(1, 2) o, generate_series(1, 30000) n;
insert into agentflow.graph_matches (organization_id, id, one_id, other_id, same, decided_by)
    select o, md5(o || 'm' || n)::uuid, least(a, b), greatest(a, b), true, 'names' from generate_series(1, 2) o,
        generate_series(10, 10000, 10) n, lateral (select md5(o || 'e' || n)::uuid, md5(o || 'e' || n - 1)::uuid) p(a, b);
analyze agentflow.graph_entities, agentflow.graph_mentions, agentflow.graph_edges, agentflow.graph_evidence,
    agentflow.graph_matches
"""


@pytest.fixture(scope="module")
def large(stack: embedded.Embedded) -> Iterator[psycopg.Connection]:
    with core_support.database(stack) as url:
        with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as conn:
            conn.execute(FILL.encode())
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as conn:
            yield conn


def _some(conn: psycopg.Connection, number: int) -> graph_queries.Thing:
    row = conn.execute("select md5('1e' || %s::text)::uuid", (number,)).fetchone()
    assert row is not None
    found = graph_queries.get(conn, 1, row[0])
    assert found is not None
    return found


def _explain(conn: psycopg.Connection) -> Any:
    row = conn.execute("select md5('1k77')::uuid").fetchone()
    assert row is not None
    found = graph_queries.edge(conn, 1, row[0])
    assert found is not None
    return graph_queries.evidence(conn, 1, found[0])


def _document(conn: psycopg.Connection) -> UUID:
    row = conn.execute("select md5('d11')::uuid").fetchone()
    assert row is not None
    return UUID(str(row[0]))


def _decide(conn: psycopg.Connection) -> None:
    one, other = sorted((_some(conn, 501).id, _some(conn, 701).id))
    graph_matches.decide(conn, 1, [(Match(one, other, True), "names")])


LOOKS: dict[str, Callable[[psycopg.Connection], Any]] = {
    "a page of things": lambda conn: graph_queries.search(conn, 1, limit=50, after=UUID(int=1 << 126)),
    "things by name": lambda conn: graph_queries.search(conn, 1, words="name 1234"),
    "around": lambda conn: graph_queries.neighbourhood(conn, _some(conn, 77), depth=2, limit=500),
    "a path": lambda conn: graph_queries.path(conn, _some(conn, 77), _some(conn, 4001), max_length=3),
    "an explanation": _explain,
    "near names": lambda conn: graph_matches.near_pairs(conn, 1, _document(conn)),
    "a decision": _decide,
    "merges": lambda conn: graph_matches.merges(conn, 1, after=UUID(int=1 << 126)),
    "what documents say": lambda conn: graph_queries.of_documents(conn, 1, [_document(conn)], limit=50),
    "documents with a graph": lambda conn: graph_queries.latest(conn, 1, limit=5),
}
_LARGE = {"graph_entities", "graph_mentions", "graph_edges", "graph_evidence", "graph_matches"}


def scanned(heard: Plans) -> list[tuple[str, str]]:
    """Tables of the graph that were read from one end to the other, and indexes without a condition."""
    return [
        (node["Node Type"], node.get("Relation Name", ""))
        for node in heard.nodes
        if node.get("Relation Name") in _LARGE and node["Node Type"] == "Seq Scan"
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_a_large_graph_finds_its_rows_by_index(large: psycopg.Connection, look: str) -> None:
    with large.transaction(force_rollback=True), plans(large) as heard:
        LOOKS[look](large)

    assert heard.nodes, "no plan was heard of"
    assert scanned(heard) == []


def test_a_document_leaves_a_large_graph_by_index(large: psycopg.Connection) -> None:
    document = _document(large)
    with large.transaction(force_rollback=True), plans(large) as heard:
        graph.forget_document(large, 1, document)
        left = large.execute("select count(*) from agentflow.graph_entities where organization_id = 1").fetchone()

    assert left == (9_980,)
    assert not [each for each in scanned(heard) if each[1] in ("graph_edges", "graph_evidence")]
