"""Documents over the API, in this process, on the real database and storage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.jobs import records
from agentflow.system import System
from tests import documents_support as support
from tests import web_support
from tests.documents_support import ANALYSIS, FILES, quick_child
from tests.web_support import client, count, problem
from web import create_app

__all__ = ["client", "quick_child"]

URL = "/api/knowledge/documents"


def files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]


def form(data: bytes, name: str = "a.txt", **fields: Any) -> dict[str, Any]:
    return {"data": {"file": (io.BytesIO(data), name), **fields}, "content_type": "multipart/form-data"}


@pytest.fixture
def with_model(environment: dict[str, str]) -> FlaskClient:
    """A caller of a system that has a model (which nobody asks here)."""
    system = System.start(settings.load({**environment, "OPENROUTER_API_KEY": "sk-test"}), "test")
    made = create_app(system).test_client()
    made.environ_base["HTTP_AUTHORIZATION"] = web_support.AUTH["Authorization"]
    return made


def finish(system: System, conn: psycopg.Connection, job_id: str) -> Any:
    job = records.get(conn, None, UUID(job_id))
    assert job is not None
    return support.finish(system, conn, job)


def test_an_upload_becomes_a_document(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    data = (FILES / "letter.txt").read_bytes()

    answer = client.post(URL, **form(data, "Пи/сьмо.TXT", source_id="letter", title="Письмо", graph="false"))

    assert answer.status_code == 202
    made = answer.json
    assert answer.headers["Location"] == f"{URL}/{made['document_id']}"
    before = client.get(answer.headers["Location"]).json
    assert (before["status"], before["searchable"], before["kind"]) == ("queued", False, "unknown")
    assert [(step["id"], step["type"]) for step in before["jobs"]] == [(made["job_id"], "generate_embeddings")]
    finish(system, conn, made["job_id"])
    after = client.get(answer.headers["Location"]).json
    assert (after["status"], after["progress"], after["kind"], after["language"]) == ("ready", 1.0, "text", "ru")
    assert (after["title"], after["source"], after["size_bytes"]) == ("Письмо", "upload", len(data))
    assert after["searchable"] and after["chunks"] == 1 and after["facts"]["encoding"] == "koi8-r"
    assert (after["version"], after["error"], after["source_id"]) == (1, None, "letter")


@pytest.mark.usefixtures("quick_child")
def test_handed_in_again_it_is_the_same_document_with_one_file(
    client: FlaskClient, system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    one = client.post(URL, json={"text": "# One\n\nText.\n\n# Two\n\nMore.", "source_id": "s"}).json
    finish(system, conn, one["job_id"])
    two = client.post(URL, **form(b"Something else altogether.", source_id="s")).json
    finish(system, conn, two["job_id"])

    assert one["document_id"] == two["document_id"] and one["job_id"] != two["job_id"]
    assert [path.read_bytes() for path in files(tmp_path)] == [b"Something else altogether."]
    seen = client.get(f"{URL}/{two['document_id']}").json
    assert (seen["version"], seen["title"], len(seen["jobs"])) == (2, "a.txt", 1)
    assert len(client.get(URL).json["documents"]) == 1
    assert client.get(f"{URL}?source_id=s").json["documents"][0]["id"] == two["document_id"]
    assert client.get(f"{URL}?source_id=t").json["documents"] == []


def test_a_list_goes_by_pages(client: FlaskClient) -> None:
    made = [client.post(URL, json={"text": f"Number {n}."}).json["document_id"] for n in range(3)]

    first = client.get(f"{URL}?limit=2").json
    second = client.get(f"{URL}?limit=2&cursor={first['next_cursor']}").json

    assert [each["id"] for each in first["documents"] + second["documents"]] == made[::-1]
    assert second["next_cursor"] is None


def test_the_chain_is_one_progress(
    with_model: FlaskClient, system: System, conn: psycopg.Connection, quick_child: None
) -> None:
    made = with_model.post(URL, json={"text": "A text.", "graph": True}).json
    url = f"{URL}/{made['document_id']}"
    seen = [with_model.get(url).json]
    taken = web_support.claim(conn, made["job_id"])
    conn.execute("update agentflow.jobs set progress = 0.5, stage = 'embed' where id = %s", (taken.id,))
    seen.append(with_model.get(url).json)
    result = support.attempt(system, taken)
    web_support.finish(system, conn, taken, result=result)
    seen.append(with_model.get(url).json)
    _, graph = [step["id"] for step in seen[0]["jobs"]]
    web_support.run(system, conn, graph, result={})
    seen.append(with_model.get(url).json)

    assert [each["status"] for each in seen] == ["queued", "processing", "processing", "ready"]
    progress = [each["progress"] for each in seen]
    assert progress == sorted(progress) and progress[0] == 0.0 < progress[1] < progress[2] < progress[3] == 1.0
    assert seen[1]["stage"] == "embed"
    assert [[step["state"] for step in each["jobs"]] for each in seen] == [
        ["queued", "waiting"],
        ["running", "waiting"],
        ["succeeded", "queued"],
        ["succeeded", "succeeded"],
    ]
    assert {tuple(step["id"] for step in each["jobs"]) for each in seen} == {(made["job_id"], graph)}
    assert conn.execute("select payload from agentflow.jobs where id = %s", (graph,)).fetchone() == (
        {"document_id": made["document_id"], "second_pass": False},
    )


def test_a_failure_says_why_where_the_document_is_looked_at(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    made = client.post(URL, **form((FILES / "locked.pdf").read_bytes(), "rules.pdf")).json
    finish(system, conn, made["job_id"])

    seen = client.get(f"{URL}/{made['document_id']}").json
    conn.execute("delete from agentflow.jobs")  # as retention does
    later = client.get(f"{URL}/{made['document_id']}").json

    for each in (seen, later):
        assert (each["status"], each["error"]["code"]) == ("failed", "encrypted")
        assert "without" in each["error"]["message"]


@pytest.mark.usefixtures("quick_child")
def test_a_video_is_analysed_and_indexed_as_one_chain(
    with_model: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    body = {"url": "https://8.8.8.8/film.mp4", "index": True, "graph": True}
    headers = {"Idempotency-Key": "film"}
    task = with_model.post("/api/videos/analyze", json=body, headers=headers).json
    same = with_model.post("/api/videos/analyze", json=body, headers=headers).json
    url = f"{URL}/{task['document_id']}"
    before = with_model.get(url).json
    web_support.run(system, conn, task["task_id"], result={**ANALYSIS, "filename": "film.mp4"})
    between = with_model.get(url).json
    finish(system, conn, between["jobs"][1]["id"])
    after = with_model.get(url).json

    assert same == task
    assert (before["source"], before["source_id"]) == ("video", f"video:{task['video_id']}")
    assert [step["type"] for step in before["jobs"]] == ["analyze_video", "generate_embeddings", "extract_graph"]
    assert before["jobs"][0]["id"] == task["task_id"] and between["jobs"][1]["state"] == "queued"
    assert before["progress"] < between["progress"] < after["progress"] < 1.0
    assert (after["kind"], after["title"], after["chunks"]) == ("video", "film.mp4", 6)
    by_hand = with_model.post(URL, json={"video_id": task["video_id"]}).json
    assert by_hand["document_id"] == task["document_id"]
    assert finish(system, conn, by_hand["job_id"])["outcome"] == "unchanged"


def test_what_is_no_document_is_refused_and_nothing_is_left(
    client: FlaskClient, conn: psycopg.Connection, tmp_path: Path
) -> None:
    video = client.post("/api/videos", json={"url": "https://8.8.8.8/film.mp4"}).json["video_id"]
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "nothing": ({}, 400),
        "empty": ({"json": {}}, 422),
        "two": ({"json": {"text": "x", "url": "https://example.com/"}}, 422),
        "blank_text": ({"json": {"text": " \n "}}, 422),
        "null": ({"json": {"text": None}}, 422),
        "nul": ({"json": {"text": "a\x00b"}}, 422),
        "private_url": ({"json": {"url": "http://127.0.0.1/x.pdf"}}, 422),
        "no_source_id": ({"json": {"text": "x", "source_id": ""}}, 422),
        "long_source_id": ({"json": {"text": "x", "source_id": "x" * 501}}, 422),
        "graph_without_model": ({"json": {"text": "x", "graph": True}}, 409),
        "no_video": ({"json": {"video_id": str(uuid4())}}, 404),
        "video_without_analysis": ({"json": {"video_id": video}}, 409),
        "other_type": ({"data": b"%PDF-", "content_type": "application/pdf"}, 415),
        "form_with_other_field": (form(b"x", other="1"), 422),
        "form_with_empty_file": (form(b""), 422),
        "form_with_bad_graph": (form(b"x", graph="perhaps"), 422),
        "form_graph_without_model": (form(b"x", graph="true"), 409),
        "form_with_long_field": (form(b"x", title="y" * 10_000), 422),
        "form_with_empty_source_id": (form(b"x", source_id=""), 422),
        "graph_without_index": ({"path": "/api/videos/analyze", "json": {"video_id": video, "graph": True}}, 422),
    }
    for name, (request, status) in cases.items():
        answer = client.post(**{"path": URL, **request})

        assert answer.status_code == status, (name, answer.status_code, answer.text)
        said = problem(answer, status)
        assert len(said["detail"]) > 10
        if "without_model" in name:
            assert "OPENROUTER_API_KEY" in said["detail"]
        assert files(tmp_path) == [], name
    assert count(conn, "documents") == count(conn, "jobs") == 0


def test_an_upload_past_the_limit_is_413(environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path) -> None:
    small = System.start(settings.load({**environment, "DOCUMENT_MAX_BYTES": "100000"}), "test")
    client = create_app(small).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = web_support.AUTH["Authorization"]

    problem(client.post(URL, **form(b"x" * 200_000)), 413)
    assert files(tmp_path) == [] and count(conn, "documents") == 0
    small.close()


@pytest.mark.usefixtures("quick_child")
def test_a_deleted_document_takes_everything_along(
    client: FlaskClient, system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    made = client.post(URL, json={"text": "One. Two.", "source_id": "s"}).json
    finish(system, conn, made["job_id"])
    again = client.post(URL, json={"text": "Three.", "source_id": "s"}).json
    url = f"{URL}/{made['document_id']}"

    answer = client.delete(url)

    assert (answer.status_code, answer.data) == (204, b"")
    problem(client.get(url), 404)
    problem(client.delete(url), 404)
    assert count(conn, "documents") == count(conn, "chunks") == 0
    assert files(tmp_path) == []
    assert client.get(f"/api/jobs/{again['job_id']}").json["state"] == "cancelled"
