"""Renders and workflows over HTTP: what is asked for is checked before it is queued, and kept with its images and seeds."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.comfyui import pool
from agentflow.jobs import files, retention
from agentflow.system import System
from tests.one_database import database_url, original
from tests.render_support import MODELS, colour, end, nodes, png
from tests.web_support import client, count, problem
from web import renders
from web.cursors import packed

__all__ = ["client", "database_url", "original"]

SNOW = {"workflow": "qwen-image-edit", "parameters": {"prompt": "make it snow"}}
BLUE = {
    "name": "blue",
    "graph": colour(color=255),
    "parameters": {"width": {"type": "integer", "paths": ["1.width"], "default": 64, "min": 1, "max": 2048}},
    "description": "A blue square.",
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the servers of the pool `default` said last; tests change it."""
    said = nodes("0.33.0", models=True)
    monkeypatch.setattr(pool, "known_nodes", lambda system, name, classes=None: said if name == "default" else None)
    return said


def send(client: FlaskClient, body: dict[str, Any], *, key: str | None = None, **images: bytes) -> Any:
    headers = {"Idempotency-Key": key} if key is not None else {}
    if not images:
        return client.post("/api/renders", json=body, headers=headers)
    form: dict[str, Any] = {name: (io.BytesIO(data), f"{name}.png") for name, data in images.items()}
    return client.post("/api/renders", data={"request": json.dumps(body), **form}, headers=headers)


def accepted(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/api/renders/{answer.json['id']}"
    return dict(answer.json)


def same(answer: Any, render: dict[str, Any]) -> bool:
    told = accepted(answer)
    return all(told[name] == render[name] for name in ("id", "version", "parameters"))


def fields(answer: Any, status: int = 422) -> dict[str, str]:
    return {each["field"]: each["problem"] for each in problem(answer, status)["errors"]}


def payload_of(client: FlaskClient, render: dict[str, Any]) -> dict[str, Any]:
    return dict(client.get(f"/api/jobs/{render['id']}").json["payload"])


def stored(system: System) -> list[str]:
    return sorted(each.key for each in system.storage.list("o"))


# ---- renders ----


def test_a_render_goes_from_a_request_to_signed_outputs(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    body = {"workflow": "smoke", "parameters": {"width": 32}, "correlation_id": "mine", "priority": "critical"}
    made = accepted(client.post("/api/renders", json=body))
    url = f"/api/renders/{made['id']}"
    assert (made["state"], made["workflow"], made["version"], made["pool"]) == ("queued", "smoke", 1, "default")
    assert (made["outputs"], made["provenance"], made["error"]) == ([], None, None)
    job = client.get(f"/api/jobs/{made['id']}").json
    assert (job["type"], job["queue"], job["priority"]) == ("comfy_render", "gpu", "critical")
    asked = {"workflow": "smoke", "version": 1, "parameters": {"width": 32}}
    assert job["payload"] == {**asked, "images": {}, "pool": "default", "graph": None}

    key, small = f"o/1/renders/{made['id']}/5-0.png", f"o/1/renders/{made['id']}/5-0.webp"
    system.storage.put_bytes(key, png())
    system.storage.put_bytes(small, b"small")
    output = {"node": "5", "kind": "image", "key": key, "thumbnail_key": small, "width": 2, "height": 2, "bytes": 75}
    foreign = {"node": "6", "kind": "file", "key": "o/2/x", "media_type": "application/zip", "new": "field"}
    said = {"workflow": "smoke", "version": 1, "parameters": {"width": 32}, "seeds": {}, "server_version": "0.33.0"}
    result = {"outputs": [output, foreign], "provenance": {"digest": "d", **said}, "cached": False, "seconds": 1.5}
    end(system, conn, made["id"], result=result)

    ended = client.get(url).json
    assert (ended["state"], ended["cached"], ended["seconds"]) == ("succeeded", False, 1.5)
    assert ended["provenance"] == {"digest": "d", **said}
    image, other = ended["outputs"]
    assert client.get(image["url"]).data == png() and client.get(image["thumbnail_url"]).data == b"small"
    assert (image["width"], image["bytes"], image["media_type"]) == (2, 75, None)
    assert (other["key"], other["url"], other["media_type"]) == ("o/2/x", None, "application/zip")


def test_what_failed_says_why_and_a_render_is_cancelled_as_a_job(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    failed, cancelled = (accepted(send(client, {"workflow": "smoke"})) for _ in range(2))
    end(system, conn, failed["id"], "failed", error={"code": "render_out_of_memory", "message": "Too large."})
    client.post(f"/api/jobs/{cancelled['id']}/cancel")

    assert client.get(f"/api/renders/{failed['id']}").json["error"] == {
        "code": "render_out_of_memory",
        "message": "Too large.",
    }
    assert client.get(f"/api/renders/{cancelled['id']}").json["state"] == "cancelled"
    other = client.post("/api/jobs", json={"type": "ping"}).json["id"]
    for unknown in (other, uuid4()):
        problem(client.get(f"/api/renders/{unknown}"), 404)


def test_the_list_is_paged_and_filtered(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    client.post("/api/jobs", json={"type": "ping"})
    ids = [accepted(send(client, {"workflow": "smoke", "correlation_id": f"c{n}"}))["id"] for n in range(4)]
    ids.append(accepted(send(client, {"graph": colour(), "pool": "other"}))["id"])
    end(system, conn, ids[0], result={"outputs": []})

    first = client.get("/api/renders?limit=3").json
    rest = client.get(f"/api/renders?limit=3&cursor={first['next_cursor']}").json

    assert [each["id"] for each in (*first["renders"], *rest["renders"])] == ids[::-1] and rest["next_cursor"] is None
    assert (first["renders"][0]["workflow"], first["renders"][0]["pool"]) == (None, "other")
    assert (first["renders"][1]["workflow"], first["renders"][1]["version"]) == ("smoke", 1)
    assert [each["id"] for each in client.get("/api/renders?state=succeeded").json["renders"]] == ids[:1]
    assert [each["id"] for each in client.get("/api/renders?correlation_id=c2").json["renders"]] == ids[2:3]


def test_a_repeated_request_is_the_same_render_though_seeds_are_drawn_and_images_sent_again(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    first = accepted(send(client, SNOW, key="k", image=png()))
    client.post("/api/workflows", json=BLUE)
    before = stored(system)

    again = send(client, SNOW, key="k", image=png())
    assert same(again, first) and again.headers["Idempotency-Replayed"] == "true"
    assert stored(system) == before and count(conn) == 1
    problem(send(client, SNOW, key="k", image=png(3)), 409)
    problem(send(client, SNOW | {"parameters": {"prompt": "rain"}}, key="k", image=png()), 409)
    assert stored(system) == before
    # A newer version in between does not make it another request.
    one = accepted(send(client, {"workflow": "blue"}, key="b"))
    client.post("/api/workflows", json={**BLUE, "description": "Another."})
    assert same(send(client, {"workflow": "blue"}, key="b"), one) and one["version"] == 1
    # Without a key each request is a render, with a seed of its own.
    others = [accepted(send(client, SNOW, image=png()))["parameters"]["seed"] for _ in range(2)]
    assert len({*others, first["parameters"]["seed"]}) == 3


# ---- images ----


def test_images_of_a_form_are_kept_with_the_render_and_go_with_it(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    jpeg, webp = b"\xff\xd8\xff\xe0" + b"x" * 300_000, b"RIFF\x00\x00\x00\x00WEBPVP8 x"
    made = accepted(send(client, SNOW, image=png(), image2=jpeg, image3=webp))

    images = payload_of(client, made)["images"]
    assert sorted(images) == ["image", "image2", "image3"]
    keys = [images[name]["artefact"] for name in sorted(images)]
    assert all(key.startswith(f"o/1/renders/{made['id']}/inputs/") for key in keys) and stored(system) == sorted(keys)
    assert [key.rpartition(".")[2] for key in keys] == ["png", "jpg", "webp"]
    assert [b"".join(system.storage.read(key)) for key in keys] == [png(), jpeg, webp]

    end(system, conn, made["id"], "failed", error={"message": "no"})
    retention.delete_jobs(conn, succeeded=False, keep=retention.Keep(0, 0))
    files.remove_batch(system.database, system.storage)
    assert stored(system) == []


@pytest.mark.parametrize(
    ("body", "images", "field", "said"),
    [
        (SNOW, {"image": b"GIF89a" + b"x" * 100}, "images.image", "is no PNG, JPEG or WebP"),
        (SNOW, {"image": b"\x89PNG"}, "images.image", "is no PNG"),
        (SNOW, {"image": b""}, "image", "is empty"),
        (SNOW, {"picture": png()}, "images.picture", "is not known here"),
        (SNOW, {"image2": png()}, "images.image", "is missing"),
        (
            SNOW | {"images": {"image": {"artefact": "o/1/x"}}},
            {"image": png()},
            "images.image",
            "is sent as a file, too",
        ),
        (SNOW | {"colour": 1}, {"image": png()}, "colour", "is not known here"),
        ({"graph": colour()}, {"7.image": png()}, "images.7.image", "the graph has no node '7'"),
        ({"graph": colour()}, {"1.width": png()}, "graph.1.width", "takes no image's name there"),
        (SNOW, {f"i{n}": png() for n in range(9)}, "i8", "is one file too many"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_and_nothing_of_it_is_kept(
    client: FlaskClient, system: System, conn: psycopg.Connection, body: Any, images: Any, field: str, said: str
) -> None:
    answer = send(client, body, **images)

    assert said in fields(answer)[field]
    assert stored(system) == [] and count(conn) == 0


def test_a_form_that_is_too_large_not_json_or_without_a_request_leaves_nothing(
    client: FlaskClient, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def form(**parts: Any) -> Any:
        return client.post("/api/renders", data={"image": (io.BytesIO(png()), "x.png"), **parts})

    assert fields(form()) == {"request": "is missing: the JSON of the request"}
    problem(form(request="{"), 400)
    assert "other" in fields(form(request="{}", other="x"))
    problem(client.post("/api/renders", data=b"x", content_type="image/png"), 415)
    problem(client.post("/api/renders"), 400)
    monkeypatch.setitem(system.settings.__dict__, "render_image_max_bytes", len(png()) - 1)
    said = problem(form(request=json.dumps(SNOW)), 413)
    assert "'image' is larger than" in said["detail"]
    assert stored(system) == []


def test_images_stay_where_nobody_knows_whether_the_commit_was_done(
    client: FlaskClient, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = renders._submit

    def cut_off(*arguments: Any) -> Any:
        original(*arguments)
        raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(renders, "_submit", cut_off)
    problem(send(client, SNOW, key="k", image=png()), 503)
    monkeypatch.undo()

    again = send(client, SNOW, key="k", image=png())

    assert again.headers["Idempotency-Replayed"] == "true"
    assert stored(system) == [payload_of(client, accepted(again))["images"]["image"]["artefact"]]


def test_a_file_in_storage_is_checked_before_it_is_rendered_from(client: FlaskClient, system: System) -> None:
    system.storage.put_bytes("o/1/photo.png", png())
    system.storage.put_bytes("o/1/notes.txt", b"no picture")
    system.storage.put_bytes("o/2/photo.png", png())

    def ask(key: str) -> Any:
        return send(client, {**SNOW, "images": {"image": {"artefact": key}}})

    assert payload_of(client, accepted(ask("o/1/photo.png")))["images"]["image"]["artefact"] == "o/1/photo.png"
    for key, said in (
        ("o/1/gone.png", "is not there"),
        ("o/1/notes.txt", "is no PNG"),
        ("o/2/photo.png", "is not a key of a file of this organization"),
        ("o/1/../2/photo.png", "is not a key of a file of this organization"),
    ):
        assert said in fields(ask(key))["images.image.artefact"], key


def test_a_url_is_asked_of_the_guard(client: FlaskClient) -> None:
    def ask(url: str) -> Any:
        return send(client, {**SNOW, "images": {"image": {"url": url}}})

    accepted(ask("http://8.8.8.8/photo.png"))
    for url in ("http://127.0.0.1/photo.png", "http://169.254.169.254/latest", "file:///etc/passwd", "ftp://8.8.8.8/x"):
        assert "images.image.url" in fields(ask(url)), url
    both = {"image": {"url": "http://8.8.8.8/x", "artefact": "o/1/x"}}
    assert fields(send(client, {**SNOW, "images": both})) == {"images.image": "give either artefact or url"}


def test_files_of_a_render_that_never_was_are_orphans(client: FlaskClient, system: System) -> None:
    made = accepted(send(client, SNOW, image=png()))
    gone = uuid4()
    system.storage.put_bytes(f"o/1/renders/{gone}/inputs/x.png", png())
    system.storage.put_bytes("o/1/renders/no-id/x.png", png())

    found = list(files.orphans(system.database, system.storage, now=datetime.now(UTC) + timedelta(days=2)))

    assert [each.key for each in found] == [f"o/1/renders/{gone}/"]
    assert client.get(f"/api/renders/{made['id']}").status_code == 200


# ---- pre-flight ----


def test_what_the_servers_cannot_run_is_refused_before_it_is_queued_with_the_whole_list(
    client: FlaskClient, conn: psycopg.Connection, known: dict[str, Any]
) -> None:
    lists = known["UNETLoader"]["input"]["required"], known["LoraLoaderModelOnly"]["input"]["required"]
    lists[0]["unet_name"][0].clear()
    lists[1]["lora_name"][0].clear()
    image = {"images": {"image": {"url": "http://8.8.8.8/x.png"}}}

    said = problem(send(client, {**SNOW, **image}), 422)
    assert [each["field"] for each in said["errors"]] == ["workflow.37.unet_name", "workflow.89.lora_name"]
    assert MODELS["UNETLoader", "unet_name"] in said["detail"] and "(and 1 more)" in said["detail"]
    without = {**SNOW, **image, "parameters": {"prompt": "x", "lightning": False}}
    assert list(fields(send(client, without))) == ["workflow.37.unet_name"]
    wrong = {**colour(width=0, height="tall"), "3": {"class_type": "SaveImages", "inputs": {}}}
    said = problem(send(client, {"graph": wrong}), 422)
    assert {each["field"] for each in said["errors"]} == {"graph.1.width", "graph.1.height", "graph.3"}
    assert "SaveImage" in said["detail"]
    assert count(conn) == 0
    # Of another pool nothing is known: its worker will see.
    accepted(send(client, {**SNOW, **image, "pool": "other"}))


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"graph": {"nodes": [], "links": []}}, "graph", "Export (API)"),
        ({"graph": {"1": {"class_type": "X"}}}, "graph.1", "inputs are missing"),
        ({"workflow": "smok"}, "workflow", "there are qwen-image-edit, smoke"),
        ({"workflow": "smoke", "version": 7}, "version", "has no version 7"),
        ({"workflow": "smoke", "parameters": {"width": 9999}}, "parameters.width", "from 1 to 4096; 9999 was given"),
        ({"workflow": "smoke", "graph": colour()}, "body", "give either workflow or graph"),
        ({}, "body", "give either workflow or graph"),
        ({"graph": colour(), "parameters": {"width": 1}}, "body", "belong to a workflow"),
        ({"workflow": "smoke", "pool": "No Pool"}, "pool", "pattern"),
        ({"workflow": "smoke", "callback_url": "http://127.0.0.1/"}, "callback_url", ""),
        ({"workflow": "smoke", "colour": 1}, "colour", "is not known here"),
    ],
)
def test_what_is_no_request_is_refused_by_its_field(client: FlaskClient, body: Any, field: str, said: str) -> None:
    assert said in fields(send(client, body))[field]


def test_a_graph_that_is_too_large_for_a_job_may_be_a_workflow(client: FlaskClient) -> None:
    graph = {**colour(), "9": {"class_type": "ImageInvert", "inputs": {"note": "x" * 300_000}}}

    assert "POST /api/workflows" in problem(send(client, {"graph": graph}), 413)["detail"]
    assert client.post("/api/workflows", json={"name": "large", "graph": graph}).status_code == 201
    accepted(send(client, {"workflow": "large"}))


# ---- workflows ----


def test_a_workflow_is_added_changed_listed_and_deleted(client: FlaskClient) -> None:
    made = client.post("/api/workflows", json=BLUE)
    assert made.status_code == 201 and made.headers["Location"] == "/api/workflows/blue"
    assert made.json == client.get("/api/workflows/blue").json
    assert (made.json["version"], made.json["shipped"], made.json["graph"]) == (1, False, BLUE["graph"])
    assert client.post("/api/workflows", json=BLUE).status_code == 200
    changed = client.post("/api/workflows", json={**BLUE, "outputs": ["2"]})
    assert (changed.status_code, changed.json["version"], changed.json["outputs"]) == (201, 2, ["2"])
    assert client.get("/api/workflows/blue?version=1").json == made.json

    first = client.get("/api/workflows?limit=2").json
    rest = client.get(f"/api/workflows?limit=2&cursor={first['next_cursor']}").json
    found = [(each["name"], each["version"], each["shipped"]) for each in (*first["workflows"], *rest["workflows"])]
    assert found == [("blue", 2, False), ("qwen-image-edit", 1, True), ("smoke", 1, True)]
    newest = client.get("/api/workflows/blue/versions?limit=1").json
    older = client.get(f"/api/workflows/blue/versions?cursor={newest['next_cursor']}").json
    assert [each["versions"][0]["version"] for each in (newest, older)] == [2, 1] and older["next_cursor"] is None
    assert [each["version"] for each in client.get("/api/workflows/smoke/versions").json["versions"]] == [1]

    assert client.delete("/api/workflows/blue").status_code == 204
    for method, path in (("GET", ""), ("GET", "/versions"), ("DELETE", "")):
        problem(client.open(f"/api/workflows/blue{path}", method=method), 404)
    problem(client.get("/api/workflows/smoke?version=9"), 404)
    problem(client.delete("/api/workflows/smoke"), 409)
    for taken in ("smoke", "check"):
        problem(client.post("/api/workflows", json={**BLUE, "name": taken}), 409)
    assert client.get("/api/workflows/check").headers["Allow"].replace("HEAD, ", "") == "POST"
    assert client.get("/api/workflows/checks").status_code == 404
    for cursor in ("x", "MQ", "!!", "99999999999999999999", packed("0:a\ud800"), packed("0:a\0"), packed(["0:a"])):
        assert client.get(f"/api/workflows?cursor={cursor}").status_code in (200, 422)
        assert client.get(f"/api/workflows/smoke/versions?cursor={cursor}").status_code in (200, 422)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"graph": {"nodes": [], "links": []}}, "graph", "Export (API)"),
        ({"graph": {"1": {}}}, "graph", "node 1: class_type is missing"),
        ({"name": "Blue"}, "name", "pattern"),
        ({"outputs": ["9"]}, "body", "outputs: the graph has no node '9'"),
        ({"parameters": {"Width": {"type": "text", "paths": ["1.x"]}}}, "parameters.Width.[key]", "pattern"),
        ({"parameters": {"w": {"type": "text"}}}, "parameters.w", "paths are missing"),
        ({"version": 3}, "version", "is not known here"),
    ],
)
def test_what_is_no_workflow_is_refused_by_its_field(client: FlaskClient, change: Any, field: str, said: str) -> None:
    assert said in fields(client.post("/api/workflows", json={**BLUE, **change}))[field]


def test_a_workflow_is_checked_without_being_kept(
    client: FlaskClient, conn: psycopg.Connection, known: dict[str, Any]
) -> None:
    definition = {name: value for name, value in BLUE.items() if name != "name"}

    def check(**body: Any) -> Any:
        return client.post("/api/workflows/check", json=body)

    assert check(workflow="qwen-image-edit").json == {"checked": True, "complaints": []}
    assert check(definition=definition).json == {"checked": True, "complaints": []}
    assert check(definition=definition, pool="other").json == {"checked": False, "complaints": []}
    known["VAELoader"]["input"]["required"]["vae_name"][0].clear()
    (complaint,) = check(workflow="qwen-image-edit").json["complaints"]
    assert (complaint["node"], complaint["input"], complaint["code"]) == ("39", "vae_name", "model_missing")
    (complaint,) = check(graph=colour(width=0)).json["complaints"]
    assert (complaint["node"], complaint["code"]) == ("1", "value_smaller_than_min")
    problem(check(workflow="nothing"), 404)
    assert "Export (API)" in fields(check(graph={"nodes": [], "links": []}))["graph"]
    assert fields(check()) == {"body": "give one of workflow, definition and graph"}
    assert count(conn, "workflows") == count(conn) == 0


def test_a_render_handed_in_as_a_job_is_the_same_kind_of_thing(client: FlaskClient, system: System) -> None:
    job = client.post("/api/jobs", json={"type": "comfy_render", "payload": {"workflow": "smoke"}}).json
    assert client.get(f"/api/renders/{job['id']}").json["workflow"] == "smoke"
    answer = client.post(
        "/api/jobs", json={"type": "comfy_render", "payload": {"workflow": "smoke", "graph": colour()}}
    )
    assert "give either workflow or graph" in problem(answer, 422)["detail"]
