"""A storm over renders: an old and a new ComfyUI fail in every way they know, workers are killed, jobs are cancelled.

Afterwards every job has ended; what is done has its own pictures in storage; and the servers, which counted, say that nothing was
rendered twice by us.
"""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from PIL import Image

from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests.comfy_support import job_of, node, picture
from tests.comfyui_server import VERSIONS, Comfy, comfyui
from tests.comfyui_worker import Run
from tests.processes import eventually, worker
from tests.test_kills import open_jobs

pytestmark = pytest.mark.flaky(reruns=0)  # a render done twice, or wrongly, is once too often

QUICK = {
    "JOB_LEASE": "4",
    "JOB_LEASE_RENEW": "1",
    "JOB_MAX_CRASHES": "100",
    "COMFYUI_TIMEOUT": "20",
    "COMFYUI_POLL_INTERVAL": "0.1",
    "WORKER_GPU_LOCK_TIMEOUT": "5",
}
#: kind, path, chance of one request (socket, event, run), seconds.
FAULTS = (
    ("lose_request", "/prompt", 0.02, 0),
    ("fail_request", "/prompt", 0.02, 0),
    ("answer_500", "/prompt", 0.04, 0),
    ("lose_answer", "/prompt", 0.04, 0),
    ("late_answer", "/prompt", 0.01, 3),
    ("lose_request", "/history", 0.01, 0),
    ("fail_request", "/queue", 0.01, 0),
    ("cut", "/history", 0.01, 0),
    ("cut", "/view", 0.04, 0),
    ("lose_answer", "/view", 0.02, 0),
    ("trickle", "/view", 0.02, 1),
    ("stall", "", 0.01, 0.4),
    ("refuse_socket", "", 0.05, 0),
    ("deaf_socket", "", 0.1, 0),
    ("drop_socket", "", 0.005, 0),
    ("no_events", "", 0.1, 0),
    ("out_of_memory", "", 0.02, 0),
    ("node_error", "", 0.02, 0),
    ("fail_later", "", 0.02, 0),
    ("no_output", "", 0.02, 0),
    ("lose_history", "", 0.02, 0),
    ("delete_outputs", "", 0.02, 0),
    ("slow", "", 0.05, 0.5),
    ("hang", "", 0.01, 1),
    ("ignore_interrupt", "", 0.2, 0),
    ("restart", "", 0.004, 0),
)
#: After these a second run of the job is right: there is no result to be had of the first.
SPOILS = {"no_output", "lose_history", "delete_outputs"}
#: A render may fail for good where its server said that it cannot be done.
FINAL = {"node_error", "fail_later", "no_output"}


@dataclass
class Storm:
    system: System
    conn: psycopg.Connection
    servers: list[Comfy]
    random: random.Random
    colors: dict[UUID, int] = field(default_factory=dict)
    cancelled: set[UUID] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def submit(self, count: int) -> None:
        """Each has a color of its own, so that a picture says whose it is; each fourth has two outputs."""
        for n in range(len(self.colors), len(self.colors) + count):
            color = (n * 7919 + 1) % 0xFFFFFF
            new = NewJob("comfy_render", {"graph": graph(color, outputs=1 + (n % 4 == 3))}, max_attempts=50)
            self.colors[self.system.submit(1, new).job.id] = color

    def keep_busy(self, count: int, seconds: float) -> None:
        """So many, spread over the time."""
        end = time.monotonic() + seconds
        for left in range(count, 0, -1):
            self.submit(1)
            self.over.wait(self.random.uniform(0, 2) * max(0.0, end - time.monotonic()) / left)

    def cancel_some(self) -> None:
        """One in thirty, at any moment of its life."""
        while not self.over.wait(self.random.uniform(0.1, 0.5)):
            rows = self.conn.execute(
                "select id from agentflow.jobs where state in ('queued', 'running') order by state = 'queued', id limit 5"
            ).fetchall()
            if rows and len(self.cancelled) < len(self.colors) / 30:
                id_ = self.random.choice(rows)[0]
                self.cancelled.add(id_)
                self.system.cancel(1, id_)

    def operate(self) -> None:
        """What people do who see a server that runs nothing: they restart it."""
        while not self.over.wait(1):
            for comfy in self.servers:
                if not comfy.worker.thread.is_alive():
                    time.sleep(2)
                    comfy.restart()

    def runs(self) -> dict[UUID, list[tuple[Comfy, Run]]]:
        """Of each job, in the order of time, whatever the servers."""
        found = defaultdict(list)
        for comfy in self.servers:
            for run in comfy.runs:
                found[UUID(job_of(run.extra_data))].append((comfy, run))
        return {id_: sorted(runs, key=lambda each: each[1].began_at) for id_, runs in found.items()}


def graph(color: int, *, outputs: int = 1) -> dict[str, Any]:
    return picture(color=color) | {
        str(3 + n): node("SaveImage", images=["2", 0], filename_prefix=f"out{n}") for n in range(outputs)
    }


@contextmanager
def storm(system: System, environment: dict[str, str], folder: Path, seed: int) -> Iterator[Storm]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(comfyui(folder / version, version=version, seed=seed + n))
            for n, version in enumerate(VERSIONS)
        ]
        for comfy in servers:
            comfy.down_s = 0.3
            comfy.durations = {"ImageInvert": 0.05}
            for kind, path, chance, seconds in FAULTS:
                comfy.fault(kind, path=path, chance=chance, seconds=seconds)
        environment.update(QUICK, COMFYUI_URL=",".join(comfy.url for comfy in servers))
        own = stack.enter_context(psycopg.connect(environment["DATABASE_URL"], autocommit=True))
        made = Storm(system, own, servers, random.Random(seed))
        threads = [threading.Thread(target=work) for work in (made.cancel_some, made.operate)]
        for thread in threads:
            thread.start()
        try:
            yield made
        finally:
            made.over.set()
            for thread in threads:
                thread.join()


def ride_out(
    made: Storm,
    environment: dict[str, str],
    conn: psycopg.Connection,
    logs: Path,
    *,
    lasts: Callable[[], bool],
    until_the_kill: Callable[[], object],
    within_s: float,
) -> int:
    """Kill the worker again and again while the storm lasts, then let the rest come to its end; returns the kills."""
    end = time.monotonic() + within_s
    kills = 0
    while lasts():
        with worker(environment, logs / f"worker-{kills}.log"):  # the block's end kills -9
            until_the_kill()
        kills += 1
    for comfy in made.servers:
        comfy.heal()
    with worker(environment, logs / "worker-last.log"):
        eventually(lambda: open_jobs(conn) == 0, within_s=max(30.0, end - time.monotonic()))
    return kills


def judge(made: Storm, conn: psycopg.Connection) -> Counter[str]:
    rows = conn.execute("select id, state, result, error from agentflow.jobs where id = any (%s)", (list(made.colors),))
    runs = made.runs()
    states: Counter[str] = Counter()
    for id_, state, result, error in rows.fetchall():
        states[state] += 1
        struck = {kind for _, run in runs.get(id_, ()) for kind in run.struck}
        match state:
            case "succeeded":
                assert_own_pictures(made, id_, result)
            case "cancelled":
                assert id_ in made.cancelled
            case _:
                assert struck & FINAL, (id_, error, struck)
        assert_no_needless_run(runs.get(id_, []))

    times = sum((comfy.times_run() for comfy in made.servers), Counter())
    assert set(times.values()) == {1}, "a prompt was sent twice"
    assert set(runs) <= set(made.colors)
    assert states.total() == len(made.colors)
    return states


def assert_own_pictures(made: Storm, id_: UUID, result: dict[str, Any]) -> None:
    color = 0xFFFFFF - made.colors[id_]
    wanted = (color >> 16, color >> 8 & 255, color & 255)
    assert result["outputs"], id_
    for output in result["outputs"]:
        with Image.open(io.BytesIO(b"".join(made.system.storage.read(output["key"])))) as picture:
            assert picture.convert("RGB").getpixel((3, 3)) == wanted, (id_, output)


def assert_no_needless_run(runs: list[tuple[Comfy, Run]]) -> None:
    for (comfy, run), (_, after) in pairwise(runs):
        assert run.ended_at <= after.began_at, ("at the same time", run, after)
        restarted = any(run.ended_at <= at <= after.began_at for at in comfy.restarted_at)
        assert run.ended != "success" or restarted or SPOILS & set(run.struck), ("it was there", run, after)


@pytest.mark.timeout(600)
def test_a_storm_of_five_minutes(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    with storm(system, environment, tmp_path, seed=random.randrange(10**6)) as made:
        coming = threading.Thread(target=made.keep_busy, args=(100, 280.0))
        coming.start()
        end = time.monotonic() + 300
        kills = ride_out(
            made,
            environment,
            conn,
            tmp_path,
            lasts=lambda: time.monotonic() < end,
            until_the_kill=lambda: time.sleep(made.random.uniform(10, 30)),
            within_s=420,
        )
        coming.join()
        states = judge(made, conn)

    assert kills >= 8
    assert states.total() == 100 and states["succeeded"] >= 75


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_storm_over_a_thousand_renders(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    with storm(system, environment, tmp_path, seed=random.randrange(10**6)) as made:
        for comfy in made.servers:
            comfy.fault("stuck", chance=0.002)
        made.submit(1000)

        def some_more_are_done() -> None:
            done = max(0, open_jobs(conn) - made.random.randint(5, 20))
            eventually(lambda: open_jobs(conn) <= done, within_s=3000)
            time.sleep(made.random.uniform(0, 0.5))

        kills = ride_out(
            made,
            environment,
            conn,
            tmp_path,
            lasts=lambda: open_jobs(conn) > len(made.colors) / 10,
            until_the_kill=some_more_are_done,
            within_s=3000,
        )
        states = judge(made, conn)

    assert kills >= 20
    assert states["succeeded"] >= 800
