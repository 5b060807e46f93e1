"""A system from a backup: into an empty database and a storage that holds nothing else under the same names.

First the files, which nobody sees without rows; then all rows in one transaction. Whatever ends a restore before that leaves an
empty system, and the same command begins anew and keeps what is there of the files.
"""

from __future__ import annotations

import itertools
import mimetypes
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from agentflow import organizations, schema
from agentflow.backup import copying, tables
from agentflow.backup.errors import Damaged, Refused
from agentflow.backup.making import Report, connected
from agentflow.backup.manifest import Manifest, Table
from agentflow.backup.place import File, Place
from agentflow.database import Connection
from agentflow.jobs import dispatch, records, rules
from agentflow.jobs.model import QUEUES
from agentflow.knowledge import embedding_models, vector_index, vectors
from agentflow.kommo import writes
from agentflow.storage import NotStored, Storage
from agentflow.system import System


@dataclass(frozen=True, slots=True)
class Restored:
    """`open_jobs`: queued or running at the moment of the backup; they are done (again) now. `took_s` in seconds."""

    manifest: Manifest
    open_jobs: int
    took_s: float


def restore(system: System, where: Place, said: Manifest, *, hold: bool, report: Report = lambda *_: None) -> Restored:
    """`system` has embedded servers that run, where it uses any, and a schema or none. With `hold` every queue is paused.

    Raises Refused before anything is changed; Damaged, StorageError and psycopg.OperationalError, after which the database is
    empty; SchemaError.
    """
    began = time.monotonic()
    _refuse_other_keys(system, said)
    with connected(system) as conn:
        _prepare_schema(conn, said)
        tables.check_empty(conn)
        _refuse_other_tables(conn, said)
        _put_files(system.storage, where, said, report)
        with tables.filling(conn, [table.name for table in said.tables]):
            _put_rows(conn, where, said, report)
            tables.go_on_from(conn, said.numbers)
            dispatch.ring_everything_again(conn)
            writes.assume_sent(conn, said.taken_at)
            if hold:
                for queue in QUEUES:
                    rules.pause(conn, "queue", queue, rules.EVERY, f"restored from backup {said.id}")
            open_jobs = records.count_open(conn)
        schema.migrate(conn)
        tables.analyze(conn, [table.name for table in said.tables])
    report("indexes", 0, 1)
    _index_vectors(system)
    return Restored(said, open_jobs, time.monotonic() - began)


def verify(where: Place, said: Manifest, report: Report = lambda *_: None) -> None:
    """Read all of a backup and compare it with its checksums. Raises Damaged."""
    done = 0
    for table in said.filled:
        for _ in where.unpacked(said.id, f"tables/{table.name}", table.sha256):
            pass
        done += table.size
        report("rows", done, said.size)
    for file in where.files(said):
        try:
            found = copying.sha256_of(where.storage, file.here)
        except NotStored:
            raise Damaged(f"the backup has lost {file.key} ({file.here})") from None
        if found != file.sha256:
            raise Damaged(f"{file.key} ({file.here}) of the backup is damaged: its content is not what was written")
        done += file.size
        report("files", done, said.size)


def _refuse_other_keys(system: System, said: Manifest) -> None:
    missing = sorted(set(said.sealed_under) - set(system.sealer.key_ids))
    if missing:
        here = system.sealer.key_id
        raise Refused(
            f"credentials in the backup are encrypted under the key {' and '.join(missing)}; ENCRYPTION_KEY is"
            f" {f'the key {here}' if here else 'not set'}: set it to the key that the system had"
        )


def _prepare_schema(conn: Connection, said: Manifest) -> None:
    """Exactly the schema that the rows are of: its later migrations come after them, as they would have in the old system."""
    shipped = {migration.name: migration for migration in schema.shipped()}
    for name, sha in said.migrations.items():
        if name not in shipped or shipped[name].sha != sha:
            raise Refused(
                f"the backup is of version {said.version} of AgentFlow and a schema that this version does not know"
                f" ({name}): restore it with that version"
            )
    applied = schema.applied(conn)
    if applied is None:
        schema.migrate(conn, [shipped[name] for name in sorted(said.migrations)])
    elif applied != said.migrations:
        other = sorted(set(applied) ^ set(said.migrations))[0]
        raise Refused(
            f"the database has another schema than the backup ({other}): name a new database, without a schema"
        )


def _refuse_other_tables(conn: Connection, said: Manifest) -> None:
    why_no_vectors = vectors.why_not(conn)
    found = {table.name: set(table.columns) for table in tables.every(conn)}
    for table in said.tables:
        if table.name == "vectors" and why_no_vectors is not None:
            raise Refused(f"the backup has vectors, and this database can have none: {why_no_vectors}")
        if found.get(table.name) != set(table.columns):
            raise Refused(f"the table {table.name} is another one than in the backup")


def _put_rows(conn: Connection, where: Place, said: Manifest, report: Report) -> None:
    total = sum(table.size for table in said.tables)
    done = 0
    for table in said.filled:
        rows = tables.copy_in(conn, table.name, table.columns, _pieces(where, said, table))
        if rows != table.rows:
            raise Damaged(f"the table {table.name} of the backup has {rows} rows, its manifest says {table.rows}")
        done += table.size
        report("rows", done, total)


def _pieces(where: Place, said: Manifest, table: Table) -> Iterator[bytes]:
    try:
        yield from where.unpacked(said.id, f"tables/{table.name}", table.sha256)
    except NotStored:
        raise Damaged(f"the backup has lost its table {table.name}") from None


def _put_files(storage: Storage, where: Place, said: Manifest, report: Report) -> None:
    done = 0
    with ThreadPoolExecutor(copying.AT_ONCE, thread_name_prefix="restore-file") as pool:
        under_way: dict[Future[None], File] = {}

        def ended() -> None:
            nonlocal done
            for future in wait(under_way, return_when=FIRST_COMPLETED)[0]:
                file = under_way.pop(future)
                future.result()
                done += file.size
                report("files", done, said.files.size)

        for file in where.files(said):
            under_way[pool.submit(_put_file, storage, where.storage, file)] = file
            if len(under_way) >= 2 * copying.AT_ONCE:
                ended()
        while under_way:
            ended()


def _put_file(storage: Storage, source: Storage, file: File) -> None:
    """What is there already, by a restore that was stopped or because the bucket outlived the database, has to be the same."""
    there = storage.stat(file.key)
    if there is not None:
        if there.size != file.size or copying.sha256_of(storage, file.key) != file.sha256:
            raise Refused(f"the storage holds another {file.key} already: name an empty one by STORAGE_URL")
        return
    kind = mimetypes.guess_type(file.key)[0]
    try:
        copying.copy(source, file.here, storage, file.key, size=file.size, sha256=file.sha256, content_type=kind)
    except NotStored:
        raise Damaged(f"the backup has lost {file.key} ({file.here})") from None
    except Damaged as error:
        raise Damaged(f"{file.key}: {error}") from None


def _index_vectors(system: System) -> None:
    """Those of organizations with many vectors: no migration makes them."""
    with system.database.connection() as conn:
        if vectors.why_not(conn) is not None:
            return
        models, owners = embedding_models.every(conn), organizations.every(conn)
    for model, owner in itertools.product(models, owners):
        vector_index.ensure(system, owner.id, model)
