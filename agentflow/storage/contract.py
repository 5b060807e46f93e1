"""Files that jobs read and write: uploads, artefacts.

A key is a relative POSIX path (`uploads/<id>/clip.mp4`). What stands under a key is whole or absent: a write that
fails or is killed leaves nothing there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

MAX_KEY_BYTES = 900  # S3 allows 1024 with the prefix
MAX_PART_BYTES = 200  # file systems allow 255, and a name under way is longer
# How obstore names a local file under way: `<name>#<n>`, renamed when whole. A key may not look like one.
UNDER_WAY = re.compile(r".*#\d+", re.DOTALL)


class StorageError(Exception):
    """The storage could not be opened, read or written. The message names the key, and may name the server."""


class NotStored(StorageError):
    """Nothing stands under this key."""


class TooLarge(StorageError):
    """The store takes no file of this size."""


@dataclass(frozen=True)
class Stored:
    key: str
    size: int
    modified: datetime
    etag: str | None


class Writer(ABC):
    """Takes a file piece by piece. `size` is how many bytes it got."""

    size: int

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Raises `StorageError`, at the latest once the store has refused an earlier piece."""


class Storage(ABC):
    """Opened once per process and shared by its threads. Every method raises `StorageError`, and `ValueError` for a bad key."""

    @staticmethod
    def open(url: str) -> Storage:
        """`file:///folder` (made if missing) or `s3://bucket/prefix` with the usual AWS_* variables.

        Raises `StorageError` that names STORAGE_URL. Says nothing about whether the bucket answers.
        """
        from agentflow.storage.objects import ObjectStorage  # which imports this module

        return ObjectStorage.at(url)

    @staticmethod
    def check_key(key: str) -> str:
        """Return `key`, or raise `ValueError`: keys are relative POSIX paths that mean one thing on every store."""
        try:
            size = len(key.encode())
        except UnicodeEncodeError:
            raise ValueError("a storage key must be text") from None
        parts = key.split("/")
        if not key or size > MAX_KEY_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
            raise ValueError("a storage key is empty or too long")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError("a storage key must be a relative path without empty parts, '.' and '..'")
        if "\\" in key or not key.isprintable():
            raise ValueError("a storage key must not contain backslashes or control characters")
        if any(UNDER_WAY.fullmatch(part) for part in parts):
            raise ValueError("a part of a storage key must not end in '#' and digits")
        return key

    def put_file(self, key: str, path: Path, *, content_type: str | None = None) -> int:
        """Store a local file; returns its size in bytes."""
        with path.open("rb") as file, self.writer(key, content_type=content_type) as writer:
            while piece := file.read(1 << 20):
                writer.write(piece)
        return writer.size

    @abstractmethod
    def put_bytes(self, key: str, data: bytes, *, content_type: str | None = None) -> int:
        """Store `data` in one request; returns its size in bytes."""

    @abstractmethod
    def writer(self, key: str, *, content_type: str | None = None) -> AbstractContextManager[Writer]:
        """Write piece by piece in constant memory. Leaving the block in order stores the whole; an exception, nothing.

        Raises `StorageError`, from a write or at the end of the block.
        """

    @abstractmethod
    def stat(self, key: str) -> Stored | None:
        """What stands under `key`, or None."""

    @abstractmethod
    def read(self, key: str, *, start: int = 0, end: int | None = None, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        """The bytes from `start` to before `end`, in pieces of about `chunk_bytes`. Opened at the call.

        Raises `NotStored` at the call, `StorageError` there or on the way (also when fewer bytes came than there are).
        """

    def fetch_to(self, key: str, path: Path) -> int:
        """Download into the local file `path`; returns the size in bytes. On an error no file is left."""
        pieces = self.read(key)
        try:
            with path.open("wb") as file:
                return sum(file.write(piece) for piece in pieces)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def local_path(self, key: str) -> Path | None:
        """Where the file lies, if it lies on a disk of this machine: a child process may read it in place."""
        self.check_key(key)
        return None

    def public_url(self, key: str, seconds: int, *, filename: str | None = None) -> str | None:
        """A URL at which anybody can read the file for so long, saved as `filename` where one is given; None where the
        store has none that a browser could reach."""
        self.check_key(key)
        return None

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove what stands under `key`; nothing there is fine."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> int:
        """Remove everything below the folder `prefix`; returns how many files that were."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Stored]:
        """Everything below the folder `prefix`, in no order; with none, everything."""

    def sweep(self, older_than_s: float) -> int:
        """Remove what killed writes left on a disk and was not touched for that long; returns how many files.

        In a bucket nothing can be listed for it: the bucket needs a lifecycle rule that aborts incomplete multipart
        uploads after a day (Supabase does so by itself).
        """
        return 0
