"""Rules over HTTP: an organization's key sets its own, never above the operator's, whose key sets any, and those for all."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import organizations
from agentflow.jobs import rules, usage
from agentflow.jobs.rules import EVERY
from agentflow.jobs.usage import Usage
from agentflow.limits import Window
from tests.core_support import submit
from tests.web_support import client, problem

Connection = psycopg.Connection
__all__ = ["client"]
ONE, TWO = 1, 2


@pytest.fixture
def tenant(client: FlaskClient, conn: Connection) -> FlaskClient:
    """Organization two's own program; a second organization exists."""
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    _, key = organizations.create_key(conn, TWO, "test", ["manage"])
    mine: FlaskClient = client.application.test_client()
    mine.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return mine


def set_(client: FlaskClient, what: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/rules/{what}", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json)


def listed(client: FlaskClient, query: str = "") -> list[dict[str, Any]]:
    return list(client.get(f"/api/rules{query}").json["rules"])


def test_what_the_operator_sets_for_each_is_what_the_workers_read(
    client: FlaskClient, tenant: FlaskClient, conn: Connection
) -> None:
    set_(client, "pause", pause="queue", name="gpu", reason="maintenance")
    set_(client, "pause", pause="type", name="ping")
    set_(client, "cap", type=None, running=7)
    set_(client, "limit", provider="openrouter", windows=[{"amount": 70, "per_s": 1}, {"amount": 5000, "per_s": 3600}])
    set_(client, "budget", measure="usd", per_day=2.5)
    found = rules.read(conn)

    assert found.pause_of(TWO, "gpu", "x") and found.pause_of(TWO, "default", "ping")
    assert found.cap_of(TWO, "") == 7
    assert found.limit_of(TWO, "openrouter") == (Window(70, 1), Window(5000, 3600))
    assert {(r["kind"], r["organization_id"], r["own"]) for r in listed(tenant)} == {
        ("pause", None, False),
        ("cap", None, False),
        ("limit", None, False),
        ("budget", None, False),
    }

    assert set_(client, "resume", resume="queue", name="gpu") == {"jobs": 0}
    set_(client, "resume", resume="type", name="ping")
    set_(client, "cap", type=None, running=None)
    set_(client, "limit", provider="openrouter", windows=[])
    set_(client, "budget", measure="usd", per_day=None)
    assert listed(client) == []


def test_an_organizations_rules_are_its_own_and_another_sees_none_of_them(
    client: FlaskClient, tenant: FlaskClient, conn: Connection
) -> None:
    set_(tenant, "pause", pause="organization", reason="a holiday")
    set_(tenant, "cap", type="ping", running=2)
    set_(tenant, "limit", provider="openrouter", windows=[{"amount": 5, "per_s": 60}])
    set_(tenant, "budget", measure="usd", per_day=1)
    usage.record(conn, [Usage(submit(conn, TWO).id, 1, {"usd": 0.25})])

    assert {(r["organization_id"], r["own"]) for r in listed(tenant)} == {(TWO, True)}
    assert [r["used_today"] for r in listed(tenant) if r["kind"] == "budget"] == [0.25]
    _, key = organizations.create_key(conn, ONE, "other", ["manage"])
    other = client.application.test_client()
    assert other.get("/api/rules", headers={"Authorization": f"Bearer {key}"}).json["rules"] == []
    assert len(listed(client)) == 4
    assert rules.read(conn).pause_of(ONE, "default", "ping") is None

    assert set_(tenant, "resume", resume="organization") == {"jobs": 0}
    problem(tenant.post("/api/rules/resume", json={"resume": "organization"}), 404)


def test_an_organization_can_neither_lift_nor_exceed_what_the_operator_says(
    client: FlaskClient, tenant: FlaskClient, conn: Connection
) -> None:
    for_two = {"headers": {"X-Organization": "two"}}
    bodies: dict[str, dict[str, Any]] = {
        "pause": {"pause": "organization"},
        "cap": {"type": "ping", "running": 3},
        "limit": {"provider": "openrouter", "windows": [{"amount": 5, "per_s": 60}]},
        "budget": {"measure": "usd", "per_day": 1},
    }
    for what, body in bodies.items():
        assert client.post(f"/api/rules/{what}", json=body, **for_two).json["own"] is False
    set_(client, "cap", type=None, running=4)

    more: dict[str, dict[str, Any]] = {
        "resume": {"resume": "organization"},
        "cap": {"type": "ping", "running": 30},
        "limit": {"provider": "openrouter", "windows": []},
        "budget": {"measure": "usd", "per_day": None},
    }
    for what, body in more.items():
        assert "the operator" in problem(tenant.post(f"/api/rules/{what}", json=body), 403)["detail"]
    problem(tenant.post("/api/rules/pause", json={"pause": "queue", "name": "default"}), 403)
    assert set_(tenant, "cap", type=None, running=100)["running"] == 4
    set_(client, "cap", type=None, running=2)

    found = rules.read(conn)
    assert (found.cap_of(TWO, "ping"), found.cap_of(TWO, "")) == (3, 2)
    assert conn.execute("select running from agentflow.caps where organization_id = 2 and type = ''").fetchone() == (2,)
    assert found.limit_of(TWO, "openrouter") == (Window(5, 60),)
    assert found.pause_of(TWO, "default", "ping")


def test_a_pause_of_the_operator_takes_the_place_of_ones_own(client: FlaskClient, tenant: FlaskClient) -> None:
    set_(tenant, "pause", pause="type", name="ping")
    assert (
        client.post("/api/rules/pause", json={"pause": "type", "name": "ping"}, headers={"X-Organization": "two"}).json[
            "own"
        ]
        is False
    )

    problem(tenant.post("/api/rules/resume", json={"resume": "type", "name": "ping"}), 403)


def test_the_list_comes_in_pages(client: FlaskClient, tenant: FlaskClient, conn: Connection) -> None:
    for number in range(7):
        rules.set_budget(conn, EVERY if number % 2 else TWO, f"m{number}", 1)
        rules.set_limit(conn, TWO, f"p{number}", [Window(1, 1)])
    pages, cursor = [], ""
    while True:
        page = client.get(f"/api/rules?limit=3{cursor}").json
        pages.append(page["rules"])
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"

    assert [len(page) for page in pages] == [3, 3, 3, 3, 2]
    assert [rule for page in pages for rule in page] == listed(client)
    problem(client.get("/api/rules?cursor=WyJhIiwxXQ"), 422)
    problem(client.get("/api/rules?cursor=WyJcdTAwMDAiLDEsImEiXQ"), 422)  # a NUL in it


@pytest.mark.parametrize(
    ("what", "body", "field"),
    [
        ("pause", {"pause": "organization"}, "X-Organization"),
        ("pause", {"pause": "organization", "name": "x"}, "name"),
        ("pause", {"pause": "type"}, "name"),
        ("pause", {"pause": "type", "name": "nonsense"}, "name"),
        ("pause", {"pause": "queue", "name": "nonsense"}, "name"),
        ("cap", {"type": "nonsense", "running": 1}, "type"),
        ("cap", {"running": 0}, "running"),
        ("cap", {}, "running"),
        ("limit", {"provider": "type:nonsense", "windows": []}, "provider"),
        ("limit", {"provider": "p", "windows": [{"amount": 1, "per_s": 1}, {"amount": 2, "per_s": 1}]}, "windows"),
        ("limit", {"provider": "p", "windows": [{"amount": 0, "per_s": 1}]}, "windows.0.amount"),
        ("budget", {"measure": "US$", "per_day": 1}, "measure"),
        ("budget", {"measure": "usd", "per_day": 0}, "per_day"),
    ],
)
def test_what_makes_no_sense_is_named(
    client: FlaskClient, conn: Connection, what: str, body: dict[str, Any], field: str
) -> None:
    said = problem(client.post(f"/api/rules/{what}", json=body), 422)

    assert said["errors"][0]["field"] == field
    assert listed(client) == []
