"""A production system that lives through outages: web, scheduler and two workers on servers that a test may stop and freeze.

`Watch` is what is under way meanwhile, and what has to be true of it: its methods are the columns of the table of what works
when something is down (intake, running jobs, status, what comes back).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psycopg

from agentflow import settings
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests import http_server, job_types, processes  # noqa: F401 - registers the tests' job types
from tests.callers import PATIENCE_S, Caller, Follower, Waiter
from tests.conftest import ADMIN_KEY
from tests.fleet import Fleet, Member, fleet
from tests.servers import Servers
from tests.web_support import AUTH, problem

LEASE_S = 6.0
WORKERS = ("one", "two")
WEB_THREADS = 8
#: Of jobs that run for as long as the test wants; one more is the last to end. One worker alone has room for all.
GATES = 3
#: Descriptors and threads that come and go: a check, a request, a connection that is being made.
SPARE = 4

#: Whatever is waited for here may need several health checks, back-offs and a lost ring's 30 s, on a busy machine.
eventually = partial(processes.eventually, within_s=120.0)


@dataclass
class Plant:
    """The system of this module. `system` submits and looks from the test's own process."""

    servers: Servers
    fleet: Fleet
    folder: Path
    environment: dict[str, str]
    usual: dict[str, Any]
    outside: http_server.Server

    def member(self, name: str) -> Member:
        return self.fleet.members[name]

    @property
    def web(self) -> Member:
        return self.member("web")

    def pids(self) -> dict[str, list[int]]:
        return {name: sorted(p.pid for p in member.process.family()) for name, member in self.fleet.members.items()}

    def connections(self) -> dict[str, dict[str, int]]:
        """Per server: kind of process and its number (`worker 4711`) -> connections. The tests' own are left out."""
        numbers = {str(pid): name for name, pids in self.pids().items() for pid in pids}
        found = {}
        for server in (self.servers.postgres, self.servers.redis, self.servers.rabbitmq):
            clients: Counter[str] = Counter()
            for name, count in server.clients().items():
                if owner := numbers.get(name.replace("-", " ").split(" ")[-1]):
                    clients[owner] += count
            found[type(server).__name__] = dict(clients)
        return found

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Descriptors and threads of each member."""
        return {name: (m.working.num_fds(), m.working.num_threads()) for name, m in self.fleet.members.items()}

    def mend(self) -> None:
        """All of it there and ready, whatever a test has left."""
        self.servers.mend()
        for member in self.fleet.members.values():
            for process in member.process.family():
                process.resume()
        for name in WORKERS:
            if self.member(name).process.popen.poll() is not None:
                start_worker(self.fleet, name)
        for member in self.fleet.members.values():
            member.wait_ready()

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.servers.postgres.url, autocommit=True) as conn:
            return conn.execute(text.encode(), values).fetchall()


def start_worker(made: Fleet, name: str) -> Member:
    member = made.worker(name)
    member.process.wait_for("Worker process is ready for action", 120)
    member.wait_ready()
    return member


@contextmanager
def running_plant(servers: Servers) -> Iterator[Plant]:
    """All started, and used once as much as a scenario does."""
    folder = Path(tempfile.mkdtemp(prefix="agentflow-plant-"))
    environment = {
        **servers.environment,
        "AGENTFLOW_ENV": "test",
        "AGENTFLOW_HOME": str(folder / "home"),
        "STORAGE_URL": (folder / "storage").as_uri(),
        "STORAGE_SHARED": "true",
        "ADMIN_API_KEY": ADMIN_KEY,
        "JOB_QUEUE_NAME": f"plant{uuid4().hex[:6]}",
        "CANARY_INTERVAL": "0",
        "JOB_CONCURRENCY": "8",
        "WORKER_POLLING_INTERVAL": "0.2",
        "JOB_LEASE": f"{LEASE_S:g}",
        "JOB_LEASE_RENEW": "2",
        "WEB_THREADS": str(WEB_THREADS),
        "WEB_WAIT_SHARE": "0.75",
        "SHUTDOWN_GRACE": "5",
        "DATABASE_POOL_SIZE": "2",
    }
    with http_server.serve() as outside, fleet({**environment, "FETCH_ALLOW": outside.netloc}, folder) as made:
        made.web()
        made.scheduler()
        for name in WORKERS:
            start_worker(made, name)
        made.members["web"].wait_ready()
        made.members["scheduler"].wait_ready()
        plant = Plant(servers, made, folder, environment, {}, outside)
        _warm_up(plant)
        plant.usual = {"connections": plant.connections(), "sizes": plant.sizes()}
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


def _warm_up(plant: Plant) -> None:
    """Use everything as much as the scenarios do, so that pools are as large as they get."""
    with Watch(plant) as watch:
        watch.begin()
        watch.assert_status_is_there(down=None)
        for member in plant.fleet.members.values():
            assert member.get("/metrics").status_code == 200
        with ThreadPoolExecutor(48) as crowd:  # web makes its threads when it needs them
            assert set(crowd.map(lambda _: plant.web.get("/health/ready", 60).status_code, range(96))) == {200}
            # As many wait as may: which of the scenarios' calls meet each other is chance.
            assert 200 in set(
                crowd.map(lambda _: watch.get(watch.late_gate, wait=1).status_code, range(2 * WEB_THREADS))
            )
        watch.open_gates()
        watch.assert_all_ended_once()


class Watch:
    """What is under way while a part is down, and what has to be true of it."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.folder = Path(tempfile.mkdtemp(dir=plant.folder))
        self.gates: list[UUID] = []
        self.late_gate: UUID | None = None
        self.callers = [Caller(plant.web.url) for _ in range(2)]
        self.log_before = {name: len(member.process.text()) for name, member in plant.fleet.members.items()}
        self.pids_before = plant.pids()
        self.followers: list[Follower] = []
        self.waiters: list[Waiter] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in (*self.callers, *self.followers, *self.waiters):
            if thread.ident is not None:
                thread.stop()

    def begin(self) -> None:
        """Work is running in both workers, somebody waits for it, somebody follows it, and callers hand in more."""
        system = System.start(settings.load(self.plant.environment), "test")
        try:
            first = [
                system.submit(1, NewJob("test_gate", {"file": str(self.folder / "gate")})).job.id for _ in range(GATES)
            ]
            last = system.submit(1, NewJob("test_gate", {"file": str(self.folder / "late")})).job.id
        finally:
            system.close()
        self.gates, self.late_gate = first, last
        eventually(lambda: self._running() == GATES + 1)
        self.followers = [Follower(self.plant.web.url, first[0]), Follower(self.plant.web.url, last)]
        self.waiters = [Waiter(self.plant.web.url, first[1]), Waiter(self.plant.web.url, last)]
        for thread in (*self.callers, *self.followers, *self.waiters):
            thread.start()
        eventually(lambda: all(len(caller.accepted) >= 5 for caller in self.callers))
        eventually(lambda: all(follower.states for follower in self.followers))

    def _running(self) -> int:
        rows = self.plant.query(
            "select count(*) from agentflow.jobs where id = any (%s) and state = 'running'",
            [*self.gates, self.late_gate],
        )
        return int(rows[0][0])

    # intake

    def assert_intake_goes_on(self) -> None:
        before = [len(caller.accepted) for caller in self.callers]
        eventually(lambda: all(len(c.accepted) >= n + 5 for c, n in zip(self.callers, before, strict=True)))
        assert self._refusals() == []

    def assert_intake_is_refused_with_a_problem(self) -> None:
        before = [len(caller.refused) for caller in self.callers]
        eventually(lambda: all(len(c.refused) >= n + 2 for c, n in zip(self.callers, before, strict=True)))
        for answer in self._refusals():
            said = problem(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0 and "nothing was kept" in said["detail"]

    def _refusals(self) -> list[httpx2.Response]:
        return [answer for caller in self.callers for answer in caller.refused]

    # running jobs

    def open_gates(self) -> None:
        (self.folder / "gate").touch()
        (self.folder / "late").touch()

    def assert_running_jobs_go_on(self) -> None:
        """Their functions end, whether or not that can be written now."""
        (self.folder / "gate").touch()
        eventually(lambda: all(self.passed(job_id) for job_id in self.gates))

    def passed(self, job_id: UUID) -> list[int]:
        """The fences with which a gate's function came through."""
        return sorted(int(path.suffix[1:]) for path in self.folder.glob(f"*.{job_id}.*"))

    @property
    def all_gates(self) -> list[Any]:
        return [*self.gates, self.late_gate]

    def worker_of(self, job_id: UUID) -> str:
        """The member that runs it."""
        ((pid,),) = self.plant.query(
            "select w.pid from agentflow.jobs j join agentflow.workers w on w.id = j.worker where j.id = %s", job_id
        )
        return next(name for name, pids in self.plant.pids().items() if pid in pids)

    def fence(self, job_id: UUID) -> int:
        return int(self.plant.query("select fence from agentflow.jobs where id = %s", job_id)[0][0])

    def outcomes_of(self, job_id: UUID) -> tuple[str, ...]:
        rows = self.plant.query("select outcome from agentflow.job_attempts where job_id = %s order by fence", job_id)
        return tuple(row[0] for row in rows)

    def freeze(self, name: str) -> None:
        for process in self.plant.member(name).process.family():
            process.suspend()

    def thaw(self, name: str) -> None:
        for process in self.plant.member(name).process.family():
            process.resume()

    def assert_running_jobs_finish(self) -> None:
        self.assert_running_jobs_go_on()
        for job_id in self.gates:
            eventually(lambda job_id=job_id: self.get(job_id).json()["state"] == "succeeded")
        eventually(lambda: self.followers[0].states[-1] == "succeeded" and self.waiters[0].state == "succeeded")

    # status

    def get(self, job_id: UUID | None, **params: Any) -> httpx2.Response:
        return httpx2.get(f"{self.plant.web.url}/api/jobs/{job_id}", params=params, headers=AUTH, timeout=PATIENCE_S)

    def assert_progress_is_shown_by_the_row(self) -> None:
        (self.folder / "late.half").touch()
        eventually(lambda: self.get(self.late_gate).json()["progress"] == 0.5)

    def assert_status_is_there(self, down: str | None, without: str = "") -> None:
        """`down` is what everybody's health says is away (None: nothing); `without`: who is not there to be asked."""
        for answer in (self.get(self.late_gate), self.get(self.late_gate, wait=1)):
            assert answer.status_code == 200 and answer.json()["state"] in ("queued", "running"), answer.text

        def is_right(member: Member) -> None:
            eventually(lambda: self._health(member, "/health/ready")[0] == 200)
            eventually(lambda: self._down(member) == ({down} if down else set()))
            if down:
                status, document = self._health(member, "/health")
                assert (status, document["status"]) == (200, "degraded") and document[down]["lastError"]
            assert self._health(member, "/health/live")[0] == 200

        self._everybody(is_right, without)

    def assert_status_is_away(self) -> None:
        """Postgres is down: 503 for everything that needs it, and health says so in time."""
        for answer in (self.get(self.late_gate), self.get(self.late_gate, wait=1)):
            problem(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0
        eventually(lambda: self.followers[1].statuses[-1] == 503)

        def is_right(member: Member) -> None:
            eventually(lambda: self._health(member, "/health/ready")[0] == 503)
            status, document = self._health(member, "/health")
            assert (status, document["status"]) == (200, "degraded"), document
            assert not document["database"]["connected"] and document["database"]["lastError"]
            assert document["redis"]["connected"] and document["rabbitmq"]["connected"], document
            assert self._health(member, "/health/live")[0] == 200

        self._everybody(is_right)

    def _everybody(self, check: Callable[[Member], Any], without: str = "") -> None:
        """All members at the same time: each answer may take as long as a check of health."""
        members = [member for name, member in self.plant.fleet.members.items() if name != without]
        with ThreadPoolExecutor(len(members)) as threads:
            list(threads.map(check, members))

    def _health(self, member: Member, path: str) -> tuple[int, dict[str, Any]]:
        answer = member.get(path, PATIENCE_S)
        return answer.status_code, answer.json()

    def _down(self, member: Member) -> set[str]:
        document = self._health(member, "/health")[1]
        return {name for name in ("redis", "rabbitmq", "database") if not document[name]["connected"]}

    # what comes back

    def assert_all_comes_back(self, *, also_refused: bool = False) -> None:
        """Callers are served, the rest of the work ends, each job once and with one attempt; all is as before."""
        self._everybody(lambda member: eventually(lambda: self._down(member) == set()))
        before = [len(caller.accepted) for caller in self.callers]
        eventually(lambda: all(len(c.accepted) >= n + 5 for c, n in zip(self.callers, before, strict=True)))
        self.open_gates()
        self.assert_all_ended_once()
        if not also_refused:
            assert self._refusals() == []
        self._assert_as_before()

    def assert_all_ended_once(self) -> None:
        for caller in self.callers:
            caller.stop()
        accepted = {UUID(job_id) for caller in self.callers for job_id in caller.accepted.values()}
        ids = [*accepted, *self.gates, self.late_gate]
        open_ = "select count(*) from agentflow.jobs where id = any (%s) and state in ('queued', 'running')"
        eventually(lambda: self.plant.query(open_, ids) == [(0,)], every_s=0.2)
        for thread in (*self.followers, *self.waiters):
            thread.join(30)
            assert not thread.is_alive(), (thread, thread.statuses)
            assert thread.unanswered == [] and set(thread.statuses) <= {200, 503}, thread.statuses
        assert {follower.states[-1] for follower in self.followers} == {"succeeded"}
        assert {waiter.state for waiter in self.waiters} == {"succeeded"}
        assert [caller.unanswered for caller in self.callers] == [[], []]
        self._assert_recorded_once(accepted, ids)

    def _assert_recorded_once(self, accepted: set[UUID], ids: list[Any]) -> None:
        rows = self.plant.query(
            "select j.id, j.idempotency_key, j.state, j.attempt, j.fence, (j.payload->>'fail_attempts')::int,"
            " array(select a.outcome from agentflow.job_attempts a where a.job_id = j.id order by a.fence)"
            " from agentflow.jobs j where j.id = any (%s) or j.idempotency_key like any (%s)",
            ids,
            [f"{caller.prefix}-%" for caller in self.callers],
        )
        by_key = {row[1]: row[0] for row in rows if row[1]}
        for caller in self.callers:
            for key, job_id in caller.accepted.items():
                assert by_key[key] == UUID(job_id)
        assert len(rows) - len(by_key) == GATES + 1
        # A request that was refused may have been written all the same, at the moment of the outage: once, by its key.
        assert set(ids) <= {row[0] for row in rows}
        unknown = [row for row in rows if row[0] not in set(ids)]
        assert len(unknown) <= len(self.callers)
        for _, _, state, attempt, fence, fails, outcomes in (row for row in rows if row[0] in set(ids)):
            assert state == "succeeded"
            assert attempt == 1 + (fails or 0), (attempt, outcomes)
            assert outcomes.count("succeeded") == 1 and len(outcomes) == fence, outcomes

    def _assert_as_before(self) -> None:
        """Nobody died or was started anew, nobody has more connections, descriptors or threads than usual, nothing unforeseen
        was logged."""
        plant = self.plant
        assert plant.pids() == self.pids_before
        for name, member in plant.fleet.members.items():
            said = member.process.text()[self.log_before.get(name, 0) :]
            assert "Traceback" not in said, said[-6000:]
        with suppress(AssertionError):
            eventually(lambda: self.unusual() == [], every_s=0.5)
        assert self.unusual() == []

    def unusual(self) -> list[str]:
        """What is more than before: connections by server, descriptors, threads."""
        now, usual = self.plant.connections(), self.plant.usual["connections"]
        found = []
        if now["RabbitMQ"] != {"web": 1, "scheduler": 1, "one": 2, "two": 2}:
            found.append(f"RabbitMQ: {now['RabbitMQ']}")
        for server in ("Postgres", "Redis"):
            for name, count in now[server].items():
                if count > usual[server].get(name, 0) + 1:  # a pool of two need not have been full before
                    found.append(f"{server}: {count} of {name}, {usual[server].get(name)} before")
        for name, sizes in self.plant.sizes().items():
            if any(size > before + SPARE for size, before in zip(sizes, self.plant.usual["sizes"][name], strict=True)):
                found.append(f"{name}: {sizes} descriptors and threads, {self.plant.usual['sizes'][name]} before")
        return found
