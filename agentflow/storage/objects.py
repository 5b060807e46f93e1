"""Files on a disk (`file://`) or in a bucket (`s3://`), through obstore."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import LocalStore, from_url

from agentflow import USER_AGENT
from agentflow.storage.contract import UNDER_WAY, NotStored, Storage, StorageError, Stored, Writer

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# A multipart upload sends one part at a time, so that an upload of any size costs about two parts of memory
# (measured: 11 MB at one, 16 MB at two). S3 takes parts of 5 MiB and up, 10,000 at most: 48 GiB.
PART_BYTES = 5 << 20
PARTS_AT_ONCE = 1

CONNECT_TIMEOUT = timedelta(seconds=10)
# For each read, and for the whole of sending a part and waiting for its answer: 5 MiB in 60 s is 87 kB/s.
READ_TIMEOUT = timedelta(seconds=60)
# obstore's default of 30 s for a whole answer would cut every longer download; stalls are ended by the read timeout.
WHOLE_TIMEOUT = timedelta(hours=2)
MAX_RETRIES = 4
RETRY_TIMEOUT = timedelta(seconds=60)

_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss"}


class ObjectStorage(Storage):
    def __init__(self, store: ObjectStore, *, root: Path | None = None) -> None:
        self._store = store
        self._root = root

    @classmethod
    def at(cls, url: str) -> ObjectStorage:
        """See Storage.open."""
        try:
            parts = urlsplit(url)
            has_credentials = parts.username is not None or parts.password is not None
        except ValueError:
            raise StorageError("STORAGE_URL is not a URL") from None
        if has_credentials or parts.query or parts.fragment:
            raise StorageError("STORAGE_URL takes no credentials and no options: they are set as AWS_* variables")
        if parts.scheme == "file":
            return cls._open_folder(parts.netloc, unquote(parts.path))
        if parts.scheme not in _SCHEMES:
            raise StorageError("STORAGE_URL must begin with file:// or s3://")
        if not parts.netloc:
            raise StorageError(f"STORAGE_URL names no bucket: {parts.scheme}://bucket/prefix")
        try:
            return cls(from_url(url, client_options=_client_options(), retry_config=_retries()))
        except (ObstoreError, ValueError) as err:
            raise StorageError(f"STORAGE_URL cannot be used: {_reason(err)}") from err

    @classmethod
    def _open_folder(cls, host: str, path: str) -> ObjectStorage:
        if host not in ("", "localhost") or not path.startswith("/"):
            raise StorageError(
                "STORAGE_URL must name a folder by its whole path, with three slashes: file:///var/files"
            )
        root = Path(path)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise StorageError(f"STORAGE_URL: the folder {root} cannot be made: {err.strerror}") from err
        if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            raise StorageError(f"STORAGE_URL: the folder {root} may not be read and written by this user")
        root = root.resolve()
        return cls(LocalStore(root, automatic_cleanup=True), root=root)

    def put_bytes(self, key: str, data: bytes, *, content_type: str | None = None) -> int:
        self.check_key(key)
        with self._errors(key):
            obstore.put(self._store, key, data, attributes=self._attributes(content_type), use_multipart=False)
            self._flush(key)
        return len(data)

    @contextmanager
    def writer(self, key: str, *, content_type: str | None = None) -> Iterator[Writer]:
        self.check_key(key)

        def put(pieces: Iterator[bytes]) -> None:
            with self._errors(key):
                obstore.put(
                    self._store,
                    key,
                    pieces,
                    attributes=self._attributes(content_type),
                    use_multipart=True,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_ONCE,
                )
                self._flush(key)

        writer = _Writer(put, name=f"storage-writer:{key}")
        try:
            yield writer
        except BaseException:
            writer._abandon()
            raise
        writer._commit()

    def stat(self, key: str) -> Stored | None:
        self.check_key(key)
        try:
            with self._errors(key):
                return _stored(obstore.head(self._store, key))
        except NotStored:
            return None

    def read(self, key: str, *, start: int = 0, end: int | None = None, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        self.check_key(key)
        if start < 0 or (end is not None and end < start):
            raise ValueError("a range must not be negative")
        # Stores refuse empty ranges and such that begin behind the end, each in words of its own; here they are empty.
        size = self._size(key) if start or end is not None else None
        if size is not None and start >= min(size, size if end is None else end):
            return iter(())
        options: Any = {} if size is None else {"range": (start, size if end is None else min(end, size))}
        with self._errors(key):
            answer = obstore.get(self._store, key, options=options)
            first, last = answer.range
        return self._pieces(key, answer, last - first, chunk_bytes)

    def _pieces(self, key: str, answer: obstore.GetResult, expected: int, chunk_bytes: int) -> Iterator[bytes]:
        with self._errors(key):
            for piece in answer.stream(min_chunk_size=chunk_bytes):
                expected -= len(piece)
                yield bytes(piece)
        if expected:
            raise StorageError(f"reading {key!r} ended {expected} bytes early")

    def _size(self, key: str) -> int:
        stored = self.stat(key)
        if stored is None:
            raise NotStored(f"nothing is stored under {key!r}")
        return stored.size

    def local_path(self, key: str) -> Path | None:
        self.check_key(key)
        return None if self._root is None else self._root / key

    def delete(self, key: str) -> None:
        self.check_key(key)
        with suppress(NotStored), self._errors(key):
            obstore.delete(self._store, key)

    def delete_prefix(self, prefix: str) -> int:
        self.check_key(prefix.removesuffix("/"))
        deleted = 0
        # Pages of S3's bulk delete. Each list is complete before its deletes begin.
        while keys := self._some_keys(prefix, limit=1000):
            with self._errors(prefix):
                if self._root is None:
                    obstore.delete(self._store, keys)
                else:  # one by one: a list stops at the first file that somebody else removed
                    for key in keys:
                        self.delete(key)
            deleted += len(keys)
        return deleted

    def _some_keys(self, prefix: str, limit: int) -> list[str]:
        return [stored.key for stored, _ in zip(self.list(prefix), range(limit), strict=False)]

    def list(self, prefix: str = "") -> Iterator[Stored]:
        if prefix:
            self.check_key(prefix.removesuffix("/"))
        with self._errors(prefix):
            for page in obstore.list(self._store, prefix.removesuffix("/") or None):
                for meta in page:
                    yield _stored(meta)

    def sweep(self, older_than_s: float) -> int:
        if self._root is None:
            return 0
        before = time.time() - older_than_s
        removed = 0
        for folder, _, names in os.walk(self._root, topdown=False):
            for name in filter(UNDER_WAY.fullmatch, names):
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
            if folder != str(self._root):
                with suppress(OSError):  # not empty, or gone
                    if Path(folder).stat().st_mtime < before:
                        Path(folder).rmdir()
        return removed

    def _attributes(self, content_type: str | None) -> dict[str, str] | None:
        # obstore refuses attributes on a local disk, which has no place for them.
        return {"Content-Type": content_type} if content_type and self._root is None else None

    def _flush(self, key: str) -> None:
        # obstore renames but does not fsync, and a job may be accepted on the strength of this file: without this
        # a power cut leaves it empty. The folders on the way may be new and are names in their parents.
        if self._root is not None:
            path = self._root / key
            for each in (path, *path.parents[: len(path.relative_to(self._root).parts)]):
                _fsync(each)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        _refuse_after_fork()
        try:
            yield
        except FileNotFoundError as err:
            raise NotStored(f"nothing is stored under {key!r}") from err
        except (ObstoreError, OSError, ValueError, NotImplementedError) as err:
            raise StorageError(f"storage failed at {key!r}: {_reason(err)}") from err


class _Writer(Writer):
    """Pieces go to obstore in a thread of its own, because it takes them from an iterator.

    That way round it aborts its multipart upload, or removes its temporary file, when the iterator raises; its own
    `open_writer` would store what has been written so far.
    """

    def __init__(self, put: Callable[[Iterator[bytes]], None], *, name: str) -> None:
        self.size = 0
        self._put = put
        self._pieces: queue.Queue[bytes | _End] = queue.Queue(maxsize=1)
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Raises `StorageError` once the store has refused an earlier piece."""
        if self._error is not None:
            raise self._error
        if data:
            self._pieces.put(bytes(data))
            self.size += len(data)
        return len(data)

    def _commit(self) -> None:
        self._pieces.put(_End(abandoned=False))
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _abandon(self) -> None:
        self._pieces.put(_End(abandoned=True))
        self._thread.join()

    def _run(self) -> None:
        try:
            self._put(self._iterate())
        except BaseException as err:  # noqa: BLE001 - it is raised again in the thread that writes
            self._error = err
            while not self._ended:  # whoever writes must not be left waiting for room
                self._next()

    def _iterate(self) -> Iterator[bytes]:
        while isinstance(piece := self._next(), bytes):
            yield piece
        if piece.abandoned:
            raise _Abandoned

    def _next(self) -> bytes | _End:
        piece = self._pieces.get()
        self._ended = isinstance(piece, _End)
        return piece


@dataclass(frozen=True)
class _End:
    abandoned: bool


class _Abandoned(Exception):
    """Makes obstore give up and clean up."""


def _stored(meta: ObjectMeta) -> Stored:
    return Stored(key=meta["path"], size=meta["size"], modified=meta["last_modified"], etag=meta["e_tag"])


def _client_options() -> ClientConfig:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    options: ClientConfig = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "timeout": WHOLE_TIMEOUT,
        "user_agent": USER_AGENT,
    }
    if endpoint.startswith("http://"):  # an operator who writes http:// means it (MinIO next door)
        options["allow_http"] = True
    return options


def _retries() -> RetryConfig:
    return {
        "max_retries": MAX_RETRIES,
        "retry_timeout": RETRY_TIMEOUT,
        "backoff": {
            "init_backoff": timedelta(milliseconds=200),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }


def _reason(err: Exception) -> str:
    # Behind the first line obstore adds a dump of its insides.
    return str(err).split("\n", 1)[0].strip() or type(err).__name__


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_used_in_process: int | None = None


def _refuse_after_fork() -> None:
    # obstore's threads do not survive a fork: without this a forked child waits for them for ever (obstore 0.12).
    global _used_in_process
    if _used_in_process is None:
        _used_in_process = os.getpid()
    elif _used_in_process != os.getpid():
        raise StorageError("storage was used before this process was forked: start the child by spawn instead")
