"""What becomes of webhooks: by a real worker from end to end, and step by step with handlers that run twice or die."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient
from standardwebhooks.webhooks import Webhook

from actors.handle_webhook import forwarding
from actors.handle_webhook import job as actor
from agentflow import metrics, settings
from agentflow.errors import Permanent, Transient
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Payload
from agentflow.system import System
from agentflow.webhooks import content, replays
from tests.core_support import value
from tests.http_server import Reply, Server, serve
from tests.processes import eventually, worker
from tests.web_support import AUTH, client, count, problem
from tests.webhook_support import event_of, make
from web import create_app

__all__ = ["client"]

Connection = psycopg.Connection


ECHO = {
    "kind": "job",
    "type": "web_echo",
    "payload": {"text": {"$from": "/name"}, "number": {"$from": "/n", "default": 7}},
}
ORDERED = {"entity": "/id", "version": "/at"}


def handle(system: System, conn: Connection, job_id: UUID | str | None = None) -> Exception | None:
    """What a worker does with the event's job, without its claim. Returns what it raised."""
    found = value(conn, "select id from agentflow.jobs where type = 'handle_webhook' order by id desc limit 1")
    running = records.get(conn, None, UUID(str(job_id or found)))
    assert running is not None
    return run(system, running, actor.handle_webhook, actor.HandleWebhook)


def run(system: System, running: Job, function: Any, payload: type[Payload]) -> Exception | None:
    context: Any = SimpleNamespace(job=running, system=system, check=lambda: None)
    try:
        function(context, payload.model_validate_json(json.dumps(running.payload)))
    except (Permanent, Transient) as error:
        return error
    return None


def echoes(conn: Connection) -> list[dict[str, Any]]:
    return [row[0] for row in conn.execute("select payload from agentflow.jobs where type = 'web_echo' order by id")]


def handled(source: str, outcome: str) -> float:
    return metrics._webhooks_handled.labels(source, outcome)._value.get()


# ---- from end to end ----


@pytest.fixture
def receiver(environment: dict[str, str]) -> Iterator[Server]:
    with serve() as server:
        environment["FETCH_ALLOW"] = server.netloc
        yield server


def test_each_kind_of_action_from_the_sender_to_its_end(
    receiver: Server, environment: dict[str, str], conn: Connection, tmp_path: Path
) -> None:
    receiver.on("/in", Reply(503), Reply(200))
    system = System(settings.load(environment), "test")
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    secret = client.post("/api/callback-secrets", json={}).json["secret"]
    ping = {"kind": "job", "type": "ping", "payload": {"sleep_ms": {"$from": "/issue/number"}}}
    mapped = make(client, "github", config={"action": ping, "only": ["issues"]})
    forwarded = make(client, "standard", config={"action": {"kind": "forward", "url": receiver.url("/in")}})
    kept = make(client, "telegram")
    with worker(environment, tmp_path / "worker.log"):
        events = {
            "mapped": event_of(client, mapped.send({"issue": {"number": 3}})),
            "other": event_of(client, mapped.send({"zen": "Keep it logically awesome."}, event="ping")),
            "forwarded": event_of(client, forwarded.post('{"name":"Zoë", "n":1.0}'.encode())),
            "kept": event_of(client, kept.send({"update_id": 1, "message": {}})),
        }

        def look(name: str) -> dict[str, Any]:
            return dict(client.get(f"/api/webhook-events/{events[name]['id']}").json)

        outcomes = {"mapped": "done", "other": "ignored", "forwarded": "done", "kept": "done"}
        eventually(lambda: {name: look(name)["outcome"] for name in events} == outcomes)
        ended = eventually(
            lambda: (
                (found := client.get(f"/api/jobs/{look('mapped')['action_job_id']}").json)["state"] == "succeeded"
                and found
            )
        )
        # The ladder's first step is 5 s: the second attempt is asked for now.
        forward = look("forwarded")["action_job_id"]
        eventually(lambda: receiver.requests)
        eventually(
            lambda: (
                conn.execute(
                    "update agentflow.jobs set run_at = clock_timestamp(), wake_at = clock_timestamp()"
                    " where id = %s and state = 'queued' and attempt = 1",
                    (forward,),
                ).rowcount
                or len(receiver.requests) == 2
            )
        )
        eventually(lambda: client.get(f"/api/jobs/{forward}").json["state"] == "succeeded")
    assert ended["type"] == "ping" and ended["payload"]["sleep_ms"] == 3
    assert ended["correlation_id"] == f"webhook:{events['mapped']['id']}"
    first, second = receiver.requests
    assert first.body == second.body == '{"name":"Zoë", "n":1.0}'.encode()
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert second.headers["content-type"] == "application/json" and second.headers["agentflow-source"] == "standard"
    assert Webhook(secret).verify(second.body, dict(second.headers))
    system.close()


# ---- once ----


def test_a_handler_that_runs_twice_makes_one_job(client: FlaskClient, system: System, conn: Connection) -> None:
    endpoint = make(client, "github", config={"action": ECHO})
    endpoint.send({"name": "a"})

    assert [handle(system, conn) for _ in range(2)] == [None, None]

    assert echoes(conn) == [{"text": "a", "number": 7, "more": {}}]


def test_a_handler_that_dies_half_way_leaves_nothing_and_is_done_once_later(
    client: FlaskClient, system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = make(client, "github", config={"action": ECHO})
    event = event_of(client, endpoint.send({"name": "a"}))
    original = actor.events.settle

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(actor.events, "settle", die)
    with pytest.raises(KeyboardInterrupt):
        handle(system, conn)
    assert echoes(conn) == []

    monkeypatch.setattr(actor.events, "settle", original)
    handle(system, conn)

    assert len(echoes(conn)) == 1
    shown = client.get(f"/api/webhook-events/{event['id']}").json
    assert (shown["outcome"], shown["handled_at"] is not None) == ("done", True)


def test_an_event_that_does_not_fit_fails_and_says_why(client: FlaskClient, system: System, conn: Connection) -> None:
    endpoint = make(client, "github", config={"action": ECHO})
    for body in (b"{}", b'{"name": 7}', b"no json", b'{"name": "x", "n": ' + b"9" * 5000 + b"}"):
        before = handled("github", "failed")
        event = event_of(client, endpoint.post(body))

        error = handle(system, conn)

        assert isinstance(error, Permanent) and error.code == "webhook_mapping", body
        shown = client.get(f"/api/webhook-events/{event['id']}").json
        assert (shown["outcome"], shown["detail"]) == ("failed", str(error))
        assert handled("github", "failed") == before + 1
    assert echoes(conn) == []
    client.post(
        f"/api/webhook-endpoints/{endpoint.id}",
        json={"name": "x", "config": {"action": {**ECHO, "payload": {}}}},
    )
    replayed = client.post("/api/webhook-events/replay", json={"outcome": "failed"}).json
    assert (replayed["matched"], replayed["submitted"]) == (4, 4)


# ---- order ----


def test_an_older_state_that_comes_late_is_discarded_and_counted(
    client: FlaskClient, system: System, conn: Connection
) -> None:
    endpoint = make(client, "github", config={"action": ECHO, **ORDERED})
    before = handled("github", "stale")
    for name, at in (("first", 100), ("third", 300), ("second", 200), ("third again", 300)):
        endpoint.send({"id": 7, "at": at, "name": name})
        handle(system, conn)
    endpoint.send({"id": 8, "at": 50, "name": "another entity"})
    handle(system, conn)

    assert [each["text"] for each in echoes(conn)] == ["first", "third", "third again", "another entity"]
    assert handled("github", "stale") == before + 1
    (stale,) = client.get("/api/webhook-events?outcome=stale").json["events"]
    assert stale["entity"] == "7" and "newer" in stale["detail"]
    keys = conn.execute(
        "select distinct concurrency_key from agentflow.jobs where payload ->> 'text' like '%ird%'"
    ).fetchall()
    assert len(keys) == 1 and keys[0][0].startswith(f"1:webhook:{endpoint.id}:")

    replayed = client.post(f"/api/webhook-events/{stale['id']}/replay", json={}).json["job_id"]
    handle(system, conn, replayed)
    forced = client.post(f"/api/webhook-events/{stale['id']}/replay", json={"even_if_stale": True}).json["job_id"]
    handle(system, conn, forced)

    assert [each["text"] for each in echoes(conn)][4:] == ["second"]


def test_a_forward_that_was_overtaken_while_it_waited_is_not_sent(
    receiver: Server, environment: dict[str, str], conn: Connection
) -> None:
    system = System(settings.load(environment), "test")
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    receiver.on("/in", Reply(500), Reply(200))
    action = {"kind": "forward", "url": receiver.url("/in")}
    endpoint = make(client, "github", config={"action": action, **ORDERED})
    jobs, events = [], []
    for at in (100, 200):
        events.append(event_of(client, endpoint.send({"id": 7, "at": at})))
        handle(system, conn)
        found = records.get(
            conn, None, UUID(client.get(f"/api/webhook-events/{events[-1]['id']}").json["action_job_id"])
        )
        assert found is not None
        jobs.append(found)

    def forward(job: Job) -> Exception | None:
        return run(system, job, forwarding.forward_webhook, forwarding.ForwardWebhook)

    assert isinstance(forward(jobs[0]), Transient)
    assert forward(jobs[1]) is None
    assert forward(jobs[0]) is None

    assert [json.loads(request.body)["at"] for request in receiver.requests] == [100, 200]
    assert client.get(f"/api/webhook-events/{events[0]['id']}").json["outcome"] == "stale"
    receiver.on("/in", Reply(410))
    assert isinstance(forward(jobs[1]), Permanent)
    assert client.get(f"/api/webhook-events/{events[1]['id']}").json["outcome"] == "failed"
    system.close()


# ---- replays ----


def test_many_are_replayed_at_a_pace_after_a_look_at_how_many(
    client: FlaskClient, system: System, conn: Connection
) -> None:
    endpoint = make(client, "github", config={"action": ECHO})
    for number in range(5):
        endpoint.send({"name": f"n{number}"}, id=str(number))
        handle(system, conn)
    client.post(endpoint.path, data=b"{}")  # refused: never replayed
    ask = {"endpoint_id": endpoint.id, "received_to": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}

    preview = client.post("/api/webhook-events/replay", json={**ask, "preview": True}).json
    jobs = count(conn)
    done = client.post("/api/webhook-events/replay", json={**ask, "per_minute": 6, "most": 3}).json

    assert preview == {"matched": 5, "submitted": 0, "correlation_id": None, "ends_at": None}
    assert (done["matched"], done["submitted"], count(conn)) == (5, 3, jobs + 3)
    rows = conn.execute(
        "select run_at, payload, priority from agentflow.jobs where correlation_id = %s order by run_at",
        (done["correlation_id"],),
    ).fetchall()
    assert [(b[0] - a[0]).total_seconds() for a, b in itertools.pairwise(rows)] == [10, 10]
    assert all(row[1]["replay"] and row[2] == 2 for row in rows)
    for (job_id,) in conn.execute("select id from agentflow.jobs where payload ->> 'replay' = 'true' order by run_at"):
        assert [handle(system, conn, job_id) for _ in range(2)] == [None, None]
    assert [each["text"] for each in echoes(conn)] == ["n0", "n1", "n2", "n3", "n4", "n0", "n1", "n2"]
    counts = conn.execute(
        "select replays from agentflow.webhook_events where verdict <> 'refused' order by id"
    ).fetchall()
    assert [row[0] for row in counts] == [1, 1, 1, 0, 0]
    (refused,) = client.get("/api/webhook-events?verdict=refused").json["events"]
    problem(client.post(f"/api/webhook-events/{refused['id']}/replay", json={}), 409)
    assert replays.MOST >= 1000


# ---- Kommo ----


def test_kommos_events_become_a_debounced_sync_that_loses_no_entity(
    client: FlaskClient, system: System, conn: Connection
) -> None:
    endpoint = make(client, "kommo")
    account = client.get(f"/api/webhook-endpoints/{endpoint.id}").json["config"]["account_id"]
    for body in (
        b"leads[add][0][id]=5&leads[add][1][id]=6",
        b"contacts[update][0][id]=9&contacts[update][0][type]=company",
    ):
        endpoint.post(body)
        assert handle(system, conn) is None
    endpoint.post(b"account[id]=7&catalogs[add][0][id]=3")
    handle(system, conn)

    syncs = conn.execute("select payload from agentflow.jobs where type = 'sync_crm'").fetchall()
    assert [(p[0]["account_id"], p[0]["touched"]) for p in syncs] == [(account, True)]
    touched = conn.execute(
        "select account_id, entity_type, entity_id from agentflow.crm_touched order by 2, 3"
    ).fetchall()
    assert touched == [(UUID(account), "companies", 9), (UUID(account), "leads", 5), (UUID(account), "leads", 6)]
    assert [e["outcome"] for e in client.get("/api/webhook-events").json["events"]] == ["ignored", "done", "done"]
    unreadable = endpoint.post(b"&".join(b"a%d=1" % n for n in range(content.MAX_FIELDS + 1)))
    error = handle(system, conn)
    assert unreadable.status_code == 200 and isinstance(error, Permanent) and error.code == "webhook_unreadable"
