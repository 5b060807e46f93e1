"""From one tier to another and back, as deploys do it; and the time in which a broker is away.

Real processes with old and new settings side by side. The leases are long here, and a lost ring counts as lost after 30 s and
more: what is done sooner was found in another way.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import psycopg
import pytest
import redis

from agentflow import settings
from agentflow.embedded.binaries import find_valkey
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.processes import eventually, worker
from tests.rabbitmq import Node

pytestmark = pytest.mark.timeout(180)

BROKERS = ("REDIS_URL", "RABBITMQ_URL")


class Valkey:
    """A Valkey of the test's own, which it may stop, empty and freeze."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        folder.mkdir()
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._popen = subprocess.Popen(
                [str(find_valkey()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", "."],
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        eventually(self._answers)

    def stop(self) -> None:
        """kill -9: it comes back empty."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(10)
            self._popen = None

    def freeze(self) -> None:
        assert self._popen is not None
        psutil.Process(self._popen.pid).suspend()

    def thaw(self) -> None:
        if self._popen is not None:
            psutil.Process(self._popen.pid).resume()

    def _answers(self) -> bool:
        with suppress(redis.RedisError):
            return bool(redis.Redis(port=self.port, socket_timeout=2).ping())
        return False


@pytest.fixture
def valkeys(tmp_path: Path) -> Iterator[list[Valkey]]:
    made = [Valkey(tmp_path / f"valkey{n}") for n in range(2)]
    for valkey in made:
        valkey.start()
    yield made
    for valkey in made:
        valkey.thaw()
        valkey.stop()


@pytest.fixture
def base(environment: dict[str, str]) -> dict[str, str]:
    """The database, and no broker."""
    quiet = {"JOB_LEASE": "60", "JOB_LEASE_RENEW": "20", "SHUTDOWN_GRACE": "6"}
    return {name: value for name, value in environment.items() if name not in BROKERS} | quiet


@contextmanager
def submitting(environment: dict[str, str]) -> Iterator[System]:
    """What a web process with these settings holds."""
    system = System.start(settings.load(environment), "web")
    try:
        yield system
    finally:
        system.close()


def pings(system: System, count: int, **payload: int) -> list[Job]:
    return [system.submit(1, NewJob("ping", dict(payload))).job for _ in range(count)]


def states(conn: psycopg.Connection) -> dict[str, int]:
    return dict(conn.execute("select state, count(*) from agentflow.jobs group by 1").fetchall())


def all_done(conn: psycopg.Connection, jobs: list[Job], within_s: float) -> None:
    """Each succeeded, at its first attempt but for those that were handed back, and none ran beside itself."""
    eventually(lambda: set(states(conn)) == {"succeeded"}, within_s=within_s)
    rows = conn.execute(
        "select j.id, j.attempt, j.fence, count(*) filter (where a.outcome = 'succeeded'),"
        " count(*) filter (where a.outcome not in ('succeeded', 'handback', 'wait'))"
        " from agentflow.jobs j join agentflow.job_attempts a on a.job_id = j.id group by j.id"
    ).fetchall()
    assert {row[0] for row in rows} == {job.id for job in jobs}
    assert {row[1:2] + row[3:] for row in rows} == {(1, 1, 0)}


def rung_before(conn: psycopg.Connection, jobs: list[Job]) -> None:
    """As if the old broker had been rung for them again and again: the next ring is five minutes off."""
    changed = conn.execute(
        "update agentflow.jobs set sends = 6, sent_at = clock_timestamp(), wake_at = clock_timestamp() + interval '5 min'"
        " where id = any (%s) and state = 'queued' returning id",
        ([job.id for job in jobs],),
    ).fetchall()
    assert len(changed) == len(jobs)


# ---- a broker's URL changes ----


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("redis", "nothing"),
        ("nothing", "rabbitmq alone"),
        pytest.param("nothing", "redis", marks=pytest.mark.long),
        pytest.param("redis", "other redis", marks=pytest.mark.long),
        pytest.param("redis", "rabbitmq", marks=pytest.mark.long),
        pytest.param("rabbitmq", "redis", marks=pytest.mark.long),
        pytest.param("rabbitmq", "other rabbitmq", marks=pytest.mark.long),
        pytest.param("rabbitmq", "nothing", marks=pytest.mark.long),
    ],
)
def test_a_brokers_url_changes_in_the_middle_of_the_work(
    before: str,
    after: str,
    base: dict[str, str],
    valkeys: list[Valkey],
    rabbitmq: Node,
    conn: psycopg.Connection,
    tmp_path: Path,
) -> None:
    """Jobs are queued, running and parked; old and new processes overlap; the old broker is gone with the old ones."""
    vhost = uuid4().hex
    tiers = {
        "nothing": {},
        "redis": {"REDIS_URL": valkeys[0].url},
        "other redis": {"REDIS_URL": valkeys[1].url},
        "rabbitmq": {"RABBITMQ_URL": rabbitmq.url, "REDIS_URL": valkeys[0].url},
        "rabbitmq alone": {"RABBITMQ_URL": rabbitmq.url},
        "other rabbitmq": {"RABBITMQ_URL": rabbitmq.url.replace("%2F", vhost), "REDIS_URL": valkeys[0].url},
    }
    old, new = base | tiers[before], base | tiers[after]
    if after == "other rabbitmq":
        rabbitmq.ctl("add_vhost", vhost)
        rabbitmq.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    with ExitStack() as stack:
        old_web = stack.enter_context(submitting(old))
        old_worker = stack.enter_context(worker({**old, "JOB_CONCURRENCY": "4"}, tmp_path / "old.log"))
        running = pings(old_web, 3, sleep_ms=4000)  # as many as it takes that are not critical
        eventually(lambda: states(conn).get("running") == 3)
        parked = pings(old_web, 3, wait_ms=3000)
        queued = pings(old_web, 30)
        if before != "nothing":
            rung_before(conn, queued)

        stack.enter_context(worker(new, tmp_path / "new.log"))
        overlapping = pings(old_web, 10)
        assert old_worker.terminate() == 0, old_worker.text()[-3000:]
        if before == "redis":
            valkeys[0].stop()
        late = pings(old_web, 5)  # the old web process is the last to go
        new_web = stack.enter_context(submitting(new))
        afterwards = pings(new_web, 10)

        # Sooner than a ring counts as lost for the second time, and far from five minutes.
        all_done(conn, [*running, *parked, *queued, *overlapping, *late, *afterwards], within_s=75)


# ---- a broker is away ----


def _away(conn: psycopg.Connection, web: System, jobs: list[Job]) -> None:
    """While the broker is away: handed in at once, and done."""
    began = time.monotonic()
    jobs += pings(web, 20)
    took_s = time.monotonic() - began
    jobs.append(web.submit(1, NewJob("ping", {}, then=(NewJob("ping", {}),))).job)
    assert took_s < 4, "handing in waits for the broker"  # each ask of it would cost its time-out of 2 s or more
    eventually(lambda: set(states(conn)) == {"succeeded"}, within_s=60)


def _and_back(conn: psycopg.Connection, web: System, jobs: list[Job]) -> None:
    """When it is back it is rung again, and what was done meanwhile is not done again."""
    eventually(lambda: web.broker.can_publish(), within_s=60)
    with web.transaction() as transaction:
        assert transaction.submit(1, NewJob("ping", {})).rings
    jobs += pings(web, 20)
    eventually(lambda: set(states(conn)) == {"succeeded"}, within_s=60)
    rows = conn.execute("select attempt, fence from agentflow.jobs").fetchall()
    assert set(rows) == {(1, 1)}, "something was run twice"


@pytest.mark.long
def test_jobs_go_on_while_redis_is_frozen_killed_or_never_there(
    base: dict[str, str], valkeys: list[Valkey], conn: psycopg.Connection, tmp_path: Path
) -> None:
    valkey = valkeys[0]
    environment = base | {"REDIS_URL": valkey.url}
    with submitting(environment) as web, worker(environment, tmp_path / "one.log") as one:
        jobs = pings(web, 5)
        eventually(lambda: set(states(conn)) == {"succeeded"})

        valkey.freeze()
        _away(conn, web, jobs)
        valkey.thaw()
        _and_back(conn, web, jobs)

        valkey.stop()
        _away(conn, web, jobs)
        with worker(environment, tmp_path / "two.log"):  # comes to life without it
            _away(conn, web, jobs)
        valkey.start()
        eventually(lambda: "Redis connection ready" in one.text())
        _and_back(conn, web, jobs)


@pytest.mark.parametrize("redis_there", [True, pytest.param(False, marks=pytest.mark.long)])
def test_jobs_go_on_while_rabbitmq_is_frozen_or_killed(
    redis_there: bool,
    base: dict[str, str],
    valkeys: list[Valkey],
    rabbitmq: Node,
    conn: psycopg.Connection,
    tmp_path: Path,
) -> None:
    environment = base | {"RABBITMQ_URL": rabbitmq.url} | ({"REDIS_URL": valkeys[0].url} if redis_there else {})
    with submitting(environment) as web, worker(environment, tmp_path / "one.log"):
        jobs = pings(web, 5)
        eventually(lambda: set(states(conn)) == {"succeeded"})

        if redis_there:
            rabbitmq.freeze()
            _away(conn, web, jobs)
            rabbitmq.thaw()
        else:
            rabbitmq.kill()
            _away(conn, web, jobs)
            rabbitmq.start()
        _and_back(conn, web, jobs)
