"""Nobody reaches what is another organization's: every statement names whose rows it means (conftest.py looks at those of the
whole run), and every route of the API is walked with foreign ids and with keys that open nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import organizations, settings, signing
from agentflow.jobs import batches, records, retention
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import graph
from agentflow.organizations import SCOPES, Scope
from agentflow.system import System
from tests import graph_support, render_support, statements
from tests.calendar_support import cleaned_up
from tests.conftest import ADMIN_KEY, RECORDER
from tests.statements import IN_REQUESTS, SYSTEM_WIDE, Statement, problem_of
from tests.web_support import claim, count, finish, problem
from web import create_app

#: High, so that no other number in a statement is taken for them.
MINE, THEIRS = 7_700_001, 7_700_002


@dataclass
class Tenant:
    organization_id: int
    key: str
    client: FlaskClient


@pytest.fixture
def app(environment: dict[str, str], conn: psycopg.Connection) -> Iterator[Any]:
    for number, slug in ((MINE, "mine"), (THEIRS, "theirs")):
        conn.execute(
            "insert into agentflow.organizations (id, slug, name) values (%s, %s, %s)", (number, slug, slug.title())
        )
    kommo = dict.fromkeys(("KOMMO_CLIENT_ID", "KOMMO_CLIENT_SECRET", "KOMMO_REDIRECT_URI"), "x")
    system = System.start(settings.load({**environment, **kommo, "AUTH_FAILURES_PER_MINUTE": "100000"}), "test")
    yield create_app(system)
    system.close()


def client_of(app: Any, key: str | None, **headers: str) -> FlaskClient:
    client: FlaskClient = app.test_client()
    if key is not None:
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    for name, value in headers.items():
        client.environ_base[f"HTTP_{name.upper()}"] = value
    return client


def tenant(app: Any, conn: psycopg.Connection, organization_id: int, *scopes: Scope) -> Tenant:
    _, key = organizations.create_key(conn, organization_id, "test", scopes or SCOPES)
    return Tenant(organization_id, key, client_of(app, key))


@pytest.fixture
def mine(app: Any, conn: psycopg.Connection) -> Tenant:
    return tenant(app, conn, MINE)


@pytest.fixture
def theirs(app: Any, conn: psycopg.Connection) -> Tenant:
    return tenant(app, conn, THEIRS)


def things_of(owner: Tenant, system: System, conn: psycopg.Connection) -> dict[str, str]:
    """One of everything that has an id, and that this organization owns."""
    batch = owner.client.post(
        "/api/jobs/batch", json={"jobs": [{"type": "ping"}], "callback_url": "http://8.8.8.8/"}
    ).json
    failed = owner.client.post("/api/jobs", json={"type": "ping", "callback_url": "http://8.8.8.8/"}).json
    finish(system, conn, claim(conn, failed["id"]), "failed", error={"code": "no", "message": "No."})
    finish(system, conn, claim(conn, batch["ids"][0]), "failed", error={"code": "no", "message": "No."})
    (callback,) = records.children(conn, UUID(failed["id"]))
    task = owner.client.post("/api/videos/analyze", json={"url": "http://8.8.8.8/film.mp4"}).json
    (key,) = organizations.keys(conn, owner.organization_id)
    owner.client.post("/api/callback-secrets", json={})
    schedule = owner.client.post("/api/schedules", json={"name": "hourly", "every_s": 3600, "type": "ping"}).json
    account = owner.client.post("/api/crm/accounts", json=BODIES["/api/crm/accounts"]).json
    config = {"account_id": str(uuid4())}
    endpoint = owner.client.post("/api/webhook-endpoints", json={"source": "kommo", "name": "x", "config": config}).json
    event = owner.client.post(endpoint["path"], data=b"leads[add][0][id]=1").json
    render = owner.client.post("/api/renders", json={"workflow": "smoke"}).json
    workflow = owner.client.post("/api/workflows", json={**BODIES["/api/workflows"], "name": f"w-{uuid4()}"}).json
    return {
        "render_id": render["id"],
        "key": f"o/{owner.organization_id}/renders/{render['id']}/one.png",
        "name": workflow["name"],
        "endpoint_id": endpoint["id"],
        "event_id": event["event_id"],
        "schedule_id": schedule["id"],
        "account_id": account["id"],
        "job_id": failed["id"],
        "batch_id": batch["batch_id"],
        "callback_id": str(callback.id),
        "video_id": task["video_id"],
        "task_id": task["task_id"],
        "key_id": str(key.id),
        **graph_support.small_graph(conn, owner.organization_id),
    }


BODIES: dict[str, Any] = {
    "/api/jobs": {"type": "ping"},
    "/api/jobs/batch": {"jobs": [{"type": "ping"}]},
    "/api/videos": {"url": "http://8.8.8.8/film.mp4"},
    "/api/knowledge/documents": {"text": "A text."},
    "/api/organizations": {"slug": "another"},
    "/api/keys": {"name": "x", "scopes": ["read"]},
    "/api/callback-secrets": {},
    "/api/keys/{key_id}/rotate": {},
    "/api/schedules": {"name": "another", "every_s": 3600, "type": "ping"},
    "/api/schedules/{schedule_id}": {"name": "renamed"},
    "/api/graph/documents/{document_id}": {},
    "/api/graph/types": {"entities": [{"name": "ship"}], "relations": []},
    "/api/rules/pause": {"pause": "type", "name": "ping"},
    "/api/rules/resume": {"resume": "type", "name": "ping"},
    "/api/rules/cap": {"type": "ping", "running": 3},
    "/api/rules/limit": {"provider": "openrouter", "windows": [{"amount": 100, "per_s": 60}]},
    "/api/rules/budget": {"measure": "usd", "per_day": 5},
    "/api/crm/accounts": {"host": "example.kommo.com", "token": "t"},
    "/api/crm/accounts/{account_id}": {"name": "x"},
    "/api/crm/accounts/{account_id}/sync": {},
    "/api/crm/accounts/{account_id}/plan": {},
    "/api/crm/accounts/{account_id}/leads": {"items": [{"name": "x"}]},
    "/api/crm/accounts/{account_id}/contacts": {"items": [{"name": "x"}]},
    "/api/crm/accounts/{account_id}/tasks": {"items": [{"text": "x"}]},
    "/api/crm/accounts/{account_id}/notes": {"items": [{"params": {"text": "x"}}]},
    "/api/crm/authorizations": {},
    "/api/renders": {"workflow": "smoke"},
    "/api/workflows": {"name": "colour", "graph": render_support.colour()},
    "/api/workflows/check": {"workflow": "smoke"},
    "/api/webhook-endpoints": {"source": "github", "name": "x"},
    "/api/webhook-endpoints/{endpoint_id}": {"name": "x", "config": {"account_id": str(uuid4())}},
    "/api/webhook-endpoints/{endpoint_id}/rotate": {"kind": "token"},
    "/api/webhook-events/{event_id}/replay": {},
    "/api/webhook-events/replay": {},
    "/api/knowledge/models": {"model": "local/universal-sentence-encoder-multilingual-3"},
}
QUERIES: dict[str, dict[str, str]] = {"/api/knowledge/search": {"q": "anything"}}


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    scope: str

    @property
    def names(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.path)

    def ask(self, client: FlaskClient, things: Mapping[str, str]) -> Any:
        body = BODIES.get(self.path)
        if self.path == "/api/videos/analyze":
            body = {"video_id": things["video_id"]}
        path = re.sub(r"{(\w+)}", lambda match: things[match.group(1)], self.path)
        json = body if self.method != "GET" else None
        return client.open(path, method=self.method, json=json, query_string=QUERIES.get(self.path))


def routes(app: Any) -> list[Route]:
    document = app.test_client().get("/openapi.json").json
    found = []
    for path, operations in document["paths"].items():
        for method, said in operations.items():
            if said["security"]:
                ((scope,),) = [list(each["key"]) for each in said["security"]]
                assert {"401", "403", "429"} <= set(said["responses"])
                found.append(Route(method.upper(), path, scope))
            else:
                assert not path.startswith("/api/"), f"{path} asks for no key"
    return found


ANYTHING: Mapping[str, str] = defaultdict(lambda: str(uuid4()))


# ---- routes ----


def test_every_route_that_names_a_thing_answers_404_to_another_organization(
    app: Any, mine: Tenant, theirs: Tenant, system: System, conn: psycopg.Connection
) -> None:
    things = things_of(theirs, system, conn)
    operator = client_of(app, ADMIN_KEY, x_organization="mine")
    before = snapshot(conn)
    walked = []
    for route in routes(app):
        if not route.names and route.path != "/api/videos/analyze":
            continue
        stranger = operator if route.scope == "admin" else mine.client

        problem(route.ask(stranger, things), 404)

        walked.append(route.path)
        # And it is there: its owner gets another answer.
        owner = client_of(app, ADMIN_KEY, x_organization="theirs") if route.scope == "admin" else theirs.client
        if route.method == "GET":
            assert route.ask(owner, things).status_code == 200, route
    assert len(walked) >= 15
    assert snapshot(conn) == before


def test_every_list_holds_only_the_callers_own(
    app: Any, mine: Tenant, theirs: Tenant, system: System, conn: psycopg.Connection
) -> None:
    things = things_of(theirs, system, conn)
    operator = client_of(app, ADMIN_KEY, x_organization="mine")
    for route in routes(app):
        if route.method == "GET" and not route.names and route.path != "/api/organizations":
            answer = route.ask(operator if route.scope == "admin" else mine.client, things)

            assert answer.status_code == 200, route
            if route.path not in (
                "/api/keys",
                "/api/system/stats",
            ):  # mine has a key of its own; stats are the operator's
                assert not [thing for thing in things.values() if thing in answer.text], route
    assert theirs.client.get("/api/jobs").json["jobs"] and mine.client.get("/api/jobs").json["jobs"] == []
    assert {k["organization_id"] for k in operator.get("/api/keys").json["keys"]} == {MINE}
    assert operator.get("/api/jobs").json["jobs"] == []
    theirs_due = {q["name"]: q for q in theirs.client.get("/api/system/queue-stats").json["queues"]}
    mine_due = {q["name"]: q for q in mine.client.get("/api/system/queue-stats").json["queues"]}
    assert sum(q["due"] for q in theirs_due.values()) > 0 == sum(q["due"] + q["running"] for q in mine_due.values())
    filters = (f"batch_id={things['batch_id']}", f"parent_id={things['job_id']}", "type=ping", "state=failed")
    assert [mine.client.get(f"/api/jobs?{each}").json["jobs"] for each in filters] == [[]] * 4


def snapshot(conn: psycopg.Connection) -> list[int]:
    tables = (
        "jobs",
        "batches",
        "videos",
        "api_keys",
        "callback_secrets",
        "idempotency_keys",
        "unique_keys",
        "schedules",
        "crm_accounts",
    )
    tables += (*graph_support.TABLES, "graph_types")
    tables += ("pauses", "caps", "rate_limits", "budgets")
    tables += ("job_logs", "webhook_endpoints", "webhook_credentials", "webhook_events", "chunks", "workflows")
    return [count(conn, table) for table in tables]


def test_every_route_refuses_whoever_has_no_good_key(app: Any, mine: Tenant, conn: psycopg.Connection) -> None:
    revoked, expired = tenant(app, conn, MINE), tenant(app, conn, MINE)
    conn.execute("update agentflow.api_keys set revoked_at = clock_timestamp() where prefix = %s", (revoked.key[:15],))
    conn.execute(
        "update agentflow.api_keys set expires_at = clock_timestamp() - interval '1 s' where prefix = %s",
        (expired.key[:15],),
    )
    changed = mine.key[:-1] + ("A" if mine.key[-1] != "A" else "B")
    strangers: dict[str, FlaskClient] = {
        "none": client_of(app, None),
        "wrong": client_of(app, "af_000000000000_" + "x" * 43),
        "almost": client_of(app, changed),
        "the prefix": client_of(app, mine.key[:15]),
        "revoked": revoked.client,
        "expired": expired.client,
        "no bearer": client_of(app, None, authorization=f"Basic {mine.key}"),
    }
    before = snapshot(conn)
    for route in routes(app):
        for who, stranger in strangers.items():
            answer = route.ask(stranger, ANYTHING)

            said = problem(answer, 401)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer"), who
            if who in ("revoked", "expired"):
                assert who in said["detail"]
    assert snapshot(conn) == before


def test_every_route_names_the_scope_that_a_key_lacks(app: Any, conn: psycopg.Connection) -> None:
    all_but = {scope: tenant(app, conn, MINE, *[s for s in SCOPES if s != scope]).client for scope in SCOPES}
    whole = tenant(app, conn, MINE).client
    before = snapshot(conn)
    scopes = set()
    for route in routes(app):
        answer = route.ask(whole if route.scope == "admin" else all_but[route.scope], ANYTHING)  # type: ignore[index]

        said = problem(answer, 403)
        assert ("operator" if route.scope == "admin" else f"`{route.scope}`") in said["detail"]
        assert f'scope="{route.scope}"' in answer.headers["WWW-Authenticate"]
        scopes.add(route.scope)
    assert scopes == {*SCOPES, "admin"}
    assert snapshot(conn) == before


def test_one_scope_is_enough_for_what_it_is_for(app: Any, conn: psycopg.Connection) -> None:
    for route in routes(app):
        if route.scope == "admin":
            continue
        client = tenant(app, conn, MINE, route.scope).client  # type: ignore[arg-type]

        assert route.ask(client, ANYTHING).status_code in (200, 201, 202, 204, 404), route


def test_the_operator_sees_all_and_acts_for_whom_he_names(
    app: Any, mine: Tenant, theirs: Tenant, system: System, conn: psycopg.Connection
) -> None:
    things = things_of(theirs, system, conn)
    everybody = client_of(app, ADMIN_KEY)
    for route in routes(app):
        if route.method == "GET":
            assert route.ask(everybody, things).status_code == 200, route
    made = everybody.post("/api/jobs", json={"type": "ping"}).json
    assert made["organization_id"] == 1
    assert client_of(app, ADMIN_KEY, x_organization="mine").post("/api/jobs", json={"type": "ping"}).json[
        "organization_id"
    ] == (MINE)
    retried = everybody.post(f"/api/jobs/{things['job_id']}/retry").json
    assert retried["organization_id"] == THEIRS
    assert everybody.post(f"/api/jobs/{retried['id']}/cancel").json["state"] == "cancelled"
    analysed = everybody.post("/api/videos/analyze", json={"video_id": things["video_id"]}).json
    assert theirs.client.get(f"/api/videos/task/{analysed['task_id']}/status").status_code == 200
    wrong = client_of(app, ADMIN_KEY, x_organization="nobody").get("/api/jobs")
    assert problem(wrong, 422)["errors"][0] == {
        "field": "X-Organization",
        "problem": "names no organization, neither by slug nor by number",
        "where": "header",
    }
    assert client_of(app, mine.key, x_organization="mine").get("/api/jobs").status_code == 200
    problem(client_of(app, mine.key, x_organization="theirs").get("/api/jobs"), 403)


def test_keys_of_two_organizations_do_not_meet_in_idempotency_concurrency_or_uniqueness(
    mine: Tenant, theirs: Tenant, conn: psycopg.Connection
) -> None:
    body = {"type": "ping", "concurrency_key": "k", "unique": {"key": "u"}}
    first = mine.client.post("/api/jobs", json=body, headers={"Idempotency-Key": "i"})
    second = theirs.client.post("/api/jobs", json=body, headers={"Idempotency-Key": "i"})

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json["id"] != second.json["id"]
    keys = conn.execute("select concurrency_key from agentflow.jobs order by 1").fetchall()
    assert [row[0] for row in keys] == [f"{MINE}:k", f"{THEIRS}:k"]


def test_a_follower_of_another_organizations_job_is_not_let_in(mine: Tenant, theirs: Tenant) -> None:
    job = theirs.client.post("/api/jobs", json={"type": "ping"}).json["id"]

    problem(mine.client.get(f"/api/jobs/{job}/events"), 404)
    problem(mine.client.get(f"/api/jobs/{job}?wait=5"), 404)


# ---- statements ----


def test_the_statements_of_a_whole_life_are_heard_and_each_names_its_organization(
    app: Any, mine: Tenant, system: System, conn: psycopg.Connection
) -> None:
    """The tables and the exceptions that are meant are really met: an empty ear would pass everything."""
    RECORDER.texts.clear()
    things = things_of(mine, system, conn)
    for route in sorted(routes(app), key=lambda each: each.method == "DELETE"):
        if route.scope != "admin":
            route.ask(mine.client, things)
    with system.database.transaction() as pooled:
        prepared = [system.prepare(MINE, NewJob("ping", {}, idempotency_key="b"))]
        batches.submit(pooled, MINE, prepared, idempotency_key="b")
        signing.live_secrets(pooled, MINE, system.sealer)
        graph.forget_document(pooled, MINE, UUID(things["document_id"]))
    cleaned_up(system)

    heard = set().union(*(statements.tables_of(text) for text in RECORDER.texts))

    # Rows of `attempts` are written by settle alone, and read through the view.
    assert {
        *("jobs", "job_attempts", "batches", "videos", "idempotency_keys", "unique_keys"),
        *("api_keys", "callback_secrets", "callback_attempts", "schedules", "ticks", "doomed_files"),
        *(*graph_support.TABLES, "graph_types"),
        *("crm_accounts", "crm_entities", "crm_drift", "sync_runs"),
        *("webhook_endpoints", "webhook_credentials", "webhook_events", "webhook_entities"),
        *("documents", "chunks"),
    } <= heard
    assert RECORDER.problems == []


def test_every_table_with_an_organization_counts_as_a_tenants(conn: psycopg.Connection) -> None:
    rows = conn.execute(
        "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'organization_id'"
        " where c.relnamespace = 'agentflow'::regnamespace and c.relkind in ('r', 'p')"
    ).fetchall()

    assert len(rows) >= 8
    assert {row[0] for row in rows} & statements.SHARED == set()


@pytest.mark.parametrize(
    ("text", "values", "acting_for", "wrong"),
    [
        ("select id from agentflow.jobs where id = %s", (MINE,), None, "names no organization"),
        ("select id from agentflow.jobs where organization_id = %s", (MINE,), None, None),
        ("select id from agentflow.jobs where organization_id = %s", (THEIRS,), MINE, "is not for organization"),
        ("select id from agentflow.jobs where organization_id = %s", (MINE,), MINE, None),
        ("insert into agentflow.videos (id, organization_id) values (%s, %s)", (1, THEIRS), MINE, "is not for"),
        ("insert into agentflow.videos (id) values (%s)", (1,), None, "names no organization"),
        ("select * from agentflow.relay_5(%s)", ("default",), None, None),
        ("select * from agentflow.relay_5(%s)", ("default",), MINE, "names no organization"),
        (
            "select j.id from agentflow.jobs j join agentflow.batches b on b.organization_id = j.organization_id",
            (),
            None,
            "names",
        ),
        ("delete from agentflow.jobs", (), None, "names no organization"),
        ("select * from agentflow.forget_1(%s)", (), None, "names no organization"),
        ("select 1", (), MINE, None),
    ],
)
def test_a_statement_that_forgets_is_told_from_one_that_does_not(
    text: str, values: tuple[Any, ...], acting_for: int | None, wrong: str | None
) -> None:
    found = problem_of(Statement(text, values, {}, acting_for))

    assert found is None if wrong is None else found is not None and wrong in found


def test_a_statement_of_the_product_that_forgets_fails_its_test(
    system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RECORDER.problems == []
    forgetful = compile('conn.execute("select count(*) from agentflow.videos")', "agentflow/videos.py", "exec")
    with system.database.connection() as pooled:
        exec(forgetful, {"conn": pooled})  # noqa: S102 - what a test asks by itself does not count

    assert len(RECORDER.problems) == 1 and "agentflow.videos" in RECORDER.problems[0]
    RECORDER.problems.clear()


def test_a_look_by_the_wrong_organization_within_a_request_is_noticed(
    mine: Tenant, theirs: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = theirs.client.post("/api/jobs", json={"type": "ping"}).json["id"]
    original = records.get
    monkeypatch.setattr(records, "get", lambda conn, _organization, job_id: original(conn, None, job_id))

    assert mine.client.get(f"/api/jobs/{job}").status_code == 200  # the hole

    assert RECORDER.problems and "whose key came with the request" in RECORDER.problems[0]
    RECORDER.problems.clear()


def test_every_exception_has_its_reason() -> None:
    for piece, reason in {**SYSTEM_WIDE, **IN_REQUESTS}.items():
        assert len(reason) > 15, piece
    assert retention.BATCH  # the deletions that are named above are that module's
