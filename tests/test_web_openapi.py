"""The OpenAPI document is right, and the API keeps to it under a machine's guesses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient
from openapi_spec_validator import validate

from agentflow.jobs import records
from agentflow.system import System
from tests import graph_support, render_support
from tests.conftest import ADMIN_KEY
from tests.processes import BIN
from tests.web_support import Web, client, count, gunicorn, problem, run
from web.problems import phrase

__all__ = ["client"]

KOMMO = dict.fromkeys(("KOMMO_CLIENT_ID", "KOMMO_CLIENT_SECRET", "KOMMO_REDIRECT_URI"), "x")

#: 413, 414 and 431 depend on sizes that no schema says; 422 on what it cannot say (a type's payload, a public address).
CONFIG = """
[parameters]
job_id = "{failed}"
callback_id = "{callback}"
task_id = "{task}"
video_id = "{video}"
batch_id = "{batch}"
key_id = "{key}"
schedule_id = "{schedule}"
document_id = "{document_id}"
entity_id = "{entity_id}"
edge_id = "{edge_id}"
merge_id = "{merge_id}"
from_id = "{from_id}"
to_id = "{to_id}"
account_id = "{account}"
endpoint_id = "{endpoint}"
event_id = "{event}"
render_id = "{render}"
name = "{workflow}"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "400", "401", "403", "404", "408", "409", "413", "414", "416", "422", "431"]

# A guess that is too long is refused before anybody reads what is wrong with it.
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "406", "409", "413", "414", "422", "428", "431", "5xx"]

# Cancelled already: every guess is answered 200.
[[operations]]
include-path = "/api/jobs/{{job_id}}/cancel"
parameters = {{ job_id = "{cancelled}" }}

[[operations]]
include-path = "/api/jobs/{{job_id}}/run-now"
parameters = {{ job_id = "{later}" }}

[[operations]]
include-path = "/api/keys/{{key_id}}/revoke"
parameters = {{ key_id = "{revoked}" }}

[[operations]]
include-path = "/api/batches/{{batch_id}}/callbacks/{{callback_id}}/replay"
parameters = {{ callback_id = "{batch_callback}" }}

[[operations]]
include-name = "DELETE /api/schedules/{{schedule_id}}"
parameters = {{ schedule_id = "{unwanted}" }}

# The first guess removes it.
[[operations]]
include-name = "DELETE /api/crm/accounts/{{account_id}}"
parameters = {{ account_id = "{removed}" }}

[[operations]]
include-path = "/crm/oauth/callback"
parameters = {{ state = "{state}", referer = "example.kommo.com", code = "c" }}

[[operations]]
include-name = "DELETE /api/knowledge/documents/{{document_id}}"
parameters = {{ document_id = "{deleted_document}" }}

# What a form holds is read as text: no file is wrong, nor a title that looks like a number.
[[operations]]
include-name = "POST /api/knowledge/documents"
checks.negative_data_rejection.enabled = false

# The same of its images.
[[operations]]
include-name = "POST /api/renders"
checks.negative_data_rejection.enabled = false

[[operations]]
include-name = "DELETE /api/workflows/{{name}}"
parameters = {{ name = "{deleted_workflow}" }}

# Texts in a form and the bare bytes of an upload mean nothing to the API: there is no wrong file.
[[operations]]
include-name = "POST /api/videos"
checks.negative_data_rejection.enabled = false

# Any body may be a webhook's.
[[operations]]
include-path = "/webhooks/{{source}}/{{token}}"
parameters = {{ source = "kommo", token = "{token}" }}
checks.negative_data_rejection.enabled = false

# A file's own type stands in the place of `*/*`, and any query that is not signed is 403 before it is wrong.
[[operations]]
include-path = "/api/artefacts/{{key}}/flight"
parameters = {{ key = "o/1/renders/{render}/one.png" }}

[[operations]]
include-path = "/artefacts/{{key}}"
parameters = {{ key = "{file}", expires = "{expires}", signature = "{signature}" }}
checks.negative_data_rejection.enabled = false
"""


def test_the_document_is_valid_and_names_every_route(client: FlaskClient) -> None:
    document = client.get("/openapi.json").json

    validate(document)
    said = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    served = {
        (
            method,
            rule.rule.replace("<uuid:", "{")
            .replace("<path:", "{")
            .replace("<workflow:", "{")
            .replace("<", "{")
            .replace(">", "}"),
        )
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(("/docs", "/openapi.json", "/dashboard"))
    }
    assert said == served
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert {"414", "500", "503"} <= set(operation["responses"])
            assert ("401" in operation["responses"]) or not path.startswith("/api/")
            for status, answer in operation["responses"].items():
                if status[0] in "45" and not path.startswith("/health"):
                    assert list(answer["content"]) == ["application/problem+json"]


def test_the_documentation_needs_no_internet(client: FlaskClient) -> None:
    page = client.get("/docs")

    assert page.status_code == 200
    assert "http://" not in page.text and "https://" not in page.text
    assert "script-src" not in page.headers["Content-Security-Policy"]
    for name in ("swagger_bundle.js", "swagger_style.css", "start.js"):
        assert f"/docs/{name}" in page.text
        assert client.get(f"/docs/{name}").status_code == 200
    assert "/openapi.json" in client.get("/docs/start.js").text
    assert client.get("/docs/..%2f__init__.py").status_code == 404
    assert client.get("/docs/redoc.js").status_code == 404


def test_every_object_of_an_answer_is_closed(client: FlaskClient) -> None:
    """Or a field that nobody described could slip out, and no guess would notice."""
    document = client.get("/openapi.json").json
    answers = [
        answer["content"]
        for operations in document["paths"].values()
        for operation in operations.values()
        for answer in operation["responses"].values()
        if "content" in answer
    ]
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(answers)))
    while (
        more := {
            name
            for each in named
            for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(document["components"]["schemas"][each]))
        }
        - named
    ):
        named |= more

    assert len(named) > 25
    for name in named:
        schema = document["components"]["schemas"][name]
        assert schema.get("additionalProperties") is False or "enum" in schema, name


def test_a_machine_that_guesses_finds_no_way_around_the_document(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    cases = guessed(environment, system, conn, tmp_path, "--seed", "7", "--max-examples", "3")

    assert cases >= 500


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_machine_that_guesses_thousands_of_times_finds_none_either(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path, seed: str
) -> None:
    cases = guessed(environment, system, conn, tmp_path, "--seed", seed, "--max-examples", "100", within_s=1500)

    assert cases >= 2500


def guessed(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    tmp_path: Path,
    *arguments: str,
    within_s: int = 240,
) -> int:
    """Run schemathesis with all its checks on everything; every operation must have been reached. Returns the number of cases."""
    config, report = tmp_path / "schemathesis.toml", tmp_path / "report.har"
    # Guesses with wrong keys come by the hundred.
    # Nobody asks a model here, but one has to be set for a graph to be asked for.
    model = {"LLM_BASE_URL": "http://127.0.0.1:9/v1", "LLM_MODEL": "m"}
    with gunicorn(environment, tmp_path, AUTH_FAILURES_PER_MINUTE="1000000", **model, **KOMMO) as web:
        config.write_text(CONFIG.format(**things(web, system, conn)))
        before = count(conn)
        guesses = subprocess.run(
            [
                *(str(BIN / "schemathesis"), "--config-file", str(config), "run", f"{web.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {ADMIN_KEY}", "--checks", "all", "--continue-on-failure"),
                *("--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--generation-database", "none"),
                *("--report", "har", "--report-har-path", str(report), "--no-color", *arguments),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=within_s,
        )
        print(guesses.stdout[-6000:])
        assert guesses.returncode == 0, guesses.stdout[-8000:] + guesses.stderr[-2000:]
        entries = json.loads(report.read_text())["log"]["entries"]
        assert unreached(web.http.get("/openapi.json").json(), entries) == []
        assert count(conn) > before + 2  # retries and new jobs: it got past the checks
        assert web.http.get("/health").json()["status"] == "ok"
        assert "not foreseen" not in web.process.text()
    return len(entries)


def things(web: Web, system: System, conn: psycopg.Connection) -> dict[str, str]:
    """Ids of what is there, so that guesses get past the 404."""
    url = "https://8.8.8.8/done"
    body = {"jobs": [{"type": "ping", "callback_url": url}, {"type": "ping"}], "callback_url": url}
    batch = web.http.post("/api/jobs/batch", json=body).json()
    failed, cancelled = batch["ids"]
    run(system, conn, failed, "failed", error={"message": "no"})  # ended: nobody has to wait for it
    web.http.post(f"/api/jobs/{cancelled}/cancel").raise_for_status()
    later = web.http.post("/api/jobs", json={"type": "ping", "run_at": "2100-01-01T00:00:00Z"}).json()["id"]
    task = web.http.post("/api/videos/analyze", json={"url": "https://8.8.8.8/film.mp4"}).json()
    run(system, conn, task["task_id"], "failed", error={"message": "no"})
    system.storage.put_bytes("o/1/x.png", b"x" * 100)
    link = parse_qs(urlsplit(system.links.sign("o/1/x.png", lifetime_s=86_400)).query)

    def callback(subject: str) -> str:
        return str(records.children(conn, UUID(subject))[0].id)

    def account() -> str:
        given = {"host": "example.kommo.com", "token": "t"}
        return str(web.http.post("/api/crm/accounts", json=given).json()["id"])

    begun = web.http.post("/api/crm/authorizations", json={}).json()
    connected = account()
    conn.execute("update agentflow.crm_accounts set deletions_held = 5")  # to be confirmed

    def key() -> str:
        return str(web.http.post("/api/keys", json={"name": "x", "scopes": ["read"]}).json()["id"])

    def schedule(name: str) -> str:
        return str(web.http.post("/api/schedules", json={"name": name, "every_s": 3600, "type": "ping"}).json()["id"])

    kommo = {"source": "kommo", "name": "x", "config": {"account_id": "0197d0a0-0000-7000-8000-000000000001"}}
    path = web.http.post("/api/webhook-endpoints", json=kommo).json()["path"]
    endpoint = web.http.post("/api/webhook-endpoints", json={"source": "github", "name": "x"}).json()["id"]

    def document() -> str:
        return str(web.http.post("/api/knowledge/documents", json={"text": "A text."}).json()["document_id"])

    def workflow(name: str) -> str:
        body = {"name": name, "graph": render_support.colour()}
        return str(web.http.post("/api/workflows", json=body).json()["name"])

    render = web.http.post("/api/renders", json={"workflow": "smoke"}).json()["id"]
    web.http.post(f"/api/jobs/{render}/cancel").raise_for_status()  # ended: nobody has to wait for it

    return {
        "render": render,
        "workflow": workflow("colour"),
        "deleted_workflow": workflow("unwanted"),
        "endpoint": endpoint,
        "event": web.http.post(path, content=b"leads[add][0][id]=1").json()["event_id"],
        "token": path.rpartition("/")[2],
        "failed": failed,
        "cancelled": cancelled,
        "later": later,
        "callback": callback(failed),
        "batch": batch["batch_id"],
        "batch_callback": callback(batch["batch_id"]),
        "task": task["task_id"],
        "video": task["video_id"],
        "key": key(),
        "deleted_document": document(),
        "revoked": key(),
        "schedule": schedule("kept"),
        "unwanted": schedule("unwanted"),
        "account": connected,
        "removed": account(),
        "state": parse_qs(urlsplit(begun["url"]).query)["state"][0],
        "file": "o/1/x.png",
        "expires": link["expires"][0],
        "signature": link["signature"][0],
        **graph_support.small_graph(conn, 1),
    }


def unreached(document: dict[str, Any], entries: list[dict[str, Any]]) -> list[str]:
    """Operations that no guess got a 2xx (or the redirect that is meant) from."""
    missing = []
    for path, operations in document["paths"].items():
        # `{key}` of a stored file goes over slashes.
        pattern = re.compile(re.sub(r"{\w+}", ".+" if "/artefacts/" in path else "[^/]+", path))
        for method in operations:
            reached = any(
                entry["request"]["method"] == method.upper()
                and 200 <= entry["response"]["status"] < (303 if path == "/" else 300)
                and pattern.fullmatch(unquote(urlsplit(entry["request"]["url"]).path))
                for entry in entries
            )
            if not reached:
                missing.append(f"{method.upper()} {path}")
    return missing


def test_statuses_have_the_names_of_rfc_9110_with_every_python(client: FlaskClient) -> None:
    named = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}

    assert {status: phrase(status) for status in (404, *named)} == {404: "Not Found"} | named
    assert problem(client.post("/api/jobs", json={}), 422)["title"] == "Unprocessable Content"
