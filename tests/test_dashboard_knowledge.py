"""The dashboard's knowledge: documents, search with its reasons, the graph as a picture with what is behind it."""

from __future__ import annotations

import io
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask import Flask
from playwright.sync_api import expect

from agentflow import settings
from agentflow.knowledge import chunks, graph_queries, graph_types
from agentflow.system import System
from tests import dashboard_samples as samples
from tests.dashboard_support import (
    DESKTOP,
    MINE,
    PATIENCE_MS,
    PHONE,
    THEIRS,
    Opened,
    app,
    browser,
    put_job,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT, Clicks
from tests.graph_support import small_graph, write_chunks
from tests.test_dashboard import change, form_token, sign_in
from tests.test_dashboard_pages import one
from web import create_app
from web.dashboard import places

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)


#: Pages that are others on a phone: tables become cards, and the panel stands below the picture.
_ANOTHER = ("", "/graph")


@pytest.fixture
def ids(conn: psycopg.Connection, system: System) -> dict[str, UUID]:
    return samples.knowledge(conn, system.storage)


# ---- without a browser ----


def test_a_document_is_handed_in_by_its_address_as_a_text_and_removed(app: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(app)

    by_url = change(client, "/dashboard/knowledge/documents", url="https://example.com/a.pdf", title="A")
    by_text = change(client, "/dashboard/knowledge/documents", text="Words.\n" * 9_000, title="")

    assert (by_url.status_code, by_text.status_code) == (303, 303)
    named = client.get("/dashboard/knowledge?source_id=https://example.com/a.pdf").text
    assert (
        named.count('id="document-') == 1 and 'id="document-' not in client.get("/dashboard/knowledge?source_id=b").text
    )
    rows = conn.execute("select title, source_url, storage_key from agentflow.documents order by id").fetchall()
    assert rows[0] == ("A", "https://example.com/a.pdf", None) and rows[1][0].startswith("text:") and rows[1][2]
    assert one(conn, "select count(*) from agentflow.jobs where type = 'generate_embeddings'") == 2
    assert change(client, "/dashboard/knowledge/documents", url="http://10.0.0.1/").status_code == 422
    assert change(client, "/dashboard/knowledge/documents", video_id=uuid4()).status_code == 404
    assert change(client, "/dashboard/knowledge/documents", text="a", url="https://example.com").status_code == 422
    document = by_text.headers["Location"].rpartition("/")[2]
    assert change(client, f"/dashboard/knowledge/documents/{document}/remove").status_code == 303
    assert one(conn, "select count(*) from agentflow.documents") == 1


def test_a_file_is_asked_for_its_token_before_it_is_read(app: Flask, system: System, conn: psycopg.Connection) -> None:
    client = sign_in(app)

    def send(headers: dict[str, str], **fields: str) -> Any:
        data = {**fields, "file": (io.BytesIO(b"# One\n" * 50_000), "one.md")}
        return client.post("/dashboard/knowledge/files", data=data, headers=headers)

    refused = send({}, form_token=form_token(client))
    added = send({"X-Form-Token": form_token(client)}, title="One")

    assert refused.status_code == 403 and added.status_code == 303
    title, key, size = conn.execute("select title, storage_key, size_bytes from agentflow.documents").fetchall()[0]
    assert (title, size) == ("One", 300_000)
    page = client.get(added.headers["Location"]).text
    assert "queued" in page and "/artefacts/" in page and system.storage.stat(key) is not None


def test_a_graph_is_made_of_a_document_where_there_is_a_model(
    environment: dict[str, str], app: Flask, conn: psycopg.Connection, ids: dict[str, UUID]
) -> None:
    path = f"/dashboard/knowledge/documents/{ids['handbook']}/graph"
    refused = change(sign_in(app), path)
    system = System.start(settings.load({**environment, "OPENROUTER_API_KEY": "sk-test"}), "test")
    try:
        asked = change(sign_in(create_app(system)), path, second_pass="true")
    finally:
        system.close()

    assert refused.status_code == 409 and "OPENROUTER_API_KEY" in refused.text
    job = asked.headers["Location"].rpartition("/")[2]
    payload = {"document_id": str(ids["handbook"]), "second_pass": True}
    assert one(conn, "select payload from agentflow.jobs where id = %s", job) == payload


def test_another_embedding_model_is_filled_and_given_up(app: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(app)
    models = "/dashboard/knowledge/models"

    assert change(client, models, model="nonsense").status_code == 422
    asked = change(client, models, model="local/universal-sentence-encoder-multilingual-3")
    page = client.get(models)

    assert asked.status_code == 303 and page.status_code == 200
    assert one(conn, "select type from agentflow.jobs where id = %s", asked.headers["Location"].rpartition("/")[2]) == (
        "backfill_embeddings"
    )
    assert change(client, f"{models}/discard").status_code == 303


def test_what_is_another_organizations_is_neither_shown_nor_changed(
    app: Flask, system: System, conn: psycopg.Connection, tenants: dict[str, str]
) -> None:
    theirs = small_graph(conn, THEIRS)
    small_graph(conn, MINE)
    client = sign_in(app, tenants["mine"])

    for path in (
        f"documents/{theirs['document_id']}", f"graph/{theirs['entity_id']}", f"edges/{theirs['edge_id']}",
        f"graph?document={theirs['document_id']}", f"graph?edge={theirs['edge_id']}", f"edges/{theirs['edge_id']}?part=panel",
    ):  # fmt: skip
        assert client.get(f"/dashboard/knowledge/{path}").status_code == 404, path
    for path in (
        f"documents/{theirs['document_id']}/graph", f"documents/{theirs['document_id']}/remove",
        f"names/{theirs['merge_id']}/undo", f"names/{theirs['merge_id']}/redo",
    ):  # fmt: skip
        assert change(client, f"/dashboard/knowledge/{path}").status_code == 404, path
    assert change(client, "/dashboard/knowledge/models", model="local/x").status_code == 403
    for path in ("", "/graph", "/names", f"/search?q=Acme&mode=text&document={theirs['document_id']}", "/graph?q=acme"):
        page = client.get(f"/dashboard/knowledge{path}", follow_redirects=True)
        assert page.status_code == 200 and not any(id_ in page.text for id_ in theirs.values() if "?" not in path), path
    assert "Nothing was found" in client.get(
        f"/dashboard/knowledge/search?q=Acme&mode=text&document={theirs['document_id']}"
    ).text  # fmt: skip


def test_types_are_written_one_in_a_line(app: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(app)

    saved = change(
        client,
        "/dashboard/knowledge/types",
        entities="ship: what swims\n\nharbour\n",
        relations="lies_in: a ship, here",
    )
    wrong = change(client, "/dashboard/knowledge/types", entities="A Ship!", relations="")

    types = graph_types.read(conn, 1)
    assert saved.status_code == 303 and wrong.status_code == 422 and "entities.0.name" in wrong.text
    assert [(each.name, each.description) for each in types.entities] == [("ship", "what swims"), ("harbour", "")]
    assert "ship: what swims\nharbour</textarea>" in client.get("/dashboard/knowledge/types").text


def test_the_graph_of_documents_is_what_they_say_and_no_more(conn: psycopg.Connection, ids: dict[str, UUID]) -> None:
    film = graph_queries.of_documents(conn, 1, [ids["film"]], limit=100)
    both = graph_queries.of_documents(conn, 1, list(ids.values()), limit=100)
    few = graph_queries.of_documents(conn, 1, list(ids.values()), limit=3)

    assert len(film.edges) < len(both.edges) and {thing.id for thing in film.things} < {t.id for t in both.things}
    for found in (film, both, few):
        known = {thing.id for thing in found.things}
        assert all({edge.from_id, edge.to_id} <= known for edge in found.edges)
        assert len({(edge.from_id, edge.predicate, edge.to_id) for edge in found.edges}) == len(found.edges)
    assert (len(few.things), few.truncated, both.truncated) == (3, True, False)
    assert graph_queries.latest(conn, 1, limit=5) == [(ids["film"], 1), (ids["handbook"], 1)]
    assert graph_queries.latest(conn, 2, limit=5) == []


def test_chunks_are_read_from_any_of_them_on(conn: psycopg.Connection, app: Flask, ids: dict[str, UUID]) -> None:
    write_chunks(conn, ids["handbook"], [f"Chunk number {n}." for n in range(50)])

    found = chunks.page(conn, 1, ids["handbook"], start=45, limit=20)
    page = sign_in(app).get(f"/dashboard/knowledge/documents/{ids['handbook']}?chunk=20").text

    assert [each.position for each in found] == [45, 46, 47, 48, 49]
    assert "Chunk number 20." in page and "Chunk number 39." in page and "Chunk number 40." not in page
    assert "?chunk=40#chunks" in page


def test_places_and_passages_are_written_as_people_say_them(app: Flask) -> None:
    with app.test_request_context():
        said = [
            places.in_words(place)
            for place in (
                {"page": 3, "heading": ["Prices", "Europe"]},
                {"sheet": "2026", "row": 4, "row_end": 9},
                {"part": "transcript", "start_s": 65.2, "end_s": 3725.0, "shot": 4},
                {},
            )
        ]
    text = "x" * 500 + "needle" + "y" * 500

    assert said == ["Prices › Europe, page 3", "sheet 2026, rows 4 to 9", "transcript, 1:05 to 1:02:05", ""]
    assert places.pieces("a needle", [(2, 8)], 100) == [("a ", False), ("needle", True)]
    cut = places.pieces(text, [(500, 506)], 200)
    assert cut[0] == cut[-1] == ("…", False) and ("needle", True) in cut
    assert sum(len(piece) for piece, _ in cut) == 202


# ---- in Chromium ----


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_frame_behind_an_edge_is_three_clicks_away(
    visitors: Opened, ids: dict[str, UUID], viewport: dict[str, int]
) -> None:
    page = visitors(viewport).sign_in().page
    clicks = Clicks(page)

    clicks.on(page.get_by_role("link", name="Knowledge"))
    clicks.on(page.get_by_role("link", name="Graph", exact=True))
    page.wait_for_selector("#graph[data-ready]")
    clicks.on(page.locator("#picture .says", has_text="Мария Сергеевна Иванова leads").locator("text"))

    panel = page.get_by_role("region", name="What is behind it")
    expect(panel.locator("mark")).to_have_text(
        "Мария Сергеевна Иванова возглавляет ООО «Ромашка» с 14 марта 2019 года."
    )
    expect(panel).to_contain_text("A visit to the plant")
    expect(panel).to_contain_text("transcript, 0:00 to 0:12")
    expect(panel).to_contain_text("from 2019-03-14 on")
    frame = panel.get_by_role("img", name="A visit to the plant at 0:05")
    expect(frame).to_be_visible()
    page.wait_for_function("image => image.complete && image.naturalWidth === 320", arg=frame.element_handle())
    assert "shot-0001.jpg" in str(frame.get_attribute("src")) and clicks.number <= 3
    page.reload()
    expect(panel.locator("mark")).to_contain_text("возглавляет")
    panel.get_by_role("link", name="A visit to the plant", exact=True).click()
    expect(page.locator("#chunk-0")).to_contain_text("возглавляет")
    page.go_back()
    panel.get_by_role("link", name="Flight record").click()
    expect(page.locator(".flight")).to_contain_text("A visit to the plant")


def test_the_picture_goes_by_keys_and_says_what_its_table_says(visitors: Opened, ids: dict[str, UUID]) -> None:
    page = visitors().sign_in().page
    page.goto(f"{page.url}/knowledge/graph")
    page.wait_for_selector("#graph[data-ready]")
    in_table = page.locator("#edges [data-edge]").count()
    focused = "document.activeElement.getAttribute('aria-label')"

    assert page.locator("#picture .edge").count() == in_table > 10
    assert page.locator("#picture .thing").count() == page.locator("#things [data-thing]").count()
    assert page.locator("#picture a[tabindex='0']").count() == 1
    page.locator("#picture a[tabindex='0']").focus()
    seen = {page.evaluate(focused)}
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        seen.add(page.evaluate(focused))
    assert len(seen) >= 4 and page.locator("#picture a[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    expect(page.locator("#panel header")).to_be_visible()
    page.wait_for_function("document.activeElement.id === 'panel'")
    page.keyboard.press("Escape")
    assert page.evaluate(focused) in seen
    page.get_by_text("The same as a table").click()
    page.locator("#edges a").first.click()
    expect(page.get_by_role("heading", name="What is behind it")).to_be_visible()
    expect(page.locator("mark").first).to_be_visible()


def test_a_thing_is_found_looked_around_and_connected_with_another(visitors: Opened, ids: dict[str, UUID]) -> None:
    page = visitors().sign_in().page
    page.goto(f"{page.url}/knowledge/graph")
    page.get_by_label("Words of a name").fill("hughes")
    page.keyboard.press("Enter")

    expect(page.get_by_role("heading", name="Hughes")).to_be_visible()
    page.wait_for_selector("#graph[data-ready='2']")
    with page.expect_navigation():
        page.get_by_label("Steps away").select_option("2")
    page.wait_for_selector("#graph[data-ready]")
    assert page.locator("#picture .thing").count() > 2
    page.get_by_label("The way to").fill("berlin")
    page.keyboard.press("Enter")
    expect(page.locator(".way a").last).to_have_text("Berlin")
    page.wait_for_selector("#graph[data-ready='3']")
    page.locator("#picture .thing", has_text="Acme").locator("use").click()
    expect(page.locator("#panel")).to_contain_text("What is around it")
    page.locator("#panel .connections a", has_text="located_in").first.click()
    expect(page.locator("#panel mark")).to_contain_text("Berlin")
    page.get_by_label("The way to").fill("nobody at all")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Nothing is called nobody at all.")


def test_a_hit_is_marked_placed_and_explained(visitors: Opened, ids: dict[str, UUID]) -> None:
    page = visitors().sign_in().page
    page.get_by_role("link", name="Knowledge").click()
    page.get_by_role("link", name="Search", exact=True).click()

    page.get_by_label("A question").fill("Who founded Acme?")
    page.locator("select[name=mode]").select_option("text")
    page.get_by_role("button", name="Search").click()

    hit = page.locator(".hits li", has_text="Margaret Hughes").first
    expect(hit.locator("mark").first).to_be_visible()
    assert {"founded", "Acme"} <= set(hit.locator("mark").all_inner_texts())
    expect(hit).to_contain_text("Supplier handbook")
    expect(hit).to_contain_text("page")
    expect(hit).to_contain_text("not among the nearest by meaning; place 1 by words, 100 % of the question's")
    page.goto(page.url.replace("Who+founded+Acme%3F", "Semenov"))
    assert "/artefacts/" in str(page.locator(".hits img").first.get_attribute("src"))


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_file_is_uploaded_followed_and_removed_by_its_buttons(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    visitor = visitors(viewport).sign_in()
    page = visitor.page
    page.get_by_role("link", name="Knowledge").click()
    page.get_by_text("Add a document").click()

    form = page.get_by_role("form", name="A file")
    form.get_by_label("A file").set_input_files({"name": "empty.md", "mimeType": "text/markdown", "buffer": b""})
    visitor.allowed = ("422",)
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_role("alert")).to_contain_text("is empty")
    form.get_by_label("A file").set_input_files(
        {"name": "ship.md", "mimeType": "text/markdown", "buffer": b"# A ship\n"}
    )
    form.get_by_role("button", name="Upload").click()

    expect(page.get_by_role("heading", name="ship.md")).to_be_visible()
    assert one(conn, "select count(*) from agentflow.documents where filename = 'ship.md' and size_bytes = 9") == 1
    conn.execute(
        "update agentflow.jobs set state = 'failed', wake_at = null, finished_at = clock_timestamp(), error = %s",
        ('{"code": "no_text", "message": "There is nothing to read in it."}',),
    )
    expect(page.get_by_text("There is nothing to read in it.")).to_be_visible()
    page.get_by_role("button", name="Remove").click()
    page.get_by_role("button", name="Yes, do it").click()
    expect(page.get_by_text("There are no documents yet")).to_be_visible()
    assert one(conn, "select count(*) from agentflow.documents") == 0


def test_merged_names_are_taken_apart_and_together(
    visitors: Opened, conn: psycopg.Connection, ids: dict[str, UUID]
) -> None:
    page = visitors().sign_in().page
    page.goto(f"{page.url}/knowledge/names")
    row = page.get_by_role("row").filter(has_text="Acme Corporation")
    merge = "select same, decided_by from agentflow.graph_matches where id = %s"
    id_ = str(row.get_attribute("id")).removeprefix("merge-")

    row.get_by_role("button", name="They are two").click()
    expect(page.get_by_text("are two again, and stay so")).to_be_visible()
    assert conn.execute(merge, (id_,)).fetchone() == (False, "person")
    page.locator(f"#merge-{id_}").get_by_role("button", name="They are one").click()
    expect(page.get_by_text("are one.")).to_be_visible()
    assert conn.execute(merge, (id_,)).fetchone() == (True, "person")


def test_nothing_that_documents_say_is_run(
    visitors: Opened, conn: psycopg.Connection, system: System, tenants: dict[str, str]
) -> None:
    theirs = small_graph(conn, MINE)
    conn.execute("update agentflow.documents set title = %s, source_id = %s, source_url = 'javascript:window.ran=true',"
                 " facts = jsonb_build_object('author', %s::text), language = %s", (SCRIPT,) * 4)  # fmt: skip
    conn.execute("update agentflow.graph_entities set name = %s || name, type = %s", (SCRIPT, SCRIPT))
    conn.execute("update agentflow.graph_edges set predicate = %s", (SCRIPT,))
    conn.execute(
        "update agentflow.chunks set text = text || %s, place = jsonb_build_object('heading', %s::text)", (SCRIPT,) * 2
    )
    conn.execute("update agentflow.graph_evidence set end_offset = 10000")
    failed = put_job(conn, "failed", organization_id=MINE, error={"code": SCRIPT, "message": SCRIPT})
    conn.execute("update agentflow.documents set chain_id = %s", (failed,))
    visitor = visitors()
    visitor.sign_in(tenants["mine"])
    for path in (
        "", "/graph", f"/graph/{theirs['entity_id']}", f"/edges/{theirs['edge_id']}", f"/graph?edge={theirs['edge_id']}",
        f"/documents/{theirs['document_id']}", "/names", f"/search?q=Acme+{SCRIPT}&mode=text", f"/graph?q={SCRIPT}",
    ):  # fmt: skip
        page = visitor.open(f"/knowledge{path}")
        if page.locator("#graph").count():
            page.wait_for_selector("#graph[data-ready]")
            page.locator("#picture .thing use").first.click()
            expect(page.locator("#panel header")).to_be_visible()
        assert page.evaluate("window.ran") is None, path
        assert page.locator("a[href^='javascript:'], main script").count() == 0, path
        assert "{{ 7*7 }}" in page.content(), path


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_of_knowledge_is_whole_and_within_reach_of_all(
    visitors: Opened, ids: dict[str, UUID], viewport: dict[str, int]
) -> None:
    visitor = visitors(viewport).sign_in()
    found = {}
    for path in ("", f"/documents/{ids['film']}", "/search?q=Acme&mode=text", "/graph", "/names", "/types"):
        page = visitor.open(f"/knowledge{path}")
        if path == "/graph":
            page.wait_for_selector("#graph[data-ready]")
            page.locator("#picture .says text").first.click()
            expect(page.locator("#panel header")).to_be_visible()
        # What axe-core finds wrong does not depend on the width, but where the page is another one.
        found[path] = (visitor.overflow(), visitor.complaints() if viewport is DESKTOP or path in _ANOTHER else [])
    page.emulate_media(color_scheme="dark")
    visitor.open("/knowledge/graph?language=ru")
    found["dark"] = (visitor.overflow(), visitor.complaints())

    assert {path: each for path, each in found.items() if each[0] > 0 or each[1]} == {}
