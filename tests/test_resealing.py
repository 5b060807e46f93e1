"""Stored credentials are brought under a new key while both can be read; and no secret comes out anywhere."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import resealing, settings, signing
from agentflow.kommo import accounts
from agentflow.kommo.accounts import Credentials
from agentflow.secrets import Sealer, Unreadable, context_of
from agentflow.settings import SettingsError
from agentflow.system import System
from agentflow.webhooks import endpoints
from tests import cli_support
from tests.cli_support import Command
from tests.core_support import value
from tests.processes import eventually, worker
from tests.web_support import client, gunicorn
from tests.webhook_support import JSON, SIGNERS, Made

__all__ = ["client"]

agentflow = cli_support.agentflow
Connection = psycopg.Connection
OLD, NEW = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))


def system_with(environment: dict[str, str], **keys: str) -> System:
    return System(settings.load({**environment, **keys}), "test")


def fill(system: System, conn: Connection, number: int) -> list[str]:
    """Callback and webhook secrets of several organizations; what they are."""
    made = []
    for _ in range(number):
        with conn.transaction():
            made.append(signing.create_secret(conn, 1, system.sealer)[1])
            _, _, secret = endpoints.create(conn, 1, "github", "x", endpoints.Config(), system.sealer)
            made.append(str(secret))
    return made


def readable(conn: Connection, sealer: Sealer) -> list[str]:
    found = []
    for column in resealing.COLUMNS:
        for id_, of, sealed in conn.execute(  # type: ignore[misc]
            f"select id, organization_id, {column.column} from agentflow.{column.table}"  # noqa: S608
            f" where {column.column} is not null"
        ):
            found.append(sealer.open(sealed, context=context_of(column.purpose, of, id_)))
    return found


def test_a_stop_half_way_is_gone_on_with_and_nothing_is_unreadable_meanwhile(
    environment: dict[str, str], conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resealing, "BATCH", 3)
    before, without = (
        system_with(environment, ENCRYPTION_KEY=OLD),
        system_with(environment),
    )
    secrets = [*fill(before, conn, 4), *fill(without, conn, 1)]  # some from the time before there was a key
    both = system_with(environment, ENCRYPTION_KEY=NEW, ENCRYPTION_KEY_OLD=OLD)
    assert sorted(readable(conn, both.sealer)) == sorted(secrets)

    def stop(done: resealing.Resealed) -> None:
        raise KeyboardInterrupt

    with both.database.connection() as pooled:
        with pytest.raises(KeyboardInterrupt):
            resealing.reseal(pooled, both.sealer, report=stop)
        assert sorted(readable(conn, both.sealer)) == sorted(secrets)

        done = resealing.reseal(pooled, both.sealer)

        assert (done.seen, done.changed, done.unreadable) == (10, 7, [])
        assert resealing.reseal(pooled, both.sealer).changed == 0
    only_new = system_with(environment, ENCRYPTION_KEY=NEW)
    assert sorted(readable(conn, only_new.sealer)) == sorted(secrets)
    with pytest.raises(Unreadable):
        readable(conn, before.sealer)
    for system in (before, without, both, only_new):
        system.close()


def test_the_command_says_what_it_did_and_what_it_could_not(
    agentflow: Command, environment: dict[str, str], conn: Connection
) -> None:
    other = system_with(environment, ENCRYPTION_KEY=OLD)
    fill(other, conn, 1)
    other.close()

    without = agentflow("rotate-key")
    lost = agentflow("rotate-key", ENCRYPTION_KEY=NEW)
    done = agentflow("rotate-key", ENCRYPTION_KEY=NEW, ENCRYPTION_KEY_OLD=OLD)

    assert without.status == 2 and "openssl rand -base64 32" in without.err
    assert lost.status == 1 and "2 of 2 values are under other keys" in lost.err
    assert done.status == 0 and "2 of 2 values encrypted anew" in done.out
    assert value(conn, "select count(distinct split_part(sealed, '.', 2)) from agentflow.callback_secrets") == 1


def test_the_tokens_of_crm_accounts_are_sealed_anew_but_for_those_that_are_being_bought(
    agentflow: Command, environment: dict[str, str], conn: Connection
) -> None:
    """Whoever buys a token knows the one that it replaces by its sealed form: changed meanwhile, what was bought is lost."""
    before = system_with(environment, ENCRYPTION_KEY=OLD)
    given = Credentials(code="code-1", client_id="c-1", client_secret="s-1", redirect_uri="https://app.example/cb")
    quiet, buying = (
        accounts.create(
            conn, 1, before.sealer, name=name, base_url=f"https://{name}.kommo.com", credentials=credentials
        )
        for name, credentials in (("quiet", Credentials(token="token-1")), ("buying", given))
    )
    before.close()
    until = "update agentflow.crm_accounts set grant_held_until = clock_timestamp() + make_interval(secs => %s) where id = %s"
    conn.execute(until, (3600, buying.id))
    keys = {"ENCRYPTION_KEY": NEW, "ENCRYPTION_KEY_OLD": OLD}

    first = agentflow("rotate-key", **keys)

    both = system_with(environment, **keys)
    assert first.status == 1 and "2 of 3 values are being renewed" in first.err and "other keys" not in first.err
    sealed = {
        row[0]: row[1:]
        for row in conn.execute("select id, access_sealed, grant_sealed, client_sealed from agentflow.crm_accounts")
    }
    assert both.sealer.is_current(sealed[quiet.id][0])
    assert sealed[buying.id][0] is None
    assert not any(both.sealer.is_current(each) for each in sealed[buying.id][1:])
    assert sorted(readable(conn, both.sealer)) == ["code-1", "s-1", "token-1"]
    both.close()
    conn.execute(until, (-1, buying.id))
    second = agentflow("rotate-key", **keys)
    assert second.status == 0 and "2 of 3 values encrypted anew" in second.out
    only_new = system_with(environment, ENCRYPTION_KEY=NEW)
    assert sorted(readable(conn, only_new.sealer)) == ["code-1", "s-1", "token-1"]
    only_new.close()


def test_every_sealed_column_of_the_schema_is_in_the_list(conn: Connection) -> None:
    rows = conn.execute(
        "select table_name, column_name from information_schema.columns"
        " where table_schema = 'agentflow' and column_name like '%sealed%'"
    ).fetchall()

    assert {(column.table, column.column) for column in resealing.COLUMNS} >= set(rows) and len(rows) >= 2


@pytest.mark.parametrize("variable", ["ENCRYPTION_KEY", "ENCRYPTION_KEY_OLD"])
@pytest.mark.parametrize("text", ["short", "x" * 33, "é" * 32, base64.b64encode(b"x" * 31).decode(), "=" * 44])
def test_a_key_of_another_form_stops_with_the_command_that_makes_one(variable: str, text: str) -> None:
    with pytest.raises(SettingsError, match="openssl rand -base64 32") as error:
        settings.load({"ENCRYPTION_KEY": NEW, variable: text})

    assert error.value.variable == variable and text not in str(error.value)


def test_an_old_key_alone_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="ENCRYPTION_KEY_OLD"):
        settings.load({"ENCRYPTION_KEY_OLD": OLD})
    assert settings.encryption_key_bytes("x" * 32) == b"x" * 32


def test_no_secret_comes_out_in_a_whole_run(
    environment: dict[str, str], system: System, client: FlaskClient, conn: Connection, tmp_path: Path
) -> None:
    """Planted ones: of endpoints, in headers, in the path; greped for in logs, rows, errors and answers."""
    environment["ENCRYPTION_KEY"] = NEW
    planted = {name: f"planted-{name}-{uuid4().hex}" for name in ("bearer", "cookie", "stripe", "slack", "apikey")}
    said: list[str] = []
    with gunicorn(environment, tmp_path) as web, worker(environment, tmp_path / "worker.log") as working:
        made = {}
        for source in SIGNERS:
            action = {"kind": "job", "type": "ping", "payload": {"sleep_ms": {"$from": "/sleep_ms"}}}
            config = {"account_id": str(uuid4())} if source == "kommo" else {"action": action}
            theirs = {"stripe": planted["stripe"], "slack": planted["slack"], "kommo_chats": planted["stripe"] + "-c"}
            body = {"source": source, "name": source, "config": config, "secret": theirs.get(source)}
            answer = web.http.post("/api/webhook-endpoints", json=body).json()
            made[source] = Made(
                answer["id"], source, answer["path"], answer["secret"] or theirs.get(source, ""), client
            )
        headers = {
            "Authorization": f"Bearer {planted['bearer']}", "Cookie": planted["cookie"], "X-Api-Key": planted["apikey"],
        }  # fmt: skip
        for endpoint in made.values():
            for content in (b'{"sleep_ms": 0}', b'{"sleep_ms": "x"}', b"\xff"):
                signed = SIGNERS[endpoint.source](endpoint.secret, content)
                took = web.http.post(endpoint.path, content=content, headers={**JSON, **signed, **headers})
                assert took.status_code == 200, took.text
                forged = web.http.post(endpoint.path + "x", content=content, headers={**signed, **headers})
                wrong = web.http.post(endpoint.path, content=content + b" ", headers={**JSON, **signed, **headers})
                said += [took.text, forged.text, wrong.text]
            rotation = {"kind": "token" if endpoint.source == "kommo" else "secret"}
            if endpoint.source not in ("stripe", "slack", "kommo_chats"):
                fresh = web.http.post(f"/api/webhook-endpoints/{endpoint.id}/rotate", json=rotation).json()
                planted[f"rotated {endpoint.source}"] = fresh["secret"] or fresh["path"].rpartition("/")[2]
        eventually(lambda: value(conn, "select count(*) from agentflow.jobs where state in ('queued', 'running')"
                                       " and attempt = 0") == 0, within_s=60)  # fmt: skip
        said.append(web.http.get("/api/webhook-events?limit=100").text)
        for event in json.loads(said[-1])["events"]:
            said.append(web.http.get(f"/api/webhook-events/{event['id']}").text)
        said += [web.http.get(path).text for path in ("/api/webhook-endpoints", "/api/jobs?limit=100", "/metrics")]
        said += [web.process.text(), working.text()]
    for table in (
        "jobs",
        "attempts",
        "webhook_endpoints",
        "webhook_credentials",
        "webhook_events",
        "callback_attempts",
    ):
        said += [str(row) for row in conn.execute(f"select to_jsonb(t)::text from agentflow.{table} t")]  # noqa: S608
    everything = "\n".join(said)
    for endpoint in made.values():
        planted[f"token {endpoint.source}"] = endpoint.path.rpartition("/")[2]
        if endpoint.secret:
            planted[f"secret {endpoint.source}"] = endpoint.secret

    found = {name for name, secret in planted.items() if secret in everything}

    assert found == set() and len(planted) > 15
    assert "a webhook was refused" in everything and "webhook_mapping" in everything  # errors were among it
