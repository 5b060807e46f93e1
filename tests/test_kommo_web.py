"""CRM accounts over HTTP and on the command line: connecting, plans, the mirror, writing; OAuth from beginning to end."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.jobs import records
from agentflow.system import System
from tests import cli_support
from tests.cli_support import Command
from tests.kommo_server import Account as Server
from tests.kommo_support import linked, run, server
from tests.web_support import AUTH, problem
from web import create_app

__all__ = ["linked", "server"]

agentflow = cli_support.agentflow

Connection = psycopg.Connection


@pytest.fixture
def client(linked: System) -> Iterator[FlaskClient]:
    client = create_app(linked).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    yield client


def done(system: System, conn: Connection, job_id: str) -> dict[str, Any]:
    with system.database.connection() as ours:
        job = records.get(ours, None, UUID(job_id))
    assert job is not None
    return run(system, conn, job)


def newest_job(conn: Connection, type_: str = "sync_crm") -> str:
    query = (
        "select id from agentflow.jobs where type = %s and payload->>'mode' = 'incremental' order by id desc limit 1"
    )
    row = conn.execute(query, (type_,)).fetchone()
    assert row is not None
    return str(row[0])


def test_an_account_from_its_token_to_its_end(
    client: FlaskClient, linked: System, server: Server, conn: Connection
) -> None:
    for n in range(5):
        server.add("leads", name=f"L{n}")

    made = client.post("/api/crm/accounts", json={"host": server.host, "token": server.token})
    path = made.headers["Location"]
    done(linked, conn, newest_job(conn))
    plan = done(linked, conn, client.post(f"{path}/plan", json={"mode": "backfill"}).json["id"])
    backfill = done(linked, conn, client.post(f"{path}/sync", json={"mode": "backfill"}).json["id"])

    assert made.status_code == 201 and made.json["state"] == "connecting" and server.token not in made.text
    assert client.get(path).json["state"] == "connected"
    assert plan["counts"] == backfill["counts"]
    first = client.get(f"{path}/mirror?limit=3").json
    rest = client.get(f"{path}/mirror?limit=3&cursor={first['cursor']}").json
    assert [first["more"], rest["more"]] == [True, False]
    assert sorted(r["data"]["name"] for r in first["rows"] + rest["rows"]) == ["L0", "L1", "L2", "L3", "L4"]
    written = client.post(f"{path}/leads", json={"items": [{"name": "from us"}]})
    assert written.status_code == 202
    assert done(linked, conn, written.json["id"])["items"][0]["state"] == "created"
    done(linked, conn, client.post(f"{path}/sync", json={}).json["id"])
    since = client.get(f"{path}/mirror?cursor={rest['cursor']}").json
    assert [row["data"]["name"] for row in since["rows"]] == ["from us"]
    runs = client.get(f"{path}/runs?limit=2").json
    assert [each["mode"] for each in runs["runs"]] == ["incremental", "backfill"] and runs["next_cursor"]
    assert client.get(f"{path}/drift").json == {"fields": []}
    assert client.patch(path, json={"sync_every_s": 600}).json["sync_every_s"] == 600
    problem(client.post(f"{path}/confirm-deletions"), 409)
    assert client.delete(path).status_code == 204
    problem(client.get(path), 404)
    problem(client.post(f"{path}/sync", json={}), 404)


def test_what_is_wrong_with_a_request_is_named(client: FlaskClient, server: Server) -> None:
    def field(answer: Any) -> str:
        return str(problem(answer, 422)["errors"][0]["field"])

    accounts = "/api/crm/accounts"
    path = client.post(accounts, json={"host": server.host, "token": "t"}).headers["Location"]

    assert field(client.post(accounts, json={"host": "evil.org", "token": "t"})) == "host"
    assert field(client.post(accounts, json={"host": server.host})) == "token"
    assert field(client.post(accounts, json={"host": server.host, "code": "c", "client_id": "x"})) == "client_id"
    assert field(client.patch(path, json={"token": "a", "code": "b"})) == "token"
    assert field(client.post(f"{path}/leads", json={"items": [{"price": 5}]})) == "items.0.name"
    assert field(client.post(f"{path}/leads", json={"items": [{"id": "7", "name": "x"}]})) == "items.0.id"
    assert field(client.post(f"{path}/sync", json={"mode": "all"})) == "mode"
    assert field(client.get(f"{path}/mirror?cursor=WzEsMl0x")) == "cursor"
    assert field(client.get(f"{path}/mirror?type=events&cursor=WzEsIDJd")) == "cursor"


def test_oauth_from_the_button_to_the_mirror(
    client: FlaskClient, linked: System, server: Server, conn: Connection
) -> None:
    begun = client.post("/api/crm/authorizations", json={"name": "By OAuth"}).json
    (state,) = parse_qs(urlsplit(begun["url"]).query)["state"]
    browser = create_app(linked).test_client()
    server.add("contacts", name="Ann")

    back = browser.get(
        f"/crm/oauth/callback?code={server.new_code()}&referer={server.host}&state={state}&client_id=c-1"
    )
    done(linked, conn, newest_job(conn))

    (account,) = client.get("/api/crm/accounts").json["accounts"]
    assert back.status_code == 200 and "being connected" in back.text
    assert (account["name"], account["state"], account["auth"]) == ("By OAuth", "connected", "oauth")
    conn.execute("update agentflow.crm_accounts set state = 'needs_reauth', state_reason = 'x'")
    again = client.post("/api/crm/authorizations", json={"account_id": account["id"]}).json
    (state,) = parse_qs(urlsplit(again["url"]).query)["state"]
    browser.get(f"/crm/oauth/callback?code={server.new_code()}&referer={server.host}&state={state}")
    done(linked, conn, newest_job(conn))
    (account,) = client.get("/api/crm/accounts").json["accounts"]
    assert account["state"] == "connected"


def test_a_forged_or_old_state_and_a_foreign_host_connect_nothing(
    client: FlaskClient, linked: System, server: Server, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = client.post("/api/crm/authorizations", json={}).json
    (state,) = parse_qs(urlsplit(begun["url"]).query)["state"]

    def answer(state: str, referer: str = server.host) -> Any:
        return client.get(f"/crm/oauth/callback?code=c&referer={referer}&state={state}")

    problem(answer(state[:-1] + ("A" if state[-1] != "A" else "B")), 422)
    problem(answer("x." + state.partition(".")[2]), 422)
    problem(answer(state, "evil.org"), 422)
    assert client.get(f"/crm/oauth/callback?error=access_denied&state={state}").status_code == 200
    monkeypatch.setattr("web.crm_oauth.time.time", lambda: 4e9)
    problem(answer(state), 422)
    row = conn.execute("select count(*) from agentflow.crm_accounts").fetchone()
    assert row == (0,)


def test_the_command_line_connects_lists_plans_and_confirms(
    linked: System, server: Server, conn: Connection, agentflow: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(server.token + "\n"))

    account = agentflow("crm", "connect", server.host).out.strip()
    done(linked, conn, newest_job(conn))
    plan = agentflow("crm", "plan", account, "--mode", "reconcile").out.strip()

    assert done(linked, conn, plan)["plan"] is True
    listed = json.loads(agentflow("crm", "list", "--json").out)
    assert (listed["id"], listed["state"]) == (account, "connected")
    assert "reconcile (plan)" in agentflow("crm", "runs", account).out
    nothing = agentflow("crm", "confirm", account)
    assert nothing.status == 1 and "wait to be confirmed" in nothing.err
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    foreign = agentflow("crm", "connect", "evil.org")
    assert foreign.status == 2 and "must be the account's host" in foreign.err
