"""Renders on the dashboard, and what a job's page shows of pictures, films and its log: signed links to its own files alone."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
from flask import Flask
from playwright.sync_api import expect

from agentflow.comfyui import prompts
from agentflow.jobs import lines
from agentflow.jobs.lines import Line, Place
from agentflow.system import System
from tests.dashboard_pictures import GB, film, put_lines, put_picture, put_prompt, put_render, put_server
from tests.dashboard_support import (
    MINE,
    PATIENCE_MS,
    THEIRS,
    Opened,
    app,
    browser,
    put_job,
    tenants,
    visitors,
)
from tests.dashboard_visits import SCRIPT, WIDTHS
from tests.test_dashboard import sign_in
from tests.test_query_plans import plans

__all__ = ["app", "browser", "tenants", "visitors"]

expect.set_options(timeout=PATIENCE_MS)
Connection = psycopg.Connection


# ---- renders ----


@WIDTHS
def test_servers_gallery_and_line_are_shown_and_lead_to_the_jobs(
    visitors: Opened, app: Flask, system: System, conn: Connection, viewport: dict[str, int]
) -> None:
    put_server(conn, "http://gpu-1:8188")
    put_server(conn, "http://gpu-2:8188", well=False, problem="stuck", free=24 * GB)
    done = put_render(conn, system, outputs=3)
    running = put_job(conn, "running", type="comfy_render", queue="gpu", progress=0.5, stage="sampling 3/6")
    put_prompt(conn, running, 1, "sent")
    line = {"type": "comfy_render", "queue": "gpu", "concurrency_key": "gpu:default", "wait_reason": "busy"}
    first, second = (
        put_job(conn, "queued", age_s=age, payload={"workflow": name}, **line) for age, name in ((90, "a"), (30, "b"))
    )
    visitor = visitors(viewport).enter(app)
    page = visitor.open("/renders")

    servers = page.get_by_role("region", name="Servers")
    expect(servers.get_by_role("row").filter(has_text="gpu-1")).to_contain_text(
        re.compile("well.*1/2.*19\u202fGB / 26\u202fGB", re.DOTALL)
    )
    expect(servers.get_by_role("row").filter(has_text="gpu-2")).to_contain_text(re.compile("stuck.*0/2", re.DOTALL))
    expect(page.get_by_role("region", name="At work")).to_contain_text("sampling 3/6")
    waits = page.get_by_role("region", name="Waiting").get_by_role("row").filter(has_text="Place")
    expect(waits).to_have_count(2)
    assert [str(first) in waits.nth(0).inner_html(), str(second) in waits.nth(1).inner_html()] == [True, True]
    pictures = page.locator(f"article:has(#render-{done}) img")
    assert pictures.count() == 3
    page.wait_for_function("[...document.querySelectorAll('article img')].every(each => each.naturalWidth === 64)")
    assert (visitor.overflow(), visitor.complaints()) == (0, [])

    page.locator(f"#render-{done}").click()
    page.wait_for_url(f"**/jobs/{done}")


def test_the_gallery_comes_in_pages(app: Flask, system: System, conn: Connection) -> None:
    made = sorted((put_render(conn, system) for _ in range(27)), reverse=True)
    client = sign_in(app)

    first = client.get("/dashboard/renders").text
    cursor = re.search(r"cursor=([\w-]+)", first)
    assert cursor is not None
    second = client.get(f"/dashboard/renders?cursor={cursor[1]}").text

    assert [UUID(each) for each in re.findall(r'id="render-([0-9a-f-]+)"', first + second)] == made


def test_renders_of_others_and_the_machines_are_not_there(
    app: Flask, system: System, conn: Connection, tenants: dict[str, str]
) -> None:
    put_server(conn, "http://gpu-1:8188")
    mine, theirs = put_render(conn, system, MINE), put_render(conn, system, THEIRS)
    waiting = {}
    for organization_id in (MINE, THEIRS):
        running = put_job(conn, "running", organization_id=organization_id, type="comfy_render", queue="gpu")
        put_prompt(conn, running, organization_id, "sent", slot=organization_id % 16)
        line = {"queue": "gpu", "concurrency_key": "gpu:default", "wait_reason": "busy"}
        waiting[organization_id] = put_job(conn, "queued", organization_id=organization_id, type="comfy_render", **line)
        waiting[organization_id, "running"] = running
    client = sign_in(app, tenants["mine"])

    text = client.get("/dashboard/renders").text + client.get("/dashboard/renders?part=now").text

    assert all(str(each) in text for each in (mine, waiting[MINE], waiting[MINE, "running"]))
    assert not any(str(each) in text for each in (theirs, waiting[THEIRS], waiting[THEIRS, "running"]))
    assert "gpu-1" not in text and f"o/{THEIRS}/" not in text
    for link in set(re.findall(r'"(/artefacts/[^"]+)"', text)):
        assert client.get(link.replace("&amp;", "&")).status_code == 200


# ---- a job's page ----


@WIDTHS
def test_a_render_is_shown_beside_what_it_was_made_of(
    visitors: Opened, app: Flask, system: System, conn: Connection, viewport: dict[str, int]
) -> None:
    before = put_picture(system, 1, "renders/source/in.png")
    foreign = put_picture(system, THEIRS, "renders/source/secret.png")
    images = {"image": {"artefact": before}, "mask": {"artefact": foreign}, "far": {"url": "https://example.com/x.png"}}
    job = put_render(conn, system, outputs=2, payload={"workflow": "edit", "images": images})
    visitor = visitors(viewport).enter(app)
    page = visitor.open(f"/jobs/{job}")

    compared = page.get_by_role("region", name="Before and after")
    assert [each.get_attribute("alt") for each in compared.locator("img").all()] == [
        "in.png",
        "000-out.png",
        "001-out.png",
    ]
    page.wait_for_function("[...document.querySelectorAll('.compared img')].every(each => each.naturalWidth === 64)")
    assert f"/artefacts/o/{THEIRS}/" not in page.content()
    assert (visitor.overflow(), visitor.complaints()) == (0, [])


@WIDTHS
def test_a_film_is_its_shots_along_the_time_and_what_is_said(
    visitors: Opened, app: Flask, system: System, conn: Connection, viewport: dict[str, int]
) -> None:
    job = put_job(conn, "succeeded", type="analyze_video", queue="heavy", result=film(system, 1))
    put_lines(conn, job, ("warning", "x" * 200, {"y" * 100: "z" * 100}))
    visitor = visitors(viewport).enter(app)
    page = visitor.open(f"/jobs/{job}")

    assert page.evaluate("[...document.querySelectorAll('.reel rect')].map(each => +each.getAttribute('x'))") == [
        0,
        333.33,
        666.67,
    ]
    assert " ".join(page.locator(".shots li").nth(1).inner_text().split()) == "2 0:04 – 0:08 A bicycle in the rain"
    expect(page.locator("#shot-3")).to_contain_text("as shot 1")
    page.locator(".reel a").nth(2).click(force=True)
    assert page.url.endswith("#shot-3")
    assert page.locator(".transcript li").all_inner_texts() == [
        "0:00 Sentence 0.",
        "1:03 Sentence 1.",
        "2:06 Sentence 2.",
    ]
    expect(page.get_by_text("Somebody rides home.").first).to_be_visible()
    sheet = page.locator(".sheet img")
    sheet.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.sheet img').naturalWidth === 64")
    assert (visitor.overflow(), visitor.complaints()) == (0, [])


def test_a_log_is_followed_and_filtered_by_level(visitors: Opened, app: Flask, conn: Connection) -> None:
    job = put_job(conn, "running", age_s=5)
    put_lines(
        conn,
        job,
        ("info", "began", {"lead": 17}),
        ("error", SCRIPT, {"exception": "Traceback: Bearer abcdefgh12345678"}),
    )
    visitor = visitors().enter(app)
    page = visitor.open(f"/jobs/{job}")
    log = page.locator("ol.log li")

    expect(log).to_have_count(2)
    expect(log.nth(0)).to_contain_text("lead=17")
    assert "abcdefgh12345678" not in page.content()
    assert page.locator("main img").count() == 0 and page.evaluate("window.ran") is None
    line = Line(Place(1, 7), 1, datetime.now(UTC), 30, "actors.x", "slow today", {}, 50)
    lines.write(conn, [(job, line)])
    page.evaluate("htmx.trigger('#log', 'again')")
    expect(log).to_have_count(3)
    page.get_by_role("link", name="warnings").click()
    expect(log).to_have_count(2)
    page.get_by_role("link", name="errors", exact=True).click()
    expect(log).to_have_count(1)
    assert (visitor.overflow(), visitor.complaints()) == (0, [])


def test_results_that_are_no_films_are_shown_all_the_same(app: Flask, system: System, conn: Connection) -> None:
    """What a job answered is whatever it was, also of another version."""
    client = sign_in(app)
    odd: list[Any] = [None, 7, "x", [], {}, [{}], {"items": 3}, [None, {"start_s": "x"}], {"key": f"o/{THEIRS}/x.png"}]
    parts = ("contact_sheet", "captions", "transcript", "chapters", "summary")
    for value in odd:
        shots = [{"end_s": 4, "keyframe": value, "duplicate_of": value, "index": n} for n in range(2)]
        for type_, result in (
            ("analyze_video", {**dict.fromkeys(parts, value), "shots": shots}),
            ("analyze_video", {"shots": value}),
            ("comfy_render", {"outputs": value}),
        ):
            job = put_job(conn, "succeeded", type=type_, result=result, payload={"images": value})
            answer = client.get(f"/dashboard/jobs/{job}")
            assert answer.status_code == 200, (type_, result)
            assert "/artefacts/" not in answer.text
    assert client.get(f"/dashboard/jobs/{job}?level=loud").status_code == 422


# ---- outside services ----


def test_outside_services_are_as_jobs_meet_with_them(
    app: Flask, system: System, conn: Connection, tenants: dict[str, str]
) -> None:
    put_server(conn, "http://gpu-1:8188", well=False, problem="unreachable")
    put_server(conn, "http://gpu-2:8188")
    put_job(conn, "queued", organization_id=MINE, wait_reason="model_limit", run_at="2100-01-01", wake_at="2100-01-01")
    for organization_id, code, age_s in (
        (MINE, "crm_blocked", 60),
        (MINE, "crm_busy", 7200),
        (THEIRS, "url_timeout", 60),
    ):
        put_job(conn, "failed", organization_id=organization_id, age_s=age_s, error={"code": code, "message": "x"})
    put_job(conn, "failed", organization_id=MINE, error={"code": "crm_not_configured", "message": "x"})

    theirs, mine, operators = (outside_of(app, key) for key in (tenants["theirs"], tenants["mine"], None))

    assert theirs == {
        "Language models": "not used", "CRM": "not used", "Telegram": "not used",
        "Addresses that jobs ask": "look 1 job has failed",
    }  # fmt: skip
    assert mine == {
        "Language models": "look 1 job waits", "CRM": "look 1 job has failed", "Telegram": "not used",
        "Addresses that jobs ask": "well",
    }  # fmt: skip
    assert operators == {
        "Language models": "look 1 job waits", "CRM": "look 1 job has failed", "Telegram": "not used",
        "Addresses that jobs ask": "look 1 job has failed", "Render servers": "wrong 1 server gets no work",
        "Senders of webhooks": "not used",
    }  # fmt: skip
    text = sign_in(app).get("/dashboard").text
    assert "Render servers: 1 server gets no work." in text and "CRM: 1 job has failed of it within an hour." in text


def outside_of(app: Flask, key: str | None) -> dict[str, str]:
    text = (sign_in(app, key) if key else sign_in(app)).get("/dashboard?part=parts").text
    card = text.split('id="outside"')[1].split("</section>")[0]
    cells = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in re.findall(r"<tr>(.*?)</tr>", card)]
    names = ("Language models", "CRM", "Telegram", "Addresses that jobs ask", "Render servers", "Senders of webhooks")
    return {name: cell.removeprefix(name).strip() for cell in cells for name in names if cell.startswith(name)}


# ---- how it is found ----


def test_the_gallery_is_read_from_its_index_however_many_renders_there_are(conn: Connection) -> None:
    made = (
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, state, finished_at)"
        " select ('0197b1e2-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,"
        " case when n % 1000 = 0 then 7 else 1 end, 'comfy_render', 'gpu', 3, 60,"
        " 'succeeded', now() from generate_series(1, 20000) n"
    )
    prompt = (
        "insert into agentflow.renders (prompt_id, organization_id, job_id, fence, server, slot, state, ended_at, found)"
        " select gen_random_uuid(), organization_id, id, 1, 'http://gpu', 0, 'collected', now(), '{\"outputs\": []}'"
        " from agentflow.jobs"
    )
    for statement in (made, prompt, "analyze agentflow.renders"):
        conn.execute(statement.encode())

    with plans(conn) as heard:
        found = [prompts.collected(conn, organization_id, limit=25) for organization_id in (None, 7)]

    assert [len(each) for each in found] == [25, 20] and {each.organization_id for each in found[1]} == {7}
    scans = [node for node in heard.nodes if node.get("Relation Name") == "renders"]
    assert [node.get("Index Name") for node in scans] == ["renders_jobs", "renders_collected"]
