"""A backup of a system that goes on working: its rows as they are at one moment, then the files that they name.

A file is in storage before its row is written, and is removed after its row is gone; the removing waits while a backup is made
(agentflow.backup.guard). So whatever the rows of that moment name is there when it is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import Final

import agentflow
from agentflow import resealing, schema
from agentflow.backup import copying, guard, manifest, place, tables
from agentflow.backup.errors import Refused
from agentflow.backup.manifest import Files, Manifest
from agentflow.backup.place import File, Place
from agentflow.database import Connection, connect_once
from agentflow.jobs import files
from agentflow.storage import NotStored, Stored
from agentflow.system import System

#: What jobs read and write lies below this; what else is in the bucket is not ours.
FOLDER: Final = "o"


#: How far a step is: its name, the bytes that are done, and those of all, which may be an estimate.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Made:
    """`copied`: the files that no earlier backup had, and their bytes. `dropped`: ids of older backups that were deleted."""

    manifest: Manifest
    copied: int
    copied_bytes: int
    dropped: list[str]


def make(system: System, where: Place, *, keep: int | None = None, report: Report = lambda *_: None) -> Made:
    """Copy everything to `where`; then delete all but the `keep` newest backups, and what was not finished, if a number is given.

    Raises Refused; StorageError and psycopg.OperationalError, after which no backup is there that looks like one.
    """
    _refuse_own_storage(system, where)
    began = time.monotonic()
    installation = system.installation_id  # made at the first look: before the moment of the backup
    with connected(system) as alone, guard.held(alone):
        before = where.newest()
        if before is not None and before.installation != installation:
            raise Refused(f"{where.shown} holds backups of another system; name another place")
        with connected(system) as conn, tables.snapshot(conn) as taken_at:
            id_ = f"{taken_at.astimezone(UTC):%Y%m%dT%H%M%S-%f}"  # in the order of time, which says what is the newest
            rows = list(_rows(conn, where, id_, report))
            numbers = tables.numbers(conn)
            migrations = schema.applied(conn) or {}
            sealed = resealing.keys_in_use(conn)
            named = files.named_by_rows(conn)
        copied = _Files(system, where, id_, before)
        listed = copied.copy(report)
        made = Manifest(
            format=manifest.FORMAT,
            id=id_,
            taken_at=taken_at,
            took_s=round(time.monotonic() - began, 1),
            version=agentflow.__version__,
            installation=installation,
            migrations=migrations,
            tables=tuple(rows),
            numbers=tuple(numbers),
            files=listed,
            gone=tuple(sorted(set(named) - copied.keys)),
            sealed_under=tuple(sorted(sealed.keys)),
            unsealed=sealed.unsealed,
        )
        alone.execute("select 1")  # who has lost the lock may have lost files
        where.finish(made)
        dropped = prune(where, keep) if keep is not None else []
    return Made(made, copied.count, copied.size, dropped)


def prune(where: Place, keep: int) -> list[str]:
    """Delete all but the newest backups, those that were not finished, and files that none of the others has. To be called
    under the guard. Returns the ids."""
    listed = where.list()
    dropped, kept = listed.finished[:-keep], listed.finished[-keep:]
    needed = {file.name for id_ in kept for file in where.files(where.manifest(id_))}
    for id_ in (*dropped, *listed.unfinished):
        where.delete(id_)
    where.delete_files(name for name in where.present() if name not in needed)
    return dropped


@contextmanager
def connected(system: System) -> Iterator[Connection]:
    """A connection past the pooler where there is one, on which a statement may take hours."""
    direct = system.settings.direct_database_url
    url = direct.get_secret_value() if direct else system.database_url
    variable = "DIRECT_DATABASE_URL" if direct else "DATABASE_URL"
    name = f"{system.application_name} backup"[:63]
    with closing(connect_once(url, application_name=name, trust=system.settings.trust, variable=variable)) as conn:
        yield conn


def _refuse_own_storage(system: System, where: Place) -> None:
    """A copy in the same folder or bucket is lost with the original, and would be copied into itself."""
    here, there = system.storage.local_path("o"), where.storage.local_path("o")
    inside = here and there and (here.parent == there.parent or here.parent in there.parent.parents)
    if inside or where.shown.rstrip("/") == (system.settings.storage_url or "").rstrip("/"):
        raise Refused(
            f"{where.shown} is where the system itself keeps its files; name another place, best on another machine"
        )


def _rows(conn: Connection, where: Place, id_: str, report: Report) -> Iterator[manifest.Table]:
    found = tables.every(conn)
    total = sum(table.size for table in found)
    before = 0
    for table in found:
        if tables.has_rows(conn, table):
            yield _table(conn, where, id_, table, lambda seen: report("rows", before + seen, total))  # noqa: B023 - in this round
        else:
            yield manifest.Table(name=table.name, columns=table.columns, rows=0, size=0, sha256="")
        before += table.size
        report("rows", before, total)


def _table(
    conn: Connection, where: Place, id_: str, table: tables.Table, seen: Callable[[int], None]
) -> manifest.Table:
    """`seen` is told how many of the table's bytes were copied, about."""
    done = 0

    def write(piece: memoryview) -> None:
        nonlocal done
        packer.write(piece)
        done += len(piece)
        seen(min(done, table.size))

    with where.packer(id_, f"tables/{table.name}") as packer:
        rows = tables.copy_out(conn, table, write)
    return manifest.Table(name=table.name, columns=table.columns, rows=rows, size=packer.size, sha256=packer.sha256)


class _Files:
    """Copies what the place does not have yet, and writes the list of all."""

    def __init__(self, system: System, where: Place, id_: str, before: Manifest | None) -> None:
        self._storage = system.storage
        self._where = where
        self._id = id_
        known = {file.name: file for file in where.files(before)} if before else {}
        present = where.present()
        self._known = {name: file for name, file in known.items() if present.get(name) == file.size}
        self.keys: set[str] = set()
        self.count = self.size = 0

    def copy(self, report: Report) -> Files:
        stored = list(self._storage.list(FOLDER))
        total = sum(each.size for each in stored)
        done = size = count = 0
        with self._where.packer(self._id, "files") as packer:
            for each, file in self._copied(stored):
                done += each.size
                report("files", done, total)
                if file is not None:
                    packer.write(place.line_of(file))
                    self.keys.add(file.key)
                    count += 1
                    size += file.size
        return Files(count=count, size=size, sha256=packer.sha256)

    def _copied(self, stored: Iterable[Stored]) -> Iterator[tuple[Stored, File | None]]:
        """Each with what it is in the place; None: it was deleted meanwhile, by whoever deleted what it belongs to."""
        with ThreadPoolExecutor(copying.AT_ONCE, thread_name_prefix="backup-file") as pool:
            under_way: dict[Future[File | None], Stored] = {}
            for each in stored:
                if (known := self._known.get(place.name_of(each))) is not None:
                    yield each, known
                    continue
                under_way[pool.submit(self._copy, each)] = each
                if len(under_way) >= 2 * copying.AT_ONCE:
                    yield from self._ended(under_way)
            while under_way:
                yield from self._ended(under_way)

    def _ended(self, under_way: dict[Future[File | None], Stored]) -> Iterator[tuple[Stored, File | None]]:
        ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in ended:
            each, file = under_way.pop(future), future.result()
            if file is not None:
                self.count += 1
                self.size += file.size
            yield each, file

    def _copy(self, stored: Stored) -> File | None:
        name = place.name_of(stored)
        file = File(stored.key, name, stored.size, "")
        try:
            size, sha256 = copying.copy(self._storage, stored.key, self._where.storage, file.here, size=stored.size)
        except NotStored:
            return None
        return File(stored.key, name, size, sha256)
