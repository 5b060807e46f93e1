"""Limits and schedules on the dashboard: what is shown is what is in force and used up, and each button does what it says."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID, uuid4

import psycopg
from flask import Flask
from playwright.sync_api import expect

from agentflow import organizations
from agentflow.calls import Service
from agentflow.jobs import rules, usage
from agentflow.jobs.rules import EVERY
from agentflow.jobs.usage import Usage
from agentflow.limits import Window
from agentflow.schedules import records, ticks
from agentflow.schedules.records import Schedule, Wanted
from agentflow.schedules.ticks import USER, Tick
from agentflow.schedules.when import When
from agentflow.system import System
from tests.dashboard_support import (
    DESKTOP,
    MINE,
    PATIENCE_MS,
    THEIRS,
    Opened,
    Visitor,
    app,
    browser,
    put_job,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT, WIDTHS, Clicks
from tests.test_dashboard import change, sign_in

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)
Connection = psycopg.Connection


def rows(conn: Connection, query: str, *values: Any) -> list[tuple[Any, ...]]:
    return conn.execute(query.encode(), values).fetchall()


def put_schedule(conn: Connection, organization_id: int = 1, name: str = "hourly", **more: Any) -> Schedule:
    wanted = Wanted(name, When(every_s=3600), "ping", {"sleep_ms": 1}, **more)
    return records.create(conn, organization_id, wanted, most=100)


def spend(conn: Connection, organization_id: int, **measures: float) -> None:
    usage.record(conn, [Usage(put_job(conn, "running", organization_id=organization_id), 1, measures)])


# ---- three clicks ----


@WIDTHS
def test_an_organization_is_paused_and_goes_on_in_three_clicks_each(
    visitors: Opened, conn: Connection, tenants: dict[str, str], viewport: dict[str, int]
) -> None:
    held = put_job(
        conn, "queued", organization_id=MINE, wait_reason="paused", run_at="2100-01-01", wake_at="2100-01-01"
    )
    page = visitors(viewport).sign_in().page
    clicks = Clicks(page)

    clicks.on_role("link", "Limits")
    clicks.on_role("button", "Pause Mine")
    clicks.on_role("button", "Yes, do it")

    expect(page.get_by_role("status").first).to_have_text("Mine: paused.")
    assert clicks.number == 3
    paused = "select kind, organization_id, own from agentflow.pauses"
    assert rows(conn, paused) == [("organization", MINE, False)]
    expect(page.get_by_role("row").filter(has_text="Mine").first).to_contain_text("paused")

    page.get_by_role("link", name="Overview", exact=True).click()
    again = Clicks(page)
    again.on_role("link", "Limits")
    again.on_role("button", "Resume Mine")

    expect(page.get_by_role("status").first).to_have_text("Mine: goes on. 1 job that it held is due.")
    assert rows(conn, paused) == [] and again.number <= 3
    held_back = "select wait_reason, run_at <= clock_timestamp() from agentflow.jobs where id = %s"
    assert rows(conn, held_back, held) == [(None, True)]

    for kind, name, button in (("Type", "ping", "Pause the type"), ("Queue", "gpu", "Pause the queue")):
        form = page.locator("form").filter(has=page.get_by_role("button", name=button))
        form.get_by_label(kind).select_option(name)
        form.get_by_label("Why").fill("maintenance")
        form.get_by_role("button", name=button).click()
        row = page.get_by_role("row").filter(has_text=f"{kind} {name}")
        expect(row).to_contain_text("maintenance")
        assert rows(conn, "select kind, name, organization_id, reason from agentflow.pauses") == [
            (kind.lower(), name, EVERY, "maintenance")
        ]
        row.get_by_role("button", name="Resume").click()
        expect(page.get_by_role("region", name="Paused")).to_contain_text("Nothing is paused.")
        assert rows(conn, paused) == []


@WIDTHS
def test_a_limit_is_raised_in_three_clicks(
    visitors: Opened, conn: Connection, tenants: dict[str, str], viewport: dict[str, int]
) -> None:
    rules.set_budget(conn, MINE, "usd", 5)
    rules.set_budget(conn, THEIRS, "usd", 7)
    spend(conn, MINE, usd=6.5)
    waiting = put_job(
        conn, "queued", organization_id=MINE, wait_reason="budget", run_at="2100-01-01", wake_at="2100-01-01"
    )
    page = visitors(viewport).sign_in().page
    clicks = Clicks(page)

    clicks.on_role("link", "Limits")
    expect(page.get_by_role("row").filter(has_text="Mine").first).to_contain_text("over budget")
    clicks.on_role("link", "Mine")
    expect(page.get_by_role("row").filter(has_text="usd")).to_contain_text("6.5 / 5")
    clicks.on_role("textbox", "usd a day")
    page.keyboard.press("Control+a")
    page.keyboard.type("12.5")
    page.keyboard.press("Enter")

    expect(page.get_by_role("status").first).to_have_text("usd: the limit is changed.")
    assert clicks.number == 3
    assert rows(conn, "select organization_id, per_day::float8 from agentflow.budgets order by 1") == [
        (MINE, 12.5),
        (THEIRS, 7),
    ]
    assert rows(conn, "select wait_reason from agentflow.jobs where id = %s", waiting) == [(None,)]
    expect(page.get_by_role("row").filter(has_text="usd")).to_contain_text("6.5 / 12.5")


# ---- limits ----


def test_budgets_caps_and_calls_are_set_changed_and_taken_away(
    visitors: Opened, app: Flask, conn: Connection, system: System
) -> None:
    page = visitors().enter(app).open("/limits")
    page.get_by_role("row").filter(has_text="default").get_by_role("link").click()
    further = page.get_by_role("region", name="A further limit")

    further.get_by_label("Budget of").fill("video_min")
    further.get_by_label("A day, at most").fill("60")
    further.get_by_role("button", name="Set the budget").click()
    assert rows(conn, "select organization_id, measure, per_day::float8, own from agentflow.budgets") == [
        (1, "video_min", 60, False)
    ]
    further.get_by_label("Jobs of type").select_option("ping")
    further.get_by_label("At once, at most").fill("3")
    further.get_by_role("button", name="Set the cap").click()
    assert rows(conn, "select organization_id, type, running from agentflow.caps") == [(1, "ping", 3)]
    further.get_by_label("Calls of").fill("openrouter")
    further.get_by_label("Calls, at most").fill("100")
    further.get_by_label("Within seconds").fill("60")
    further.get_by_role("button", name="Limit the calls").click()
    windows = (
        "select provider, amount, per_s::float8 from agentflow.rate_limits where organization_id = 1 order by per_s"
    )
    assert rows(conn, windows) == [("openrouter", 100, 60)]

    for n in range(7):
        permit(system, 1, n)
    page.reload()
    calls = page.get_by_role("region", name="Calls of others")
    expect(calls.get_by_role("row").filter(has_text="openrouter")).to_contain_text("7 / 100 in 1 min")
    calls.get_by_label("Calls of openrouter in 1 min").fill("200")
    calls.get_by_role("row").filter(has_text="openrouter").get_by_text("One more").click()
    calls.get_by_label("Further calls of openrouter").fill("5000")
    calls.get_by_label("Further seconds of openrouter").fill("3600")
    calls.get_by_role("button", name="Save openrouter").click()
    expect(calls.get_by_role("row").filter(has_text="openrouter")).to_contain_text("7 / 5\u202f000 in 1 h")
    assert rows(conn, windows) == [("openrouter", 200, 60), ("openrouter", 5000, 3600)]

    for name, table in (("openrouter", "rate_limits"), ("ping", "caps"), ("video_min", "budgets")):
        page.get_by_role("button", name=f"Take away {name}").click()
        expect(page.get_by_role("status").first).to_have_text(f"{name}: the rule is taken away.")
        assert rows(conn, f"select from agentflow.{table}") == []


def permit(system: System, organization_id: int, n: int) -> None:
    """A call as a job makes it."""
    system.rules.anew()
    system.calls.permit(Service("openrouter", "credential"), organization_id, f"holder {n}")


def test_what_an_organization_sets_for_itself_is_never_above_the_operators(
    app: Flask, conn: Connection, tenants: dict[str, str]
) -> None:
    client = sign_in(app, tenants["mine"])
    rules.set_budget(conn, EVERY, "usd", 5)
    rules.set_budget(conn, MINE, "tokens", 100)
    rules.set_cap(conn, EVERY, "", 4)
    rules.set_limit(conn, EVERY, "openrouter", [Window(10, 60)])

    assert change(client, "/dashboard/limits/budget", measure="usd", per_day="9").status_code == 303
    assert change(client, "/dashboard/limits/budget", measure="tokens", per_day="900").status_code == 403
    assert change(client, "/dashboard/limits/cap", type="", running="40").status_code == 303
    assert (
        change(client, "/dashboard/limits/calls", provider="openrouter", amount=["99"], per_s=["60"]).status_code == 303
    )
    assert change(client, "/dashboard/limits/pause", kind="queue", name="default").status_code == 403
    assert change(client, "/dashboard/limits/pause", kind="type", name="ping", reason="by us").status_code == 303
    text = client.get("/dashboard/limits?part=used").text

    found = rules.read(conn)
    assert budgets_of(conn) == [(0, "usd", 5, False), (MINE, "tokens", 100, False), (MINE, "usd", 9, True)]
    assert found.cap_of(MINE, "") == 4 and found.limit_of(MINE, "openrouter") == (Window(10, 60), Window(99, 60))
    assert found.pause_of(MINE, "default", "ping") and not found.pause_of(THEIRS, "default", "ping")
    assert re.search(r"usd\s+0 / 5\s", re.sub(r"<[^>]+>", " ", text))  # not 9
    assert 'name="measure" value="tokens"' not in text and "set by the operator" in text  # no form for it
    assert "0 / 10 in" in text and "0 / 99 in" in text  # both hold


def budgets_of(conn: Connection) -> list[tuple[Any, ...]]:
    return rows(conn, "select organization_id, measure, per_day::float8, own from agentflow.budgets order by 1, 2")


def test_what_cannot_be_a_limit_is_refused_and_changes_nothing(app: Flask, conn: Connection) -> None:
    client = sign_in(app)
    before = rules.read(conn)
    for path, form in (
        ("budget", {"measure": "usd", "per_day": "much"}),
        ("budget", {"measure": "usd", "per_day": "nan"}),
        ("budget", {"measure": "usd", "per_day": "-1"}),
        ("budget", {"measure": "U S D", "per_day": "1"}),
        ("cap", {"type": "nothing-of-ours", "running": "1"}),
        ("cap", {"type": "ping", "running": "0"}),
        ("cap", {"type": "ping", "running": "²"}),
        ("calls", {"provider": "openrouter"}),
        ("calls", {"provider": "openrouter", "amount": ["1"], "per_s": [""]}),
        ("calls", {"provider": "openrouter", "amount": ["1", "2"], "per_s": ["60", "60"]}),
        ("pause", {"kind": "planet", "name": "x"}),
        ("pause", {"kind": "organization"}),  # which one?
        ("pause", {"kind": "queue", "name": "\x00"}),
    ):
        answer = change(client, f"/dashboard/limits/{path}", **form)

        assert answer.status_code == 422 and answer.mimetype == "text/html", (path, form)
    assert change(client, "/dashboard/limits/resume", kind="type", name="ping").status_code == 404
    assert rules.read(conn) == before


def test_organizations_come_in_pages_with_what_is_theirs(app: Flask, conn: Connection, tenants: dict[str, str]) -> None:
    for n in range(60):
        organizations.create(conn, f"further-{n}", f"Further {n}")
    rules.set_budget(conn, EVERY, "usd", 10)
    spend(conn, THEIRS, usd=2.5)
    client = sign_in(app)

    first = client.get("/dashboard/limits?part=organizations").text
    after = re.search(r"after=(\d+)", first)
    assert after is not None
    second = client.get(f"/dashboard/limits?part=organizations&after={after[1]}").text

    shown = re.findall(r'id="organization-(\d+)"', first + second)
    assert len(shown) == len(set(shown)) == rows(conn, "select count(*) from agentflow.organizations")[0][0]
    row = next(each for each in (first + second).split("<tr>") if ">Theirs<" in each)
    assert "usd 25\u202f%" in row and re.search(r'<td class="number off-phone">1</td>', row)


# ---- schedules ----


@WIDTHS
def test_a_schedule_is_run_paused_and_goes_on_by_its_buttons(
    visitors: Opened, app: Flask, conn: Connection, viewport: dict[str, int]
) -> None:
    made = put_schedule(conn)
    page = visitors(viewport).enter(app).open("/schedules")
    row = page.get_by_role("row").filter(has_text="hourly")
    expect(row).to_contain_text("not yet")
    expect(row).to_contain_text("in 59 min")

    row.get_by_role("button", name="Run now").click()
    expect(page.get_by_role("heading", name="ping")).to_be_visible()
    ((job, by_hand, outcome),) = rows(conn, "select job_id, by_hand, outcome from agentflow.ticks")
    assert page.url.endswith(str(job)) and (by_hand, outcome) == (True, "submitted")
    asked = "select payload -> 'sleep_ms', correlation_id from agentflow.jobs where id = %s"
    assert rows(conn, asked, job) == [(1, f"schedule:{made.id}")]

    page.get_by_role("link", name="Schedules", exact=True).click()
    expect(row).to_contain_text("handed in")
    row.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("status").first).to_have_text("hourly: paused.")
    state = "select enabled, next_at is null from agentflow.schedules"
    assert rows(conn, state) == [(False, True)]
    row.get_by_role("link", name="hourly").click()
    expect(page.get_by_text("no further time")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="by hand")).to_have_count(1)
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("status").first).to_have_text("hourly: goes on.")
    assert rows(conn, state) == [(True, False)]
    page.get_by_role("link", name="hourly").click()
    expect(page.locator("#next li")).to_have_count(5)


def test_schedules_come_in_pages_each_with_its_last_tick(app: Flask, conn: Connection) -> None:
    made = [put_schedule(conn, name=f"schedule {n}") for n in range(53)]
    for each in (made[0], made[-1]):
        for minute in (1, 2):
            tick = Tick(USER, each.created_at.replace(minute=minute), str(each.id), 1)
            assert ticks.claim(conn, tick)
            ticks.end(conn, tick, "refused" if minute == 2 else "submitted", facts={"error": "unknown type"})
    client = sign_in(app)

    first = client.get("/dashboard/schedules?part=rows").text
    cursor = re.search(r"cursor=([\w-]+)", first)
    assert cursor is not None
    second = client.get(f"/dashboard/schedules?part=rows&cursor={cursor[1]}").text

    shown = [UUID(each) for each in re.findall(r'id="schedule-([0-9a-f-]+)"', first + second)]
    assert shown == [each.id for each in reversed(made)]
    both = [text.split('id="calendar"')[0] for text in (first, second)]
    assert [text.count("refused") for text in both] == [1, 1] and "handed in" not in "".join(both)
    assert "unknown type" in client.get(f"/dashboard/schedules/{made[0].id}").text


# ---- whose, and what is made of them ----


def test_schedules_of_others_are_not_there(app: Flask, conn: Connection, tenants: dict[str, str]) -> None:
    theirs = put_schedule(conn, THEIRS, "their schedule")
    put_schedule(conn, MINE, "my schedule")
    rules.set_budget(conn, THEIRS, "their_measure", 1)
    rules.pause(conn, "type", "ping", THEIRS, "their reason")
    client = sign_in(app, tenants["mine"])

    for path in (f"/dashboard/schedules/{theirs.id}", f"/dashboard/schedules/{uuid4()}"):
        assert client.get(path).status_code == 404
    for what in ("run", "pause", "resume"):
        assert change(client, f"/dashboard/schedules/{theirs.id}/{what}").status_code == 404
    seen = "".join(
        client.get(f"/dashboard/{path}").text for path in ("schedules", "limits", "limits?organization=theirs")
    )

    assert "my schedule" in seen and "their" not in re.sub(r"their place|their end", "", seen)
    assert rows(conn, "select count(*), bool_and(enabled) from agentflow.schedules") == [(2, True)]
    assert rows(conn, "select count(*) from agentflow.ticks") == [(0,)]


@WIDTHS
def test_the_pages_are_whole_and_run_nothing_that_others_wrote(
    visitors: Opened, app: Flask, conn: Connection, tenants: dict[str, str], viewport: dict[str, int]
) -> None:
    conn.execute("update agentflow.organizations set name = %s where id = %s", (SCRIPT, MINE))
    made = put_schedule(conn, MINE, SCRIPT)
    put_schedule(conn, MINE, "x" * 120, enabled=False)
    for kind, name in (("type", "ping"), ("organization", "")):
        rules.pause(conn, kind, name, MINE, SCRIPT)  # type: ignore[arg-type]
    rules.set_limit(conn, MINE, SCRIPT, [Window(10, 60), Window(100, 3600)])
    rules.set_cap(conn, MINE, "x" * 60, 5)
    spend(conn, MINE, usd=3.25)
    rules.set_budget(conn, EVERY, "usd", 4)
    conn.execute("insert into agentflow.ticks (schedule, at, outcome) values ('clean_up', now(), 'failed')")
    visitor = visitors(viewport).enter(app)
    found = {}
    for path in ("/limits", "/limits?organization=mine", "/schedules", f"/schedules/{made.id}"):
        page = visitor.open(path)
        found[path] = looked_at(visitor)
        assert page.locator("main script, main img").count() == 0 and page.evaluate("window.ran") is None
    page.emulate_media(color_scheme="dark")
    for path in ("/limits?organization=mine", "/schedules") if viewport == DESKTOP else ():
        visitor.open(path)
        found[f"{path} dark"] = looked_at(visitor)

    assert {path: each for path, each in found.items() if each != (0, [])} == {}


def looked_at(visitor: Visitor) -> tuple[int, list[str]]:
    return max(0, visitor.overflow()), visitor.complaints()


def test_what_is_typed_is_not_drawn_over(visitors: Opened, app: Flask, conn: Connection) -> None:
    rules.set_budget(conn, 1, "usd", 5)
    visitor = visitors().enter(app)
    page = visitor.open("/limits?organization=default")
    field = page.get_by_role("textbox", name="usd a day")
    field.fill("12")
    page.get_by_role("heading", name="Limits").click()  # elsewhere

    spend(conn, 1, usd=4)
    page.evaluate("htmx.trigger('#used', 'again')")
    with page.expect_response(lambda response: "part=used" in response.url):
        page.evaluate("htmx.trigger('#used', 'again')")
    expect(field).to_have_value("12")
    field.fill("5")
    page.get_by_role("heading", name="Limits").click()
    page.evaluate("htmx.trigger('#used', 'again')")
    expect(page.get_by_role("row").filter(has_text="usd")).to_contain_text("4 / 5")
