"""The dashboard without a browser: who gets in, what a change has to come with, whose things are seen, what pages are made of."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any, Final
from uuid import uuid4

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from agentflow import organizations, sessions, settings
from agentflow.jobs import history
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.dashboard_support import (
    MINE,
    THEIRS,
    TIMEOUT,
    app,
    fill,
    put_job,
    rich_job,
    tenants,
)
from tests.processes import ROOT
from web import create_app
from web.dashboard import frame, runbook, shown, troubles, words

__all__ = ["app", "tenants"]

DASHBOARD: Final = ROOT / "web" / "dashboard"
STATIC: Final = DASHBOARD / "static"


def sign_in(app: Flask, key: str = ADMIN_KEY) -> FlaskClient:
    client = app.test_client()
    answer = client.post("/dashboard/sign-in", data={"key": key})
    assert answer.status_code == 303, answer.text
    return client


def form_token(client: FlaskClient) -> str:
    cookie = client.get_cookie(frame.COOKIE, path="/dashboard")
    assert cookie is not None
    return sessions.form_token(cookie.value)


def change(client: FlaskClient, path: str, **form: Any) -> TestResponse:
    return client.post(path, data={"form_token": form_token(client), **form})


def state_of(conn: psycopg.Connection, job_id: Any) -> tuple[Any, ...]:
    row = conn.execute(
        "select state, cancel_requested, dealt_with, run_at <= clock_timestamp() from agentflow.jobs where id = %s",
        (job_id,),
    ).fetchone()
    assert row is not None
    return tuple(row)


def page_paths(app: Flask, **values: Any) -> list[str]:
    """Every page, with something in the place of each argument."""
    return [
        filled(rule.rule, 0, values)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("dashboard.")
        and "GET" in (rule.methods or ())
        and rule.endpoint not in ("dashboard.static", "dashboard.nowhere", "dashboard.sign_in")
    ]


def changing_paths(app: Flask, **values: Any) -> list[str]:
    return [
        filled(rule.rule, -1, values)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("dashboard.")
        and "POST" in (rule.methods or ())
        and rule.endpoint != "dashboard.try_key"
    ]


def filled(rule: str, choice: int, values: dict[str, Any]) -> str:
    """An address of the rule: of `any` this choice, another argument's value, or an id that nothing has."""

    def fill_in(match: re.Match[str]) -> str:
        return match[2].split(",")[choice] if match[2] else str(values.get(match[3], uuid4()))

    return re.sub(r"<(?:(\w+)(?:\(([^)]*)\))?:)?(\w+)>", fill_in, rule)


# ---- who gets in ----


def test_a_key_opens_a_session_whose_cookie_says_nothing(
    app: Flask, tenants: dict[str, str], conn: psycopg.Connection
) -> None:
    answer = app.test_client().post(
        "/dashboard/sign-in", data={"key": tenants["mine"]}, headers={"X-Forwarded-Proto": "https"}
    )

    assert answer.status_code == 303 and answer.headers["Location"] == "/dashboard"
    (cookie,) = [each for each in answer.headers.getlist("Set-Cookie") if each.startswith(frame.COOKIE)]
    assert {"HttpOnly", "Secure", "SameSite=Strict", "Path=/dashboard"} <= set(cookie.split("; "))
    assert tenants["mine"] not in cookie
    token = cookie.split(";")[0].split("=", 1)[1]
    (row,) = conn.execute("select hash, organization_id from agentflow.dashboard_sessions").fetchall()
    assert (bytes(row[0]), row[1]) == (hashlib.sha256(token.encode()).digest(), MINE)


def test_another_key_opens_nothing(app: Flask, conn: psycopg.Connection) -> None:
    for key in ("", "wrong", "af_000000000000_" + "x" * 43, ADMIN_KEY + "x", "\x00", "ключ"):
        answer = app.test_client().post("/dashboard/sign-in", data={"key": key})

        assert answer.status_code in (401, 422) and "text/html" in answer.headers["Content-Type"], key
        assert not answer.headers.getlist("Set-Cookie")
    assert conn.execute("select count(*) from agentflow.dashboard_sessions").fetchone() == (0,)


def test_wrong_keys_are_limited_with_those_of_the_api(environment: dict[str, str]) -> None:
    system = System.start(settings.load({**environment, "AUTH_FAILURES_PER_MINUTE": "3"}), "test")
    client = create_app(system).test_client()
    try:
        for _ in range(2):
            assert client.get("/api/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.post("/dashboard/sign-in", data={"key": "wrong"}).status_code == 401

        refused = client.post("/dashboard/sign-in", data={"key": "wrong"})

        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert (
            client.post("/dashboard/sign-in", data={"key": ADMIN_KEY}).status_code == 303
        )  # a right one is never held up
    finally:
        system.close()


@pytest.mark.parametrize("end", ["revoked", "expired", "session over", "signed out"])
def test_a_session_ends_with_its_key_its_time_or_by_the_button(
    app: Flask, tenants: dict[str, str], conn: psycopg.Connection, end: str
) -> None:
    client = sign_in(app, tenants["mine"])
    assert client.get("/dashboard").status_code == 200

    if end == "revoked":
        conn.execute("update agentflow.api_keys set revoked_at = clock_timestamp()")
    elif end == "expired":
        conn.execute("update agentflow.api_keys set expires_at = clock_timestamp()")
    elif end == "session over":
        conn.execute("update agentflow.dashboard_sessions set expires_at = clock_timestamp()")
    else:
        cookie = client.get_cookie(frame.COOKIE, path="/dashboard")
        assert cookie is not None
        assert change(client, "/dashboard/sign-out").status_code == 303
        client.set_cookie(frame.COOKIE, cookie.value, path="/dashboard")  # somebody kept it

    assert client.get("/dashboard").headers["Location"].startswith("/dashboard/sign-in")


def test_another_operators_key_ends_the_operators_sessions(environment: dict[str, str], app: Flask) -> None:
    cookie = sign_in(app).get_cookie(frame.COOKIE, path="/dashboard")
    assert cookie is not None
    system = System.start(settings.load({**environment, "ADMIN_API_KEY": "another-operators-key-0123456789"}), "test")
    try:
        client = create_app(system).test_client()
        client.set_cookie(frame.COOKIE, cookie.value, path="/dashboard")

        assert client.get("/dashboard").status_code == 303
    finally:
        system.close()


def test_whoever_is_not_signed_in_is_sent_to_the_door_and_back_to_a_page_of_ours(app: Flask) -> None:
    for path in page_paths(app, job_id=uuid4()):
        answer = app.test_client().get(path)
        assert (answer.status_code, answer.headers["Location"].split("?")[0]) == (303, "/dashboard/sign-in"), path
        part = app.test_client().get(path, headers={"HX-Request": "true"})
        assert (part.status_code, part.headers["HX-Redirect"]) == (401, "/dashboard/sign-in"), path

    for wanted, leads_to in (
        ("/dashboard/jobs?state=failed", "/dashboard/jobs?state=failed"),
        ("https://example.com/dashboard", "/dashboard"),
        ("//example.com/dashboard", "/dashboard"),
        ("/dashboard\\@example.com", "/dashboard"),
        ("/api/jobs", "/dashboard"),
    ):
        answer = app.test_client().post("/dashboard/sign-in", data={"key": ADMIN_KEY, "next": wanted})
        assert answer.headers["Location"] == leads_to


def test_a_form_of_another_site_signs_nobody_in(app: Flask) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://example.com"}):
        answer = app.test_client().post("/dashboard/sign-in", data={"key": ADMIN_KEY}, headers=headers)

        assert answer.status_code == 403 and not answer.headers.getlist("Set-Cookie")


# ---- changes ----


def test_no_change_without_the_form_token(app: Flask, conn: psycopg.Connection) -> None:
    client, other = sign_in(app), sign_in(app)
    waiting, failed = put_job(conn, "queued"), put_job(conn, "failed", error=TIMEOUT)
    paths = changing_paths(app, job_id=waiting) + changing_paths(app, job_id=failed)
    assert len(paths) >= 10
    for path in paths:
        for form in ({}, {"form_token": ""}, {"form_token": form_token(other)}, {"form_token": "é"}):
            answer = client.post(path, data=form)
            assert answer.status_code == 403 and "text/html" in answer.headers["Content-Type"], path
        assert client.post(path, headers={"X-Form-Token": "no"}).status_code == 403
    assert state_of(conn, waiting) == ("queued", False, None, True) and state_of(conn, failed)[2] is None
    assert conn.execute("select count(*) from agentflow.jobs").fetchone() == (2,)
    assert client.get("/dashboard").status_code == 200


def test_a_key_that_may_only_read_changes_nothing_and_is_shown_no_button(
    app: Flask, tenants: dict[str, str], conn: psycopg.Connection
) -> None:
    client = sign_in(app, tenants["reader"])
    waiting = put_job(conn, "queued", organization_id=MINE)
    put_job(conn, "failed", organization_id=MINE, error=TIMEOUT)

    for path in changing_paths(app, job_id=waiting):
        if not path.endswith("sign-out"):
            assert change(client, path).status_code == 403, path
    assert state_of(conn, waiting) == ("queued", False, None, True)
    assert "/cancel" not in client.get(f"/dashboard/jobs/{waiting}").text
    assert "Lay aside" not in client.get("/dashboard/dead-letters").text


def test_run_now_lets_a_job_go_that_waits_for_a_time_and_no_other(
    app: Flask, system: System, conn: psycopg.Connection
) -> None:
    client = sign_in(app)
    parked = put_job(conn, "queued", run_at="2100-01-01", wake_at="2100-01-01", wait_reason="retry")
    due, running = put_job(conn, "queued"), put_job(conn, "running")

    assert change(client, f"/dashboard/jobs/{parked}/run-now").status_code == 303
    assert change(client, f"/dashboard/jobs/{due}/run-now").status_code == 409
    assert change(client, f"/dashboard/jobs/{running}/run-now").status_code == 409

    assert state_of(conn, parked) == ("queued", False, None, True)
    assert conn.execute("select wait_reason from agentflow.jobs where id = %s", (parked,)).fetchone() == (None,)
    api = app.test_client().post(f"/api/jobs/{due}/run-now", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    assert api.status_code == 409


# ---- whose things ----


def test_what_is_another_organizations_is_not_there(
    app: Flask, tenants: dict[str, str], conn: psycopg.Connection
) -> None:
    client = sign_in(app, tenants["mine"])
    foreign = put_job(
        conn, "failed", organization_id=THEIRS, type="their_type", error=dict(TIMEOUT, message="their secret words")
    )
    put_job(conn, "failed", organization_id=MINE, type="my_type", error=TIMEOUT)
    history.roll_up(conn)

    assert client.get(f"/dashboard/jobs/{foreign}").status_code == 404
    for path in changing_paths(app, job_id=foreign):
        if str(foreign) in path:
            assert change(client, path).status_code == 404, path
    for path in ("/dashboard", "/dashboard/jobs", "/dashboard/jobs?error=secret", "/dashboard/jobs?type=their_type",
                 "/dashboard/dead-letters",
                 f"/dashboard/dead-letters/retry?job={foreign}"):  # fmt: skip
        assert "their secret" not in client.get(path).text, path
        assert str(foreign) not in client.get(path).text, path
    assert sum(client.get("/dashboard/charts").json["failed"]) == 1
    assert client.get(f"/dashboard/dead-letters/retry?group={THEIRS}").status_code == 404
    assert change(client, "/dashboard/dead-letters/discard", group=THEIRS).status_code == 404
    assert change(client, "/dashboard/dead-letters/discard", job=foreign).status_code == 303
    assert state_of(conn, foreign)[2] is None
    assert "Parts and services" not in client.get("/dashboard").text  # the machinery is the operator's
    named = client.get("/dashboard/jobs?organization=theirs").text
    assert "their_type" not in named


def test_the_operator_sees_all_or_the_organization_that_he_names(
    app: Flask, tenants: dict[str, str], conn: psycopg.Connection
) -> None:
    client = sign_in(app)
    put_job(conn, organization_id=THEIRS, type="their_type")
    put_job(conn, organization_id=MINE, type="my_type")

    rows = {name: client.get(f"/dashboard/jobs?part=rows&organization={name}").text for name in ("", "mine", "theirs")}

    assert "my_type" in rows[""] and "their_type" in rows[""]
    assert "my_type" in rows["mine"] and "their_type" not in rows["mine"]
    assert "organization=theirs" in rows["theirs"]  # and the links stay with it
    assert client.get("/dashboard/jobs?organization=nobody").status_code == 404


# ---- what pages are made of ----


def test_every_page_holds_to_the_policy(app: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(app)
    job = rich_job(conn)
    fill(conn, jobs=10)
    for path in [
        *page_paths(app, job_id=job),
        "/dashboard/sign-in",
        "/dashboard/nowhere",
        f"/dashboard/jobs/{uuid4()}",
    ]:
        answer = client.get(path, follow_redirects=True)

        assert "script-src 'self'" in answer.headers["Content-Security-Policy"], path
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
        if answer.mimetype == "text/html":
            assert not re.search(
                r"<style|<script>|\sstyle=|\son[a-z]+=|javascript:|https?://(?!127)[^\"'\s]+\.(js|css)", answer.text
            ), path
    assert client.get("/dashboard/nowhere").status_code == 404


def test_what_cannot_be_understood_is_said_and_is_no_error_of_ours(app: Flask) -> None:
    client = sign_in(app)
    for path in (
        *("?window=2h", "/charts?window=2h", "/dead-letters/burn", "/dead-letters/retry?until=x"),
        *("/jobs?since=yesterday", "/jobs?batch=x", "/jobs?cursor=!", "/jobs?q=%00", "/jobs?error=%22%22"),
        *("/jobs?error=a%20or%20-(", "/dead-letters/retry?job=x", "/dead-letters/retry?group=99999999999999999999"),
    ):
        answer = client.get(f"/dashboard{path}")

        assert answer.status_code in (200, 404, 422), (path, answer.text)


def test_a_part_that_has_not_changed_is_not_sent_again(app: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(app)
    first = client.get("/dashboard/jobs?part=rows")

    again = client.get("/dashboard/jobs?part=rows", headers={"X-Seen": first.headers["X-Part"]})
    put_job(conn)
    changed = client.get("/dashboard/jobs?part=rows", headers={"X-Seen": first.headers["X-Part"]})

    assert (again.status_code, again.data) == (204, b"") and changed.status_code == 200


def test_secrets_are_hidden_wherever_they_stand(app: Flask, conn: psycopg.Connection) -> None:
    key = "af_0123456789ab_" + "k" * 43
    hidden = {"password": "hunter2-0", "nested": [{"Api-Key": "hunter2-1", "bot_token": "hunter2-2"}], "note": f"use {key}",
              "url": "https://me:hunter2-3@example.com/x?a=1&access_token=hunter2-4&b=2"}  # fmt: skip
    shown_too = {"tokens_in": 18200, "key": "o/1/film.mp4", "keyword": "bikes"}
    job = put_job(
        conn,
        "failed",
        payload={**hidden, **shown_too},
        error={"code": "x", "message": "GET https://e.com/?token=hunter2-5", "traceback": "hunter: Bearer hunter2-66"},
    )

    text = sign_in(app).get(f"/dashboard/jobs/{job}").text

    assert "hunter2" not in text and key not in text
    assert "18200" in text and "o/1/film.mp4" in text and "bikes" in text and "b=2" in text


def test_durations_are_written_as_people_do(app: Flask) -> None:
    with app.test_request_context():
        written = [
            shown.lasting(seconds) for seconds in (None, 0, 0.0042, 0.42, 3.24, 12.4, 59.6, 61, 3600, 3725, 90_000, 8e6)
        ]

    assert written == [
        "–",
        "0 ms",
        "4 ms",
        "420 ms",
        "3.2 s",
        "12 s",
        "1 min",
        "1 min 1 s",
        "1 h",
        "1 h 2 min",
        "1 d 1 h",
        "92 d 14 h",
    ]


# ---- words ----


def said_in_pages() -> tuple[set[str], set[str]]:
    """The texts, and the plurals, that templates and modules say."""
    one, many = set(shown.UNITS) - {"{n} ms", "{n} s"}, set()
    text = r'"((?:[^"\\]|\\.)*)"'
    for file in [*DASHBOARD.glob("templates/*.html"), *DASHBOARD.glob("*.py")]:
        source = file.read_text()
        one |= set(re.findall(rf"(?<![\w.])(?:_|say|words\.say)\(\s*{text}", source))
        many |= set(re.findall(rf"(?<!def )plural\(\s*[^\"]*?,\s*\"[^\"]*\",\s*{text}", source))
    return one | {name for _, name, _, _ in frame.SECTIONS}, many


def test_every_text_is_there_in_russian_and_nothing_else() -> None:
    one, many = said_in_pages()
    catalogue = json.loads((DASHBOARD / "ru.json").read_text())

    assert len(one) > 200 and len(many) > 5
    assert {key for key, value in catalogue.items() if isinstance(value, str)} == one
    assert {key for key, value in catalogue.items() if isinstance(value, list)} == many
    for key, value in catalogue.items():
        forms = [value] if isinstance(value, str) else value
        assert len(forms) == (1 if isinstance(value, str) else words.RUSSIAN_FORMS)
        for form in forms:
            assert form.strip() and set(re.findall(r"{\w+}", form)) == set(re.findall(r"{\w+}", key)), key


def test_the_language_is_the_browsers_or_the_one_that_was_chosen(app: Flask) -> None:
    client = app.test_client()
    russian = {"Accept-Language": "ru-RU,ru;q=0.9,en;q=0.5"}

    assert 'lang="en"' in client.get("/dashboard/sign-in", headers={"Accept-Language": "de"}).text
    assert "Войти" in client.get("/dashboard/sign-in", headers=russian).text
    assert "Sign in" in client.get("/dashboard/sign-in?language=en", headers=russian).text
    assert "Sign in" in client.get("/dashboard/sign-in", headers=russian).text  # it is remembered


def test_russian_counts(app: Flask) -> None:
    with app.test_request_context("/?language=ru"):
        said = [words.plural(n, "{n} job", "{n} jobs") for n in (1, 2, 5, 11, 21, 22, 112, 1000)]

    assert said == [
        "1 задача",
        "2 задачи",
        "5 задач",
        "11 задач",
        "21 задача",
        "22 задачи",
        "112 задач",
        "1\u202f000 задач",
    ]


# ---- what is wrong, and the runbook ----


def test_what_is_wrong_is_said_with_its_paragraph(app: Flask, conn: psycopg.Connection) -> None:
    put_job(conn, "queued", age_s=300)

    text = sign_in(app).get("/dashboard").text

    assert "1 job is due in default, and no worker serves it." in text
    assert "No scheduler has run yet" in text
    anchor = runbook.anchor_of("Jobs wait")
    assert f"/dashboard/runbook#{anchor}" in text and f'id="{anchor}"' in sign_in(app).get("/dashboard/runbook").text


def test_every_paragraph_that_is_named_is_in_the_runbook() -> None:
    for beginning in troubles.RUNBOOK.values():
        assert runbook.anchor_of(beginning), beginning


# ---- files of others ----


def test_vendored_files_are_those_of_their_packages() -> None:
    known = json.loads((ROOT / "ops" / "vendor.json").read_text())
    folders = {STATIC / "vendor", ROOT / "tests" / "data" / "axe"}
    expected = set()
    for package in known:
        assert (
            re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", package["integrity"])
            and package["version"]
            and package["licence"]
        )
        for name, file in package["files"].items():
            path = ROOT / file["to"]
            digest = base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()
            assert f"sha384-{digest}" == file["sha384"], (
                f"{path} is not {package['name']} {package['version']}'s {name}"
            )
            expected.add(path)
    assert {path for folder in folders for path in folder.iterdir()} == expected


def test_sessions_that_are_over_are_deleted(app: Flask, conn: psycopg.Connection) -> None:
    sign_in(app)
    sign_in(app)
    conn.execute(
        "update agentflow.dashboard_sessions set expires_at = clock_timestamp()"
        " where hash = (select min(hash) from agentflow.dashboard_sessions)"
    )

    assert sessions.delete_old(conn) == 1
    assert organizations.find(conn, "default") is not None
