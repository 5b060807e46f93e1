"""The OpenAPI document is right, and the API keeps to it under a machine's guesses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
from flask.testing import FlaskClient
from openapi_spec_validator import validate

from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.processes import BIN
from tests.web_support import client, count, gunicorn, run

__all__ = ["client"]

SECONDS = 15
#: 413, 414 and 431 depend on sizes that no schema says; 422 on what it cannot say (a type's payload, a public address).
CONFIG = """
[parameters]
job_id = "{job}"
task_id = "{task}"
video_id = "{video}"
batch_id = "{batch}"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "400", "401", "403", "404", "408", "409", "413", "414", "416", "422", "431"]

# Texts in a form and the bare bytes of an upload mean nothing to the API: there is no wrong file.
[[operations]]
include-path = "/api/videos"
include-method = "POST"
checks.negative_data_rejection.enabled = false

# A file's own type stands in the place of `*/*`, and any query that is not signed is 403 before it is wrong.
[[operations]]
include-path = "/artefacts/{{key}}"
checks.negative_data_rejection.enabled = false
"""


def test_the_document_is_valid_and_names_every_route(client: FlaskClient) -> None:
    document = client.get("/openapi.json").json

    validate(document)
    said = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    served = {
        (method, rule.rule.replace("<uuid:", "{").replace("<path:", "{").replace(">", "}"))
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(("/docs", "/openapi.json"))
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


def test_a_machine_that_guesses_finds_no_way_around_the_document(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    config = tmp_path / "schemathesis.toml"
    with gunicorn(environment, tmp_path) as web:
        batch = web.http.post("/api/jobs/batch", json={"jobs": [{"type": "ping"}] * 2}).json()
        task = web.http.post("/api/videos/analyze", json={"url": "https://example.com/a"}).json()
        run(system, conn, batch["ids"][0], "failed", error={"message": "no"})  # ended: nobody has to wait for it
        run(system, conn, task["task_id"], "failed", error={"message": "no"})
        config.write_text(
            CONFIG.format(job=batch["ids"][0], task=task["task_id"], video=task["video_id"], batch=batch["batch_id"])
        )
        before = count(conn)
        guesses = subprocess.run(
            [
                *(str(BIN / "schemathesis"), "--config-file", str(config), "run", f"{web.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {ADMIN_KEY}", "--seed", "7", "--max-examples", "6"),
                *("--phases", "examples,coverage,fuzzing", "--max-time", str(SECONDS), "--continue-on-failure"),
                *("--request-timeout", "30", "--generation-database", "none", "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS + 60,
        )
        print(guesses.stdout[-6000:])
        assert guesses.returncode == 0, guesses.stdout[-8000:] + guesses.stderr[-2000:]
        assert count(conn) > before + 2  # retries and new jobs: it got past the checks
        assert web.http.get("/health").json()["status"] == "ok"
        assert "not foreseen" not in web.process.text()
