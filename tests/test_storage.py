from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow import USER_AGENT
from agentflow.storage import NotStored, Storage, StorageError
from agentflow.storage import objects as storage_module
from agentflow.storage.supabase import SupabaseStorage

from .http_server import Reply, Request, Server, serve
from .supabase_server import SECRET, supabase_server

MB = 1 << 20


@dataclass
class Bucket:
    """The part of S3's protocol that a store needs, and its insides for the tests to look at."""

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    parts_taken: int = 0
    fault: Callable[[Request], Reply | None] = lambda request: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request) -> Reply:
        if (reply := self.fault(request)) is not None:
            return reply
        with self.lock:
            key = request.path.removeprefix("/bucket").lstrip("/")
            return self._object(request, key) if key else self._bucket(request)

    def _bucket(self, request: Request) -> Reply:
        if request.method == "POST" and "delete" in request.query:
            names = [name.decode() for name in re.findall(rb"<Key>(.*?)</Key>", request.body)]
            for name in names:
                self.objects.pop(name, None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            return _xml(f"<DeleteResult>{deleted}</DeleteResult>")
        prefix = request.query.get("prefix", "")
        found = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<ETag>&quot;e&quot;</ETag><Size>{len(data)}</Size></Contents>"
            for name, (data, _) in self.objects.items()
            if name.startswith(prefix)
        )
        return _xml(f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>")

    def _object(self, request: Request, key: str) -> Reply:
        upload = request.query.get("uploadId")
        match request.method:
            case "POST" if "uploads" in request.query:
                name = f"upload-{len(self.uploads)}-{time.monotonic_ns()}"
                self.uploads[name] = {}
                return _xml(
                    f"<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>{key}</Key>"
                    f"<UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
                )
            case "PUT" if upload is not None:
                self.uploads[upload][int(request.query["partNumber"])] = request.body
                self.parts_taken += 1
                return Reply(headers={"ETag": '"p"'})
            case "POST" if upload is not None:
                parts = self.uploads.pop(upload)
                if not parts:
                    return Reply(400, b"<Error><Code>MalformedXML</Code></Error>")
                self.objects[key] = b"".join(parts[number] for number in sorted(parts)), "multipart"
                return _xml(
                    f"<CompleteMultipartUploadResult><Key>{key}</Key>"
                    "<ETag>&quot;e&quot;</ETag></CompleteMultipartUploadResult>"
                )
            case "DELETE" if upload is not None:
                self.uploads.pop(upload, None)
                return Reply(204)
            case "PUT":
                self.objects[key] = request.body, request.headers.get("content-type", "")
                return Reply(headers={"ETag": '"e"'})
            case "DELETE":
                self.objects.pop(key, None)
                return Reply(204)
        if key not in self.objects:
            return Reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self._get(request, *self.objects[key])

    def _get(self, request: Request, data: bytes, content_type: str) -> Reply:
        headers = {"ETag": '"e"', "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT", "Content-Type": content_type}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Reply(headers={**headers, "Content-Length": str(len(data))}, body=data)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _xml(text: str) -> Reply:
    return Reply(body=text.encode(), headers={"Content-Type": "application/xml"})


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def s3_server(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    with serve() as server:
        server.on("/bucket", bucket)
        server.on("/bucket/", bucket)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url("").rstrip("/"))
        yield server


@pytest.fixture
def s3(s3_server: Server) -> Storage:
    return Storage.open("s3://bucket/files")


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage.open(f"file://{tmp_path}/files")


@pytest.fixture
def supabase() -> Iterator[Storage]:
    with supabase_server() as server:
        yield SupabaseStorage(server.url, SECRET, "agentflow")


@pytest.fixture(params=["disk", "s3", "supabase"])
def storage(request: pytest.FixtureRequest) -> Storage:
    found: Storage = request.getfixturevalue(request.param)
    return found


def read_all(storage: Storage, key: str, *, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(storage.read(key, start=start, end=end))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What is stored


def test_bytes_come_back_as_they_were_stored(storage: Storage) -> None:
    assert storage.put_bytes("a/b.bin", b"12345", content_type="image/png") == 5

    assert read_all(storage, "a/b.bin") == b"12345"
    stored = storage.stat("a/b.bin")
    assert stored is not None
    assert (stored.key, stored.size) == ("a/b.bin", 5)
    assert stored.modified.tzinfo is not None
    assert stored.etag


def test_a_file_goes_in_and_comes_out(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(7 * MB + 3)
    (tmp_path / "in").write_bytes(data)

    assert storage.put_file("clip", tmp_path / "in") == len(data)
    assert storage.fetch_to("clip", tmp_path / "out") == len(data)

    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("sizes", [[], [0], [1], [5 * MB], [3 * MB, 3 * MB, 3 * MB, 1], [12 * MB]])
def test_a_writer_stores_its_pieces_in_order(storage: Storage, sizes: list[int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]

    with storage.writer("a/joined") as writer:
        for piece in pieces:
            writer.write(piece)

    assert writer.size == sum(sizes)
    assert read_all(storage, "a/joined") == b"".join(pieces)


def test_a_writer_keeps_what_a_reused_buffer_held(storage: Storage) -> None:
    buffer = bytearray(b"first")

    with storage.writer("joined") as writer:
        writer.write(memoryview(buffer))
        buffer[:] = b"later"
        writer.write(buffer)

    assert read_all(storage, "joined") == b"firstlater"


def test_a_later_write_replaces_the_earlier_one(storage: Storage) -> None:
    storage.put_bytes("k", b"old and long")
    with storage.writer("k") as writer:
        writer.write(b"new")

    assert read_all(storage, "k") == b"new"


def test_ranges_are_cut_like_slices(storage: Storage) -> None:
    storage.put_bytes("digits", b"0123456789")

    assert read_all(storage, "digits", start=3) == b"3456789"
    assert read_all(storage, "digits", start=3, end=5) == b"34"
    assert read_all(storage, "digits", end=4) == b"0123"
    assert read_all(storage, "digits", start=8, end=100) == b"89"
    assert read_all(storage, "digits", start=5, end=5) == b""
    assert read_all(storage, "digits", start=10) == b""
    with pytest.raises(ValueError, match="range"):
        storage.read("digits", start=5, end=4)


def test_large_files_are_read_in_small_pieces(disk: Storage) -> None:
    disk.put_bytes("large", bytes(5 * MB))

    assert max(len(piece) for piece in disk.read("large", chunk_bytes=MB)) <= 2 * MB


def test_what_is_missing_is_told_at_the_call(storage: Storage, tmp_path: Path) -> None:
    assert storage.stat("nothing/here") is None
    with pytest.raises(NotStored, match="nothing/here"):
        storage.read("nothing/here")
    with pytest.raises(NotStored):
        storage.read("nothing/here", start=3)
    with pytest.raises(NotStored):
        storage.fetch_to("nothing/here", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deleting_twice_is_fine(storage: Storage) -> None:
    storage.put_bytes("a/b/c", b"1")

    storage.delete("a/b/c")
    storage.delete("a/b/c")

    assert storage.stat("a/b/c") is None


def test_the_last_file_of_a_folder_takes_the_folder_with_it(disk: Storage, tmp_path: Path) -> None:
    disk.put_bytes("a/b/c", b"1")

    disk.delete("a/b/c")

    assert list((tmp_path / "files").iterdir()) == []


def test_a_folder_is_listed_and_deleted_without_its_neighbours(storage: Storage) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "c"):
        storage.put_bytes(key, key.encode())

    assert sorted(stored.key for stored in storage.list("a")) == ["a/1", "a/b/2"]
    assert sorted(stored.key for stored in storage.list()) == ["a/1", "a/b/2", "ab/3", "c"]
    assert storage.delete_prefix("a/") == 2
    assert storage.delete_prefix("a") == 0
    assert sorted(stored.key for stored in storage.list()) == ["ab/3", "c"]
    with pytest.raises(ValueError, match="key"):
        storage.delete_prefix("")


def test_a_bucket_is_told_who_asks(s3: Storage, s3_server: Server) -> None:
    s3.put_bytes("a", b"x")

    assert {request.headers["user-agent"] for request in s3_server.requests} == {USER_AGENT}


def test_a_folder_in_a_bucket_is_deleted_in_one_request(s3: Storage, s3_server: Server) -> None:
    for number in range(12):
        s3.put_bytes(f"a/{number}", b"1")
    before = len(s3_server.requests)

    assert s3.delete_prefix("a") == 12

    assert [request.method for request in s3_server.requests[before:]] == ["GET", "POST", "GET"]


# Keys


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a/.", "a//b", "a/", "a\\b", "..\\x"),
        *("a\0b", "a\nb", "a\x7f", "a\u2028b", "\udcff", "a#1", "a#1/b", "x" * 201, "/".join(["abcdefghi"] * 100)),
    ],
)
def test_a_key_that_leaves_the_folder_or_means_two_things_is_refused(disk: Storage, key: str) -> None:
    for use in (disk.stat, disk.read, disk.delete, disk.local_path, lambda key: disk.put_bytes(key, b"")):
        with pytest.raises(ValueError, match="key"):
            use(key)
    with pytest.raises(ValueError, match="key"), disk.writer(key):
        pass


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(parts=st.lists(names, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_key_that_is_accepted_names_one_file_below_the_folder(
    parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = "/".join(parts)
    folder = tmp_path_factory.mktemp("keys").resolve()
    disk = Storage.open(folder.as_uri())
    try:
        disk.check_key(key)
    except ValueError:
        return

    disk.put_bytes(key, b"here")

    path = disk.local_path(key)
    assert path is not None
    assert path.is_relative_to(folder)
    assert files_in(folder) == [str(path.relative_to(folder))]
    assert path.read_bytes() == b"here"
    assert [stored.key for stored in disk.list()] == [key]
    disk.delete(key)
    assert files_in(folder) == []


# Writes that fail


def test_an_exception_in_the_block_leaves_nothing_on_a_disk(disk: Storage, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk.writer("a/cut") as writer:
        for _ in range(12):
            writer.write(bytes(MB))
        raise ZeroDivisionError

    assert files_in(tmp_path) == []


def test_an_exception_in_the_block_keeps_the_earlier_file(storage: Storage) -> None:
    storage.put_bytes("a/cut", b"earlier")

    with pytest.raises(KeyboardInterrupt), storage.writer("a/cut") as writer:
        writer.write(bytes(6 * MB))
        raise KeyboardInterrupt

    assert read_all(storage, "a/cut") == b"earlier"


@pytest.mark.parametrize("megabytes", [0, 1, 12])
def test_an_exception_in_the_block_aborts_the_multipart_upload(s3: Storage, bucket: Bucket, megabytes: int) -> None:
    with pytest.raises(ZeroDivisionError), s3.writer("a/cut") as writer:
        for _ in range(megabytes):
            writer.write(bytes(MB))
        raise ZeroDivisionError

    assert bucket.parts_taken >= (megabytes > 10)
    assert bucket.objects == {}
    assert bucket.uploads == {}


def test_a_refused_part_is_told_and_its_upload_aborted(s3: Storage, bucket: Bucket) -> None:
    bucket.fault = lambda request: Reply(403, b"<Error/>") if request.query.get("partNumber") == "2" else None

    with pytest.raises(StorageError, match="a/refused") as failure, s3.writer("a/refused") as writer:
        for _ in range(40):
            writer.write(bytes(MB))

    assert "\n" not in str(failure.value)
    assert bucket.parts_taken >= 1
    assert bucket.objects == {}
    assert bucket.uploads == {}


def test_a_part_that_fails_once_is_sent_again(s3: Storage, bucket: Bucket) -> None:
    failures = iter([Reply(503, b"slow down"), Reply(500, b"")])
    bucket.fault = lambda request: next(failures, None) if "partNumber" in request.query else None

    with s3.writer("a/retried") as writer:
        writer.write(bytes(11 * MB))

    assert bucket.objects["files/a/retried"][0] == bytes(11 * MB)


def test_a_folder_that_cannot_be_written_is_told(disk: Storage, tmp_path: Path) -> None:
    disk.put_bytes("taken", b"a file where a folder is needed")

    with pytest.raises(StorageError), disk.writer("taken/below") as writer:
        for _ in range(100):
            writer.write(bytes(MB))

    assert writer.size < 50 * MB, "told at a write, not at the end"
    assert files_in(tmp_path / "files") == ["taken"]


KILLED_WRITER = """
    import sys
    from agentflow.storage import Storage
    with Storage.open(sys.argv[1]).writer("a/killed") as writer:
        while True:
            writer.write(bytes(1 << 20))
            print(flush=True)
"""


def test_a_killed_write_leaves_no_file_and_its_leftover_is_swept(disk: Storage, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(KILLED_WRITER), f"file://{tmp_path}/files"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    assert disk.stat("a/killed") is None
    assert list(disk.list()) == []
    [leftover] = files_in(tmp_path / "files")
    assert disk.sweep(older_than_s=60) == 0, "it might still be written"
    disk.put_bytes("a/kept", b"kept")
    hour_ago = time.time() - 3600
    for path in (tmp_path / "files" / leftover, tmp_path / "files" / "a" / "kept"):
        os.utime(path, (hour_ago, hour_ago))
    assert disk.sweep(older_than_s=60) == 1
    assert files_in(tmp_path / "files") == ["a/kept"]


def test_empty_old_folders_are_swept(disk: Storage, tmp_path: Path) -> None:
    (tmp_path / "files/old/empty").mkdir(parents=True)
    (tmp_path / "files/young").mkdir()
    hour_ago = time.time() - 3600
    for path in (tmp_path / "files/old", tmp_path / "files/old/empty"):
        os.utime(path, (hour_ago, hour_ago))

    disk.sweep(older_than_s=60)
    os.utime(tmp_path / "files/old", (hour_ago, hour_ago))
    disk.sweep(older_than_s=60)

    assert [path.name for path in (tmp_path / "files").iterdir()] == ["young"]


def test_sweeping_a_bucket_does_nothing(s3: Storage) -> None:
    assert s3.sweep(older_than_s=0) == 0


def test_what_is_stored_is_flushed_to_the_disk(disk: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    with disk.writer("new/folder/file") as writer:
        writer.write(b"1")

    root = tmp_path / "files"
    assert flushed == [str(root / name) for name in ("new/folder/file", "new/folder", "new", "")]


# Memory


GROWTH = """
    import sys
    from agentflow.storage import Storage

    def resident_mb():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

    storage = Storage.open(sys.argv[1])
    storage.put_bytes("warm", b"1")
    list(storage.read("warm"))
    before = highest = resident_mb()
    piece = b"x" * (1 << 20)
    with storage.writer("large") as writer:
        for number in range(300):
            writer.write(bytearray(piece))
            if number % 5 == 0:
                highest = max(highest, resident_mb())
    written = sum(len(piece) for piece in storage.read("large"))
    print(max(highest, resident_mb()) - before, written)
"""


def test_300_mb_go_through_a_writer_in_constant_memory(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", dedent(GROWTH), f"file://{tmp_path}/files"], check=True, capture_output=True, text=True
    ).stdout

    growth_mb, written = out.split()
    assert int(written) == 300 * MB
    assert float(growth_mb) < 20


def test_30_mb_go_into_a_bucket_in_parts_of_5_mb(s3: Storage, bucket: Bucket) -> None:
    with s3.writer("large") as writer:
        for _ in range(30):
            writer.write(bytes(MB))

    assert bucket.parts_taken == 6
    assert len(bucket.objects["files/large"][0]) == 30 * MB


# Where


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    storage = Storage.open(f"file://{tmp_path}/with%20space/files")

    storage.put_bytes("a", b"1")

    assert storage.local_path("a") == tmp_path / "with space/files/a"
    assert (tmp_path / "with space/files").stat().st_mode & 0o777 == 0o700


def test_a_bucket_has_no_local_path(s3: Storage) -> None:
    s3.put_bytes("a", b"1")

    assert s3.local_path("a") is None


def test_the_content_type_goes_to_the_bucket(s3: Storage, bucket: Bucket) -> None:
    s3.put_bytes("sheet.png", b"1", content_type="image/png")

    assert bucket.objects["files/sheet.png"] == (b"1", "image/png")


@pytest.mark.parametrize(
    "url",
    [
        *("", "files", "/files", "file://files", "file://host/files", "ftp://x/y", "http://bucket/x", "s3://"),
        *("s3:///x", "s3://key:secret@bucket", "s3://bucket?region=x", "file:///x#y", "s3://[bucket"),
    ],
)
def test_a_wrong_url_names_the_setting_and_no_secret(url: str) -> None:
    with pytest.raises(StorageError, match="STORAGE_URL") as failure:
        Storage.open(url)

    assert "secret" not in str(failure.value)


def test_a_file_where_the_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    for below in ("file", "file/files"):
        with pytest.raises(StorageError, match=r"STORAGE_URL: the folder .*file"):
            Storage.open(f"file://{tmp_path}/{below}")


# A bucket that does not answer


def test_a_stalled_bucket_ends_in_an_error(s3_server: Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "READ_TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setattr(storage_module, "MAX_RETRIES", 1)
    bucket.fault = lambda request: Reply(raw=iter([b"HTTP/1.1 200 OK\r\n", b""]), pause_s=30)
    storage = Storage.open("s3://bucket/files")
    began = time.monotonic()

    with pytest.raises(StorageError, match="'a'"):
        storage.stat("a")
    with pytest.raises(StorageError, match="'a'"):
        storage.put_bytes("a", b"1")
    with pytest.raises(StorageError, match="'a'"), storage.writer("a") as writer:
        writer.write(bytes(6 * MB))

    assert time.monotonic() - began < 10


def test_a_bucket_that_refuses_the_key_is_not_taken_for_an_empty_one(s3: Storage, bucket: Bucket) -> None:
    bucket.fault = lambda request: Reply(403, b"<Error><Code>AccessDenied</Code></Error>")

    with pytest.raises(StorageError) as failure:
        s3.stat("a")

    assert not isinstance(failure.value, NotStored)
    assert "test-secret" not in str(failure.value)


def test_a_download_that_ends_early_is_not_taken_for_the_whole(
    s3: Storage, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"ETag": '"e"', "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
    bucket.fault = lambda request: Reply(body=bytes(MB), length=2 * MB, headers=headers)
    storage = s3

    with pytest.raises(StorageError, match="'a'"):
        storage.fetch_to("a", tmp_path / "out")

    assert not (tmp_path / "out").exists()


# A forked child


FORKED = """
    import os, sys
    from agentflow.storage import Storage, StorageError
    storage = Storage.open(sys.argv[1])
    if sys.argv[2] == "used":
        storage.put_bytes("a", b"1")
    if os.fork() == 0:
        try:
            storage.put_bytes("b", b"2")
        except StorageError as err:
            print(err)
        else:
            print("stored")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize(("before", "answer"), [("used", "forked"), ("opened", "stored")])
def test_a_forked_child_is_refused_where_it_would_hang(tmp_path: Path, before: str, answer: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", dedent(FORKED), f"file://{tmp_path}", before],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
    ).stdout

    assert answer in out


def test_a_stored_file_says_when_it_was_written(disk: Storage) -> None:
    disk.put_bytes("a", b"1")

    stored = disk.stat("a")

    assert stored is not None
    assert abs(stored.modified - datetime.now(UTC)) < timedelta(seconds=10)
