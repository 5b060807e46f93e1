"""Each part fails alone: RabbitMQ, Redis, Postgres or a worker, stopped, frozen or restarted, and all of what works then.

One system for all of it, as a platform runs it: web, scheduler and two workers, which have to live through every outage. The
columns of the table of what works are the methods of `Watch`: intake, running jobs, status, what comes back. Of each part the
hardest ways to fail run always, the others in `ops/test --all`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from agentflow import settings
from agentflow.database import POOL_TIMEOUT_S
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests.callers import PATIENCE_S
from tests.clips import film, write_film
from tests.http_server import Reply
from tests.plant import LEASE_S, WEB_THREADS, Plant, Watch, eventually, running_plant, start_worker
from tests.servers import Servers, production
from tests.web_support import AUTH, problem

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def running() -> Iterator[Plant]:
    with production() as servers, running_plant(servers) as made:
        yield made


@pytest.fixture
def plant(running: Plant) -> Iterator[Plant]:
    running.mend()
    yield running
    running.mend()


# ---- the twelve ----


def rabbitmq_restarted_empty(servers: Servers) -> None:
    """A new one behind the same name, which knows no queue and no message."""
    servers.rabbitmq.kill()
    servers.rabbitmq.forget()
    servers.rabbitmq.start()


OUTAGES: dict[str, dict[str, tuple[Callable[[Servers], None], Callable[[Servers], None] | None]]] = {
    "rabbitmq": {
        "stopped": (lambda s: s.rabbitmq.stop(), lambda s: s.rabbitmq.start()),
        "frozen": (lambda s: s.rabbitmq.freeze(), lambda s: s.rabbitmq.thaw()),
        "restarted empty": (rabbitmq_restarted_empty, None),
    },
    "redis": {
        "stopped": (lambda s: s.redis.stop(), lambda s: s.redis.start()),
        "frozen": (lambda s: s.redis.freeze(), lambda s: s.redis.thaw()),
        "restarted empty": (lambda s: s.redis.wipe(), None),
    },
}


@pytest.mark.parametrize(
    ("part", "how"),
    [
        pytest.param("rabbitmq", "stopped", marks=pytest.mark.long),
        pytest.param("rabbitmq", "frozen", marks=pytest.mark.long),
        pytest.param("rabbitmq", "restarted empty", marks=pytest.mark.long),
        pytest.param("redis", "stopped", marks=pytest.mark.long),
        ("redis", "frozen"),
        pytest.param("redis", "restarted empty", marks=pytest.mark.long),
    ],
)
def test_without_a_broker_or_the_scratchpad_work_is_taken_in_goes_on_and_is_shown(
    plant: Plant, part: str, how: str
) -> None:
    fail, recover = OUTAGES[part][how]
    with Watch(plant) as watch:
        watch.begin()

        fail(plant.servers)

        watch.assert_intake_goes_on()
        if recover is not None:
            if part == "redis":
                watch.assert_progress_is_shown_by_the_row()
            watch.assert_running_jobs_finish()
            watch.assert_status_is_there(down=part)
            recover(plant.servers)
        else:
            watch.assert_running_jobs_finish()
        watch.assert_all_comes_back()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("stopped", marks=pytest.mark.long),
        "frozen",
        pytest.param("restarted", marks=pytest.mark.long),
        "crashed and restarted",
    ],
)
def test_without_postgres_intake_and_status_say_so_and_what_ran_is_written_when_it_is_back(
    plant: Plant, how: str
) -> None:
    postgres = plant.servers.postgres
    with Watch(plant) as watch:
        watch.begin()

        if how == "restarted":
            postgres.stop()
            postgres.start()
        elif how == "crashed and restarted":
            postgres.stop(signal.SIGQUIT)
            postgres.start()
        else:
            postgres.stop() if how == "stopped" else postgres.freeze()
            began = time.monotonic()
            watch.assert_running_jobs_go_on()
            watch.assert_intake_is_refused_with_a_problem()
            watch.assert_status_is_away()
            time.sleep(max(0.0, began + 1.3 * LEASE_S - time.monotonic()))
            postgres.start() if how == "stopped" else postgres.thaw()

        watch.assert_all_comes_back(also_refused=True)
        assert {watch.outcomes_of(job_id) for job_id in watch.all_gates} == {("succeeded",)}, (
            "somebody was rescued, or did it again, who lived"
        )


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.long), "frozen", "killed and replaced"])
def test_without_one_worker_its_jobs_go_to_the_other_and_count_once(plant: Plant, how: str) -> None:
    with Watch(plant) as watch:
        watch.begin()
        victim = watch.worker_of(watch.gates[0])
        process = plant.member(victim).process
        mine = [job_id for job_id in watch.all_gates if watch.worker_of(job_id) == victim]
        watch.pids_before.pop(victim)

        if how == "stopped":
            assert process.terminate() == 0, process.text()[-3000:]
        elif how == "frozen":
            watch.freeze(victim)
        else:
            process.kill()
            start_worker(plant.fleet, victim)

        watch.assert_intake_goes_on()
        watch.assert_status_is_there(down=None, without=victim)
        eventually(lambda: all(watch.fence(job_id) == 2 for job_id in mine))
        eventually(lambda: all(watch.get(job_id).json()["state"] == "running" for job_id in mine))
        watch.assert_running_jobs_finish()
        if how == "frozen":
            watch.thaw(victim)
        elif how == "stopped":
            start_worker(plant.fleet, victim)
        watch.pids_before[victim] = plant.pids()[victim]

        watch.assert_all_comes_back()
        ends = ("handback" if how == "stopped" else "crashed", "succeeded")
        assert {watch.outcomes_of(job_id) for job_id in mine} == {ends}
        assert {watch.outcomes_of(job_id) for job_id in set(watch.all_gates) - set(mine)} <= {("succeeded",)}


# ---- the other rows ----


@pytest.mark.long
def test_after_an_outage_of_postgres_longer_than_a_lease_only_the_dead_are_rescued(plant: Plant) -> None:
    with Watch(plant) as watch:
        watch.begin()
        victim = watch.worker_of(watch.gates[0])
        mine = {job_id for job_id in watch.all_gates if watch.worker_of(job_id) == victim}

        plant.servers.postgres.stop()
        plant.member(victim).process.kill()
        time.sleep(1.3 * LEASE_S)
        plant.servers.postgres.start()

        eventually(lambda: all(watch.fence(job_id) == 2 for job_id in mine))
        start_worker(plant.fleet, victim)
        watch.pids_before[victim] = plant.pids()[victim]
        watch.assert_all_comes_back(also_refused=True)
        assert {watch.outcomes_of(job_id) for job_id in mine} == {("crashed", "succeeded")}
        assert {watch.outcomes_of(job_id) for job_id in set(watch.all_gates) - mine} <= {("succeeded",)}


def test_a_crowd_that_meets_a_frozen_postgres_is_answered_and_leaves_a_thread_for_health(plant: Plant) -> None:
    """Far more callers than web has threads. Each of them waiting for a connection in vain is what must not be."""
    requests = 320
    all_in_vain_s = requests / WEB_THREADS * POOL_TIMEOUT_S
    plant.servers.postgres.freeze()

    def one(_number: int) -> httpx2.Response:
        return httpx2.post(f"{plant.web.url}/api/jobs", json={"type": "ping"}, headers=AUTH, timeout=60)

    with ThreadPoolExecutor(2 * WEB_THREADS) as crowd:
        answers = list(crowd.map(one, range(2 * WEB_THREADS)))  # these find out
        began = time.monotonic()
        asked = crowd.map(one, range(requests))
        lives = [plant.web.get("/health/live", PATIENCE_S).status_code for _ in range(5)]
        answers += asked
        took_s = time.monotonic() - began
    plant.servers.postgres.thaw()

    for answer in answers:
        problem(answer, 503)
        assert "Retry-After" in answer.headers
    assert lives == [200] * 5
    assert took_s < all_in_vain_s / 2, "they waited"
    plant.web.wait_ready()
    accepted = eventually(lambda: answer if (answer := one(0)).status_code == 202 else None)
    assert httpx2.get(plant.web.url + accepted.headers["Location"], headers=AUTH, timeout=60).status_code == 200


def test_without_redis_a_rate_limit_holds_in_each_worker_by_itself(plant: Plant) -> None:
    plant.servers.redis.stop()
    try:
        system = System.start(settings.load(plant.environment), "test")
        ids = [system.submit(1, NewJob("test_limited", {})).job.id for _ in range(40)]
        system.close()
        done = "select count(*) from agentflow.jobs where id = any (%s) and state = 'succeeded'"
        eventually(lambda: plant.query(done, ids) == [(40,)], every_s=0.2)
    finally:
        plant.servers.redis.start()

    starts: dict[UUID, list[float]] = {}
    for worker, at in plant.query(
        "select a.worker, (j.result->>'at')::float8 from agentflow.jobs j join agentflow.job_attempts a"
        " on a.job_id = j.id and a.outcome = 'succeeded' where j.id = any (%s) order by 2",
        ids,
    ):
        starts.setdefault(worker, []).append(at)
    for times in starts.values():
        # 5 in a second by two counters that slide: never more than twice as many. Without a limit all come at once.
        assert all(times[n + 10] - times[n] > 1.0 for n in range(len(times) - 10)), times


def test_without_the_scheduler_everything_goes_on_and_its_missed_tick_runs_once(plant: Plant) -> None:
    ticks = "select at from agentflow.ticks where schedule = 'clean_up.failed' order by at"

    def ran() -> int:
        lines = plant.member("scheduler").process.text().splitlines()
        return sum("schedule ran" in line and "clean_up.failed" in line for line in lines)

    with Watch(plant) as watch:
        watch.begin()

        plant.fleet.members.pop("scheduler").process.kill()
        watch.pids_before.pop("scheduler")
        # As after a longer time: whatever is due now was missed.
        before = len(plant.query("delete from agentflow.ticks where schedule = 'clean_up.failed' returning at"))

        watch.assert_intake_goes_on()
        watch.assert_status_is_there(down=None)
        watch.assert_running_jobs_finish()
        assert plant.query(ticks) == []
        first = plant.fleet.scheduler()
        eventually(lambda: plant.query(ticks) and ran() > before)
        # Started anew at once, it finds that nothing is due.
        first.process.kill()
        plant.fleet.scheduler().wait_ready()
        watch.pids_before["scheduler"] = plant.pids()["scheduler"]

        watch.assert_all_comes_back()
    # Once for each tick, be it that another one came due meanwhile.
    eventually(lambda: ran() == before + len(plant.query(ticks)))


def test_an_outside_service_that_is_down_is_tried_again_and_one_that_says_no_is_not_and_status_says_why(
    plant: Plant, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    write_film(clip, film([20, 20]))
    comes_back = threading.Event()
    plant.outside.on("/down.mp4", lambda _request: Reply(body=clip.read_bytes()) if comes_back.is_set() else Reply(503))
    plant.outside.on("/gone.mp4", Reply(404))

    def analyze(path: str) -> str:
        answer = httpx2.post(
            f"{plant.web.url}/api/videos/analyze", json={"url": plant.outside.url(path)}, headers=AUTH, timeout=30
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def job(job_id: str) -> dict[str, Any]:
        return dict(httpx2.get(f"{plant.web.url}/api/jobs/{job_id}", headers=AUTH, timeout=30).json())

    down, gone = analyze("/down.mp4"), analyze("/gone.mp4")

    failed = eventually(lambda: now if (now := job(gone))["state"] == "failed" else None)
    assert "404" in failed["error"]["message"] and failed["attempt"] == 1
    tried = eventually(lambda: now if (now := job(down))["error"] else None)
    assert "503" in tried["error"]["message"] and tried["state"] == "queued" and tried["wait_reason"] == "retry"
    comes_back.set()
    done = eventually(lambda: now if (now := job(down))["state"] == "succeeded" else None)
    assert done["attempt"] >= 2 and done["result"]["shots"]
