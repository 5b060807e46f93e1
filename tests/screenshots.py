"""`ops/screenshots`: every page of the dashboard with something in it, light and dark, on a desktop and a phone, as PNG files."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg
from playwright.sync_api import Browser, sync_playwright

from agentflow import embedded, settings
from agentflow.system import System
from agentflow.webhooks import events, replays
from tests.conftest import ADMIN_KEY
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
    "runbook": "/runbook",
}


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
                conn.execute("insert into agentflow.organizations (slug, name) values ('acme', 'Acme')")
                fill(conn)
                ids = {"job": rich_job(conn), "waiting": _waiting(conn), "event": _webhooks(system, conn)}
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
        page.screenshot(
            path=folder / f"{name}-{kind}.png", full_page=name in ("overview", "job") or (phone and name != "runbook")
        )
    for problem in visitor.problems():
        print(f"{kind}: {problem}", file=sys.stderr)
    visitor.page.context.close()


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
