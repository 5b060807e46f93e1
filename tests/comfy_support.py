"""Renders in tests: servers with a pool's line before them, and attempts that are made in this process as a worker makes them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

import actors  # noqa: F401 - declares the product's types
from agentflow import settings
from agentflow.comfyui import attempt, sending, sightings
from agentflow.comfyui.keeper import Keeper
from agentflow.jobs import settlement
from agentflow.jobs.model import Job, State, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from agentflow.worker import middleware
from agentflow.worker.running import JobContext, Running
from tests.comfyui_server import Comfy
from tests.core_support import ORGANIZATION, claim, read, rows
from tests.processes import eventually

Graph = dict[str, Any]
LEASE_S = 30.0


def picture(seconds: float = 0.0, *, color: int = 0xFF8000, side: int = 8, prefix: str = "out") -> Graph:
    """A picture that takes so long."""
    return {
        "1": node("EmptyImage", width=side, height=side, batch_size=1, color=color),
        "2": node("TestSleep", value=["1", 0], seconds=seconds) if seconds else node("ImageInvert", image=["1", 0]),
        "3": node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


class Attempt:
    """One attempt under way in a thread of its own."""

    def __init__(self, studio: Studio, running: Running) -> None:
        self.running = running
        self.verdict: Verdict | None = None
        self._studio = studio
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> Verdict:
        self._thread.join(60)
        assert self.verdict is not None, "the attempt has no end"
        return self.verdict

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        self.verdict = self._studio.perform(self.running)


class Studio:
    """`conn` is the test's own."""

    def __init__(self, system: System, conn: psycopg.Connection) -> None:
        self.system = system
        self.conn = conn
        self._layers = middleware.layers(system)
        self.keeper = Keeper(
            system.database,
            system.comfyui,
            look_again_s=system.settings.worker_gpu_lock_timeout,
            ring=lambda _conn, _ids: None,
        )

    def look(self) -> None:
        """Every server is due for a look, and is looked at."""
        self.conn.execute("update agentflow.comfyui_servers set looked_at = null, sick_until = null")
        with self.system.database.connect() as conn:
            self.keeper.step(conn)

    def submit(self, graph: Graph, *, max_attempts: int | None = None, **request: Any) -> Job:
        new = NewJob("comfy_render", {"graph": graph, **request}, max_attempts=max_attempts)
        return self.system.submit(ORGANIZATION, new).job

    def claim(self, job: Job) -> Running | None:
        """The job, claimed by a new worker; None where its line is full. Whatever it waited for is over, and it is the first."""
        self.conn.execute(
            "update agentflow.jobs set run_at = (select least(now(), min(run_at)) from agentflow.jobs) - interval '1 s',"
            " wake_at = now() where id = %s and state = 'queued'",
            (job.id,),
        )
        claimed = claim(self.conn, uuid4(), job)
        return Running(claimed[0], time.monotonic() + 3600, repeatable=False) if claimed else None

    def begin(self, job: Job) -> Attempt:
        running = self.claim(job)
        assert running is not None, "its line is full"
        return Attempt(self, running)

    def attempt(self, job: Job) -> Verdict:
        running = self.claim(job)
        assert running is not None, "its line is full"
        return self.perform(running)

    def perform(self, running: Running, *, write: bool = True) -> Verdict:
        """Run it, and write its end."""
        verdict = middleware.perform(self._layers, running, JobContext(running, self.system))
        if not write:
            return verdict
        with self.system.database.connection() as conn:
            assert running.job.worker is not None
            settlement.settle(conn, [verdict], running.job.worker, lease_s=LEASE_S)
        return verdict

    def finished(self, job: Job, attempts: int = 10) -> Job:
        """As it is once it has ended, after so many attempts at most."""
        for _ in range(attempts):
            self.look()
            if read(self.conn, job).terminal:
                break
            self.attempt(job)
        return read(self.conn, job)

    def state(self, job: Job) -> State:
        return read(self.conn, job).state

    def prompts(self, job: Job) -> list[tuple[UUID, str]]:
        """Prompts of a job and what became of them, in their order."""
        query = "select prompt_id, state from agentflow.renders where job_id = %s order by taken_at"
        return [(row.prompt_id, row.state) for row in rows(self.conn, query, job.id)]

    def states(self, job: Job) -> list[str]:
        return [state for _, state in self.prompts(job)]

    def at_work(self, comfy: Comfy, job: Job) -> None:
        """Waits until a prompt of this job runs there, and its attempt knows that it was taken."""
        eventually(lambda: "" in runs(comfy, job) and self.states(job)[-1] == "sent", every_s=0.005)

    def slots(self, pool: str = "default") -> int | None:
        found = rows(self.conn, "select slots from agentflow.concurrency_keys where key = %s", f"gpu:{pool}")
        return found[0].slots if found else None

    def die(self, running: Running) -> None:
        """Its worker is gone, and the job is back in the queue, as a rescue leaves it."""
        verdict = Verdict(*running.key, "crashed", reason="worker lost")
        assert running.job.worker is not None
        settlement.settle(self.conn, [verdict], running.job.worker, lease_s=LEASE_S)


def code(verdict: Verdict) -> str | None:
    return json.loads(verdict.error)["code"] if verdict.error else verdict.reason


def runs(comfy: Comfy, job: Job) -> list[str]:
    """How each run of this job's prompts ended at the server."""
    return [run.ended for run in list(comfy.runs) if job_of(run.extra_data) == str(job.id)]


def job_of(extra_data: dict[str, Any]) -> str | None:
    return (extra_data.get("agentflow") or {}).get("job_id")


@contextmanager
def studio(
    environment: dict[str, str], conn: psycopg.Connection, servers: Sequence[Comfy] | Sequence[str], **more: str
) -> Iterator[Studio]:
    """A system with these servers, each of which has been looked at."""
    urls = [each.url if isinstance(each, Comfy) else each for each in servers]
    environment |= {"COMFYUI_URL": ",".join(urls), "COMFYUI_POLL_INTERVAL": "0.05", **more}
    system = System(settings.load(environment), "test")
    try:
        opened = Studio(system, conn)
        opened.look()
        yield opened
    finally:
        system.close()


def stored(system: System, key: str) -> Path:
    path = system.storage.local_path(key)
    assert path is not None
    return path


def judge_quickly(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """What a real server is given many seconds for, it is given so many here; what comes between is a third of them."""
    patch.setattr(attempt, "PATIENCE_S", seconds)
    patch.setattr(attempt, "LITTLE_PATIENCE_S", seconds / 3)
    patch.setattr(sightings, "STUCK_S", seconds)
    patch.setattr(sightings, "QUEUE_EVERY_S", seconds / 3)
    patch.setattr(sending, "LOOK_AFTER_S", (0.0, seconds / 3, seconds))
