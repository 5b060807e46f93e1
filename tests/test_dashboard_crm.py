"""The dashboard's CRM page: states, tokens, lag and runs; and what every button does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import psycopg
import pytest
from flask import Flask
from playwright.sync_api import expect

from agentflow import settings
from agentflow.kommo import accounts, runs, syncing
from agentflow.kommo.runs import Latest
from agentflow.system import System
from tests import dashboard_samples as samples
from tests.dashboard_support import (
    DESKTOP,
    MINE,
    PATIENCE_MS,
    PHONE,
    THEIRS,
    Opened,
    app,
    browser,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT
from tests.test_dashboard import change, sign_in
from tests.test_dashboard_pages import one
from tests.test_query_plans import plans
from web import create_app
from web.dashboard import crm

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)

#: Pages that are others on a phone: tables become cards.
_ANOTHER = ("",)
OAUTH = {
    "KOMMO_CLIENT_ID": "c-1",
    "KOMMO_CLIENT_SECRET": "s-1",
    "KOMMO_REDIRECT_URI": "https://example.com/crm/oauth/callback",
    "ENCRYPTION_KEY": "0123456789abcdef0123456789abcdef",
}


@pytest.fixture
def with_oauth(environment: dict[str, str]) -> Iterator[Flask]:
    system = System.start(settings.load({**environment, **OAUTH}), "test")
    yield create_app(system)
    system.close()


def newest_job(conn: psycopg.Connection) -> Any:
    """Type and payload of what was handed in last."""
    return conn.execute("select type, payload - 'touched' from agentflow.jobs order by id desc limit 1").fetchone()


# ---- without a browser ----


def test_an_account_is_connected_by_a_token_and_again_by_another(with_oauth: Flask, conn: psycopg.Connection) -> None:
    client = sign_in(with_oauth)

    made = change(client, "/dashboard/crm/connect", host="acme.kommo.com", token="secret-one", name="")
    account = UUID(made.headers["Location"].rpartition("/")[2])
    before = one(conn, "select access_sealed from agentflow.crm_accounts where id = %s", account)
    conn.execute("update agentflow.crm_accounts set state = 'needs_reauth', state_reason = 'it was revoked'")
    stopped = client.get("/dashboard/crm").text
    again = change(client, f"/dashboard/crm/{account}/token", token="secret-two")

    assert made.status_code == again.status_code == 303
    assert "connect it again" in stopped and "it was revoked" in stopped and "Connect again" in stopped
    found = conn.execute("select state, name, auth, access_sealed from agentflow.crm_accounts").fetchone()
    assert found is not None and found[:3] == ("connecting", "acme.kommo.com", "token") and found[3] != before
    assert newest_job(conn) == ("sync_crm", {"account_id": str(account), "mode": "incremental", "plan": False})
    assert "secret-" not in client.get(f"/dashboard/crm/{account}").text
    assert change(client, "/dashboard/crm/connect", host="evil.org", token="x").status_code == 422
    assert change(client, f"/dashboard/crm/{account}/token", token="x" * 8001).status_code == 422


def test_connecting_again_through_kommo_leads_there_with_a_state_of_ours(
    with_oauth: Flask, app: Flask, conn: psycopg.Connection
) -> None:
    account = samples.account(conn, auth="oauth", state="needs_reauth", state_reason="its token has ended")
    client = sign_in(with_oauth)

    page = client.get(f"/dashboard/crm/{account}").text
    answer = client.get(f"/dashboard/crm/authorize?account={account}")
    without = sign_in(app)

    link = f"/dashboard/crm/authorize?account={account}"
    assert link in page and link in client.get("/dashboard/crm").text
    to = urlsplit(answer.headers["Location"])
    assert (answer.status_code, to.scheme, to.netloc, to.path) == (303, "https", "www.kommo.com", "/oauth")
    state = parse_qs(to.query)["state"][0]
    back = with_oauth.test_client().get(f"/crm/oauth/callback?code=abc&referer=acme.kommo.com&state={state}")
    assert back.status_code == 200
    assert conn.execute("select state, grant_type from agentflow.crm_accounts").fetchall() == [
        ("connecting", "authorization_code")
    ]
    assert client.get("/dashboard/crm/authorize?account=x").status_code == 422
    assert without.get(f"/dashboard/crm/authorize?account={account}").status_code == 409
    assert "/dashboard/crm/authorize" not in without.get(f"/dashboard/crm/{account}").text


def test_what_is_another_organizations_is_neither_shown_nor_changed(
    app: Flask, conn: psycopg.Connection, tenants: dict[str, str]
) -> None:
    theirs = samples.account(conn, "Their account", organization_id=THEIRS)
    samples.account(conn, "My account", organization_id=MINE)
    client = sign_in(app, tenants["mine"])

    assert client.get(f"/dashboard/crm/{theirs}").status_code == 404
    assert client.get(f"/dashboard/crm/{theirs}/mirror").status_code == 404
    for action in ("token", "settings", "remove", "sync", "plan", "confirm-deletions", "write"):
        form = {"token": "t", "items": '[{"name": "x"}]'}
        assert change(client, f"/dashboard/crm/{theirs}/{action}", **form).status_code == 404, action
    for action in ("pause", "resume"):  # of all jobs of a type: the operator's
        assert change(client, f"/dashboard/crm/{action}").status_code == 403
    page = client.get("/dashboard/crm").text
    assert "My account" in page and "Their account" not in page
    assert one(conn, "select count(*) from agentflow.jobs") == 0


def test_how_far_a_mirror_is_behind_counts_from_its_last_whole_look(conn: psycopg.Connection) -> None:
    account = samples.account(conn, sync_every_s=300)
    samples.run(conn, account, age_s=3600)
    others: tuple[dict[str, Any], ...] = ({"mode": "touched"}, {"state": "failed"}, {"plan": True})
    _, failed, _ = (samples.run(conn, account, age_s=200 - n, **more) for n, more in enumerate(others))
    latest = runs.latest(conn, None, [account])[account]
    found = accounts.get(conn, 1, account)
    assert found is not None and latest.run is not None and latest.read_at is not None

    behind_s = syncing.behind_s(found, latest.read_at, datetime.now(UTC))

    assert latest.run.id == failed
    assert behind_s == pytest.approx(3600 - 330, abs=60)
    assert syncing.lags(conn, limit=10)[1] == pytest.approx(behind_s, abs=60)
    assert syncing.behind_s(found, datetime.now(UTC), datetime.now(UTC)) == 0
    assert runs.latest(conn, THEIRS, [account]) == {}
    assert runs.latest(conn, 1, [samples.account(conn, "New")]).popitem()[1] == Latest(None, None)


def test_what_is_said_of_a_token_is_what_is_known_of_it(app: Flask, conn: psycopg.Connection) -> None:
    soon = datetime.now(UTC) + timedelta(hours=5)
    cases: dict[str, dict[str, Any]] = {
        "long-lived": {},
        "long-lived; ends": {"access_expires_at": soon},
        "renews itself; this one ends": {"auth": "oauth", "access_expires_at": soon},
        "could not be renewed, and ends": {"auth": "oauth", "access_expires_at": soon, "grant_refused_at": soon},
        "is tried by the first sync": {"state": "connecting"},
        "is not good any more": {"state": "needs_reauth"},
    }
    for said, columns in cases.items():
        found = accounts.get(conn, 1, samples.account(conn, said, **columns))
        assert found is not None
        with app.test_request_context():
            assert crm.token_in_words(found)[1] == said


def test_the_last_runs_of_many_are_found_by_index(conn: psycopg.Connection) -> None:
    ids = [samples.account(conn, f"account {n}", age_s=n + 1) for n in range(30)]
    conn.execute(
        "insert into agentflow.sync_runs (id, organization_id, account_id, job_id, mode, plan, state)"
        " select gen_random_uuid(), 1, a, gen_random_uuid(), 'incremental', false, 'succeeded'"
        " from unnest(%s::uuid[]) a, generate_series(1, 500)",
        (ids,),
    )
    conn.execute("analyze agentflow.sync_runs")

    with plans(conn) as heard:
        runs.latest(conn, None, ids)

    scans = [node for node in heard.nodes if node.get("Relation Name") == "sync_runs"]
    assert scans and {node.get("Index Name") for node in scans} == {"sync_runs_list"}


# ---- in Chromium ----


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_account_is_synced_planned_changed_and_forgotten_by_its_buttons(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    account = samples.accounts(conn)
    page = visitors(viewport).sign_in().page
    page.get_by_role("link", name="CRM").click()
    expect(page.get_by_role("row").filter(has_text="Romashka")).to_contain_text("late")
    expect(page.get_by_role("row").filter(has_text="Romashka")).to_contain_text("could not be renewed, and ends")

    def handed_in(mode: str, plan: bool) -> None:
        assert newest_job(conn) == ("sync_crm", {"account_id": str(account), "mode": mode, "plan": plan})

    page.get_by_role("row").filter(has_text="Acme sales").get_by_role("button", name="Sync now").click()
    expect(page.get_by_text("The sync is handed in.")).to_be_visible()
    handed_in("incremental", False)
    address = page.url
    runs_ = page.get_by_role("region", name="Runs")
    expect(runs_).to_contain_text("leads 41 held, 8\u202f211 unchanged")
    expect(runs_).to_contain_text("HTTP 502 from acme.kommo.com")
    expect(page.get_by_role("region", name="Drift")).to_contain_text("loss_forecast")
    page.get_by_role("button", name="Read everything").click()
    expect(page.get_by_text("The sync is handed in.")).to_be_visible()
    handed_in("backfill", False)
    page.get_by_role("button", name="Let 41 deletions through").click()
    page.get_by_role("button", name="Yes, do it").click()
    expect(page.get_by_text("So many may be deleted")).to_be_visible()
    assert one(conn, "select deletions_confirmed from agentflow.crm_accounts where id = %s", account) == 41
    handed_in("reconcile", False)
    page.get_by_role("button", name="What would a reconciliation change?").click()
    expect(page.get_by_text("changes nothing")).to_be_visible()
    handed_in("reconcile", True)
    page.goto(address)
    page.get_by_label("Seconds between syncs").fill("900")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("The account is changed.")).to_be_visible()
    assert one(conn, "select sync_every_s from agentflow.crm_accounts where id = %s", account) == 900
    page.get_by_text("Write to this account").click()
    page.get_by_label("Things as Kommo's API").fill('[{"name": "From the dashboard"}]')
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_text("what has become of each")).to_be_visible()
    assert newest_job(conn)[1]["items"] == [{"name": "From the dashboard"}]
    page.goto(address)
    page.get_by_role("link", name="The mirror").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    expect(page.get_by_role("row").filter(has_text="503")).to_contain_text("gone")
    page.goto(address)
    page.get_by_role("button", name="Forget this account").click()
    page.get_by_role("button", name="Yes, do it").click()
    expect(page.get_by_text("The account is forgotten.")).to_be_visible()
    assert one(conn, "select state from agentflow.crm_accounts where id = %s", account) == "removed"


def test_syncs_are_paused_and_go_on(visitors: Opened, conn: psycopg.Connection) -> None:
    samples.accounts(conn)
    page = visitors().sign_in().page
    page.get_by_role("link", name="CRM").click()

    page.get_by_role("button", name="Pause syncs").click()
    page.get_by_role("button", name="Yes, do it").click()
    expect(page.get_by_text("Syncs are paused. What runs goes on to its end.")).to_be_visible()
    assert conn.execute("select kind, name, organization_id from agentflow.pauses").fetchall() == [
        ("type", "sync_crm", 0)
    ]
    page.get_by_role("button", name="Let syncs go on").click()
    expect(page.get_by_text("Syncs go on.")).to_be_visible()
    assert one(conn, "select count(*) from agentflow.pauses") == 0


def test_nothing_that_kommo_says_is_run(visitors: Opened, conn: psycopg.Connection, tenants: dict[str, str]) -> None:
    account = samples.account(conn, SCRIPT, organization_id=MINE, state="blocked", state_reason=SCRIPT,
                              base_url=f"https://{SCRIPT}")  # fmt: skip
    samples.run(conn, account, organization_id=MINE, state="failed", error=SCRIPT, counts={SCRIPT: {SCRIPT: 1}})
    conn.execute(
        "insert into agentflow.crm_drift (account_id, organization_id, entity_type, field, kind) values (%s, %s, %s, %s, %s)",
        (account, MINE, SCRIPT, SCRIPT, SCRIPT),
    )
    conn.execute(
        "insert into agentflow.crm_entities (account_id, organization_id, entity_type, entity_id, updated_at, read_at, seen_at,"
        " hash, version, data) values (%s, %s, 'leads', 1, 0, now(), now(), '', 1, jsonb_build_object('name', %s::text))",
        (account, MINE, SCRIPT),
    )
    visitor = visitors()
    visitor.sign_in(tenants["mine"])

    for path in ("", f"/{account}", f"/{account}/mirror"):
        page = visitor.open(f"/crm{path}")
        assert page.evaluate("window.ran") is None, path
        assert page.locator("a[href^='javascript:'], main script").count() == 0
        assert "{{ 7*7 }}" in page.content(), path


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_of_the_crm_is_whole_and_within_reach_of_all(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    account = samples.accounts(conn)
    visitor = visitors(viewport).sign_in()
    found = {}
    for path in ("", f"/{account}", f"/{account}/mirror", "?language=ru"):
        visitor.open(f"/crm{path}")
        # What axe-core finds wrong does not depend on the width, but where the page is another one.
        found[path] = (visitor.overflow(), visitor.complaints() if viewport is DESKTOP or path in _ANOTHER else [])

    assert {path: each for path, each in found.items() if each[0] > 0 or each[1]} == {}
