"""Backups of a whole system, and systems from them: the same to the last row and byte, or none at all."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask.testing import FlaskClient

from actors import write_crm
from agentflow import embedded, organizations, schema, settings, signing
from agentflow.backup import guard, making, packing, restoring, tables
from agentflow.backup.errors import Damaged, Refused
from agentflow.backup.place import Place
from agentflow.jobs import files
from agentflow.jobs.files import Doomed
from agentflow.jobs.model import QUEUES
from agentflow.jobs.requests import NewJob
from agentflow.kommo import accounts
from agentflow.secrets import Sealer
from agentflow.storage import StorageError
from agentflow.system import System
from tests import core_support as core
from tests import webhook_support as webhooks
from tests.backup_support import FILES, KEY, bare_target, contents, everything_in, files_of, fill, system_of, target
from tests.cli_support import Command, agentflow
from tests.kommo_server import Account as Server
from tests.kommo_support import attempt, connect, linked, server
from tests.pgbouncer import pooler
from tests.supabase_server import SECRET, supabase_server
from tests.test_storage import Bucket, bucket, s3_server
from tests.web_support import client
from web import create_app

__all__ = ["agentflow", "bare_target", "bucket", "client", "linked", "s3_server", "server", "target"]

Connection = psycopg.Connection


@pytest.fixture(autouse=True)
def _key(environment: dict[str, str]) -> None:
    environment["ENCRYPTION_KEY"] = KEY


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "backups"


def made(agentflow: Command, where: Path | str, *options: str) -> dict[str, Any]:
    said = agentflow("backup", str(where), "--json", *options)
    assert said.status == 0, said.err
    return dict(json.loads(said.out))


def is_empty(target: dict[str, str]) -> bool:
    """No schema, or one that nobody has used."""
    with psycopg.connect(target["DATABASE_URL"], autocommit=True) as conn:
        if schema.applied(conn) is None:
            return True
        return core.value(conn, "select count(*) from agentflow.jobs") == 0 and (
            core.value(conn, "select count(*) from agentflow.organizations") == 1
        )


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- the same again ----


def test_every_row_and_byte_comes_back(
    agentflow: Command, system: System, conn: Connection, client: FlaskClient, where: Path, bare_target: dict[str, str]
) -> None:
    fill(system, conn, client)

    said = made(agentflow, where)
    before = contents(system.database_url)
    done = agentflow("restore", str(where), "--json", **bare_target)

    assert done.status == 0, done.err
    after = contents(bare_target["DATABASE_URL"])
    filled = {name for name, rows in before.items() if rows}
    assert {
        "jobs",
        "attempts",
        "batches",
        "callback_secrets",
        "chunks",
        "vectors",
        "webhook_events",
        "schedules",
    } <= filled
    assert after == before
    assert files_of(bare_target) == FILES
    assert (said["files"], said["copied_files"]) == (len(FILES), len(FILES))
    assert said["rows"] == sum(map(len, before.values()))
    open_jobs = [row for row in after["jobs"] if '"state": "queued"' in row or '"state": "running"' in row]
    assert json.loads(done.out)["open_jobs"] == len(open_jobs) > 0


def test_the_restored_system_goes_on_where_the_old_one_was(
    agentflow: Command, system: System, conn: Connection, client: FlaskClient, where: Path, target: dict[str, str]
) -> None:
    fill(system, conn, client)
    sent = core.submit(conn)
    conn.execute("update agentflow.jobs set wake_at = now() + interval '5 min' where id = %s", (sent.id,))
    made(agentflow, where)
    assert agentflow("restore", str(where), **target).status == 0

    new = system_of(target)
    with new.database.connection() as restored:
        assert organizations.create(restored, "next", "Next").id == 3  # numbers go on
        due = restored.execute("select wake_at <= clock_timestamp() from agentflow.jobs where id = %s", (sent.id,))
        assert due.fetchone() == (True,)  # what the lost broker was told is told to the new one at once
        stopped = restored.execute("select count(*) from pg_trigger where tgenabled <> 'O'").fetchone()
        assert stopped == (0,)
        statistics = restored.execute(
            "select reltuples from pg_class where oid = 'agentflow.jobs'::regclass"
        ).fetchone()
        assert statistics is not None and statistics[0] > 0
    assert new.installation_id == system.installation_id
    repeated = new.submit(2, NewJob("ping", {}, idempotency_key="other"))
    assert repeated.job.organization_id == 2
    new.close()


def test_a_webhook_that_was_taken_before_is_known_again(
    agentflow: Command, system: System, conn: Connection, client: FlaskClient, where: Path, target: dict[str, str]
) -> None:
    endpoint = webhooks.make(client, "github")
    endpoint.send({"action": "opened"}, id="delivery-1")
    made(agentflow, where)
    assert agentflow("restore", str(where), **target).status == 0
    new = system_of(target)

    endpoint.client = create_app(new).test_client()
    again = endpoint.send({"action": "opened"}, id="delivery-1")

    assert again.status_code == 200
    with psycopg.connect(target["DATABASE_URL"]) as restored:
        assert core.value(restored, "select count(*) from agentflow.webhook_events") == 1
        assert core.value(restored, "select count(*) from agentflow.jobs where type = 'handle_webhook'") == 1
    new.close()


@pytest.mark.parametrize("done", ["before the loss", "never"])
def test_what_may_have_been_created_in_a_crm_is_looked_for_first(
    linked: System,
    server: Server,
    conn: Connection,
    where: Path,
    target: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    done: str,
) -> None:
    monkeypatch.setattr(write_crm, "SETTLE_S", 0.0)
    account = connect(linked, server)
    payload = {"account_id": str(account.id), "kind": "leads", "items": [{"name": "twin"}, {"name": "twin"}]}
    job = linked.submit(core.ORGANIZATION, NewJob("write_crm", payload)).job
    place = Place.open(str(where), make=True)
    said = making.make(linked, place).manifest
    if done == "before the loss":
        attempt(linked, conn, job)

    new = System(settings.load(target), "test")
    restoring.restore(new, place, said, hold=False)
    with psycopg.connect(target["DATABASE_URL"], autocommit=True) as restored:
        result = attempt(new, restored, job)
    new.close()

    assert len(server.shown("leads")) == 2
    assert sorted(each["id"] for each in result["items"]) == sorted(server.shown("leads"))
    assert server.requests["POST /api/v4/leads"] == 1


def test_held_back_nothing_is_due_until_the_queues_are_resumed(
    agentflow: Command, system: System, where: Path, target: dict[str, str]
) -> None:
    system.submit(1, NewJob("ping", {}))
    made(agentflow, where)

    said = agentflow("restore", str(where), "--hold", **target)

    assert said.status == 0 and "1 jobs were open then" in said.out
    with psycopg.connect(target["DATABASE_URL"]) as restored:
        paused = restored.execute("select name from agentflow.pauses where kind = 'queue'").fetchall()
    assert sorted(row[0] for row in paused) == sorted(QUEUES)
    for queue in QUEUES:
        assert agentflow("rules", "resume", "queue", queue, **target).status == 0


def test_through_a_transaction_pooler(
    agentflow: Command,
    system: System,
    conn: Connection,
    client: FlaskClient,
    where: Path,
    target: dict[str, str],
    stack: embedded.Embedded,
) -> None:
    fill(system, conn, client)
    with pooler(stack.database_url, size=3) as pgbouncer:
        said = agentflow("backup", str(where), DATABASE_URL=pgbouncer.url_of(system.database_url))
        assert said.status == 0, said.err
        said = agentflow("restore", str(where), **{**target, "DATABASE_URL": pgbouncer.url_of(target["DATABASE_URL"])})
        assert said.status == 0, said.err

    assert contents(target["DATABASE_URL"]) == contents(system.database_url)


def test_from_supabase_storage_into_a_bucket_and_back(
    agentflow: Command, environment: dict[str, str], target: dict[str, str], bucket: Bucket, s3_server: Any
) -> None:
    with supabase_server() as supabase:
        files_there = {"STORAGE_URL": "", "SUPABASE_URL": supabase.url, "SUPABASE_SECRET_KEY": SECRET}
        old = System(settings.load({k: v for k, v in {**environment, **files_there}.items() if v}), "test")
        for key, data in FILES.items():
            old.storage.put_bytes(key, data)
        where = Place.open("s3://bucket/backups")

        said = making.make(old, where).manifest
        old.close()
        assert agentflow("restore", "s3://bucket/backups", **target).status == 0

    assert said.files.count == len(FILES) and f"backups/backups/{said.id}/manifest.json" in bucket.objects
    assert files_of(target) == FILES


# ---- what is in a backup ----


def test_no_secret_stands_in_it_in_clear(
    agentflow: Command, system: System, conn: Connection, client: FlaskClient, where: Path
) -> None:
    secrets = fill(system, conn, client)
    with conn.transaction():
        credentials = accounts.Credentials(token="crm-token-0123456789")
        accounts.create(conn, 1, system.sealer, name="x", base_url="https://x.kommo.com", credentials=credentials)
    said = made(agentflow, where)

    everything = everything_in(where)

    assert "Ёжик в тумане".encode() in everything  # it looks at what is there
    for name, secret in {**secrets, "crm": "crm-token-0123456789"}.items():
        assert secret.encode() not in everything, name
    assert said["sealed_under"] == [system.sealer.key_id]


def test_credentials_that_are_not_encrypted_are_named(
    agentflow: Command, environment: dict[str, str], conn: Connection, where: Path
) -> None:
    with conn.transaction():
        signing.create_secret(conn, 1, Sealer(None))

    said = agentflow("backup", str(where))

    assert said.status == 0 and "1 credentials are not encrypted" in said.err


def test_what_comes_after_its_moment_is_not_in_it(
    agentflow: Command,
    system: System,
    conn: Connection,
    where: Path,
    target: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = core.submit(conn)
    original = tables.every

    def late(reader: Connection) -> list[tables.Table]:
        core.submit(conn)
        conn.execute("update agentflow.jobs set stage = 'late' where id = %s", (before.id,))
        return original(reader)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "every", late)
        made(agentflow, where)
    assert agentflow("restore", str(where), **target).status == 0

    with psycopg.connect(target["DATABASE_URL"]) as restored:
        assert restored.execute("select id, stage from agentflow.jobs").fetchall() == [(before.id, None)]


def test_only_new_and_changed_files_are_copied_again(
    agentflow: Command, system: System, where: Path, target: dict[str, str]
) -> None:
    for key, data in FILES.items():
        system.storage.put_bytes(key, data)
    made(agentflow, where)
    first, *_ = FILES
    system.storage.put_bytes(first, b"another")
    system.storage.put_bytes("o/1/new", b"new")

    second = made(agentflow, where)

    assert (second["files"], second["copied_files"], second["copied_bytes"]) == (4, 2, 10)
    assert agentflow("restore", str(where), **target).status == 0
    assert files_of(target) == {**FILES, first: b"another", "o/1/new": b"new"}


def test_files_that_rows_name_and_that_are_gone_are_said(
    agentflow: Command, system: System, conn: Connection, client: FlaskClient, where: Path
) -> None:
    fill(system, conn, client)
    key, *_ = FILES
    system.storage.delete(key)

    said = agentflow("backup", str(where))

    assert said.status == 0 and "1 files that rows name are not in storage" in said.err
    newest = Place.open(str(where)).newest()
    assert newest is not None and newest.gone == (key,)


def test_no_file_is_removed_while_a_backup_is_made_and_only_one_is_made(
    system: System, conn: Connection, connect: Callable[[], Connection], where: Path
) -> None:
    system.storage.put_bytes("o/1/doomed", b"x")
    files.doom(conn, [Doomed(1, "o/1/doomed")])

    with guard.held(connect()):
        assert files.remove_batch(system.database, system.storage) == 0
        with pytest.raises(Refused, match="another backup"):
            making.make(system, Place.open(str(where), make=True))
        assert system.storage.stat("o/1/doomed") is not None

    assert files.remove_batch(system.database, system.storage) == 1
    assert system.storage.stat("o/1/doomed") is None


def test_so_many_are_kept_and_files_that_none_of_them_has_go(
    agentflow: Command, system: System, where: Path, target: dict[str, str]
) -> None:
    system.storage.put_bytes("o/1/stays", b"stays")
    for number in range(3):
        system.storage.put_bytes("o/1/changes", b"x" * number)
        made(agentflow, where)
    (where / "backups" / "20200101T000000Z-dead" / "tables").mkdir(parents=True)
    (where / "backups" / "20200101T000000Z-dead" / "tables" / "jobs.gz").write_bytes(b"half")
    before = Place.open(str(where)).list().finished

    said = agentflow("backup", str(where), "--keep", "2")

    listed = Place.open(str(where)).list()
    assert said.status == 0 and all(id_ in said.err for id_ in before[:2])
    assert listed.finished[0] == before[2] and len(listed.finished) == 2 and listed.unfinished == []
    assert len(Place.open(str(where)).present()) == 2  # of both kept: the same two
    assert agentflow("restore", str(where), "--backup", before[2], **target).status == 0
    assert files_of(target) == {"o/1/stays": b"stays", "o/1/changes": b"xx"}


def test_the_list_shows_what_is_there(agentflow: Command, system: System, where: Path) -> None:
    id_ = made(agentflow, where)["id"]

    said = agentflow("restore", str(where), "--list")
    as_json = agentflow("restore", str(where), "--list", "--json")

    assert said.status == 0 and id_ in said.out
    assert [each["id"] for each in json.loads(as_json.out)["backups"]] == [id_]


# ---- refused ----


def test_a_backup_that_was_not_finished_is_none(
    agentflow: Command, system: System, where: Path, target: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.storage.put_bytes("o/1/file", b"x")

    def killed(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "finish", killed)
        assert agentflow("backup", str(where)).status == 3
    (half,) = Place.open(str(where)).list().unfinished
    said = agentflow("restore", str(where), "--backup", half, **target)
    newest = agentflow("restore", str(where), **target)

    assert said.status == 2 and "was not finished" in said.err
    assert newest.status == 1 and "no finished backup" in newest.err
    assert is_empty(target)
    made(agentflow, where)
    assert agentflow("restore", str(where), **target).status == 0


@pytest.mark.parametrize(
    "part",
    [
        "tables/jobs.gz",
        "manifest.json",
        "a file",
        *(pytest.param(part, marks=pytest.mark.long) for part in ("files.gz", "a lost file", "a lost table")),
    ],
)
def test_what_is_damaged_is_found_and_nothing_comes_of_it(
    agentflow: Command,
    system: System,
    conn: Connection,
    client: FlaskClient,
    where: Path,
    target: dict[str, str],
    part: str,
) -> None:
    fill(system, conn, client)
    folder = where / "backups" / made(agentflow, where)["id"]
    largest = max((where / "files").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    match part:
        case "a file":
            damage(largest)
        case "a lost file":
            largest.unlink()
        case "a lost table":
            (folder / "tables" / "jobs.gz").unlink()
        case "manifest.json":
            text = (folder / part).read_text()
            (folder / part).write_text(text.replace('"unsealed": 0', '"unsealed": 7'))
            assert (folder / part).read_text() != text
        case _:
            damage(folder / part)

    checked = agentflow("restore", str(where), "--check")
    restored = agentflow("restore", str(where), **target)

    assert checked.status in (1, 3) and restored.status in (1, 3), (checked.err, restored.err)
    assert len(checked.err.strip().splitlines()) <= 3 and "Traceback" not in checked.err + restored.err
    if "file" in part and part != "files.gz":
        assert next(iter(FILES)) in checked.err and next(iter(FILES)) in restored.err
    assert is_empty(target)


@pytest.mark.parametrize(
    "stored",
    [gzip.compress(b"another table"), gzip.compress(b"the table")[:-9], b""],
    ids=[
        "another",
        "cut off",
        "empty",
    ],  # else its bytes, with the time in them: other names in each process of pytest's
)
def test_a_part_is_what_was_written_or_refused(stored: bytes) -> None:
    """Exchanged for another that is whole; cut off, also where the checksum is that of the rest; empty."""
    whole = gzip.compress(b"the table")

    assert b"".join(packing.unpacked([whole[:5], whole[5:]], hashlib.sha256(whole).hexdigest(), "it")) == b"the table"
    with pytest.raises(Damaged):
        list(packing.unpacked([stored], hashlib.sha256(whole).hexdigest(), "it"))
    if stored[-8:] != gzip.compress(b"another table")[-8:]:
        with pytest.raises(Damaged):
            list(packing.unpacked([stored], hashlib.sha256(stored).hexdigest(), "it"))


def test_a_whole_backup_passes_its_check(agentflow: Command, system: System, where: Path) -> None:
    system.storage.put_bytes("o/1/file", b"x")
    made(agentflow, where)

    said = agentflow("restore", str(where), "--check")

    assert said.status == 0 and "is whole" in said.out


@pytest.mark.parametrize("key", ["", "another-key-of-32-characters-...!"[:32]])
def test_the_key_that_is_missing_is_named(
    agentflow: Command,
    system: System,
    conn: Connection,
    client: FlaskClient,
    where: Path,
    target: dict[str, str],
    key: str,
) -> None:
    fill(system, conn, client)
    made(agentflow, where)

    said = agentflow("restore", str(where), **{**target, "ENCRYPTION_KEY": key})

    assert said.status == 2 and str(system.sealer.key_id) in said.err and "ENCRYPTION_KEY is" in said.err
    assert is_empty(target)


def test_a_database_that_is_in_use_is_refused(
    agentflow: Command, system: System, conn: Connection, where: Path, target: dict[str, str]
) -> None:
    core.submit(conn)
    made(agentflow, where)
    before = contents(system.database_url)

    onto_itself = agentflow("restore", str(where))
    twice = [agentflow("restore", str(where), **target).status for _ in range(2)]

    assert onto_itself.status == 2 and "the database is not empty (there are rows in jobs)" in onto_itself.err
    assert contents(system.database_url) == before
    assert twice == [0, 2]


def test_a_storage_with_another_file_of_that_name_is_refused(
    agentflow: Command, system: System, where: Path, target: dict[str, str]
) -> None:
    system.storage.put_bytes("o/1/file", b"ours")
    made(agentflow, where)
    theirs = System(settings.load(target), "test").storage
    theirs.put_bytes("o/1/file", b"else")

    said = agentflow("restore", str(where), **target)

    assert said.status == 2 and "another o/1/file already" in said.err
    assert b"".join(theirs.read("o/1/file")) == b"else" and is_empty(target)


def test_a_schema_that_this_version_does_not_know_is_refused(
    agentflow: Command, system: System, where: Path, target: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(agentflow, where)
    shipped = schema.shipped()
    monkeypatch.setattr(schema, "shipped", lambda: shipped[:-1])

    said = agentflow("restore", str(where), **target)

    assert said.status == 2 and shipped[-1].name in said.err and "restore it with that version" in said.err


def test_a_backup_of_an_older_schema_is_brought_up_to_date(
    system: System, where: Path, bare_target: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this version had a migration more than the one that made the backup."""
    place = Place.open(str(where), make=True)
    said = making.make(system, place).manifest
    shipped = schema.shipped()
    newer = schema.Migration("9999_newer.sql", "alter table agentflow.jobs add column newer integer default 7")
    monkeypatch.setattr(schema, "shipped", lambda: [*shipped, newer])

    new = System(settings.load(bare_target), "test")
    restoring.restore(new, place, said, hold=False)

    with new.database.connection() as conn:
        assert newer.name in (schema.applied(conn) or {})
        conn.execute("select newer from agentflow.jobs")
    new.close()


def test_backups_of_another_system_and_ones_own_storage_are_refused(
    agentflow: Command, system: System, where: Path, target: dict[str, str], environment: dict[str, str]
) -> None:
    made(agentflow, where)

    other = agentflow("backup", str(where), **target)
    inside = agentflow("backup", environment["STORAGE_URL"] + "/backups")
    same = agentflow("backup", environment["STORAGE_URL"])
    nowhere = agentflow("restore", str(where / "nowhere"))

    assert other.status == 2 and "of another system" in other.err
    assert inside.status == same.status == 2 and "keeps its files" in inside.err and "keeps its files" in same.err
    assert nowhere.status == 2 and "there is no folder" in nowhere.err and not (where / "nowhere").exists()


# ---- stopped half-way ----


@pytest.mark.parametrize("at", [pytest.param("files", marks=pytest.mark.long), "rows"])
def test_a_restore_that_was_stopped_leaves_an_empty_system_and_is_done_again(
    agentflow: Command,
    system: System,
    conn: Connection,
    client: FlaskClient,
    where: Path,
    bare_target: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    fill(system, conn, client)
    made(agentflow, where)
    original_rows, original_file, calls = tables.copy_in, restoring._put_file, 0

    def stop(original: Callable[..., Any], last: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise psycopg.OperationalError("the connection was cut")
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        if at == "rows":
            patch.setattr(tables, "copy_in", stop(original_rows, 12))
        else:
            patch.setattr(restoring, "_put_file", stop(original_file, 2))
        assert agentflow("restore", str(where), **bare_target).status == 3
    assert calls >= 2 and is_empty(bare_target)

    assert agentflow("restore", str(where), **bare_target).status == 0
    assert contents(bare_target["DATABASE_URL"]) == contents(system.database_url)
    assert files_of(bare_target) == FILES
