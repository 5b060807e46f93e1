"""What is special about Supabase Storage; what every store has to do is in test_storage.py."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.cli.client import Client
from agentflow.storage import NotStored, Storage, StorageError
from agentflow.storage import supabase as supabase_module
from agentflow.storage.supabase import PIECE_BYTES, SupabaseStorage
from agentflow.system import System
from tests.http_server import Reply, Request, serve
from tests.supabase_server import LEGACY, SECRET, SupabaseServer, supabase_server
from tests.web_support import client  # noqa: F401 - a fixture

MB = 1 << 20


@pytest.fixture
def server() -> Iterator[SupabaseServer]:
    with supabase_server() as server:
        yield server


@pytest.fixture
def storage(server: SupabaseServer) -> Storage:
    return SupabaseStorage(server.url, SECRET, "files")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supabase_module, "_FIRST_PAUSE_S", 0.01)


def all_of(storage: Storage, key: str) -> bytes:
    return b"".join(storage.read(key))


@pytest.mark.parametrize("key", [SECRET, LEGACY])
@pytest.mark.parametrize("old_errors", [True, False])
def test_either_kind_of_key_works_and_the_bucket_is_made_at_the_first_write(key: str, old_errors: bool) -> None:
    with supabase_server(key=key, old_errors=old_errors) as server:
        storage = SupabaseStorage(server.url, key, "files")
        assert storage.stat("a/b") is None
        assert list(storage.list()) == []
        storage.delete("a/b")
        with pytest.raises(NotStored):
            storage.read("a/b")
        assert server.buckets == {}

        storage.put_bytes("a/b", b"1", content_type="text/plain")
        storage.put_bytes("a/b", b"22", content_type="text/plain")

        assert server.buckets["files"]["public"] is False
        assert server.objects == {"files/a/b": (b"22", "text/plain")}
        assert [r.path for r in server.server.requests].count("/storage/v1/bucket") == 1
        agents = {r.headers["user-agent"] for r in server.server.requests}
        assert all(agent.startswith("AgentFlow/") for agent in agents)


def test_a_bucket_that_somebody_else_makes_meanwhile_is_fine(server: SupabaseServer, storage: Storage) -> None:
    def meanwhile(request: Request) -> None:
        if request.path.endswith("/bucket"):
            server.buckets["files"] = {}

    server.fault = meanwhile

    storage.put_bytes("a", b"1")

    assert server.objects["files/a"][0] == b"1"


@pytest.mark.parametrize("size", [PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 13 * MB])
def test_large_files_go_in_pieces_of_6_mb(server: SupabaseServer, storage: Storage, size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "film").write_bytes(data)

    assert storage.put_file("film.mp4", tmp_path / "film", content_type="video/mp4") == size

    assert server.objects["files/film.mp4"] == (data, "video/mp4")
    assert server.largest_body <= PIECE_BYTES


def test_an_upload_goes_on_where_the_server_is(server: SupabaseServer, storage: Storage) -> None:
    data = os.urandom(20 * MB)
    storage.put_bytes("first", b"")  # the bucket
    patches = []

    def unreliable(request: Request) -> Reply | None:
        if request.method != "PATCH":
            return None
        patches.append(int(request.headers["upload-offset"]))
        match len(patches):
            case 2:
                return Reply(503, b"slow down")
            case 4:  # it arrives, and the answer does not
                server.fault = lambda request: None
                server(request)
                server.fault = unreliable
                return Reply(raw=[b""])
            case 5:
                return Reply(423, b"locked")
        return None

    server.fault = unreliable

    storage.put_bytes("film", data)

    assert hashlib.sha256(server.objects["files/film"][0]).digest() == hashlib.sha256(data).digest()
    assert patches == [0, 6 * MB, 6 * MB, 12 * MB, 18 * MB, 18 * MB]


def test_an_upload_that_was_whole_but_not_completed_is_no_success(server: SupabaseServer, storage: Storage) -> None:
    storage.put_bytes("first", b"")

    def lost(request: Request) -> Reply | None:
        if request.method == "PATCH" and request.headers["upload-offset"] != "0":
            (upload,) = server.uploads.values()
            upload.data += request.body
            return Reply(500, b"the hook failed")
        return None

    server.fault = lost

    with pytest.raises(StorageError, match="not completed"):
        storage.put_bytes("film", bytes(7 * MB))


def test_the_key_goes_to_no_host_that_an_answer_names(server: SupabaseServer, storage: Storage) -> None:
    storage.put_bytes("film", bytes(7 * MB))

    assert "files/film" in server.objects  # although the upload's address was https://elsewhere.example/…


@pytest.mark.parametrize("old_errors", [True, False])
def test_a_file_above_the_plans_limit_is_told_at_once(
    server: SupabaseServer, storage: Storage, old_errors: bool
) -> None:
    server.old_errors = old_errors
    server.limit = 8 * MB

    with pytest.raises(StorageError, match=r"film.*exceeded the maximum allowed size"):
        storage.put_bytes("film", bytes(9 * MB))

    assert not [r for r in server.server.requests if r.method == "PATCH"]


@pytest.mark.parametrize("old_errors", [True, False])
def test_a_key_that_is_refused_is_not_taken_for_an_empty_bucket(server: SupabaseServer, old_errors: bool) -> None:
    server.old_errors = old_errors
    storage = SupabaseStorage(server.url, "sb_secret_wrong", "files")

    for use in (storage.stat, storage.read, storage.delete, lambda key: storage.put_bytes(key, b"")):
        with pytest.raises(StorageError) as raised:
            use("a")
        assert not isinstance(raised.value, NotStored)
        assert "sb_secret" not in str(raised.value)


def test_what_may_pass_is_tried_again_and_given_up_at_last(server: SupabaseServer, storage: Storage) -> None:
    storage.put_bytes("a", b"1")
    faults = iter([Reply(544, b"{}"), Reply(raw=[b""]), Reply(429, b"")])
    server.fault = lambda request: next(faults, None)

    assert all_of(storage, "a") == b"1"

    server.fault = lambda request: Reply(503, b"<html>")
    with pytest.raises(StorageError, match="503"):
        storage.stat("a")


def test_a_download_that_ends_early_is_not_taken_for_the_whole(server: SupabaseServer, storage: Storage) -> None:
    storage.put_bytes("a", b"1234567890")
    server.fault = lambda request: Reply(body=b"123", length=10) if request.method == "GET" else None

    with pytest.raises(StorageError, match="'a'"):
        all_of(storage, "a")


def test_a_folder_of_many_files_is_listed_by_pages_and_deleted_in_bulk(
    server: SupabaseServer, storage: Storage
) -> None:
    server.buckets["files"] = {}
    keys = {f"a/{n % 3}/x y#%/{n}.jpg" for n in range(230)} | {f"a/{n:03}.jpg" for n in range(120)}
    server.objects = {f"files/{key}": (b"1", "image/jpeg") for key in keys} | {"files/b": (b"1", "")}

    assert {stored.key for stored in storage.list("a")} == keys
    assert {(stored.size, stored.modified.year) for stored in storage.list("a")} == {(1, 2026)}
    assert storage.delete_prefix("a") == 350

    assert list(server.objects) == ["files/b"]
    assert len([r for r in server.server.requests if r.method == "DELETE"]) == 1


@pytest.mark.parametrize("key", ["a b/ü?&#+%2F.jpg", "o/1/é.mp4"])
def test_every_character_of_a_key_arrives(server: SupabaseServer, storage: Storage, key: str) -> None:
    storage.put_bytes(key, b"1")

    assert list(server.objects) == [f"files/{key}"]
    assert all_of(storage, key) == b"1"
    assert storage.stat(key) is not None
    storage.delete(key)
    assert server.objects == {}


def test_a_signed_url_needs_no_key(server: SupabaseServer, storage: SupabaseStorage) -> None:
    storage.put_bytes("o/1/film.mp4", b"data")

    url = storage.signed_url("o/1/film.mp4", 60, filename="Mein Film.mp4")

    with urllib.request.urlopen(url) as answer:
        assert (answer.read(), answer.headers["X-Download"]) == (b"data", "Mein Film.mp4")
    with pytest.raises(NotStored):
        storage.signed_url("nothing", 60)
    assert storage.public_url("o/1/film.mp4", 60) is None  # http:// is a network of its own


def test_a_download_goes_to_the_store_where_a_browser_can_reach_it(
    client: FlaskClient,  # noqa: F811
    system: System,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system.storage.put_bytes("o/1/film.mp4", b"data")
    link = system.links.sign("o/1/film.mp4", filename="f.mp4")
    asked: list[Any] = []

    def public_url(key: str, seconds: int, *, filename: str | None) -> str:
        asked.append((key, seconds, filename))
        return "https://x.supabase.co/storage/v1/object/sign/…"

    monkeypatch.setattr(system.storage, "public_url", public_url)

    answer = client.get(link)

    assert (answer.status_code, answer.headers["Location"][:23]) == (302, "https://x.supabase.co/st"[:23])
    assert asked == [("o/1/film.mp4", 60, "f.mp4")]


def test_an_upload_above_the_plans_limit_is_the_callers_413(
    client: FlaskClient,  # noqa: F811
    system: System,
    server: SupabaseServer,
    storage: Storage,
) -> None:
    server.limit = MB
    system.__dict__["storage"] = storage

    answer = client.post("/api/videos", data=bytes(2 * MB), content_type="application/octet-stream")

    assert (answer.status_code, answer.json["title"]) == (413, "Content Too Large"), answer.text
    assert client.post("/api/videos", data=b"small", content_type="application/octet-stream").status_code == 201


UPLOADER = """
    import resource, sys
    from agentflow.storage.supabase import SupabaseStorage
    storage = SupabaseStorage(sys.argv[1], sys.argv[2], "files")
    storage.put_bytes("first", bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with storage.writer("film") as writer:
        for _ in range(256):
            writer.write(bytes(1 << 20))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_256_mb_are_uploaded_in_constant_memory(server: SupabaseServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(UPLOADER), server.url, SECRET], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * 1024, "kilobytes; two pieces of 6 MB and what the allocator keeps"
    assert len(server.objects["files/film"][0]) == 256 * MB


# ---- settings ----


def opened(**environment: str) -> Storage:
    return System(settings.load({"AGENTFLOW_HOME": "/nowhere", **environment}), "test").storage


def test_the_secret_key_is_preferred_and_storage_url_wins(server: SupabaseServer, tmp_path: Path) -> None:
    named = {"SUPABASE_URL": server.url, "SUPABASE_SERVICE_ROLE_KEY": LEGACY}

    opened(**named, SUPABASE_SECRET_KEY=SECRET, SUPABASE_BUCKET="mine").put_bytes("a", b"1")

    assert list(server.objects) == ["mine/a"]
    assert server.server.requests[-1].headers["apikey"] == SECRET
    server.key = LEGACY
    opened(**named).put_bytes("a", b"1")
    assert "agentflow/a" in server.objects
    opened(**named, STORAGE_URL=tmp_path.as_uri()).put_bytes("b", b"1")
    assert (tmp_path / "b").exists()


def test_a_publishable_key_is_refused_by_name() -> None:
    with pytest.raises(settings.SettingsError, match="SUPABASE_SECRET_KEY: is a publishable key"):
        settings.load({"SUPABASE_URL": "https://x.supabase.co", "SUPABASE_SECRET_KEY": "sb_publishable_1"})


def test_the_command_line_follows_a_download_to_the_store_without_its_key(tmp_path: Path) -> None:
    with serve() as store, serve() as api:
        store.on("/film", Reply(body=b"data"))
        api.on("/artefacts/film", Reply(302, headers={"Location": store.url("/film")}))

        Client(api.url(""), "the-operators-key").download("/artefacts/film", tmp_path / "film")

        assert (tmp_path / "film").read_bytes() == b"data"
        assert api.requests[0].headers["authorization"] == "Bearer the-operators-key"
        assert "authorization" not in store.requests[0].headers
