"""Webhooks are taken in: stored once with their job before the answer, told apart, refused, and never answered 500."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agentflow import metrics, scraping, settings
from agentflow.database import BoundedConnection
from agentflow.system import System
from agentflow.webhooks import endpoints, events, keeping, order, silence
from agentflow.webhooks.intake import moment_of
from agentflow.webhooks.retention import delete_events
from tests.calendar_support import cleaned_up
from tests.core_support import value
from tests.two_at_once import together
from tests.web_support import AUTH, client, count, problem
from tests.webhook_support import FORM, JSON, SIGNERS, Made, event_of, make
from web import create_app

__all__ = ["client"]

Connection = psycopg.Connection

BODIES: dict[str, bytes] = {
    "standard": b'{"type": "user.created", "data": {"id": 7}}',
    "github": b'{"action": "opened"}',
    "stripe": b'{"id": "evt_1", "type": "invoice.paid"}',
    "slack": b'{"event_id": "Ev1", "event": {"type": "message"}}',
    "telegram": b'{"update_id": 10001, "message": {"text": "hi"}}',
    "kommo": b"leads%5Badd%5D%5B0%5D%5Bid%5D=5&account%5Bid%5D=1",
    "kommo_chats": b'{"message": {"message": {"id": "m-1"}}}',
    "generic": b"\x00\xffno text at all",
}
TYPES = {
    "standard": "user.created", "github": "issues", "stripe": "invoice.paid", "slack": "message", "telegram": "message",
    "kommo": "leads.add", "kommo_chats": "message", "generic": None,
}  # fmt: skip


def counted(source: str, verdict: str) -> float:
    return metrics._webhooks.labels(source, verdict)._value.get()


# ---- taking in ----


@pytest.mark.parametrize("source", sorted(SIGNERS))
def test_a_webhook_is_stored_with_its_job_and_told_from_a_duplicate_and_a_forgery(
    client: FlaskClient, conn: Connection, source: str
) -> None:
    endpoint, body = make(client, source), BODIES[source]
    same = {"id": "d-1"} if source in ("standard", "github") else {}
    before = counted(source, "duplicate")

    first, again = endpoint.post(body, **same), endpoint.post(body, **same)

    event = event_of(client, first)
    assert (first.json["duplicate"], again.json) == (False, {**first.json, "duplicate": True})
    assert (event["type"], event["size_bytes"], event["duplicates"]) == (TYPES[source], len(body), 0 + 1)
    assert event["verdict"] == ("by_token" if source == "kommo" else "verified")
    row = conn.execute("select body, job_id from agentflow.webhook_events").fetchone()
    assert row is not None and bytes(row[0]) == body
    job = conn.execute("select id, type, payload from agentflow.jobs").fetchall()
    assert job == [(row[1], "handle_webhook", {"event_id": event["id"], "replay": False, "even_if_stale": False})]
    assert counted(source, "duplicate") == before + 1
    if source != "kommo":
        forged = client.post(endpoint.path, data=body + b" ", headers=SIGNERS[source](endpoint.secret + "x", body))
        problem(forged, 401)
        refused = client.get("/api/webhook-events?verdict=refused").json["events"]
        assert [(e["endpoint_id"], e["job_id"], bool(e["reason"])) for e in refused] == [(endpoint.id, None, True)]
        assert count(conn) == 1


def test_a_new_webhook_takes_one_statement(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has few connections, and each statement more holds one for another trip."""
    endpoint = make(client, "generic", config={"entity": "/lead"})
    assert endpoint.send({"lead": 1}).status_code == 200  # by now the endpoint is known
    asked: list[str] = []
    execute = BoundedConnection.execute

    def noted(self: Connection, query: Any, *args: Any, **options: Any) -> Any:
        asked.append(str(query))
        return execute(self, query, *args, **options)

    monkeypatch.setattr(BoundedConnection, "execute", noted)
    monkeypatch.setattr(BoundedConnection, "transaction", lambda _: pytest.fail("a transaction is two trips more"))

    for lead in (1, 2):  # one that has been met, and one that has not
        assert endpoint.send({"lead": lead, "change": "other"}).status_code == 200
    assert len([query for query in asked if "agentflow." in query]) == 2, asked


def test_the_same_id_with_another_body_is_kept_flagged_and_left_alone(client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "github")
    first = endpoint.post(b'{"n": 1}', id="d-1")

    other, again = endpoint.post(b'{"n": 2}', id="d-1"), endpoint.post(b'{"n": 2}', id="d-1")

    assert other.json["event_id"] != first.json["event_id"] and other.json["duplicate"] is False
    assert again.json == {"event_id": other.json["event_id"], "duplicate": True}
    event = event_of(client, other)
    assert (event["verdict"], event["job_id"], event["duplicates"]) == ("conflict", None, 1)
    assert count(conn) == 1


def test_a_body_without_an_id_is_remembered_for_hours_and_not_for_ever(client: FlaskClient, conn: Connection) -> None:
    endpoint, body = make(client, "kommo"), BODIES["kommo"]
    first = endpoint.post(body)
    conn.execute("update agentflow.webhook_events set received_at = received_at - interval '7 h'")

    second, third = endpoint.post(body), endpoint.post(body)

    assert second.json["event_id"] != first.json["event_id"]
    assert (second.json["duplicate"], third.json["duplicate"]) == (False, True)
    assert (count(conn), count(conn, "webhook_events")) == (2, 2)


def test_of_many_at_once_one_is_stored(system: System, client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "github")
    app = client.application

    def send() -> Any:
        return Made(endpoint.id, "github", endpoint.path, endpoint.secret, app.test_client()).post(b"{}", id="d-1")

    answers = together(*[send] * 4)

    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json["event_id"] for answer in answers}) == 1
    assert sorted(answer.json["duplicate"] for answer in answers) == [False, True, True, True]
    assert (count(conn), value(conn, "select duplicates from agentflow.webhook_events")) == (1, 3)


def test_an_address_that_is_none_is_404_and_leaves_nothing(client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "github")
    token = endpoint.path.rpartition("/")[2]
    other = token[:-1] + ("A" if token[-1] != "A" else "B")
    for path in (other, token[:-1], "x", "%00", "ÿ", token.swapcase()):
        problem(client.post(f"/webhooks/github/{path}", data=b"{}"), 404)
    for source in ("stripe", "nothing", "%2e%2e"):
        problem(client.post(f"/webhooks/{source}/{token}", data=b"{}"), 404)
    assert count(conn, "webhook_events") == 0
    assert client.get(endpoint.path).status_code in (404, 405)


def test_a_body_beyond_the_limit_is_413_and_leaves_nothing(environment: dict[str, str], conn: Connection) -> None:
    with_limit = System(settings.load({**environment, "WEBHOOK_MAX_BYTES": "2048"}), "test")
    client = create_app(with_limit).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    endpoint = make(client, "kommo")

    problem(endpoint.post(b"a" * 2049), 413)

    assert endpoint.post(b"a" * 2048).status_code == 200
    assert count(conn, "webhook_events") == 1
    with_limit.close()


def test_without_a_database_it_is_503_and_to_be_sent_again(
    client: FlaskClient, system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = make(client, "github")
    assert endpoint.post(b"{}").status_code == 200  # the endpoint is known to the process now

    def away(*_: Any, **__: Any) -> Any:
        raise psycopg.OperationalError("gone")

    monkeypatch.setattr(system.database, "connection", away)
    answer = endpoint.post(b'{"n": 2}')

    problem(answer, 503)
    assert int(answer.headers["Retry-After"]) >= 1
    assert count(conn, "webhook_events") == 1


def test_an_event_whose_job_cannot_be_written_is_not_kept_either(
    client: FlaskClient, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = make(client, "github")
    conn.execute("alter table agentflow.jobs add check (type <> 'handle_webhook')")

    assert endpoint.post(b"{}", id="d-1").status_code == 500

    conn.execute("alter table agentflow.jobs drop constraint jobs_type_check1")
    assert (count(conn, "webhook_events"), count(conn)) == (0, 0)
    assert endpoint.post(b"{}", id="d-1").json["duplicate"] is False


def test_slacks_challenge_is_echoed_once_it_is_signed(client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "slack")
    body = b'{"type": "url_verification", "challenge": "3eZbrw1aB10FEMAGAZd4FyFQ"}'

    answer = endpoint.post(body)

    assert (answer.status_code, answer.text) == (200, "3eZbrw1aB10FEMAGAZd4FyFQ")
    assert answer.mimetype == "text/plain" and count(conn, "webhook_events") == 0
    problem(client.post(endpoint.path, data=body, headers=JSON), 401)


def test_headers_are_kept_without_what_opens_anything(client: FlaskClient) -> None:
    endpoint = make(client, "generic", config={"hmac": {"header": "X-Mine"}})
    signature = SIGNERS["generic"](endpoint.secret, b"{}")["X-Signature"]
    sent = {
        "X-Mine": signature,
        "Proxy-Authorization": "c",
        "X-Api-Key": "k",
        "X-Auth-Token": "t",
        "X-Keyboard": "qwerty",
    }

    event = event_of(client, client.post(endpoint.path, data=b"{}", headers={**JSON, **sent}))

    hidden = {name for name, text in event["headers"].items() if text == "[redacted]"}
    assert hidden >= {"x-mine", "proxy-authorization", "x-api-key", "x-auth-token", "authorization"}
    assert event["headers"]["x-keyboard"] == "qwerty" and signature not in json.dumps(event)


def test_of_what_is_refused_no_more_is_kept_than_is_of_use(
    client: FlaskClient, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "REFUSED_PER_HOUR", 3)
    endpoint = make(client, "telegram")
    for number in range(5):
        answer = client.post(endpoint.path, data=b"x" * (20_000 + number))
        problem(answer, 401)

    rows = conn.execute("select length(body), size_bytes from agentflow.webhook_events").fetchall()
    assert rows == [(keeping.REFUSED_BODY_BYTES, 20_000 + number) for number in range(3)]


def test_an_endpoint_whose_secrets_are_all_over_verifies_nothing(client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "github")
    conn.execute("update agentflow.webhook_credentials set expires_at = clock_timestamp() where kind = 'secret'")

    problem(endpoint.post(b"{}"), 401)


# ---- fuzz ----

TEXT = st.text(max_size=40)
PAIRS = st.lists(
    st.tuples(st.from_regex(r"[a-z]{0,3}(\[[a-z0-9]{0,3}\]){0,6}[\[\]]?", fullmatch=True), TEXT), max_size=8
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
WICKED: list[tuple[bytes, str]] = [
    (b"[" * 100_000, "application/json"),
    (b'{"a":' * 50_000, "application/json"),
    (b'{"update_id": 1e999, "id": ' + b"9" * 10_000 + b"}", "application/json"),
    (b'{"id": "\\u0000\\ud800", "type": "\\udfff", "update_id": null}', "application/json"),
    ("{\"id\": \"Zoë\"}".encode("utf-16"), "application/json; charset=utf-16"),
    (b"\xff\xfe\x00" * 1000, "text/plain; charset=none-such"),
    (b"k" * 1_000_000, FORM["Content-Type"]),
    (b"k[" * 100_000, FORM["Content-Type"]),
    (b"a" + b"[b]" * 50_000 + b"=1", FORM["Content-Type"]),
    (b"&".join(b"leads[add][%d][id]=%d" % (n, n) for n in range(10_000)), FORM["Content-Type"]),
    (b"&".join(b"a[]=%d" % n for n in range(30_000)), FORM["Content-Type"]),
    (b"&" * 100_000, FORM["Content-Type"]),
    (b"%" * 1000 + b"=%zz%00%ff", FORM["Content-Type"]),
    (b"payload=" + b"%5B" * 20_000, FORM["Content-Type"]),
    (b"leads[note][0][note][type]=3&leads[note][0][note][type][message_uuid]=x&leads=1", FORM["Content-Type"]),
    (b"null", "application/json"),
    (b'{"update_id": true, "message": [1], "id": {}}', ""),
]  # fmt: skip


@pytest.fixture
def everybody(client: FlaskClient) -> list[Made]:
    places = {"entity": "/data/0/id", "version": "/data/0/at"}
    generic = {"delivery_id": "/id", "type": "/type", **places}
    return [
        make(client, source, config=generic if source == "generic" else places if source != "kommo" else {})
        for source in sorted(SIGNERS)
    ]


def test_no_body_however_wicked_is_answered_500(everybody: list[Made], conn: Connection) -> None:
    for endpoint in everybody:
        for body, content_type in WICKED:
            if len(body) > 20_000 and endpoint.source not in ("generic", "kommo"):
                continue  # what is costly is the same for all
            answer = endpoint.post(body, {"Content-Type": content_type})

            assert answer.status_code == 200, (endpoint.source, body[:60], answer.text)
    assert count(conn, "webhook_events") >= len(WICKED) * 4


@hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    st.one_of(
        st.binary(max_size=200).map(lambda body: (body, "application/octet-stream")),
        VALUES.map(lambda v: (json.dumps(v).encode(), "application/json")),
        st.fixed_dictionaries(
            {"id": VALUES, "type": VALUES, "update_id": VALUES, "data": st.lists(VALUES, max_size=2)}
        ).map(lambda v: (json.dumps(v).encode(), "application/json")),
        PAIRS.map(
            lambda pairs: ("&".join(f"{k}={v}" for k, v in pairs).encode(errors="replace"), FORM["Content-Type"])
        ),
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
    st.integers(0, 7),
)
def test_no_guess_is_answered_500(everybody: list[Made], sent: tuple[bytes, str], header: str, which: int) -> None:
    body, content_type = sent

    answer = everybody[which].post(body, {"Content-Type": content_type, "X-Any": header})
    forged = everybody[which].client.post(everybody[which].path, data=body, headers={"X-Signature": header})

    assert answer.status_code == (200 if body else 400), answer.text
    assert forged.status_code in ((200, 401) if body else (400,)), forged.text


# ---- endpoints ----


def test_an_endpoint_shows_its_token_and_secret_once(client: FlaskClient, conn: Connection) -> None:
    endpoint = make(client, "github", silence_after_s=3600)

    token = endpoint.path.rpartition("/")[2]
    shown = client.get(f"/api/webhook-endpoints/{endpoint.id}")
    said = shown.text + client.get("/api/webhook-endpoints").text
    assert token not in said and endpoint.secret not in said
    assert {c["kind"] for c in shown.json["credentials"]} == {"token", "secret"}
    assert shown.json["silence_after_s"] == 3600
    stored = str(conn.execute("select hash, sealed from agentflow.webhook_credentials").fetchall())
    assert token not in stored and endpoint.secret not in stored


@pytest.mark.parametrize("kind", ["secret", "token"])
def test_a_rotation_leaves_two_live_and_ends_the_third(client: FlaskClient, conn: Connection, kind: str) -> None:
    first = make(client, "github")
    made = [first]
    for _ in range(2):
        answer = client.post(f"/api/webhook-endpoints/{first.id}/rotate", json={"kind": kind})
        assert answer.status_code == 201, answer.text
        assert (answer.json["path"] is None, answer.json["secret"] is None) == (kind == "secret", kind == "token")
        path, secret = answer.json["path"] or made[-1].path, answer.json["secret"] or made[-1].secret
        made.append(Made(first.id, "github", path, secret, client))
    live = client.get(f"/api/webhook-endpoints/{first.id}").json["credentials"]
    forget(client)

    answers = [each.post(b"{}").status_code for each in made]

    assert answers == [401 if kind == "secret" else 404, 200, 200]
    assert sorted(c["kind"] for c in live) == sorted(["secret", "token", kind])
    ended = client.post(f"/api/webhook-endpoints/{first.id}/rotate", json={"kind": kind, "grace_s": 0})
    assert ended.status_code == 201
    forget(client)
    assert made[-1].post(b"{}").status_code == answers[0]


def forget(client: FlaskClient) -> None:
    """Let the seconds pass for which a process remembers an endpoint."""
    client.application.extensions["agentflow"].system.webhook_doors._remembered.clear()


def test_a_disabled_endpoint_is_unknown_until_it_is_enabled(client: FlaskClient) -> None:
    endpoint = make(client, "kommo")

    assert client.post(f"/api/webhook-endpoints/{endpoint.id}/disable").json["disabled_at"] is not None
    forget(client)
    problem(endpoint.post(b"a=1"), 404)

    assert client.post(f"/api/webhook-endpoints/{endpoint.id}/enable").json["disabled_at"] is None
    assert endpoint.post(b"a=1").status_code == 200


def test_what_a_process_knows_of_an_endpoint_is_asked_anew_within_seconds(
    client: FlaskClient, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = make(client, "kommo")
    now = time.monotonic()
    monkeypatch.setattr(endpoints.time, "monotonic", lambda: now)
    assert endpoint.post(b"a=1").status_code == 200
    client.post(f"/api/webhook-endpoints/{endpoint.id}/disable")

    now += endpoints.REMEMBERED_S + 0.01

    problem(endpoint.post(b"a=2"), 404)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"source": "stripe"}, "secret"),
    ({"source": "github", "secret": "short"}, "secret"),
    ({"source": "kommo"}, "config.account_id"),
    ({"source": "github", "config": {"account_id": str(uuid4())}}, "config.account_id"),
    ({"source": "github", "config": {"hmac": {"header": "X-A"}}}, "config.hmac"),
    ({"source": "github", "config": {"version": "/at"}}, "config.version"),
    ({"source": "github", "config": {"entity": "data.id"}}, "config.entity"),
    ({"source": "github", "config": {"action": {"kind": "dance"}}}, "config.action"),
    (
        {"source": "github", "config": {"action": {"kind": "forward", "url": "http://127.0.0.1/"}}},
        "config.action.url",
    ),
    ({"source": "github", "config": {"action": {"kind": "job", "type": "nothing"}}}, "config.action.type"),
    ({"source": "github", "config": {"action": {"kind": "job", "type": "web_secret"}}}, "config.action.type"),
    (
        {"source": "github", "config": {"action": {"kind": "job", "type": "ping", "payload": {"sleep": 1}}}},
        "config.action.payload.sleep",
    ),
    (
        {"source": "github", "config": {"action": {"kind": "job", "type": "ping", "payload": {"sleep_ms": "x"}}}},
        "config.action.payload.sleep_ms",
    ),
    (
        {
            "source": "github",
            "config": {"action": {"kind": "job", "type": "ping", "payload": {"nap": {"$from": "/a"}}}},
        },
        "config.action.payload.nap",
    ),
    (
        {
            "source": "github",
            "config": {"action": {"kind": "job", "type": "ping", "payload": {"sleep_ms": {"$from": "a"}}}},
        },
        "config.action.payload.sleep_ms",
    ),
    ({"source": "github", "silence_after_s": 1}, "silence_after_s"),
]


def test_an_endpoint_that_could_not_work_is_not_made(client: FlaskClient, conn: Connection) -> None:
    for body, field in IMPOSSIBLE:
        said = problem(client.post("/api/webhook-endpoints", json={"name": "x", **body}), 422)

        assert said["errors"][0]["field"].startswith(field), (body, said)
    assert count(conn, "webhook_endpoints") == 0


def test_a_token_that_is_asked_for_of_a_source_without_secrets(client: FlaskClient) -> None:
    endpoint = make(client, "kommo")

    problem(client.post(f"/api/webhook-endpoints/{endpoint.id}/rotate", json={"kind": "secret"}), 422)

    answer = client.post(f"/api/webhook-endpoints/{endpoint.id}/rotate", json={"kind": "token"})
    assert answer.status_code == 201 and answer.json["path"].startswith("/webhooks/kommo/")


# ---- lists, silence, retention ----


def test_events_are_found_by_what_they_are(client: FlaskClient, conn: Connection) -> None:
    one, two = make(client, "github"), make(client, "kommo")
    one.post(b"{}", id="1")
    one.post(b"{}", id="2", event="ping")
    two.post(b"leads[add][0][id]=1")
    middle = datetime.now(UTC)
    one.post(b"{}", id="3")

    def found(**query: Any) -> int:
        return len(client.get("/api/webhook-events", query_string=query).json["events"])

    assert (found(), found(source="github"), found(type="ping"), found(endpoint_id=two.id)) == (4, 3, 1, 1)
    assert (found(outcome="pending"), found(outcome="done"), found(verdict="by_token")) == (4, 0, 1)
    assert found(received_from=(middle - timedelta(hours=1)).isoformat()) == 4
    assert found(received_to=(middle - timedelta(hours=1)).isoformat()) == 0
    page = client.get("/api/webhook-events?limit=3").json
    rest = client.get(f"/api/webhook-events?limit=3&cursor={page['next_cursor']}").json
    ids = [e["id"] for e in page["events"] + rest["events"]]
    assert len(set(ids)) == 4 and ids == sorted(ids, reverse=True) and rest["next_cursor"] is None


def test_a_silence_is_told_once_and_so_is_its_end(
    client: FlaskClient, conn: Connection, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    for level in ("error", "info"):
        monkeypatch.setattr(silence.logger, level, lambda text, _level=level, **_: told.append((_level, text)))
    watched = make(client, "github", silence_after_s=600)
    make(client, "github")  # is not watched
    assert silence.silent(conn) == []
    conn.execute("update agentflow.webhook_endpoints set watched_since = watched_since - interval '11 min'")

    states = [len(silence.silent(conn)) for _ in range(3)]

    assert states == [1, 1, 1] and [level for level, _ in told] == ["error"]
    assert client.get(f"/api/webhook-endpoints/{watched.id}").json["silent_since"] is not None
    text = scraping.text(system).decode()
    assert f'agentflow_webhook_silence{{endpoint="{watched.id}",source="github"}} 1.0' in text
    client.post(watched.path, data=b"{}")  # refused: this is not the sender
    assert len(silence.silent(conn)) == 1
    watched.post(b"{}")
    assert [len(silence.silent(conn)) for _ in range(2)] == [0, 0]
    assert [level for level, _ in told] == ["error", "info"]
    assert client.get(f"/api/webhook-endpoints/{watched.id}").json["silent_since"] is None
    conn.execute("update agentflow.webhook_events set received_at = received_at - interval '11 min'")
    conn.execute("update agentflow.webhook_endpoints set disabled_at = clock_timestamp()")
    assert silence.silent(conn) == []


def test_old_events_go_in_batches_but_for_those_that_are_still_to_be_handled(
    client: FlaskClient, conn: Connection, system: System
) -> None:
    endpoint = make(client, "github", config={"entity": "/id", "version": "/at"})
    for number in range(4):
        endpoint.send({"id": number, "at": 1_700_000_000 + number}, id=str(number))
    old = events.first_id_of(datetime.now(UTC) - timedelta(days=31)).int
    ids = conn.execute("select id from agentflow.webhook_events order by id").fetchall()
    for number, (event_id,) in enumerate(ids[:3]):
        conn.execute("update agentflow.webhook_events set id = %s where id = %s", (_id(old + number), event_id))
    conn.execute(
        "update agentflow.jobs set state = 'cancelled', finished_at = clock_timestamp(), wake_at = null, sent_at = null"
        " where id in (select job_id from agentflow.webhook_events order by id limit 2)"
    )

    assert delete_events(conn, days=30, limit=1) == 1
    assert cleaned_up(system)["clean_up.webhooks"] == 1

    assert value(conn, "select count(*) from agentflow.webhook_events") == 2
    conn.execute(
        "insert into agentflow.webhook_entities values (1, %s, 'a', now(), now()), (1, %s, 'b', now(), now() - interval '31 d')",
        (endpoint.id, endpoint.id),
    )
    assert order.delete_old(conn, days=30) == 1


def _id(number: int) -> Any:
    from uuid import UUID

    return UUID(int=number)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1_700_000_000, "2023-11-14T22:13:20+00:00"),
        ("1700000000", "2023-11-14T22:13:20+00:00"),
        (1_700_000_000_000, "2023-11-14T22:13:20+00:00"),
        ("2023-11-14T22:13:20Z", "2023-11-14T22:13:20+00:00"),
        ("2023-11-14T23:13:20+01:00", "2023-11-14T23:13:20+01:00"),
        ("2023-11-14 22:13:20", "2023-11-14T22:13:20+00:00"),
        (True, None), (0, None), (-5, None), (1e300, None), ("nan", None), ("inf", None), ("soon", None), (None, None),
        ("0001-01-01T00:00:00+14:00", None), ("9" * 400, None), ([], None),
    ],
)  # fmt: skip
def test_a_time_is_read_as_senders_write_it(written: Any, expected: str | None) -> None:
    found = moment_of(written)

    assert (found.isoformat() if found else None) == expected
