"""Kill -9 of the web process while it takes work in, and of every process of a system at once, its servers included."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import psutil
import psycopg
import pytest

from agentflow import embedded
from tests.clips import real_clips  # noqa: F401 - a fixture
from tests.conftest import ADMIN_KEY
from tests.folders import server_folder
from tests.processes import eventually, worker
from tests.test_kills import QUICK_LEASES, assert_each_ended_once, open_jobs
from tests.test_up import running_up
from tests.web_support import gunicorn

pytestmark = pytest.mark.flaky(reruns=0)  # a job lost once is lost

AUTH = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.mark.long
@pytest.mark.timeout(180)
def test_what_web_accepted_before_its_death_is_kept_and_sending_it_again_makes_no_second_job(
    environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    accepted: dict[int, str] = {}
    stop = threading.Event()
    url = ""

    def send(first: int) -> None:
        """Sends until each of its numbers is accepted, with the same key each time."""
        for number in range(first, 500, 4):
            while not stop.is_set() and number not in accepted:
                try:
                    answer = httpx2.post(
                        f"{url}/api/jobs",
                        json={"type": "ping", "payload": {}},
                        headers={**AUTH, "Idempotency-Key": f"n{number}"},
                        timeout=10,
                    )
                    if answer.status_code == 202:
                        accepted[number] = answer.json()["id"]
                except httpx2.TransportError:
                    time.sleep(0.05)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    try:
        with worker(environment, tmp_path / "worker.log"):
            for kill in (True, True, False):
                with gunicorn(environment, tmp_path) as web:
                    url = web.url
                    for thread in threads:
                        if thread.ident is None:
                            thread.start()
                    if kill:
                        seen = len(accepted)
                        eventually(lambda seen=seen: len(accepted) > seen + 30)
                        for process in web.process.family():
                            with suppress(psutil.NoSuchProcess):
                                process.kill()
                    else:
                        for thread in threads:
                            thread.join(60)
            eventually(lambda: open_jobs(conn) == 0, within_s=60)
    finally:
        stop.set()

    rows = conn.execute("select id::text, idempotency_key, state from agentflow.jobs").fetchall()
    assert len(accepted) == 500
    assert {(i, f"n{n}") for n, i in accepted.items()} == {(row[0], row[1]) for row in rows}
    assert {row[2] for row in rows} == {"succeeded"}


@pytest.fixture
def home() -> Iterator[Path]:
    with server_folder("all") as folder:
        yield folder


@pytest.mark.timeout(240)
def test_everything_killed_at_once_in_the_middle_of_the_work_and_started_again(
    environment: dict[str, str],
    home: Path,
    tmp_path: Path,
    real_clips: Path,  # noqa: F811
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL"):
        environment.pop(name)
    environment.update(QUICK_LEASES, AGENTFLOW_HOME=str(home / "home"), JOB_CONCURRENCY="8")
    ids: list[Any] = []

    with running_up(environment, tmp_path / "first.log") as up:
        api = httpx2.Client(base_url=up.url, headers=AUTH, timeout=30)
        with (real_clips / "bikes.mp4").open("rb") as clip:
            video = api.post("/api/videos", files={"file": clip}).json()
        ids.append(api.post("/api/videos/analyze", json={"video_id": video["video_id"]}).json()["task_id"])
        mixed = [{}, {"sleep_ms": 300}, {"wait_ms": 200}, {"native_ms": 200}, {"fail_attempts": 1}]
        for n in range(5):
            jobs = [{"type": "ping", "payload": mixed[k % 50 % 5 if k % 50 < 5 else 1]} for k in range(100)]
            ids += api.post("/api/jobs/batch", json={"jobs": jobs}).json()["ids"]
            if n == 2:
                time.sleep(1.0)
        everything = [*up.family(), *servers(home)]
        assert len(everything) >= 5, everything
        for process in everything:
            with suppress(psutil.NoSuchProcess):  # the death of its parent was quicker
                process.kill()
    assert eventually(lambda: not servers(home))

    with running_up(environment, tmp_path / "second.log"):
        with psycopg.connect(embedded.database_url(home / "home"), autocommit=True) as conn:
            assert open_jobs(conn) > 0, "the kill came too late to prove anything"
            eventually(lambda: open_jobs(conn) == 0, within_s=150)

            assert_each_ended_once(conn, [UUID(i) for i in ids])


def servers(home: Path) -> list[psutil.Process]:
    """Postgres with its children, Valkey and the keeper of a home."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join([*process.cmdline(), process.cwd()]) and process.pid != psutil.Process().pid:
                found.append(process)
        except psutil.Error:
            continue
    return found
