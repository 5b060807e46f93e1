"""The dashboard in tests: served from this process, looked at by Chromium, with something to see in it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from flask import Flask
from playwright.sync_api import Browser, Page, sync_playwright
from werkzeug.serving import make_server

import actors  # noqa: F401 - makes ping known, which is tried again
from agentflow import organizations
from agentflow.jobs import history
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.processes import ROOT
from web import create_app
from web.dashboard.frame import COOKIE

CHROMIUM: Final = "/usr/bin/chromium"
DESKTOP: Final = {"width": 1360, "height": 900}
PHONE: Final = {"width": 390, "height": 844}
AXE: Final = ROOT / "tests" / "data" / "axe" / "axe.min.js"
#: A page on a busy machine: nothing here is a measurement.
PATIENCE_MS: Final = 30_000
MINE, THEIRS = 7_800_001, 7_800_002
_WATCH: Final = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


_launched: list[Browser] = []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One in each test process: every file that imports this has a fixture of its own, and Playwright cannot be started twice."""
    if _launched:
        yield _launched[0]
        return
    with sync_playwright() as playwright:
        _launched.append(
            playwright.chromium.launch(
                executable_path=CHROMIUM,
                args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
                timeout=PATIENCE_MS,
            )
        )
        yield _launched[0]
        _launched.pop().close()


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


@dataclass
class Visitor:
    """A browser window, and what went wrong in it."""

    page: Page
    address: str
    wrong: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()

    def open(self, path: str) -> Page:
        self.page.goto(f"{self.address}/dashboard{path}")
        return self.page

    def sign_in(self, key: str = ADMIN_KEY) -> Visitor:
        self.open("/sign-in")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url("**/dashboard")
        return self

    def enter(self, app: Flask, key: str = ADMIN_KEY) -> Visitor:
        """Signed in, past the door and the overview."""
        client = app.test_client()
        client.post("/dashboard/sign-in", data={"key": key})
        cookie = client.get_cookie(COOKIE, path="/dashboard")
        assert cookie is not None
        self.page.context.add_cookies([{"name": COOKIE, "value": cookie.value, "url": f"{self.address}/dashboard"}])
        return self

    def problems(self) -> list[str]:
        """Errors on the console, exceptions, violations of the policy."""
        violated = self.page.evaluate("window.violations || []")
        return [each for each in self.wrong + violated if not any(known in each for known in self.allowed)]

    def complaints(self) -> list[str]:
        """What axe-core finds that is serious or worse: rule and first element."""
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['any'][:1]}"
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


Opened = Callable[..., Visitor]


@pytest.fixture
def app(system: System) -> Flask:
    return create_app(system)


@pytest.fixture
def visitors(browser: Browser, app: Flask) -> Iterator[Opened]:
    """Windows on the dashboard; at the end none may have anything to complain of."""
    opened: list[Visitor] = []
    with served(app) as address:

        def one(viewport: dict[str, int] = DESKTOP, **more: Any) -> Visitor:
            opened.append(window(browser, address, viewport, **more))
            return opened[-1]

        yield one
        problems = [problem for each in opened for problem in each.problems()]
        for each in opened:
            each.page.context.close()
    assert not problems, problems


def window(browser: Browser, address: str, viewport: dict[str, int], **more: Any) -> Visitor:
    context = browser.new_context(viewport=viewport, locale="en-GB", **more)  # type: ignore[arg-type]
    context.add_init_script(_WATCH)
    context.set_default_timeout(PATIENCE_MS)
    visitor = Visitor(context.new_page(), address)
    visitor.page.on("console", lambda said: visitor.wrong.append(said.text) if said.type == "error" else None)
    visitor.page.on("pageerror", lambda error: visitor.wrong.append(str(error)))
    return visitor


# ---- something to see ----


@pytest.fixture
def tenants(conn: psycopg.Connection) -> dict[str, str]:
    """Two organizations: keys by name, `reader` with the scope `read` alone."""
    for number, slug, name in ((MINE, "mine", "Mine"), (THEIRS, "theirs", "Theirs")):
        conn.execute("insert into agentflow.organizations (id, slug, name) values (%s, %s, %s)", (number, slug, name))
    return {
        "mine": organizations.create_key(conn, MINE, "dashboard", organizations.SCOPES)[1],
        "theirs": organizations.create_key(conn, THEIRS, "dashboard", organizations.SCOPES)[1],
        "reader": organizations.create_key(conn, MINE, "reader", ["read"])[1],
    }


def uuid_at(at: datetime) -> UUID:
    return UUID(int=(int(at.timestamp() * 1000) << 80) | (7 << 76) | (2 << 62) | random.getrandbits(62))


def put_job(
    conn: psycopg.Connection,
    state: str = "succeeded",
    *,
    age_s: float = 60.0,
    ran_s: float = 1.0,
    waited_s: float = 0.1,
    **columns: Any,
) -> UUID:
    """A row as it is after the job came to this state: handed in `age_s` ago, begun `waited_s` later."""
    created = datetime.now(UTC) - timedelta(seconds=age_s)
    started = created + timedelta(seconds=waited_s) if state != "queued" else None
    ended = started + timedelta(seconds=ran_s) if started and state not in ("running",) else None
    values: dict[str, Any] = {
        "id": uuid_at(created), "organization_id": 1, "type": "ping", "queue": "default", "max_attempts": 5,
        "time_limit_s": 60, "state": state, "created_at": created, "run_at": created,
        "attempt": int(state != "queued"), "fence": int(state != "queued"),
        "started_at": started, "finished_at": ended, "wake_at": created if state == "queued" else None,
        **({"worker": uuid4(), "lease_until": datetime.now(UTC) + timedelta(hours=1)} if state == "running" else {}),
        **columns,
    }  # fmt: skip
    for name in ("payload", "result", "error", "then_jobs"):
        if values.get(name) is not None:
            values[name] = json.dumps(values[name])
    names = ", ".join(values)
    conn.execute(
        f"insert into agentflow.jobs ({names}) values ({', '.join(['%s'] * len(values))})",  # noqa: S608
        list(values.values()),
    )
    found: UUID = values["id"]
    return found


TIMEOUT: Final = {"code": "timeout", "message": "openrouter.ai did not answer within 30 s (request 8812)"}
REFUSED: Final = {
    "code": "unexpected",
    "message": "ValueError: lead 4711 has no contact",
    "traceback": 'Traceback (most recent call last):\n  File "actors/sync_kommo.py", line 71, in run\n'
    "    raise ValueError(f'lead {lead} has no contact')\nValueError: lead 4711 has no contact\n",
}


def fill(conn: psycopg.Connection, *, jobs: int = 400, hours: float = 24.0) -> None:
    """Something on every page: a day of work, dead letters of three kinds, waiting and running jobs, workers."""
    dice = random.Random(7)
    types = (
        "analyze_video",
        "sync_kommo_contacts",
        "generate_embeddings",
        "deliver_callback",
        "render_image",
        "answer_telegram",
    )
    for n in range(jobs):
        age_s = 200 + dice.random() ** 1.5 * hours * 3600
        kind = types[dice.randrange(len(types))]
        fails = dice.random() < (0.2 if kind == "sync_kommo_contacts" else 0.03 if kind == "analyze_video" else 0)
        error = (
            dict(TIMEOUT, message=f"openrouter.ai did not answer within 30 s (request {n})")
            if n % 2
            else dict(REFUSED, message=f"ValueError: lead {n} has no contact")
        )
        put_job(
            conn, "failed" if fails else "succeeded", age_s=age_s, ran_s=dice.expovariate(1 / 8),
            waited_s=dice.expovariate(1 / 0.4), type=kind, queue="heavy" if kind == "analyze_video" else "default",
            error=error if fails else None, payload={"account_id": n}, result=None if fails else {"done": True},
        )  # fmt: skip
    for n in range(3):
        put_job(
            conn,
            "running",
            age_s=40 + n * 20,
            type="analyze_video",
            queue="heavy",
            progress=0.2 + 0.3 * n,
            stage="reading frames",
        )
    soon = datetime.now(UTC) + timedelta(minutes=12)
    for n in range(5):
        put_job(
            conn,
            "queued",
            age_s=30 + n,
            type=types[n],
            **({"run_at": soon, "wake_at": soon, "wait_reason": "limit"} if n % 2 else {}),
        )
    for n, (threads, busy) in enumerate(((25, 9), (25, 3), (8, 2))):
        conn.execute(
            "insert into agentflow.workers (id, kind, host, pid, version, queues, threads, busy, memory_bytes, started_at)"
            " values (%s, 'worker', %s, %s, '0.1.0', %s, %s, %s, %s, clock_timestamp() - interval '5 h')",
            (
                uuid4(),
                f"worker-{n + 1}",
                4000 + n,
                ["default", "heavy", "gpu"][: 3 if n == 2 else 2],
                threads,
                busy,
                (180 + 40 * n) << 20,
            ),
        )
    history.roll_up(conn)
    conn.execute(
        "insert into agentflow.depth_history (seconds, at, organization_id, queue, due, parked, running, oldest_due_s)"
        " select s, date_bin(make_interval(secs => s), clock_timestamp(), 'epoch') - make_interval(secs => s * n), 1, 'default',"
        " greatest(0, 30 * (random() ^ 4) * (1 + sin(n / 23.0)) + 3 * random()), 6 + 2 * random(), 8 + 6 * random(),"
        " 9 * (random() ^ 3)"
        " from unnest(array[60, 600, 3600]) s, generate_series(0, 167) n on conflict do nothing"
    )
    history.sample_depths(conn)


def rich_job(conn: psycopg.Connection) -> UUID:
    """One with attempts, a chain, usage and an error that was got over."""
    now = datetime.now(UTC)
    second, third = uuid_at(now), uuid_at(now)
    then = [
        {"id": str(second), "type": "generate_embeddings", "then": [{"id": str(third), "type": "deliver_callback"}]}
    ]
    made = put_job(
        conn, "succeeded", age_s=900, waited_s=640, ran_s=48, type="analyze_video", queue="heavy", attempt=3, fence=4,
        correlation_id="deal-20417",
        payload={"video_id": "0197b1e2", "url": "https://cdn.example.com/film.mp4?token=abc", "api_key": "sk-very-secret"},
        result={"shots": 42, "duration_s": 183.2, "title": "Bikes in the rain"}, then_jobs=then,
    )  # fmt: skip
    for fence, attempt, outcome, began_s, ended_s, error in (
        (1, 1, "retry", 890, 850, TIMEOUT),
        (2, 2, "wait", 840, 839, {"code": "model_limit", "message": "The provider's limit is used up until 12:40."}),
        (
            3,
            2,
            "crashed",
            700,
            620,
            {"code": "worker_lost", "message": "The worker that ran this job died or fell silent."},
        ),
    ):
        conn.execute(
            "insert into agentflow.attempts (job_id, fence, attempt, worker, started_at, ended_at, outcome, error)"
            " values (%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                made,
                fence,
                attempt,
                uuid4(),
                now - timedelta(seconds=began_s),
                now - timedelta(seconds=ended_s),
                outcome,
                json.dumps(error),
            ),
        )
    conn.execute("update agentflow.jobs set started_at = clock_timestamp() - interval '260 s' where id = %s", (made,))
    conn.execute("update agentflow.jobs set finished_at = clock_timestamp() - interval '212 s' where id = %s", (made,))
    conn.execute(
        "insert into agentflow.usage (job_id, fence, organization_id, measures) values (%s, 4, 1, %s)",
        (made, json.dumps({"usd": 0.0412, "tokens_in": 18200, "tokens_out": 940})),
    )
    put_job(
        conn,
        "running",
        age_s=211,
        type="generate_embeddings",
        id=second,
        parent_id=made,
        progress=0.6,
        stage="chunk 12 of 20",
    )
    return made
