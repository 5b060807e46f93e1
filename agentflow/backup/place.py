"""Where backups lie: a folder or a bucket, and what stands where in it.

    backups/<id>/manifest.json         what the backup is of; written last, so that one that was not finished is known by it
    backups/<id>/tables/<table>.gz     rows
    backups/<id>/files.gz              which files belong to it: a line of JSON each
    files/<ab>/<name>                  the files themselves, once for all backups that have them

A file's name is made of its key, size, time and ETag: what did not change since the last backup is there already.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from agentflow.backup import manifest, packing
from agentflow.backup.errors import Refused
from agentflow.backup.manifest import Manifest
from agentflow.backup.packing import Packer
from agentflow.storage import Storage, StorageError, Stored

_MANIFEST: Final = re.compile(r"backups/([^/]+)/manifest\.json")
_PART: Final = re.compile(r"backups/([^/]+)/.+")


@dataclass(frozen=True, slots=True)
class File:
    """`key` in the system's storage, `name` here. `size` in bytes."""

    key: str
    name: str
    size: int
    sha256: str

    @property
    def here(self) -> str:
        return _here(self.name)


@dataclass(frozen=True, slots=True)
class Listed:
    """Ids, the oldest first. `unfinished`: without a manifest, by a process that died, or one that is still at it."""

    finished: list[str]
    unfinished: list[str]


class Place:
    def __init__(self, storage: Storage, shown: str) -> None:
        self.storage = storage
        self.shown = shown

    @classmethod
    def open(cls, where: str, *, make: bool = False) -> Place:
        """A folder, or a URL as STORAGE_URL takes it. Raises Refused."""
        url = where if "://" in where else Path(where).expanduser().resolve().as_uri()
        parts = urlsplit(url)
        if not make and parts.scheme == "file" and not Path(unquote(parts.path)).is_dir():
            raise Refused(f"there is no folder {where}")
        try:
            return cls(Storage.open(url), where)
        except StorageError as error:
            raise Refused(str(error).replace("STORAGE_URL", "the place of the backups")) from None

    def list(self) -> Listed:
        keys = [stored.key for stored in self.storage.list("backups")]
        finished = {found[1] for key in keys if (found := _MANIFEST.fullmatch(key))}
        begun = {found[1] for key in keys if (found := _PART.fullmatch(key))}
        return Listed(sorted(finished), sorted(begun - finished))

    def manifest(self, id_: str) -> Manifest:
        """Raises Damaged; Refused where there is none, or not a whole one."""
        listed = self.list()
        if id_ in listed.unfinished:
            raise Refused(f"backup {id_} was not finished: it has no manifest")
        if id_ not in listed.finished:
            raise Refused(
                f"there is no backup {id_} in {self.shown}; `agentflow restore {self.shown} --list` shows them"
            )
        return manifest.read(b"".join(self.storage.read(f"backups/{id_}/manifest.json")), id_)

    def newest(self) -> Manifest | None:
        finished = self.list().finished
        return self.manifest(finished[-1]) if finished else None

    def finish(self, said: Manifest) -> None:
        self.storage.put_bytes(f"backups/{said.id}/manifest.json", manifest.written(said))

    @contextmanager
    def packer(self, id_: str, part: str) -> Iterator[Packer]:
        """Writes a part, compressed; what an exception ends is not there."""
        with self.storage.writer(_key(id_, part)) as writer:
            packer = Packer(writer)
            yield packer
            packer.finish()

    def unpacked(self, id_: str, part: str, sha256: str) -> Iterator[bytes]:
        """Raises Damaged, NotStored, StorageError."""
        return packing.unpacked(self.storage.read(_key(id_, part)), sha256, f"{part}.gz")

    def files(self, said: Manifest) -> Iterator[File]:
        for line in packing.lines(self.unpacked(said.id, "files", said.files.sha256)):
            yield File(**json.loads(line))

    def present(self) -> dict[str, int]:
        """The files that are here, by name, with their sizes."""
        return {stored.key.rpartition("/")[2]: stored.size for stored in self.storage.list("files")}

    def delete(self, id_: str) -> None:
        """The manifest first: what is left after a kill is an unfinished one. Its files stay."""
        self.storage.delete(f"backups/{id_}/manifest.json")
        self.storage.delete_prefix(f"backups/{id_}")

    def delete_files(self, names: Iterable[str]) -> int:
        deleted = 0
        for name in names:
            self.storage.delete(_here(name))
            deleted += 1
        return deleted


def line_of(file: File) -> bytes:
    """Of the list of files."""
    return json.dumps(asdict(file), ensure_ascii=False).encode() + b"\n"


def name_of(stored: Stored) -> str:
    """Another one as soon as the file is another."""
    said = "\0".join((stored.key, str(stored.size), stored.modified.isoformat(), stored.etag or ""))
    return hashlib.sha256(said.encode()).hexdigest()


def _here(name: str) -> str:
    return f"files/{name[:2]}/{name}"


def _key(id_: str, part: str) -> str:
    return f"backups/{id_}/{part}.gz"
