"""What the tests of backups share: a system with something of everything, an empty one to restore into, and what each holds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient
from psycopg import sql

from agentflow import embedded, organizations, settings, signing
from agentflow.system import System
from tests import core_support as core
from tests import webhook_support as webhooks
from tests.conftest import TEMPLATE, new_database
from tests.knowledge_support import add_document, key_of

KEY = "0123456789abcdef0123456789abcdef"
#: What a restore changes on purpose: rings of the lost broker are due again. And what it leaves out.
_RUNG = "- 'wake_at' - 'sent_at' - 'sends'"
_OWN = ("migrations", "workers")
FILES = {
    "o/1/videos/00000000-0000-7000-8000-000000000001/source.mp4": b"film" * 2_000_000,  # in several pieces
    "o/1/renders/00000000-0000-7000-8000-000000000002/картинка 1.png": b"\x89PNG",
    "o/2/documents/empty": b"",
}


@pytest.fixture
def target(stack: embedded.Embedded, environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a system whose database has a schema and no rows, and whose storage has no files."""
    yield from _target(stack, environment, tmp_path, TEMPLATE)


@pytest.fixture
def bare_target(stack: embedded.Embedded, environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The same, and the database has not even a schema."""
    yield from _target(stack, environment, tmp_path, "template1")


def _target(
    stack: embedded.Embedded, environment: dict[str, str], tmp_path: Path, template: str
) -> Iterator[dict[str, str]]:
    with new_database(stack, f"empty_{uuid4().hex[:12]}", template) as url:
        yield {
            **environment,
            "AGENTFLOW_HOME": str(tmp_path / "new-home"),
            "DATABASE_URL": url,
            "STORAGE_URL": (tmp_path / "new-storage").as_uri(),
            "JOB_QUEUE_NAME": f"{environment['JOB_QUEUE_NAME']}-new",
        }


def fill(system: System, conn: psycopg.Connection, client: FlaskClient) -> dict[str, str]:
    """Jobs in every state with what hangs on them, organizations, keys, a document with vectors, a webhook, a schedule, files.

    Returns the secrets that must stand nowhere in clear.
    """
    with conn.transaction():
        acme = organizations.create(conn, "acme", "Acme\tLtd \\N 'quoted' \\.")
        _, api_key = organizations.create_key(conn, acme.id, "theirs", organizations.SCOPES)
        _, callback_secret = signing.create_secret(conn, acme.id, system.sealer)
    core.finish(conn, core.claimed(conn, callback_url="https://example.com/ended", then=[core.child()]))
    core.finish(conn, core.claimed(conn), "failed")
    core.finish(conn, core.claimed(conn), "cancelled")
    core.finish(conn, core.claimed(conn, key="k", slots=2), "retry", delay_s=3600)
    core.claimed(conn)
    core.submit(
        conn, acme.id, payload=json.dumps({"text": "line\nbreak \\ tab\t ёж \u2028 \\N"}), idempotency_key="once"
    )
    conn.execute(
        "insert into agentflow.batches (id, organization_id, total, succeeded, finished_at, callback_url)"
        " values (%s, 1, 1, 1, now(), 'https://example.com/batch')",
        (uuid4(),),
    )
    add_document(conn, ["Ёжик в тумане", "the second one"])
    (model,) = conn.execute(
        "insert into agentflow.embedding_models (provider, name, dimensions, state) values ('server', 'e5', 3, 'active')"
        " returning id"
    ).fetchone() or (0,)
    conn.execute(
        "insert into agentflow.vectors (organization_id, model_id, chunk_key, vector)"
        " values (1, %s, %s, '[0.1,0.70710678,-0.33333333]')",
        (model, key_of("the second one")),
    )
    endpoint = webhooks.make(client, "github")
    assert endpoint.send({"action": "opened"}, id="delivery-1").status_code == 200
    made = client.post("/api/schedules", json={"name": "daily", "cron": "0 4 * * *", "type": "ping", "payload": {}})
    assert made.status_code == 201, made.text
    key, *_ = FILES
    conn.execute(
        "insert into agentflow.videos (id, organization_id, storage_key) values (%s, 1, %s)",
        (UUID(key.split("/")[3]), key),
    )
    for key, data in FILES.items():
        system.storage.put_bytes(key, data)
    return {"callback": callback_secret, "webhook": endpoint.secret, "key": api_key, "encryption": KEY}


def contents(database_url: str) -> dict[str, list[str]]:
    """Every table's rows as text, in order; but for what a restore is to change."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        names = [
            row[0]
            for row in conn.execute(
                "select tablename from pg_tables where schemaname = 'agentflow' and tablename <> all (%s)",
                (list(_OWN),),
            ).fetchall()
        ]
        return {
            name: [
                row[0]
                for row in conn.execute(
                    sql.SQL("select (to_jsonb(t) {})::text from {} t order by 1").format(
                        sql.SQL(_RUNG),
                        sql.Identifier("agentflow", name),  # type: ignore[arg-type]
                    )
                ).fetchall()
            ]
            for name in names
        }


def system_of(environment: dict[str, str]) -> System:
    return System.start(settings.load(environment), "test")


def files_of(environment: dict[str, str]) -> dict[str, bytes]:
    system = System(settings.load(environment), "test")
    return {stored.key: b"".join(system.storage.read(stored.key)) for stored in system.storage.list("o")}


def everything_in(folder: Path) -> bytes:
    """All that a backup's files hold, unpacked."""
    return b"\0".join(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
