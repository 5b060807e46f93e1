"""Five ways in which Dramatiq 2.2.1 on RabbitMQ loses or doubles work, each shown on bare Dramatiq, and AgentFlow under the same.

The bare half is a test, too (most of it in `ops/test --all`): where a new version of Dramatiq no longer fails, what we do
about it may go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import dramatiq
import pika
import psycopg
import pytest

from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.processes import BIN, ROOT, Process, eventually, started, worker
from tests.rabbitmq import CONSUMER_TIMEOUT_S, Node
from tests.test_worker import ended, outcomes, read, submit

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def environment(environment: dict[str, str], rabbitmq: Node) -> dict[str, str]:
    return {**environment, "RABBITMQ_URL": rabbitmq.url, "JOB_LEASE": "4", "JOB_LEASE_RENEW": "1"}


class Bare:
    """Bare Dramatiq's queue, and what its actors have said."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.folder = folder
        self.queue = f"bare{uuid4().hex[:8]}"
        folder.mkdir()

    @contextmanager
    def worker(self, threads: int, **environment: str) -> Iterator[Process]:
        arguments = [str(BIN / "dramatiq"), "tests.bare_dramatiq", "--processes", "1", "--threads", str(threads)]
        settings = {"BARE_URL": self.node.url, "BARE_QUEUE": self.queue, "BARE_FOLDER": str(self.folder)}
        with started(
            [*arguments, "--path", str(ROOT)], {**settings, **environment}, self.folder / "worker.log"
        ) as process:
            process.wait_for("Worker process is ready for action")
            eventually(self.is_declared)
            yield process

    def is_declared(self) -> bool:
        try:
            return sum(self.waiting().values()) >= 0
        except pika.exceptions.ChannelClosedByBroker:
            return False

    def send(self, actor: str, *arguments: Any, delay_s: float | None = None) -> None:
        """As `actor.send` does, or `actor.send_with_options(delay=…)`."""
        queue, options = self.queue, {}
        if delay_s is not None:
            queue, options = f"{self.queue}.DQ", {"eta": int((time.time() + delay_s) * 1000)}
        message: dramatiq.Message[Any] = dramatiq.Message(queue, actor, arguments, {}, options)
        with pika.BlockingConnection(pika.URLParameters(self.node.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish("", queue, message.encode(), pika.BasicProperties(delivery_mode=2))

    def said(self, what: str) -> int:
        log = self.folder / "log"
        return log.read_text().splitlines().count(what) if log.exists() else 0

    def hears(self, what: str, times: int = 1, within_s: float = 15.0) -> None:
        eventually(lambda: self.said(what) >= times, within_s=within_s)

    def open_gate(self, name: str) -> None:
        (self.folder / f"{name}.go").touch()

    def waiting(self) -> dict[str, int]:
        """Messages in its queue, its delayed and its dead ones that no consumer has."""
        names = (self.queue, f"{self.queue}.DQ", f"{self.queue}.XQ")
        return dict(zip(("ready", "delayed", "dead"), self.node.ready_messages(*names).values(), strict=True))


NOWHERE = {"ready": 0, "delayed": 0, "dead": 0}


@pytest.fixture
def bare(rabbitmq: Node, tmp_path: Path) -> Bare:
    return Bare(rabbitmq, tmp_path / "bare")


# ---- 1. An acknowledgement that comes after a reconnection deletes another job ----


@pytest.mark.long
def test_1_bare_a_late_acknowledgement_deletes_another_job(bare: Bare) -> None:
    with bare.worker(threads=3, dramatiq_restart_delay="200") as process:
        bare.send("quick", "A")
        bare.hears("start A")
        bare.send("gate", "B")  # its delivery has the number 2
        bare.hears("start B")
        bare.node.close_all_connections()
        bare.hears("start B", times=2)  # again, as number 1 of the new channel
        bare.send("gate", "C")  # number 2
        bare.hears("start C")
        bare.open_gate("B")
        bare.hears("end B")
        time.sleep(1.0)  # the acknowledgement of 2 is on its way
        process.kill()

    time.sleep(1.0)
    assert bare.said("end C") == 0
    assert bare.waiting() == NOWHERE  # C was running, its worker is dead, and nobody will run it again


def test_1_a_late_acknowledgement_changes_nothing(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    def gate(name: str) -> Any:
        return submit(system, "test_gate", {"file": str(tmp_path / name)})

    def runs(job: Any) -> None:
        eventually(lambda: read(system, job.id).state == "running")

    with worker(environment, tmp_path / "worker.log"):
        ended(system, submit(system, "ping"))
        b = gate("B")
        runs(b)
        rabbitmq.close_all_connections()
        c = gate("C")
        runs(c)
        (tmp_path / "B").touch()
        assert ended(system, b).state == "succeeded"
        time.sleep(1.0)
    (tmp_path / "C").touch()
    with worker(environment, tmp_path / "worker.log"):
        assert ended(system, c).state == "succeeded"

    assert outcomes(system, b) == ["succeeded"]
    assert outcomes(system, c) == ["crashed", "succeeded"]


# ---- 2. A retry that cannot be published is acknowledged all the same ----


@contextmanager
def publishing_refused(node: Node, pattern: str) -> Iterator[None]:
    """The broker refuses what is published to these queues, as a full one does."""
    name = f"refuse-{uuid4().hex[:6]}"
    node.ctl("set_policy", "--apply-to", "queues", name, pattern, '{"max-length":0,"overflow":"reject-publish"}')
    try:
        yield
    finally:
        node.ctl("clear_policy", name)


@pytest.mark.long
def test_2_bare_a_job_whose_retry_cannot_be_published_is_gone(bare: Bare) -> None:
    with bare.worker(threads=2):
        with publishing_refused(bare.node, rf"^{bare.queue}\.DQ$"):
            bare.send("fails_once", "F")
            bare.hears("start F")
            time.sleep(2.0)

        time.sleep(1.5)
        assert bare.said("start F") == 1
        assert bare.waiting() == NOWHERE


def test_2_a_retry_is_a_row_and_is_published_when_the_broker_takes_it(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    with worker(environment, tmp_path / "worker.log") as process:
        job = submit(system, "test_narrow_fails_once", {"file": str(gate)})
        eventually(lambda: read(system, job.id).state == "running")
        with publishing_refused(rabbitmq, rf"^{environment['JOB_QUEUE_NAME']}\."):
            gate.touch()
            process.wait_for("RabbitMQ refused the message")
            assert read(system, job.id).state == "queued"

        done = ended(system, job)

    assert (done.state, done.attempt) == ("succeeded", 2)
    assert outcomes(system, job) == ["retry", "succeeded"]


# ---- 3. A time limit that fires while the end is recorded ----


@pytest.mark.long
def test_3_bare_a_time_limit_during_the_hooks_loses_the_job_and_its_thread(bare: Bare) -> None:
    with bare.worker(threads=1, BARE_SLOW_RECORD="yes"):
        bare.send("fails_within_its_limit", "L")
        bare.hears("start L")
        time.sleep(2.5)  # failed after 0.5 s with five retries left; its limit of 1 s fires in the hook
        bare.send("quick", "next")
        time.sleep(3.0)

        assert bare.said("start L") == 1
        assert bare.said("start next") == 0  # the only thread is dead, and is not replaced
    assert bare.waiting() == {**NOWHERE, "ready": 1}  # the next one; L is nowhere


def test_3_a_time_limit_does_not_reach_the_recording_of_the_end(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment["JOB_CONCURRENCY"] = "1"
    with worker(environment, tmp_path / "worker.log"):
        job = submit(system, "ping", {"sleep_ms": 500, "fail_attempts": 1}, time_limit_s=1.0)
        eventually(lambda: read(system, job.id).state == "running")
        with conn.transaction():  # recording the end waits for this
            conn.execute("select 1 from agentflow.jobs where id = %s for update", (job.id,))
            time.sleep(2.5)

        assert ended(system, job).state == "succeeded"
        assert ended(system, submit(system, "ping")).state == "succeeded"

    assert outcomes(system, job) == ["retry", "succeeded"]
    with system.database.connection() as c:
        error = c.execute("select error->>'code' from agentflow.attempts where job_id = %s", (job.id,)).fetchone()
    assert error == ("asked",)  # its own failure, not the time limit's


# ---- 4. consumer_timeout ----


def test_4_a_long_job_runs_again_and_again_on_bare_dramatiq_and_once_here(
    environment: dict[str, str], system: System, bare: Bare, tmp_path: Path
) -> None:
    """The same time for both. One such among eight others is in tests/test_rabbitmq.py."""
    takes_s = CONSUMER_TIMEOUT_S + 5
    with bare.worker(threads=2, dramatiq_restart_delay="200"), worker(environment, tmp_path / "worker.log") as process:
        bare.send("takes", "T", 60)
        job = submit(system, "ping", {"sleep_ms": int(takes_s * 1000)})

        bare.hears("start T", times=2, within_s=takes_s)
        done = ended(system, job)

        assert (done.state, done.attempt, done.fence) == ("succeeded", 1, 1)
        assert "connection lost" not in process.text()


# ---- 5. Delays are kept in the workers' memory ----


def test_5_a_delayed_job_waits_behind_later_ones_on_bare_dramatiq_and_not_here(
    environment: dict[str, str], system: System, bare: Bare, tmp_path: Path
) -> None:
    """Smaller numbers than Dramatiq's default of 1000 delayed messages per thread; the same happens there."""
    with (
        bare.worker(threads=2, dramatiq_delay_queue_prefetch="10"),
        worker(environment, tmp_path / "worker.log"),
    ):
        for _ in range(20):
            bare.send("quick", "in an hour", delay_s=3600)
            submit(system, "ping", run_at=datetime.now(UTC) + timedelta(hours=1))
        bare.send("quick", "in a second", delay_s=1)
        soon = submit(system, "ping", run_at=datetime.now(UTC) + timedelta(seconds=1))

        done = ended(system, soon)
        time.sleep(3.0)

        assert done.started_at is not None and done.started_at - done.run_at < timedelta(seconds=1.5)
        assert bare.said("start in a second") == 0


def test_the_bare_worker_does_what_it_should_where_nothing_goes_wrong(bare: Bare) -> None:
    """Else the failures above prove nothing."""
    with bare.worker(threads=2):
        bare.send("quick", "A")
        bare.send("fails_once", "F")
        bare.send("fails_within_its_limit", "L")
        bare.send("quick", "D", delay_s=1)

        bare.hears("start A")
        bare.hears("start F", times=2)
        bare.hears("start L", times=2)
        bare.hears("start D")
