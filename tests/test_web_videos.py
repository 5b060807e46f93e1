"""Videos and their files over the API, in this process, on the real database and storage."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.system import System
from tests.web_support import claim, client, count, problem, run
from web import create_app

__all__ = ["client"]


def files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]


def form(data: bytes, name: str = "clip.mp4", field: str = "file") -> dict[str, Any]:
    return {"data": {field: (io.BytesIO(data), name, "video/mp4")}, "content_type": "multipart/form-data"}


def test_a_form_is_stored_under_the_organization_and_registered(client: FlaskClient, system: System) -> None:
    data = bytes(range(256)) * 5000

    answer = client.post("/api/videos", **form(data, "Ünser/../Clip \r\n 1.MP4"))

    assert answer.status_code == 201
    video = client.get(answer.headers["Location"]).json
    assert (video["id"], video["source"], video["size_bytes"]) == (answer.json["video_id"], "upload", len(data))
    assert "/" not in video["filename"] and video["filename"].isprintable()
    key = f"o/1/videos/{video['id']}/source.mp4"
    assert b"".join(system.storage.read(key)) == data


def test_a_bare_body_is_stored_with_its_name(client: FlaskClient, system: System) -> None:
    answer = client.post("/api/videos?filename=a.mov", data=b"frames", content_type="video/quicktime")

    assert answer.status_code == 201
    assert answer.json["filename"] == "a.mov"
    assert b"".join(system.storage.read(f"o/1/videos/{answer.json['video_id']}/source.mov")) == b"frames"


def test_a_video_by_url_is_registered_without_a_download(client: FlaskClient) -> None:
    answer = client.post("/api/videos", json={"url": "https://example.com/clip.mp4"})

    assert answer.status_code == 201
    assert client.get(answer.headers["Location"]).json["url"] == "https://example.com/clip.mp4"


def test_what_is_no_upload_is_refused_and_nothing_is_left(
    client: FlaskClient, conn: psycopg.Connection, tmp_path: Path
) -> None:
    boundary = {"content_type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "nothing": ({}, 400),
        "empty_body": ({"data": b"", "content_type": "video/mp4"}, 400),
        "text": ({"data": b"x", "content_type": "text/plain"}, 415),
        "no_boundary": ({"data": b"x", "content_type": "multipart/form-data"}, 400),
        "no_parts": ({"data": b"--b--\r\n", **boundary}, 422),
        "no_form": ({"data": b"x" * 1000, **boundary}, 400),
        "empty_file": (form(b""), 422),
        "other_field": (form(b"x", field="video"), 422),
        "no_file_name": ({"data": {"file": "x"}, "content_type": "multipart/form-data"}, 422),
        "cut_off": ({"data": head + b"half", **boundary}, 400),
        "cut_in_the_boundary": ({"data": head + b"half\r\n--b", **boundary}, 400),
        "two_files": ({"data": head + b"1\r\n" + head + b"2\r\n--b--\r\n", **boundary}, 422),
        "header_without_end": ({"data": b"--b\r\nX: " + b"y" * (1 << 20), **boundary}, 400),
        "part_without_a_name": (
            {"data": b"--b\r\nContent-Disposition: form-data; filename=x\r\n\r\nx\r\n--b--", **boundary},
            422,
        ),
        "part_without_headers": ({"data": b"--b\r\n\r\nx\r\n--b--\r\n", **boundary}, 400),
        "url_of_this_machine": ({"json": {"url": "http://127.0.0.1:8000/x.mp4"}}, 422),
        "url_of_metadata": ({"json": {"url": "http://169.254.169.254/latest"}}, 422),
        "url_by_another_scheme": ({"json": {"url": "file:///etc/passwd"}}, 422),
        "url_with_nul": ({"json": {"url": "https://example.com/\x00"}}, 422),
        "no_url": ({"json": {}}, 422),
        "unknown_field": ({"json": {"url": "https://example.com/", "x": 1}}, 422),
    }
    for name, (request, status) in cases.items():
        answer = client.post("/api/videos", **request)

        assert answer.status_code == status, (name, answer.status_code, answer.text)
        problem(answer, status)
        assert files(tmp_path) == [], name
    assert count(conn, "videos") == 0


def test_an_upload_past_the_limit_is_413_with_and_without_a_length(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    small = System(settings.load({**environment, "UPLOAD_MAX_BYTES": "300000"}), "test")
    client = create_app(small).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {small.admin_key()}"
    chunked = {"input_stream": io.BytesIO(b"x" * 400_000), "environ_overrides": {"wsgi.input_terminated": True}}

    assert client.post("/api/videos", data=b"x" * 300_000, content_type="video/mp4").status_code == 201
    problem(client.post("/api/videos", data=b"x" * 300_001, content_type="video/mp4"), 413)
    problem(client.post("/api/videos", content_type="video/mp4", **chunked), 413)
    problem(client.post("/api/videos", **form(b"x" * 400_000)), 413)
    assert len(files(tmp_path)) == count(conn, "videos") == 1
    small.close()


def test_a_file_whose_row_cannot_be_written_is_taken_away(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise psycopg.OperationalError("gone")

    monkeypatch.setattr("agentflow.videos.create_upload", away)

    problem(client.post("/api/videos", data=b"frames", content_type="video/mp4"), 503)
    assert files(tmp_path) == []


def test_an_analysis_of_an_upload_or_a_url_is_a_task(client: FlaskClient, conn: psycopg.Connection) -> None:
    video = client.post("/api/videos", data=b"frames", content_type="video/mp4").json["video_id"]

    of_upload = client.post("/api/videos/analyze", json={"video_id": video})
    of_url = client.post("/api/videos/analyze", json={"url": "https://example.com/a.mp4"})

    for answer in (of_upload, of_url):
        assert answer.status_code == 202
        assert answer.json["status"] == "queued" and answer.json["message"]
        assert answer.headers["Location"] == f"/api/videos/task/{answer.json['task_id']}/status"
        row = conn.execute(
            "select type, payload from agentflow.jobs where id = %s", (answer.json["task_id"],)
        ).fetchone()
        assert row == ("analyze_video", {"video_id": answer.json["video_id"], "index": False})
        assert answer.json["document_id"] is None
    assert of_upload.json["video_id"] == video
    assert count(conn, "videos") == 2


def test_an_analysis_that_is_refused_writes_neither_row_nor_job(client: FlaskClient, conn: psycopg.Connection) -> None:
    unknown = client.post("/api/videos/analyze", json={"video_id": str(uuid4())})
    nothing = client.post("/api/videos/analyze", json={})
    both = client.post("/api/videos/analyze", json={"video_id": str(uuid4()), "url": "https://example.com/a"})
    null = client.post("/api/videos/analyze", json={"video_id": None, "url": "https://example.com/a"})
    inside = client.post("/api/videos/analyze", json={"url": "http://localhost/a.mp4"})

    problem(unknown, 404)
    for answer in (nothing, both, null, inside):
        problem(answer, 422)
    assert count(conn) == count(conn, "videos") == 0


def test_an_idempotency_key_makes_one_analysis(client: FlaskClient, conn: psycopg.Connection) -> None:
    def send(url: str) -> Any:
        return client.post("/api/videos/analyze", json={"url": url}, headers={"Idempotency-Key": "once"})

    first, again, other = send("https://example.com/a"), send("https://example.com/a"), send("https://example.com/b")

    assert first.json == again.json
    problem(other, 409)
    assert count(conn) == count(conn, "videos") == 1


def test_the_status_speaks_the_old_words(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    def start() -> str:
        task = client.post("/api/videos/analyze", json={"url": "https://example.com/a.mp4"}).json["task_id"]
        return str(task)

    def status(task: str) -> dict[str, Any]:
        answer = client.get(f"/api/videos/task/{task}/status")
        assert answer.status_code == 200
        return dict(answer.json)

    waiting, working, done, failed, cancelled = (start() for _ in range(5))
    claim(conn, working)
    conn.execute("update agentflow.jobs set progress = 0.5, stage = 'shots' where id = %s", (working,))
    run(system, conn, done, result={"contact_sheet": {"key": "o/1/s.png"}})
    run(system, conn, failed, "failed", error={"message": "The file has no video.", "code": "no_video_stream"})
    client.post(f"/api/jobs/{cancelled}/cancel")

    assert status(waiting)["status"] == "queued"
    assert (status(working)["status"], status(working)["progress"], status(working)["stage"]) == (
        "processing",
        0.5,
        "shots",
    )
    completed = status(done)
    assert completed["status"] == "completed" and completed["completed_at"] and completed["failed_at"] is None
    assert completed["result"]["contact_sheet"]["url"].startswith("/artefacts/o/1/s.png?")
    broken = status(failed)
    assert broken["status"] == "failed" and broken["failed_at"] and broken["completed_at"] is None
    assert (broken["error"], broken["error_code"]) == ("The file has no video.", "no_video_stream")
    assert status(cancelled)["status"] == "cancelled"
    problem(client.get(f"/api/videos/task/{uuid4()}/status"), 404)
    problem(client.get("/api/videos/task/not-an-id/status"), 404)
    other = client.post("/api/jobs", json={"type": "ping"}).json["id"]
    problem(client.get(f"/api/videos/task/{other}/status"), 404)


def test_a_link_serves_the_file_and_its_parts_without_a_key(system: System) -> None:
    data = bytes(range(256)) * 3000
    system.storage.put_bytes("o/1/j/sheet.png", data)
    stranger = create_app(system).test_client()
    link = system.links.sign("o/1/j/sheet.png")

    whole = stranger.get(link)
    head = stranger.head(link)
    part = stranger.get(link, headers={"Range": "bytes=100-299"})
    tail = stranger.get(link, headers={"Range": "bytes=-10"})
    beyond = stranger.get(link, headers={"Range": f"bytes={len(data)}-"})
    changed = stranger.get(link, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    same = stranger.get(link, headers={"Range": "bytes=0-9", "If-Range": whole.headers["ETag"]})
    odd = stranger.get(link, headers={"Range": "pages=1-2"})

    assert (whole.status_code, whole.data) == (200, data)
    assert whole.headers["Content-Type"] == "image/png"
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert whole.headers["Content-Disposition"] == "inline; filename*=UTF-8''sheet.png"
    assert (head.status_code, head.data, head.headers["Content-Length"]) == (200, b"", str(len(data)))
    assert (part.status_code, part.data) == (206, data[100:300])
    assert part.headers["Content-Range"] == f"bytes 100-299/{len(data)}"
    assert (tail.status_code, tail.data) == (206, data[-10:])
    problem(beyond, 416)
    assert beyond.headers["Content-Range"] == f"bytes */{len(data)}"
    assert (changed.status_code, changed.data) == (200, data)
    assert (same.status_code, same.data) == (206, data[:10])
    assert (odd.status_code, odd.data) == (200, data)


def test_a_link_that_is_not_ours_or_over_is_403(system: System) -> None:
    system.storage.put_bytes("o/1/a.html", b"<script>")
    stranger = create_app(system).test_client()
    good = system.links.sign("o/1/a.html")

    html = stranger.get(good)
    named = stranger.get(system.links.sign("o/1/a.html", filename="b.png"))

    assert html.headers["Content-Type"] == "application/octet-stream"
    assert html.headers["Content-Disposition"].startswith("attachment")
    assert named.headers["Content-Disposition"] == "attachment; filename*=UTF-8''b.png"
    problem(stranger.get(system.links.sign("o/1/a.html", now=time.time() - 3600)), 403)
    problem(stranger.get(good.replace("a.html", "b.html")), 403)
    problem(stranger.get(good + "x"), 403)
    problem(stranger.get("/artefacts/o/1/a.html"), 403)
    problem(stranger.get(good + "&filename=evil.exe"), 403)
    problem(stranger.get("/artefacts/o/1/../../secret?expires=1&signature=x"), 403)
    problem(stranger.get("/artefacts//o/1/a.html?expires=1&signature=x"), 404)
    system.storage.delete("o/1/a.html")
    problem(stranger.get(good), 404)
