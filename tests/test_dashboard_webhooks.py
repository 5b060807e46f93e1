"""The dashboard's webhooks and flight records in Chromium, and what they show to whom."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import expect

from agentflow.system import System
from agentflow.webhooks import browsing, events
from tests import graph_support
from tests.conftest import ADMIN_KEY
from tests.core_support import value
from tests.dashboard_support import (
    DESKTOP,
    MINE,
    PATIENCE_MS,
    PHONE,
    Opened,
    app,
    browser,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT
from tests.flight_support import Flown, endpoint, fly, forget_events, forget_jobs
from tests.test_dashboard import change, form_token, sign_in
from web.dashboard import shown, webhooks

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)
Connection = psycopg.Connection


def caller(app: Flask, key: str = ADMIN_KEY) -> FlaskClient:
    made = app.test_client()
    made.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return made


@pytest.fixture
def api(app: Flask, tenants: dict[str, str]) -> FlaskClient:
    """A caller of the organization whose things these are."""
    return caller(app, tenants["mine"])


@pytest.fixture
def flown(api: FlaskClient, system: System, conn: Connection) -> Flown:
    return fly(api, system, conn, endpoint(api))


def set_outcome(conn: Connection, event_id: UUID, outcome: str, detail: str | None = None) -> None:
    conn.execute(
        "update agentflow.webhook_events set outcome = %s, detail = %s, handled_at = clock_timestamp() where id = %s",
        (outcome, detail, event_id),
    )


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_pages_are_whole_and_within_reach_of_all(
    visitors: Opened,
    conn: Connection,
    system: System,
    api: FlaskClient,
    flown: Flown,
    tenants: dict[str, str],
    viewport: dict[str, int],
) -> None:
    quiet = endpoint(api, "a-rather-long-name-" * 8, source="standard")
    conn.execute("update agentflow.webhook_endpoints set silent_since = clock_timestamp() where id = %s", (quiet.id,))
    flown.endpoint.client.post(flown.endpoint.path, data=b"{}", headers={"X-Hub-Signature-256": "sha256=00"})
    failed = fly(api, system, conn, flown.endpoint, {"name": "x" * 300})
    set_outcome(conn, failed.event_id, "failed", "payload.number: Input should be a valid integer " * 5)
    graph = graph_support.small_graph(conn, MINE)
    paths = ["/webhooks", "/webhooks?verdict=refused", "/webhooks?q=nothing", f"/webhooks/{flown.event_id}"]
    paths += [f"/webhooks/{failed.event_id}", f"/flight/event/{flown.event_id}", f"/flight/edge/{graph['edge_id']}"]
    visitor = visitors(viewport).sign_in(tenants["mine"])

    found = {}
    for scheme in ("light", "dark"):
        visitor.page.emulate_media(color_scheme=scheme)
        for path in paths if scheme == "light" else (paths[0], paths[3], paths[5]):
            visitor.open(path)
            found[f"{path} {scheme}"] = (visitor.overflow(), visitor.complaints())

    assert {path: each for path, each in found.items() if each[0] > 0 or each[1]} == {}


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_webhook_is_replayed_in_three_clicks(
    visitors: Opened, conn: Connection, flown: Flown, tenants: dict[str, str], viewport: dict[str, int]
) -> None:
    page = visitors(viewport).sign_in(tenants["mine"]).page

    page.get_by_role("link", name="Webhooks").click()
    page.locator(f"#event-{flown.event_id}").click()
    page.get_by_role("button", name="Replay", exact=True).click()

    expect(page.get_by_text("The webhook is handled once more.")).to_be_visible()
    again = "select state, priority, payload from agentflow.jobs where retry_of = %s"
    ((state, priority, payload),) = conn.execute(again, (flown.handle_id,)).fetchall()
    assert (state, priority, payload["event_id"]) == ("queued", 2, str(flown.event_id)) and payload["replay"]
    assert value(conn, "select replays from agentflow.webhook_events where id = %s", flown.event_id) == 1
    expect(page.get_by_role("row").filter(has_text="handles it once more")).to_be_visible()

    page.get_by_role("link", name="Webhooks").first.click()  # and in two, from the list
    page.get_by_role("row").filter(has=page.locator(f"#event-{flown.event_id}")).get_by_role("button").click()
    expect(page.get_by_text("The webhook is handled once more.")).to_be_visible()
    assert value(conn, "select replays from agentflow.webhook_events where id = %s", flown.event_id) == 2


def test_what_was_overtaken_is_replayed_when_somebody_insists(
    visitors: Opened, conn: Connection, flown: Flown, tenants: dict[str, str]
) -> None:
    set_outcome(conn, flown.event_id, "stale")
    visitor = visitors().sign_in(tenants["mine"])
    page = visitor.open(f"/webhooks/{flown.event_id}")

    page.get_by_role("button", name="Replay even so").click()
    page.get_by_role("button", name="No, leave it").click()
    assert value(conn, "select count(*) from agentflow.jobs where retry_of = %s", flown.handle_id) == 0
    page.get_by_role("button", name="Replay even so").click()
    page.get_by_role("button", name="Yes, do it").click()

    expect(page.get_by_text("The webhook is handled once more.")).to_be_visible()
    forced = "select payload -> 'even_if_stale' from agentflow.jobs where retry_of = %s"
    assert value(conn, forced, flown.handle_id) is True


def test_webhooks_are_found_by_their_fields_and_follow_the_database(
    visitors: Opened, conn: Connection, api: FlaskClient, system: System, flown: Flown, tenants: dict[str, str]
) -> None:
    orders, other = flown.endpoint, endpoint(api, "pushes", source="standard")
    other.send({"type": "push"}, id="msg_17")
    for n in range(60):
        orders.send({"name": f"n{n}"}, event="issue_comment")
    visitor = visitors().sign_in(tenants["mine"])
    page = visitor.open("/webhooks")
    rows = page.locator("[data-row]")

    expect(rows).to_have_count(50)
    page.get_by_role("link", name="Older ones").click()
    expect(rows).to_have_count(12)
    page.locator("#filter [name=endpoint_id]").select_option(other.id)
    expect(rows).to_have_count(1)
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(50)
    page.get_by_label("Outcome").select_option("done")
    expect(rows).to_have_count(1)
    assert page.locator(f"#event-{flown.event_id}").is_visible()
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(50)
    page.keyboard.press("/")
    page.keyboard.type("msg_17")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="push")).to_be_visible()
    health = visitor.open("/webhooks").get_by_role("region", name="Endpoints").get_by_role("row")
    expect(health.filter(has_text="pushes")).to_contain_text("1 not handled yet")
    expect(health.filter(has_text="orders")).to_contain_text("60 not handled yet")
    new = orders.send({"name": "new"}).json["event_id"]
    expect(page.locator(f"#event-{new}")).to_be_visible()


def test_a_flight_is_told_from_the_page_of_a_job_and_after_everything_was_deleted(
    visitors: Opened, conn: Connection, flown: Flown, tenants: dict[str, str]
) -> None:
    visitor = visitors().sign_in(tenants["mine"])
    page = visitor.open(f"/jobs/{flown.action_id}")
    lines = page.locator(".flight li")

    page.get_by_role("link", name="Flight record").click()
    expect(lines).to_have_count(3)
    assert [line.get_attribute("data-id") for line in lines.all()] == [
        str(each) for each in (flown.event_id, flown.handle_id, flown.action_id)
    ]
    assert lines.nth(2).get_attribute("aria-current") == "true"
    expect(page.locator(".flight .branch")).to_have_count(2)
    page.get_by_role("link", name="orders · issues").click()
    page.wait_for_url(f"**/webhooks/{flown.event_id}")

    forget_jobs(conn)
    page.reload()
    row = page.get_by_role("row").filter(has_text="was made of it")
    expect(row).to_contain_text("remembered")
    row.get_by_role("link").click()
    page.wait_for_url(f"**/flight/job/{flown.action_id}")
    expect(page.get_by_text("remembered: the row itself is deleted")).to_have_count(2)

    forget_events(conn)
    visitor.open(f"/webhooks/{flown.event_id}")
    page.wait_for_url(f"**/flight/event/{flown.event_id}")
    expect(page.get_by_text("remembered: the row itself is deleted")).to_have_count(3)
    expect(lines).to_have_count(3)


def test_nothing_that_a_sender_wrote_is_run(
    visitors: Opened, conn: Connection, api: FlaskClient, system: System, tenants: dict[str, str]
) -> None:
    made = endpoint(api, SCRIPT)
    flown = fly(api, system, conn, made, {"name": SCRIPT}, key=f"o/{MINE}/{SCRIPT}.png")
    plain = made.post(f"not json {SCRIPT}".encode(), {"X-Note": SCRIPT, "Content-Type": "text/plain"}).json["event_id"]
    binary = made.post(b"\xff\xfe<script>window.ran = true</script>").json["event_id"]
    conn.execute(
        "update agentflow.webhook_events set type = %(x)s, delivery_id = %(x)s, detail = %(x)s, entity = %(x)s",
        {"x": SCRIPT},
    )
    conn.execute("update agentflow.jobs set type = %s where id = %s", (SCRIPT, flown.action_id))
    conn.execute("update agentflow.webhook_events set outcome = 'failed', handled_at = clock_timestamp()")
    visitor = visitors()
    visitor.sign_in(tenants["mine"])
    paths = [
        "/webhooks",
        f"/webhooks?q={SCRIPT}x&type={SCRIPT}&endpoint_id={SCRIPT}",
        f"/flight/event/{flown.event_id}",
    ]
    paths += [f"/webhooks/{each}" for each in (flown.event_id, plain, binary)]

    for path in paths:
        page = visitor.open(path)
        assert page.evaluate("window.ran") is None, path
        assert page.locator("a[href^='javascript:'], main script").count() == 0
        assert "{{ 7*7 }}" in page.content(), path


# ---- without a browser ----


def test_secrets_in_headers_and_bodies_are_hidden(app: Flask, api: FlaskClient, conn: Connection) -> None:
    made = endpoint(api)
    body = {
        "password": "hunter2-0",
        "items": [{"api_key": "hunter2-1"}],
        "url": "https://e.com/?access_token=hunter2-2",
        "who": "Ada",
    }
    seen = made.send(body).json["event_id"]
    form = made.post(
        b"token=hunter2-3&name=Grace&card%5Bsecret%5D=hunter2-4", {"Content-Type": "application/x-www-form-urlencoded"}
    ).json["event_id"]
    odd = b'{"password": "hunter2-5", Linus note: api_key=hunter2-6 Authorization: Basic hunter2-7'
    text = made.post(odd, {"Cookie": "a=hunter2-8"}).json["event_id"]
    client = sign_in(app)

    found = {name: client.get(f"/dashboard/webhooks/{name}").text for name in (seen, form, text)}

    assert not any("hunter2" in each for each in found.values())
    assert "Ada" in found[seen] and "Grace" in found[form] and "Linus" in found[text]
    assert all(shown.HIDDEN in each for each in found.values())


def test_a_body_of_any_kind_becomes_text_that_can_be_shown(app: Flask) -> None:
    with app.test_request_context():
        assert webhooks.read_body(b'{"a": [1]}', "application/json").text == json.dumps({"a": [1]}, indent=2)
        assert webhooks.read_body(b"\xff\xfe", "application/json") == webhooks.Body(None, raw=True)
        long = webhooks.read_body(b"x" * (shown.MOST_CHARACTERS + 9), "text/plain").text
        assert long is not None and long.endswith("9 more characters")
        for costly in (
            b"x",
            b"?",
            b"?x",
            b"token",
            b"token=",
            b"a ",
            b"?token",
        ):  # a time that grows with the square is hours
            assert webhooks.read_body(costly * 500_000, "text/plain").raw


def test_what_is_another_organizations_is_not_there(
    app: Flask, tenants: dict[str, str], conn: Connection, flown: Flown
) -> None:
    key = f"o/{MINE}/renders/{flown.action_id}/one.png"
    edge = graph_support.small_graph(conn, MINE)["edge_id"]
    paths = [
        *(f"/webhooks/{flown.event_id}", f"/flight/event/{flown.event_id}", f"/flight/job/{flown.action_id}"),
        *(f"/flight/edge/{edge}", f"/flight/artefact/{key}"),
    ]
    client, mine = sign_in(app, tenants["theirs"]), sign_in(app, tenants["mine"])

    for path in paths:
        assert mine.get(f"/dashboard{path}").status_code == 200, path
        assert client.get(f"/dashboard{path}").status_code == 404, path
    for path in ("/webhooks", f"/webhooks?q={flown.event_id}", f"/webhooks?endpoint_id={flown.endpoint.id}"):
        text = client.get(f"/dashboard{path}").text
        assert "orders" not in text and f"event-{flown.event_id}" not in text
    assert change(client, f"/dashboard/webhooks/{flown.event_id}/replay").status_code == 404
    assert value(conn, "select replays from agentflow.webhook_events where id = %s", flown.event_id) == 0

    forget_jobs(conn)
    forget_events(conn)
    for path in paths[:3]:
        assert mine.get(f"/dashboard{path}", follow_redirects=True).status_code == 200, path
        assert client.get(f"/dashboard{path}").status_code == 404, path


def test_who_may_only_read_sees_no_body_and_replays_nothing(
    app: Flask, tenants: dict[str, str], conn: Connection, flown: Flown
) -> None:
    client = sign_in(app, tenants["reader"])

    text = client.get(f"/dashboard/webhooks/{flown.event_id}").text

    assert "Ada" not in text and "/replay" not in text + client.get("/dashboard/webhooks").text
    assert change(client, f"/dashboard/webhooks/{flown.event_id}/replay").status_code == 403
    assert client.post(f"/dashboard/webhooks/{flown.event_id}/replay").status_code == 403
    owner = sign_in(app, tenants["mine"])
    assert "Ada" in owner.get(f"/dashboard/webhooks/{flown.event_id}").text
    assert owner.post(f"/dashboard/webhooks/{flown.event_id}/replay").status_code == 403  # without the form token
    other = owner.post(f"/dashboard/webhooks/{flown.event_id}/replay", data={"form_token": form_token(client)})
    assert other.status_code == 403
    assert value(conn, "select replays from agentflow.webhook_events where id = %s", flown.event_id) == 0


def test_what_cannot_be_understood_is_said_and_is_no_error_of_ours(app: Flask, conn: Connection, flown: Flown) -> None:
    client = sign_in(app)
    for path in (
        *("/webhooks?cursor=!", "/webhooks?q=%00", "/webhooks?endpoint_id=x", "/webhooks?verdict=x&outcome=y&period=z"),
        *(
            f"/webhooks/{uuid4()}",
            "/flight/artefact/o/1/%00",
            "/flight/artefact/..%2f..%2fetc/passwd",
            "/flight/planet/1",
        ),
        *(f"/flight/{kind}/{uuid4()}" for kind in ("job", "event", "edge", "artefact")),
    ):
        assert client.get(f"/dashboard{path}").status_code in (200, 404), path
    refused = conn.execute(
        "insert into agentflow.webhook_events (id, organization_id, endpoint_id, verdict, reason, body_hash, headers, body,"
        " size_bytes) select %s, organization_id, endpoint_id, 'refused', 'no signature', body_hash, headers, body, 2"
        " from agentflow.webhook_events limit 1 returning id",
        (uuid4(),),
    ).fetchone()
    assert refused is not None
    assert change(client, f"/dashboard/webhooks/{refused[0]}/replay").status_code == 409
    assert "Its signature was wrong: no signature" in client.get(f"/dashboard/webhooks/{refused[0]}").text


def test_a_page_looks_through_so_many_and_goes_on_from_there(
    conn: Connection, flown: Flown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browsing, "MOST_LOOKED_AT", 3)
    for n in range(7):
        flown.endpoint.send({"name": f"n{n}"})
    wanted = events.Filter(outcome="done")

    pages: list[Any] = []
    before = None
    for _ in range(9):
        found, before = browsing.browse(conn, MINE, wanted, before=before, limit=50)
        pages.append([each.id for each in found])
        if before is None:
            break

    assert pages == [[], [], [flown.event_id]]
