"""`agentflow webhooks …`: what it makes takes webhooks in, and what it refuses it names."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
from flask.testing import FlaskClient

from tests import cli_support
from tests.cli_support import Command
from tests.web_support import client, count
from tests.webhook_support import Made

__all__ = ["client"]

Connection = psycopg.Connection
agentflow = cli_support.agentflow


def test_an_endpoint_from_its_making_to_a_replay(agentflow: Command, client: FlaskClient, conn: Connection) -> None:
    config = json.dumps({"action": {"kind": "job", "type": "ping", "payload": {"sleep_ms": {"$from": "/n"}}}})
    made = agentflow("webhooks", "create", "github", "--name", "issues", "--config", config, "--silence-after", "600")
    assert made.status == 0, made.err
    path, secret = made.out.split()
    (row,) = [json.loads(line) for line in agentflow("webhooks", "list", "--json").out.splitlines()]
    endpoint = Made(row["id"], "github", path, secret, client)
    assert secret not in agentflow("webhooks", "list").out and row["silence_after_s"] == 600

    event = endpoint.send({"n": 1}).json["event_id"]
    client.post(path, data=b"{}")
    second = agentflow("webhooks", "rotate", row["id"], "--grace", "0").out.strip()
    (listed,) = [
        json.loads(x) for x in agentflow("webhooks", "events", "--verdict", "verified", "--json").out.splitlines()
    ]
    replayed = agentflow("webhooks", "replay", event).out.strip()

    assert listed["id"] == event and second not in ("", secret)
    assert client.get(f"/api/jobs/{replayed}").json["payload"]["replay"] is True
    assert "missing" in agentflow("webhooks", "events", "--verdict", "refused").out
    assert "disabled" in agentflow("webhooks", "disable", row["id"]).out
    assert "disabled" in agentflow("webhooks", "list").out
    assert "enabled" in agentflow("webhooks", "enable", row["id"]).out


def test_what_cannot_be_is_one_line_and_exit_2(
    agentflow: Command, conn: Connection, client: FlaskClient, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("whsec_stripe_secret\n")
    wrong = [
        ("create", "github", "--name", "x", "--config", "{"),
        ("create", "github", "--name", "x", "--config", '{"action": {"kind": "job", "type": "none"}}'),
        ("create", "github", "--name", "x", "--org", "nobody"),
        ("create", "stripe", "--name", "x"),
        ("create", "stripe", "--name", "x", "--secret-file", str(tmp_path / "none")),
        ("rotate", "0197d0a0-0000-7000-8000-000000000001"),
        ("list", "--org", "nobody"),
    ]
    for arguments in wrong:
        answer = agentflow("webhooks", *arguments)
        assert (answer.status, answer.err.count("\n")) == (2, 1), (arguments, answer.err)
    assert count(conn, "webhook_endpoints") == 0

    made = agentflow("webhooks", "create", "stripe", "--name", "x", "--secret-file", str(tmp_path / "secret"))

    assert made.status == 0 and made.out.count("\n") == 1  # the vendor's secret is not said again
    endpoint = Made("", "stripe", made.out.strip(), "whsec_stripe_secret", client)
    assert endpoint.send({"id": "evt_1"}).status_code == 200
    assert agentflow("webhooks", "replay", "0197d0a0-0000-7000-8000-000000000001").status == 1
