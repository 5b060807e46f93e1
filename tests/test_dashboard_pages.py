"""The dashboard in Chromium: what people see and do, on a desktop and a phone, with what the database has afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
from playwright.sync_api import Page, expect

from agentflow.jobs import history
from tests.dashboard_support import (
    DESKTOP,
    MINE,
    PATIENCE_MS,
    PHONE,
    TIMEOUT,
    Opened,
    app,
    browser,
    fill,
    put_job,
    rich_job,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT
from tests.processes import eventually

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)


def one(conn: psycopg.Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query, values).fetchone()
    return row[0] if row else None


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_is_whole_and_within_reach_of_all(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    fill(conn, jobs=60)
    failed = put_job(conn, "failed", error=TIMEOUT, type="x" * 60, correlation_id="y" * 120)
    pages = ["", "/jobs", "/jobs?state=cancelled", f"/jobs/{rich_job(conn)}", f"/jobs/{failed}", "/dead-letters"]
    pages += ["/dead-letters/retry?type=ping", "/runbook"]
    visitor = visitors(viewport)
    visitor.allowed = ("401",)
    found = {"/sign-in": (visitor.open("/sign-in").title(), visitor.overflow(), visitor.complaints())}
    visitor.sign_in()
    for path in pages:
        page = visitor.open(path)
        if path == "":
            page.wait_for_selector("#charts[data-ready]")
        found[path] = (page.title(), visitor.overflow(), visitor.complaints())
    page.emulate_media(color_scheme="dark")
    for path in ("/jobs", "/dead-letters", ""):
        visitor.open(path)
        found[f"{path} dark"] = ("", visitor.overflow(), visitor.complaints())

    assert {path: each[1:] for path, each in found.items() if each[1] > 0 or each[2]} == {}
    assert len({title for title, _, _ in found.values() if title}) >= 7


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_job_is_cancelled_run_now_and_tried_again_by_its_buttons(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    later = put_job(conn, "queued", run_at="2100-01-01", wake_at="2100-01-01", wait_reason="scheduled")
    page = visitors(viewport).sign_in().page
    page.get_by_role("link", name="Jobs").click()

    page.locator(f"#job-{later}").click()
    expect(page.get_by_text("It was asked to start later").first).to_be_visible()
    page.get_by_role("button", name="Run now").click()
    expect(page.get_by_role("status").first).to_have_text("The job is due now.")
    assert one(conn, "select run_at <= clock_timestamp() from agentflow.jobs where id = %s", later)

    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="No, leave it").click()
    assert one(conn, "select state from agentflow.jobs where id = %s", later) == "queued"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Yes, do it").click()
    expect(page.get_by_text("The job is cancelled.")).to_be_visible()
    assert one(conn, "select state from agentflow.jobs where id = %s", later) == "cancelled"

    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("This is the new job")).to_be_visible()
    assert page.url.endswith(str(one(conn, "select id from agentflow.jobs where retry_of = %s", later)))
    page.reload()
    expect(page.get_by_text("This is the new job")).to_have_count(0)  # said once


def test_why_a_job_waits_and_what_became_of_its_attempts(visitors: Opened, conn: psycopg.Connection) -> None:
    conn.execute("insert into agentflow.pauses (kind, name, reason) values ('type', 'ping', 'the vendor is down')")
    paused, story = put_job(conn, "queued"), rich_job(conn)
    page = visitors().sign_in().page

    page.goto(page.url + f"/jobs/{paused}")
    why = page.get_by_role("region", name="Why it waits")
    expect(why).to_contain_text("It is paused, until somebody resumes it")
    expect(why).to_contain_text("the vendor is down")

    page.goto(page.url.replace(str(paused), str(story)))
    steps = page.locator(".step").all_inner_texts()
    assert [text.split("\n")[0].split(" ·")[0] for text in steps] == [
        "Waited for its turn", "Attempt 1: Failed, to be tried again", "Waited longer after each failure, before the next try",
        "Attempt 2: Gave way, without spending an attempt", "Waited: model_limit", "Attempt 2: Its worker died or fell silent",
        "Waited before another worker took it", "Attempt 3: Succeeded",
    ]  # fmt: skip
    expect(page.locator(".tree li")).to_have_count(3)
    expect(page.locator(".tree")).to_contain_text("comes after")
    expect(page.get_by_text("$0.0412")).to_be_visible()


def test_jobs_are_found_by_state_type_words_of_the_error_and_correlation_id(
    visitors: Opened, conn: psycopg.Connection
) -> None:
    for n in range(60):
        put_job(conn, age_s=100 + n)
    failed = put_job(
        conn,
        "failed",
        type="sync_kommo_contacts",
        error={"code": "http_503", "message": "The vendor is overloaded today"},
    )
    put_job(conn, "failed", type="sync_kommo_contacts", error=TIMEOUT)
    tagged = put_job(conn, correlation_id="deal-17", age_s=90_000)
    page = visitors().sign_in().page
    page.get_by_role("link", name="Jobs").click()
    rows = page.locator("[data-row]")

    page.get_by_label("State").select_option("failed")
    expect(rows).to_have_count(2)
    page.get_by_label("Words of the error").fill("overloaded -timeout")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(1)
    assert page.locator(f"#job-{failed}").is_visible() and "error=overloaded" in page.url and "type=" not in page.url
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(50)
    page.keyboard.press("/")
    page.keyboard.type("deal-17")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(1)
    assert page.locator(f"#job-{tagged}").is_visible()
    page.get_by_label("Submitted").select_option("24h")
    expect(page.get_by_text("No job is like that")).to_be_visible()
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(50)
    page.get_by_role("link", name="Older ones").click()
    expect(rows).to_have_count(13)
    page.get_by_label("Job id or correlation id").fill(str(failed))
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/jobs/{failed}")


def test_rows_follow_the_database_while_somebody_looks(visitors: Opened, conn: psycopg.Connection) -> None:
    put_job(conn)
    visitor = visitors().sign_in()
    page = visitor.open("/jobs")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "part=rows" in request.url else None)

    new = put_job(conn, "running", age_s=1)
    expect(page.locator(f"#job-{new}")).to_be_visible()

    hide(page, True)
    page.wait_for_timeout(200)  # what was on its way
    before = len(asked)
    page.wait_for_timeout(3500)  # longer than a round
    assert len(asked) == before
    hide(page, False)
    eventually(lambda: page.wait_for_timeout(50) or len(asked) > before)


def hide(page: Page, hidden: bool) -> None:
    page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }",
        hidden,
    )


def test_an_end_shows_itself(visitors: Opened, conn: psycopg.Connection) -> None:
    job = put_job(conn, "running", age_s=5, progress=0.25, stage="first half")
    page = visitors().sign_in().page
    page.goto(f"{page.url}/jobs/{job}")
    expect(page.get_by_text("25\u202f% first half")).to_be_visible()

    conn.execute(
        "update agentflow.jobs set state = 'succeeded', worker = null, lease_until = null, finished_at = clock_timestamp(),"
        """ result = '{"found": "the needle"}' where id = %s""",
        (job,),
    )

    expect(page.get_by_text("the needle")).to_be_visible()


def test_the_charts_have_the_numbers_of_the_database(
    visitors: Opened, conn: psycopg.Connection, tenants: dict[str, str]
) -> None:
    for n in range(40):
        state = "failed" if n % 6 == 1 else "cancelled" if n % 6 == 2 else "succeeded"
        put_job(
            conn,
            state,
            age_s=60 + 70 * n,
            organization_id=MINE if n % 2 else 1,
            error=TIMEOUT if state == "failed" else None,
        )
    put_job(conn, "queued", age_s=50)
    history.roll_up(conn)
    history.sample_depths(conn)
    within = """select {} from agentflow.jobs where {} >= date_bin(%(size)s::interval, clock_timestamp(), 'epoch')
        - %(size)s::interval * %(before)s and (%(organization)s::bigint is null or organization_id = %(organization)s)"""
    for key, organization in ((None, None), (tenants["mine"], MINE)):
        visitor = visitors()
        visitor.sign_in(key) if key else visitor.sign_in()
        for window, size, before in (("1h", "1 min", 59), ("24h", "10 min", 143), ("7d", "1 h", 167)):
            button = {"1h": "1 hour", "24h": "24 hours", "7d": "7 days"}[window]
            visitor.page.get_by_role("button", name=button).click()
            visitor.page.wait_for_selector(f"#charts[data-ready='{window}']")

            drawn = visitor.page.evaluate(
                "Object.fromEntries([...document.querySelectorAll('[data-chart]')].map(each => [each.dataset.chart,"
                " each.querySelector('.plot').chart.data.slice(1)]))"
            )

            values = {"size": size, "before": before, "organization": organization}
            ended = dict(
                conn.execute(within.format("state, count(*)", "finished_at") + " group by 1", values).fetchall()
            )
            submitted = conn.execute(within.format("count(*)", "created_at"), values).fetchone()
            assert [sum(line) for line in drawn["throughput"]] == [submitted[0] if submitted else 0, ended["succeeded"]]
            assert [sum(line) for line in drawn["failures"]] == [ended["failed"], ended.get("cancelled", 0)]
            assert len(drawn["depth"][0]) == before + 1
            assert max(filter(None, drawn["depth"][0]), default=0) == (1 if organization is None else 0)
            legend = visitor.page.locator("[data-chart=throughput] [data-value=succeeded]").inner_text()
            assert legend == str(ended["succeeded"])


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_group_of_dead_letters_is_tried_again_in_three_clicks(
    visitors: Opened, conn: psycopg.Connection, viewport: dict[str, int]
) -> None:
    group = [
        put_job(conn, "failed", age_s=100 - n, error={"code": "x", "message": f"request {n} was lost"})
        for n in range(12)
    ]
    other = put_job(conn, "failed", error={"code": "y", "message": "something else"})
    page = visitors(viewport).sign_in().page

    page.get_by_role("link", name="Dead letters").click()
    page.get_by_role("row").filter(has_text="was lost").get_by_role("link", name="Try again").click()
    expect(page.get_by_role("heading", name="Try 12 jobs again")).to_be_visible()
    later = put_job(conn, "failed", age_s=1, ran_s=0.5, error={"code": "x", "message": "request 99 was lost"})
    conn.execute("update agentflow.jobs set finished_at = clock_timestamp() where id = %s", (later,))
    page.get_by_label("How fast").select_option("1")
    page.get_by_role("button", name="Try again").click()

    expect(page.get_by_text("12 jobs are tried again.")).to_be_visible()
    retried = conn.execute(
        "select retry_of, run_at from agentflow.jobs where retry_of is not null order by run_at"
    ).fetchall()
    assert [row[0] for row in retried] == group  # the oldest first
    assert (retried[-1][1] - retried[0][1]).total_seconds() == pytest.approx(11, abs=1)
    dealt_with = dict(conn.execute("select id, dealt_with from agentflow.jobs where state = 'failed'").fetchall())
    assert [dealt_with[each] for each in group] == ["retried"] * 12 and dealt_with[other] is dealt_with[later] is None
    expect(page.locator("[data-row]")).to_have_count(2)


def test_dead_letters_that_a_search_finds_are_laid_aside(visitors: Opened, conn: psycopg.Connection) -> None:
    found = {put_job(conn, "failed", type=type_, error=TIMEOUT) for type_ in ("a", "b")}
    put_job(conn, "failed", error={"code": "y", "message": "something else"})
    page = visitors().sign_in().page
    page.get_by_role("link", name="Dead letters").click()

    page.get_by_label("Words of the error").fill("openrouter.ai")
    page.get_by_role("button", name="Preview laying aside").click()
    expect(page.get_by_role("heading", name="Lay 2 dead letters aside")).to_be_visible()
    page.get_by_role("button", name="Lay aside").click()

    expect(page.get_by_text("2 dead letters are laid aside.")).to_be_visible()
    aside = conn.execute("select id from agentflow.jobs where dealt_with = 'discarded'").fetchall()
    assert {row[0] for row in aside} == found


def test_nothing_that_others_wrote_is_run(visitors: Opened, conn: psycopg.Connection, tenants: dict[str, str]) -> None:
    conn.execute("update agentflow.organizations set name = %s where id = %s", (SCRIPT, MINE))
    conn.execute("update agentflow.api_keys set name = %s", (SCRIPT,))
    conn.execute("insert into agentflow.pauses (kind, name, reason) values ('queue', 'default', %s)", (SCRIPT,))
    hostile: dict[str, Any] = {
        "type": SCRIPT,
        "correlation_id": SCRIPT,
        "callback_url": "javascript:window.ran=true",
        "organization_id": MINE,
    }
    words = {"code": SCRIPT, "message": SCRIPT, "traceback": SCRIPT}
    file = {"key": f"o/{MINE}/{SCRIPT}.png", "name": SCRIPT, "url": "javascript:window.ran=true"}
    jobs: list[UUID] = [
        put_job(conn, "failed", error=words, payload={SCRIPT: SCRIPT}, **hostile),
        put_job(conn, "succeeded", result={SCRIPT: [file]}, **hostile),
        put_job(conn, "running", stage=SCRIPT, progress=0.5, **hostile),
        put_job(conn, "queued", wait_reason=SCRIPT, error=words, **hostile),
    ]
    visitor = visitors()
    visitor.allowed = ("404", "403")  # the picture that is not there
    visitor.sign_in(tenants["mine"])
    for path in (
        "",
        "/jobs",
        "/dead-letters",
        "/dead-letters/retry",
        *(f"/jobs/{job}" for job in jobs),
        f"/jobs?q={SCRIPT}&type={SCRIPT}&error={SCRIPT}",
    ):
        page = visitor.open(path)
        assert page.evaluate("window.ran") is None, path
        assert page.locator("a[href^='javascript:'], main script").count() == 0
        assert "{{ 7*7 }}" in page.content() or path in ("/dead-letters/retry",), path


def test_keys_theme_and_language(visitors: Opened, conn: psycopg.Connection) -> None:
    first, second = put_job(conn, age_s=10), put_job(conn, age_s=20)
    visitor = visitors(color_scheme="light").sign_in()
    page = visitor.page
    focused: Callable[[], Any] = lambda: page.evaluate("document.activeElement.id")  # noqa: E731

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("g")
    page.keyboard.press("j")
    page.wait_for_url("**/dashboard/jobs")
    page.keyboard.press("j")
    assert focused() == f"job-{first}"
    page.keyboard.press("j")
    assert focused() == f"job-{second}"
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("link", name="Русский").click()
    expect(page.get_by_role("heading", name="Задачи")).to_be_visible()
    visitor.open("")
    expect(page.get_by_role("heading", name="Обзор")).to_be_visible()
    assert visitor.complaints() == []
    page.get_by_role("button", name="Выйти").first.click()
    page.wait_for_url("**/sign-in*")
    assert one(conn, "select count(*) from agentflow.dashboard_sessions") == 0
