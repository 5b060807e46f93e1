"""What a process says of its health: in itself, over the probe, and over the API."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest

from agentflow import health, probe, settings
from agentflow.database import BoundedConnection
from agentflow.probe import Probe
from agentflow.prove.ports import free_port
from agentflow.schedules.ticks import Tick
from agentflow.system import System
from agentflow.worker.loops import Loop
from scheduler import schedule
from scheduler.calendar import Entry
from tests.processes import eventually, worker
from tests.web_support import AUTH, client

__all__ = ["client"]


def test_all_is_well_when_everything_answers(system: System) -> None:
    document, ready = health.report(system, "worker")

    assert ready
    assert (document["status"], document["service"]) == ("ok", "worker")
    assert document["database"] == document["redis"] == {"connected": True, "lastError": None}
    assert document["rabbitmq"] == {"connected": False, "lastError": "not configured"}
    assert document["timestamp"].endswith("Z") and document["uptime"] >= 0
    assert set(document["jobs"]) == {"total", "completed", "failed", "processing"}


def test_a_database_that_is_away_makes_it_degraded_and_not_ready_but_alive(environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}), "test")

    began = time.monotonic()
    document, ready = health.report(system, "web")

    assert time.monotonic() - began < 2.5
    assert not ready
    assert document["status"] == "degraded"
    assert document["database"]["connected"] is False
    assert eventually(lambda: "refused" in health.report(system, "web")[0]["database"]["lastError"], within_s=5)
    assert health.answer(system, "web", "/health/live") == (200, {"status": "live"})
    answer = health.answer(system, "web", "/health")
    assert answer is not None and answer[0] == 200


def test_without_redis_it_is_degraded_and_ready(environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "REDIS_URL": "redis://127.0.0.1:1"}), "test")

    document, ready = health.report(system, "web")

    assert (document["status"], ready, document["redis"]["connected"]) == ("degraded", True, False)
    assert document["redis"]["lastError"]
    system.close()


def test_a_server_that_hangs_is_not_waited_for(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        port = silent.getsockname()[1]
        urls = {"DATABASE_URL": f"postgresql://x@127.0.0.1:{port}/x", "REDIS_URL": f"redis://127.0.0.1:{port}"}
        system = System(settings.load({**environment, **urls}), "test")

        began = time.monotonic()
        document, ready = health.report(system, "web")

    assert time.monotonic() - began < health.PATIENCE_S + 0.7
    assert not ready
    assert document["database"]["connected"] is document["redis"]["connected"] is False


def test_an_older_schema_is_not_ready(environment: dict[str, str], conn: psycopg.Connection) -> None:
    conn.execute("delete from agentflow.migrations where name like '0002%'")
    system = System(settings.load(environment), "test")

    document, ready = health.report(system, "web")

    assert not ready
    assert "python -m migrations" in document["database"]["lastError"]


def test_many_askers_cost_one_look(system: System) -> None:
    checks = health.of(system)
    ran: list[int] = []
    inner = checks.database._look
    checks.database._look = lambda: (ran.append(1), inner())[1]  # type: ignore[func-returns-value]
    askers = [threading.Thread(target=health.report, args=(system, "web")) for _ in range(20)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()

    assert len(ran) == 1


def test_a_check_that_fails_in_an_unforeseen_way_is_an_answer_too() -> None:
    def broken() -> None:
        raise KeyError("x")

    assert health.Check("test", broken).result() == health.Connection(False, "KeyError")


def test_draining_is_not_ready_and_stuck_is_not_alive(system: System) -> None:
    health.of(system).draining = True
    assert health.report(system, "worker")[1] is False
    assert health.report(system, "worker")[0]["status"] == "draining"
    assert health.answer(system, "worker", "/health/live") == (200, {"status": "live"})

    health.of(system).stuck = "a thread ignores its time limit"
    assert health.answer(system, "worker", "/health/live") == (
        503,
        {"status": "stuck", "reason": "a thread ignores its time limit"},
    )


@pytest.fixture
def served(system: System) -> Iterator[Probe]:
    served = probe.serve(system, "worker", 0, host="127.0.0.1")
    assert served is not None
    yield served
    served.close()


def test_the_probe_serves_health_and_metrics(served: Probe, system: System) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{served.port}") as http:
        assert http.get("/health").json()["service"] == "worker"
        assert http.get("/health/ready").json()["ready"] is True
        assert http.get("/health/live?x=1").status_code == 200
        assert "worker_jobs_total" in http.get("/metrics").text
        assert set(http.get("/metrics", headers={"Accept": "application/json"}).json()) == {
            *("redis", "rabbitmq", "database", "jobs")
        }
        nothing = http.get("/api/jobs")
        assert nothing.status_code == 404
        assert nothing.headers["Content-Type"] == "application/problem+json"
        health.of(system).draining = True
        assert http.get("/health/ready").status_code == 503


def test_the_probe_keeps_metrics_behind_their_token(environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "METRICS_TOKEN": "secret"}), "test")
    served = probe.serve(system, "worker", 0, host="127.0.0.1")
    assert served is not None
    with httpx2.Client(base_url=f"http://127.0.0.1:{served.port}") as http:
        assert http.get("/metrics").status_code == 401
        assert http.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert http.get("/health").status_code == 200
    served.close()
    system.close()


def test_the_second_process_on_a_port_leaves_it_to_the_first(served: Probe, system: System) -> None:
    assert probe.serve(system, "worker", served.port, host="127.0.0.1") is None


def test_idle_connections_do_not_keep_the_probe_from_answering(served: Probe) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(probe.MOST_AT_ONCE * 2)]

    def answers() -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{served.port}/health/live").status_code == 200
        except httpx2.TransportError:
            return False

    eventually(answers, within_s=probe.SOCKET_TIMEOUT_S + 3, every_s=0.3)
    for connection in idle:
        connection.close()


def test_the_api_shows_the_same_without_a_key(client: object, system: System) -> None:
    from web import create_app

    stranger = create_app(system).test_client()
    assert stranger.get("/health").json["service"] == "agentflow-web"
    assert stranger.get("/health/ready").status_code == 200
    assert stranger.get("/health/live").json == {"status": "live"}
    assert json.loads(stranger.get("/health", headers=AUTH).text)["status"] == "ok"
    health.of(system).draining = True
    assert stranger.get("/health/ready").status_code == 503
    assert stranger.get("/").headers["Location"] == "/docs"


# ---- stuck ----


class Stalled(Loop):
    """Waits in its round, as for a lock that nobody gives back."""

    def __init__(self, system: System) -> None:
        super().__init__("stalled", system.database, answer_timeout_s=30.0)
        self.inside, self.let_go = threading.Event(), threading.Event()

    def step(self, conn: BoundedConnection) -> float:
        self.inside.set()
        self.let_go.wait(60)
        return 60.0


def test_a_loop_that_does_not_come_out_of_its_round_makes_its_process_dead_until_it_does(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "STUCK_ANSWERS", 0.001)
    loop = Stalled(system)
    health.of(system).watch(loop.stuck)
    loop.start()
    assert loop.inside.wait(30)

    eventually(lambda: live(system)[0] == 503)
    assert "the loop 'stalled' has been in one round for" in live(system)[1]["reason"]
    document, ready = health.report(system, "worker")
    assert (document["status"], ready) == ("stuck", False)
    assert document["degraded"] == [live(system)[1]["reason"]]

    loop.let_go.set()
    eventually(lambda: live(system) == (200, {"status": "live"}))
    loop.stop()
    assert live(system)[0] == 200


def test_a_loop_that_waits_for_work_is_not_stuck(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STUCK_ANSWERS", 0.001)
    work: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Waiting(Stalled):
        def step(self, conn: BoundedConnection) -> float:
            self.waiting(work.get)
            return super().step(conn)

    loop = Waiting(system)
    loop.start()
    eventually(lambda: loop._conn is not None)
    time.sleep(0.2)
    assert loop.stuck() is None

    work.put(1)
    assert loop.inside.wait(30)
    eventually(loop.stuck)
    loop.let_go.set()
    loop.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_whose_thread_has_ended_is_stuck(system: System) -> None:
    class Ends(Stalled):
        def step(self, conn: BoundedConnection) -> float:
            raise SystemExit

    loop = Ends(system)
    assert loop.stuck() is None
    loop.start()

    assert eventually(loop.stuck) == "the loop 'stalled' has ended"


def test_loops_that_wait_for_a_database_that_is_away_are_not_stuck(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "STUCK_ANSWERS", 0.01)
    system = System(settings.load({**environment, "DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}), "test")
    loop = Stalled(system)
    loop.start()

    eventually(lambda: loop.failures >= 3)

    assert loop.stuck() is None
    loop.stop()


def test_a_calendar_that_does_not_come_a_step_further_is_stuck(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STUCK_ANSWERS", 0.001)
    inside, let_go = threading.Event(), threading.Event()

    def due(_conn: object, _now: object) -> list[Tick]:
        inside.set()
        let_go.wait(60)
        return []

    running = schedule.start(system, [Entry("held", due)])
    assert inside.wait(30)

    eventually(lambda: live(system)[0] == 503)
    assert "the calendar has not come a step further" in live(system)[1]["reason"]
    monkeypatch.setattr(health, "STUCK_ANSWERS", 10)
    let_go.set()
    eventually(lambda: live(system)[0] == 200)
    running.shutdown(wait=False)


def test_a_worker_whose_heart_hangs_says_so_and_goes_on_answering(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    hang = tmp_path / "hang"
    environment |= {"HANG_WHEN": str(hang), "PORT": str(port := free_port())}
    with worker(environment, tmp_path / "worker.log", types="tests.hanging_worker"):

        def alive() -> int:
            return httpx2.get(f"http://127.0.0.1:{port}/health/live", timeout=30).status_code

        eventually(lambda: alive() == 200, within_s=60)
        hang.touch()
        eventually(lambda: alive() == 503, within_s=60)

        said = httpx2.get(f"http://127.0.0.1:{port}/health", timeout=30).json()
        assert said["status"] == "stuck" and "the loop 'heart' has been in one round" in said["degraded"][0]
        assert httpx2.get(f"http://127.0.0.1:{port}/health/ready", timeout=30).status_code == 503
        hang.unlink()
        eventually(lambda: alive() == 200, within_s=60)


def live(system: System) -> tuple[int, dict[str, str]]:
    answer = health.answer(system, "worker", "/health/live")
    assert answer is not None
    return answer


def test_a_loop_that_goes_on_failing_is_said_and_one_without_a_database_is_not(system: System) -> None:
    class Breaks(Stalled):
        error: Exception = KeyError("x")

        def step(self, conn: BoundedConnection) -> float:
            raise self.error

    for error, unexpected in ((KeyError("x"), True), (psycopg.OperationalError("gone"), False)):
        loop = Breaks(system)
        loop.error = error
        loop.start()
        eventually(lambda loop=loop: loop.failures >= 3)
        assert (loop.unexpected >= 3) is unexpected
        loop.stop()
