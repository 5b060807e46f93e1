"""`ops/screenshots`: every page of the dashboard with something in it, light and dark, on a desktop and a phone, as PNG files."""

from __future__ import annotations

import io
import math
import os
import random
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg
from playwright.sync_api import Browser, sync_playwright

from agentflow import embedded, settings
from agentflow.jobs import rules, usage
from agentflow.jobs.usage import Usage
from agentflow.limits import Bucket, Window
from agentflow.schedules import records, ticks
from agentflow.schedules.records import Wanted
from agentflow.schedules.ticks import USER, Tick
from agentflow.schedules.when import When
from agentflow.system import System
from agentflow.webhooks import events, replays
from tests import dashboard_samples
from tests.conftest import ADMIN_KEY
from tests.dashboard_pictures import GB, film, put_lines, put_picture, put_prompt, put_render, put_server
from tests.dashboard_support import CHROMIUM, DESKTOP, PHONE, fill, put_job, rich_job, served, window
from tests.flight_support import endpoint, fly, handle
from web import create_app

PAGES: Final = {
    "overview": "",
    "jobs": "/jobs",
    "job": "/jobs/{job}",
    "waiting": "/jobs/{waiting}",
    "dead-letters": "/dead-letters",
    "preview": "/dead-letters/retry?type=answer_telegram",
    "webhooks": "/webhooks",
    "webhook": "/webhooks/{event}",
    "flight": "/flight/event/{event}",
    "renders": "/renders",
    "film": "/jobs/{film}",
    "render": "/jobs/{render}",
    "limits": "/limits",
    "limits-of-one": "/limits?organization=acme",
    "schedules": "/schedules",
    "schedule": "/schedules/{schedule}",
    "knowledge": "/knowledge",
    "document": "/knowledge/documents/{document}",
    "search": "/knowledge/search?q=Margaret+Hughes+founded+Acme&mode=text",
    "graph": "/knowledge/graph",
    "names": "/knowledge/names",
    "crm": "/crm",
    "account": "/crm/{account}",
    "runbook": "/runbook",
}


#: Pages that are pictured from top to bottom on a desktop, too.
_WHOLE: Final = ("overview", "job", "film", "limits-of-one", "graph", "account")


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[2:] or [f"{size}-{theme}" for size in ("desktop", "phone") for theme in ("light", "dark")]
    home = Path(tempfile.mkdtemp(prefix="agentflow-screenshots-"))
    home.chmod(0o755)
    read = settings.load({"AGENTFLOW_HOME": str(home), "AGENTFLOW_ENV": "test", "ADMIN_API_KEY": ADMIN_KEY})
    with embedded.join(home) as servers:
        system = System.start(read, "screenshots")
        try:
            with psycopg.connect(servers.database_url, autocommit=True) as conn:
                for slug, name in (("acme", "Acme"), ("north", "Northern Light"), ("velo", "Velo")):
                    conn.execute("insert into agentflow.organizations (slug, name) values (%s, %s)", (slug, name))
                fill(conn)
                ids = {
                    "job": rich_job(conn),
                    "waiting": _waiting(conn),
                    **_pictures(conn, system),
                    "schedule": _calendar(conn),
                    "event": _webhooks(system, conn),
                    "account": dashboard_samples.accounts(conn),
                }
                _limits(conn, system)
                ids |= {"document": dashboard_samples.knowledge(conn, system.storage)["film"]}
            with served(create_app(system)) as address, sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                for kind in wanted:
                    _take(browser, address, kind, folder, ids)
                browser.close()
        finally:
            system.close()
    servers.wait_stopped(20)
    return 0


def _waiting(conn: psycopg.Connection) -> UUID:
    conn.execute("insert into agentflow.durations (type, seconds) values ('analyze_video', '{28, 31, 44, 52, 60}')")
    conn.execute("insert into agentflow.concurrency_keys (key, slots) values ('1:gpu-lab', 1)")
    lab = {
        "type": "analyze_video",
        "queue": "heavy",
        "concurrency_key": "1:gpu-lab",
        "payload": {"video_id": "0197b1e2"},
    }
    put_job(conn, "running", age_s=22, progress=0.4, stage="reading frames", slot=0, **lab)
    put_job(conn, "queued", age_s=120, wait_reason="busy", **lab)
    return put_job(conn, "queued", age_s=95, wait_reason="busy", **lab)


def _webhooks(system: System, conn: psycopg.Connection) -> UUID:
    """Of three endpoints; one webhook with a story: what was made of it five minutes ago, and a replay now."""
    client = create_app(system).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {ADMIN_KEY}"
    shop, forms = endpoint(client, "Web shop", source="standard"), endpoint(client, "Forms of the site")
    for n in range(9):
        (forms if n % 3 else shop).send({"type": "order.paid", "order": 20_410 + n})
    forms.client.post(forms.path, data=b"{}", headers={"X-Hub-Signature-256": "sha256=00"})
    endpoint(client, "Payments", source="stripe")
    order = {
        "type": "order.paid",
        "order": 20_417,
        "name": "Ada",
        "card_token": "tok_1",
        "items": [{"article": "poster"}],
    }
    flown = fly(client, system, conn, shop, order, outputs=[{"key": f"o/1/renders/{n}/poster-{n}.png"} for n in (1, 2)])
    conn.execute(
        "update agentflow.webhook_events set received_at = now() - '300 s'::interval, handled_at = now() - '299 s'::interval"
        " where id = %s",
        (flown.event_id,),
    )
    for job_id, type_, times in (
        (flown.handle_id, "handle_webhook", (300, 300, 299)),
        (flown.action_id, "comfy_render", (299, 296, 214)),
    ):
        columns = ("created_at", "started_at", "finished_at")
        ago = ", ".join(f"{name} = now() - '{s} s'::interval" for name, s in zip(columns, times, strict=True))
        conn.execute(f"update agentflow.jobs set type = '{type_}', {ago} where id = %s".encode(), (job_id,))  # noqa: S608
    put_job(
        conn,
        age_s=214,
        ran_s=4,
        type="deliver_callback",
        parent_id=flown.action_id,
        trace=flown.handle_id.hex,
        attempt=2,
    )
    event = events.get(conn, 1, flown.event_id)
    assert event is not None
    with system.transaction() as transaction:
        again = replays.one(transaction, event)
    handle(system, conn, again.id)
    return flown.event_id


def _draw(number: int) -> bytes:
    """A hill under a sun, another one for each number."""
    from PIL import Image, ImageDraw

    dice = random.Random(number)
    sky = [dice.randrange(90, 230) for _ in range(3)]
    image = Image.new("RGB", (480, 270))
    pen = ImageDraw.Draw(image)
    for y in range(270):
        pen.line([(0, y), (480, y)], fill=tuple(min(255, each + y // 5) for each in sky))
    x, y, radius = dice.randrange(60, 420), dice.randrange(40, 120), dice.randrange(18, 44)
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(255, 244, 214))
    for step in range(3):
        hill = tuple(max(0, each // (2 + step)) for each in sky)
        top, phase = 160 + 34 * step, dice.random() * 6
        slope = [(at, top + 22 * math.sin(at / (60 + 20 * step) + phase)) for at in range(0, 490, 10)]
        pen.polygon([(0, 270), *slope, (480, 270)], fill=hill)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _pictures(conn: psycopg.Connection, system: System) -> dict[str, UUID]:
    put_server(conn, "http://gpu-1.lan:8188", queue=2)
    put_server(conn, "http://gpu-2.lan:8188", free=19 * GB)
    put_server(conn, "http://gpu-3.lan:8188", well=False, problem="stuck", free=23 * GB)
    for n in range(11):
        put_render(
            conn,
            system,
            outputs=(1, 4, 1, 2)[n % 4],
            draw=lambda each, n=n: _draw(100 * n + each),
            age_s=4000 - 300 * n,
        )  # type: ignore[misc]
    source = {"image": {"artefact": put_picture(system, 1, "renders/source/before.png", _draw(7))}}
    payload = {"workflow": "qwen-image-edit", "parameters": {"prompt": "make it evening"}, "images": source}
    render = put_render(conn, system, payload=payload, outputs=2, draw=lambda each: _draw(900 + each))
    line = {"type": "comfy_render", "queue": "gpu", "payload": {"workflow": "qwen-image-edit"}}
    for n in range(2):
        at_work = put_job(conn, "running", age_s=30 + n, progress=0.4 + n / 3, stage="rendering: KSampler 9/20", **line)
        put_prompt(conn, at_work, 1, "sent", slot=n, server=f"http://gpu-{n + 1}.lan:8188")
        put_job(conn, "queued", age_s=20 + n, concurrency_key="gpu:default", wait_reason="busy", **line)
    of_film = put_job(
        conn,
        "succeeded",
        age_s=700,
        ran_s=95,
        type="analyze_video",
        queue="heavy",
        result=film(system, 1, shots=18, draw=_draw),
    )
    put_lines(
        conn,
        of_film,
        ("info", "the film is read", {"seconds": 72.0, "shots": 18}),
        ("warning", "a caption was asked for again", {"shot": 5, "code": "model_bad_answer"}),
        ("info", "captions are there", {"shots": 18}),
    )
    return {"render": render, "film": of_film}


def _limits(conn: psycopg.Connection, system: System) -> None:
    acme, north, velo = (
        each[0] for each in conn.execute("select id from agentflow.organizations where id > 1 order by id")
    )
    rules.set_budget(conn, 0, "usd", 20)
    rules.set_budget(conn, acme, "usd", 50)
    rules.set_budget(conn, acme, "video_min", 600, own=True)
    rules.set_cap(conn, acme, "analyze_video", 4)
    rules.set_limit(conn, acme, "openrouter", [Window(100, 60), Window(5000, 3600)])
    rules.pause(conn, "organization", "", north, "the contract is being changed")
    rules.pause(conn, "type", "write_crm", velo, "the CRM is being moved", own=True)
    for organization_id, measures in (
        (acme, {"usd": 31.4, "tokens_in": 812_000, "tokens_out": 44_000, "video_min": 588, "gpu_s": 912.5}),
        (velo, {"usd": 21.3}),
    ):
        running = put_job(conn, "running", organization_id=organization_id, type="analyze_video", queue="heavy")
        usage.record(conn, [Usage(running, 1, measures)])
    for n in range(43):
        system.limits.take([Bucket(f"calls:openrouter:{acme}", (Window(100, 60), Window(5000, 3600)))], f"holder {n}")


def _calendar(conn: psycopg.Connection) -> UUID:
    made = [
        records.create(conn, 1, Wanted(name, when, "ping", {}, enabled=name != "on the hour"), most=10)
        for name, when in (
            ("on the hour", When(cron="0 * * * *")),
            ("every quarter of an hour", When(every_s=900)),
            ("every morning", When(cron="30 7 * * mon-fri", time_zone="Europe/Berlin")),
        )
    ]
    for each in made:
        for hours in range(6):
            tick = Tick(USER, records.now(conn) - timedelta(hours=24 * hours + 3), str(each.id), 1)
            ticks.claim(conn, tick)
            ticks.end(conn, tick, "submitted", job_id=put_job(conn, age_s=3600))
    return made[-1].id


def _take(browser: Browser, address: str, kind: str, folder: Path, ids: dict[str, UUID]) -> None:
    size, theme = kind.split("-")
    phone = size == "phone"
    visitor = window(
        browser, address, PHONE if phone else DESKTOP, color_scheme=theme, device_scale_factor=2 if phone else 1
    )
    if not phone:
        visitor.open("/sign-in").screenshot(path=folder / f"sign-in-{kind}.png")
    visitor.sign_in()
    for name, path in PAGES.items():
        page = visitor.open(path.format(**ids))
        if name == "overview":
            page.get_by_role("button", name="24 hours").click()
            page.wait_for_selector("#charts[data-ready='24h']")
        if name == "graph":
            page.wait_for_selector("#graph[data-ready]")
            page.locator("#picture .says", has_text="ООО «Ромашка» uses").locator("text").click()
            page.locator("#panel img").wait_for()
        page.screenshot(
            path=folder / f"{name}-{kind}.png",
            full_page=name in _WHOLE or (phone and name != "runbook"),
        )
    for problem in visitor.problems():
        print(f"{kind}: {problem}", file=sys.stderr)
    visitor.page.context.close()


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
