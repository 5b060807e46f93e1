"""Renders under random faults of two servers and deaths of workers: none is lost, run twice by us, or given another's picture."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from PIL import Image

from agentflow.comfyui import supervisor
from agentflow.jobs import settlement
from agentflow.jobs.model import Job, Verdict
from agentflow.worker.running import Running
from tests.comfy_support import LEASE_S, Studio, job_of, judge_quickly, picture, stored, studio
from tests.comfyui_server import Comfy, comfyui
from tests.comfyui_worker import Run
from tests.core_support import claim, read
from tests.one_database import database_url, original

__all__ = ["database_url", "original"]

WORKERS = 4
FAULTS = {
    "answer_500": {"path": "/prompt", "chance": 0.03},
    "lose_answer": {"path": "/prompt", "chance": 0.03},
    "lose_request": {"chance": 0.005},
    "fail_request": {"chance": 0.005},
    "stall": {"chance": 0.01, "seconds": 0.3},
    "late_answer": {"path": "/prompt", "chance": 0.03, "seconds": 0.3},
    "cut": {"chance": 0.01},
    "refuse_socket": {"chance": 0.1},
    "deaf_socket": {"chance": 0.1},
    "drop_socket": {"chance": 0.01},
    "no_events": {"chance": 0.05},
    "out_of_memory": {"chance": 0.03},
    "delete_outputs": {"chance": 0.02},
    "lose_history": {"chance": 0.02},
    "slow": {"chance": 0.05, "seconds": 0.3},
    "hang": {"chance": 0.01, "seconds": 2.5},
    "ignore_interrupt": {"chance": 0.02},
    "restart": {"chance": 0.02},
    "stuck": {"chance": 0.01, "seconds": 1.5},
}


@pytest.fixture(autouse=True)
def quick_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_quickly(monkeypatch, 0.8)
    monkeypatch.setattr(supervisor, "_STOP_S", 4.0)


class Storm:
    """Workers of this process, each a thread that takes jobs, and now and then dies in the middle of one."""

    def __init__(self, studio: Studio, url: str, jobs: list[Job], seed: int) -> None:
        self.studio = studio
        self.open = {job.id: job for job in jobs}
        self.deaths = 0
        self._url = url
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._stop = threading.Event()

    def run(self, within_s: float) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        threads.append(threading.Thread(target=self._keep, daemon=True))
        for thread in threads:
            thread.start()
        end = time.monotonic() + within_s
        while self.open and time.monotonic() < end:
            time.sleep(0.1)
        self._stop.set()
        for thread in threads:
            thread.join(60)

    def _keep(self) -> None:
        while not self._stop.wait(0.2):
            self.studio.look()

    def _work(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as conn:
            while self.open and not self._stop.is_set():
                with self._lock:
                    job = self._random.choice(list(self.open.values()))
                    dies_after_s = self._random.uniform(0, 0.6) if self._random.random() < 0.15 else None
                self._one(conn, job, dies_after_s)
                if read(conn, job).terminal:
                    self.open.pop(job.id, None)

    def _one(self, conn: psycopg.Connection, job: Job, dies_after_s: float | None) -> None:
        conn.execute(
            "update agentflow.jobs set run_at = now(), wake_at = now() where id = %s and state = 'queued'", (job.id,)
        )
        for claimed in claim(conn, uuid4(), job):
            running = Running(claimed, time.monotonic() + 3600, repeatable=False)
            if dies_after_s is None:
                self.studio.perform(running)
            else:
                self._die(conn, running, dies_after_s)

    def _die(self, conn: psycopg.Connection, running: Running, after_s: float) -> None:
        """Its lease is lost in the middle of it: what it does then counts no more, and its job is back in the queue."""
        self.deaths += 1
        timer = threading.Timer(after_s, running.stop, ("lost",))
        timer.start()
        verdict = self.studio.perform(running, write=False)
        timer.cancel()
        assert running.job.worker is not None
        if verdict.outcome == "handback":
            verdict = Verdict(*running.key, "handback")
        settlement.settle(conn, [verdict], running.job.worker, lease_s=LEASE_S)


def storm(
    tmp_path: Path,
    environment: dict[str, str],
    conn: psycopg.Connection,
    database_url: str,
    renders: int,
    seed: int = 1,
) -> None:
    more = {"COMFYUI_TIMEOUT": "3", "WORKER_GPU_LOCK_TIMEOUT": "5"}
    with (
        comfyui(tmp_path / "a", seed=seed) as a,
        comfyui(tmp_path / "b", version="0.3.64", seed=seed + 1) as b,
        studio(environment, conn, [a, f"{b.url}?slots=2"], **more) as two,
    ):
        for comfy in (a, b):
            comfy.durations["ImageInvert"] = 0.02
            for kind, how in FAULTS.items():
                comfy.fault(kind, **how)
        jobs = [two.submit(picture(color=n, side=16), max_attempts=50) for n in range(renders)]

        weather = Storm(two, database_url, jobs, seed)
        weather.run(within_s=30 + 3 * renders)

        assert not weather.open, f"{len(weather.open)} of {renders} have no end"
        _check(two, [a, b], jobs)


def _check(two: Studio, servers: list[Comfy], jobs: list[Job]) -> None:
    runs: dict[str, list[Run]] = {}
    for comfy in servers:
        assert all(times == 1 for times in comfy.times_run().values()), "a prompt id was sent twice"
        for run in comfy.runs:
            runs.setdefault(str(job_of(run.extra_data)), []).append(run)
    kept = {prompt_id for comfy in servers for prompt_id in comfy.queue.history}
    for color, job in enumerate(jobs):
        done = read(two.conn, job)
        assert done.state == "succeeded", done.error
        mine = runs[str(job.id)]
        # One run more is right where nothing of the first was to be had: its server was started anew, its history or files lost.
        states = {str(prompt_id): state for prompt_id, state in two.prompts(job) if state != "gone"}
        good = [
            (run.prompt_id, states[run.prompt_id], run.struck)
            for run in mine
            if run.ended == "success" and run.prompt_id in states
            if states[run.prompt_id] == "collected" or run.prompt_id in kept
        ]
        assert len(good) == 1, f"{job.id} was run again after a run that was good: {good}"
        (made,) = done.result["outputs"]
        assert done.result["prompt_id"] in {run.prompt_id for run in mine if run.ended == "success"}
        with Image.open(stored(two.system, made["key"])) as image:
            assert image.getpixel((0, 0)) == tuple(255 - part for part in (color >> 16, color >> 8 & 255, color & 255))


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_short_storm_loses_nothing_and_runs_nothing_twice(
    tmp_path: Path, environment: dict[str, str], conn: psycopg.Connection, database_url: str
) -> None:
    storm(tmp_path, environment, conn, database_url, renders=12)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_storm_loses_nothing_and_runs_nothing_twice(
    tmp_path: Path, environment: dict[str, str], conn: psycopg.Connection, database_url: str
) -> None:
    storm(tmp_path, environment, conn, database_url, renders=300, seed=7)
