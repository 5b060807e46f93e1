"""The core with RabbitMQ as its broker: the worker's essential tests again, and what a broker can do to us.

The node's consumer_timeout is 5 s in all of them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import psutil
import psycopg
import pytest

from agentflow import health, settings
from agentflow.broker import RabbitBroker, queue_name
from agentflow.jobs.model import QUEUES, Job, Ring
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.cli_support import Command, agentflow  # noqa: F401 - a fixture
from tests.processes import Process, eventually, started, worker
from tests.rabbitmq import Node
from tests.test_kills import (  # noqa: F401 - run again here, on this broker
    assert_each_ended_once,
    open_jobs,
    test_sigterm_hands_running_jobs_back_without_spending_an_attempt,
)
from tests.test_worker import (  # noqa: F401 - run again here, on this broker
    ended,
    outcomes,
    read,
    running_worker,
    submit,
    test_a_doubled_a_stale_and_a_malformed_message_change_nothing,
    test_a_failing_attempt_is_tried_again_after_a_back_off,
    test_a_job_does_not_start_before_its_time,
    test_a_ping_succeeds_and_its_result_is_in_the_row_and_in_dramatiqs_backend,
    test_a_type_that_this_worker_does_not_know_stays_queued_for_another,
    test_critical_jobs_run_while_default_ones_take_all_the_room,
    test_parking_gives_the_attempt_back,
)

pytestmark = pytest.mark.timeout(120)
MEMORY = "512MiB"


@pytest.fixture
def environment(environment: dict[str, str], rabbitmq: Node) -> dict[str, str]:
    """Quick leases: several tests kill workers, and no ring is to be mended by a lease of half a minute."""
    return {
        **environment,
        "RABBITMQ_URL": rabbitmq.url,
        "JOB_LEASE": "6",
        "JOB_LEASE_RENEW": "2",
        "JOB_MAX_CRASHES": "50",
    }


def pings(system: System, count: int, **payload: int) -> list[Job]:
    return [system.submit(1, NewJob("ping", dict(payload))).job for _ in range(count)]


def all_done(system: System, jobs: list[Job], within_s: float = 60.0) -> list[Job]:
    ids = [job.id for job in jobs]

    def done() -> bool:
        with system.database.connection() as conn:
            row = conn.execute(
                "select count(*) from agentflow.jobs where id = any (%s) and state = 'succeeded'", (ids,)
            ).fetchone()
        return bool(row and row[0] == len(ids))

    eventually(done, within_s=within_s)
    return [read(system, job_id) for job_id in ids]


def latest_start_s(jobs: list[Job]) -> float:
    return max((job.started_at - job.run_at).total_seconds() for job in jobs if job.started_at)


def most_sends(conn: psycopg.Connection, jobs: list[Job]) -> int:
    row = conn.execute(
        "select max(sends) from agentflow.jobs where id = any (%s)", ([job.id for job in jobs],)
    ).fetchone()
    return int(row[0]) if row else 0


def broker_of(system: System) -> RabbitBroker:
    assert isinstance(system.broker, RabbitBroker)
    return system.broker


# ---- settings and health ----


def test_the_url_is_taken_from_either_variable_and_checked() -> None:
    assert settings.load({}).rabbitmq_url is None
    cloud = settings.load({"CLOUDAMQP_URL": "amqps://u:p@cloud.example/v"})
    both = settings.load({"CLOUDAMQP_URL": "amqps://u:p@cloud.example/v", "RABBITMQ_URL": "amqp://u:p@own.example"})

    assert cloud.rabbitmq_url is not None and "cloud.example" in cloud.rabbitmq_url.get_secret_value()
    assert both.rabbitmq_url is not None and "own.example" in both.rabbitmq_url.get_secret_value()
    for wrong in ("redis://own.example", "amqp://"):
        with pytest.raises(settings.SettingsError, match="RABBITMQ_URL") as refused:
            settings.load({"RABBITMQ_URL": wrong})
        assert wrong not in str(refused.value)


# ---- connections ----


def test_a_worker_has_two_connections_and_any_other_process_one_whatever_it_does(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    """At most 3 for a process: two are meant."""
    with worker(environment, tmp_path / "worker.log"), ThreadPoolExecutor(16) as callers:
        jobs = list(callers.map(lambda _: system.submit(1, NewJob("ping", {})).job, range(64)))
        all_done(system, jobs)
        names = rabbitmq.connections()

    mine = [name for name in names if name == system.application_name]
    workers = [name for name in names if name.startswith("agentflow worker")]
    assert len(mine) == 1 and len(workers) == 2 and len(set(workers)) == 1, names


def test_losing_all_connections_again_and_again_loses_no_job_and_leaks_nothing(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    with worker(environment, tmp_path / "worker.log") as process:
        all_done(system, pings(system, 20))
        child = process.family()[1]
        before = (child.num_fds(), child.num_threads())
        jobs = []
        for _ in range(4):
            jobs += pings(system, 60, sleep_ms=30)
            rabbitmq.close_all_connections()
        done = all_done(system, jobs, within_s=40)
        eventually(lambda: child.num_fds() <= before[0] + 2 and child.num_threads() <= before[1] + 2)
        said = process.text()

    assert {(job.attempt, job.fence) for job in done} == {(1, 1)}
    assert_each_ended_once(conn, [job.id for job in jobs])
    # One line for each change of state of each of the two connections, and nothing of Dramatiq's about it.
    assert 2 <= said.count("RabbitMQ connection lost") <= 10
    assert "Restarting consumer" not in said and "Traceback" not in said, said[-3000:]


# ---- messages ----


def test_a_message_that_is_not_ours_is_dropped_and_the_worker_lives(
    system: System,
    running_worker: Process,  # noqa: F811
    rabbitmq: Node,
) -> None:
    name = queue_name(system.settings.job_queue_name, "default")
    ours = b'{"queue_name": "%s", "actor_name": "ping", "args": [], "kwargs": {}, "options": null, "message_id": "x"}'
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        channel = connection.channel()
        for body in (b"", b"\xff\x00", b"[]", b'{"a": 1}', ours % name.encode(), ours % b"elsewhere"):
            channel.basic_publish("", name, body)

    assert ended(system, submit(system, "ping")).state == "succeeded"
    eventually(lambda: running_worker.text().count("not one of ours") == 6)
    assert rabbitmq.ready_messages(name) == {name: 0}


def test_cancelling_reaches_a_running_job_sooner_than_its_heartbeat(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    with worker({**environment, "JOB_LEASE": "60", "JOB_LEASE_RENEW": "25"}, tmp_path / "worker.log"):
        job = submit(system, "ping", {"sleep_ms": 600_000})
        eventually(lambda: read(system, job.id).state == "running")

        system.cancel(1, job.id)

        assert ended(system, job, within_s=4).state == "cancelled"


def test_picking_up_takes_milliseconds(system: System, running_worker: Process) -> None:  # noqa: F811
    all_done(system, pings(system, 5))
    jobs = []
    for _ in range(30):
        jobs += all_done(system, pings(system, 1))

    waits = sorted((job.started_at - job.run_at).total_seconds() for job in jobs if job.started_at)
    print(f"pick-up p50 {waits[15] * 1000:.1f} ms, max {waits[-1] * 1000:.1f} ms")
    assert waits[15] < 0.1


# ---- kills ----


@pytest.mark.long
def test_killing_the_worker_in_the_middle_loses_nothing(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    kinds = [{}, {"sleep_ms": 40}, {"sleep_ms": 400}, {"wait_ms": 300}, {"fail_attempts": 1}]
    ids = [system.submit(1, NewJob("ping", dict(kinds[n % 5]))).job.id for n in range(120)]

    for _ in range(2):
        with worker(environment, tmp_path / "worker.log"):
            time.sleep(0.5)  # the block's end kills -9 all of it
        assert open_jobs(conn) > 0, "the kill came too late to prove anything"
    with worker(environment, tmp_path / "worker.log"):
        eventually(lambda: open_jobs(conn) == 0, within_s=60)

    assert_each_ended_once(conn, ids)


def test_a_broker_killed_in_a_burst_loses_nothing_and_holds_up_nothing_while_it_is_away(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    def view() -> dict[str, Any]:
        seen: dict[str, Any] = health.report(system, "test")[0]["rabbitmq"]
        return seen

    with worker(environment, tmp_path / "worker.log"):
        running = pings(system, 3, sleep_ms=4000)
        eventually(lambda: all(read(system, job.id).state == "running" for job in running))
        eventually(lambda: view() == {"connected": True, "lastError": None})
        with ThreadPoolExecutor(4) as callers:
            burst = [callers.submit(pings, system, 150, sleep_ms=40) for _ in range(4)]
            eventually(lambda: open_jobs(conn) > 50, within_s=20, every_s=0.01)
            rabbitmq.kill()
            jobs = [job for one in burst for job in one.result()]

        all_done(system, running, within_s=10)
        eventually(lambda: not view()["connected"])
        eventually(lambda: "refused" in view()["lastError"])
        while_away = pings(system, 20)
        done = all_done(system, running + jobs + while_away, within_s=60)  # workers look for them in Postgres

        rabbitmq.start()
        eventually(lambda: view()["connected"])

    assert broker_of(system).reconnects == 1
    assert_each_ended_once(conn, [job.id for job in done])
    assert {job.attempt for job in done} == {1}


# ---- a broker that is slow, full or empty ----


def test_submitting_does_not_wait_for_a_frozen_broker(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    with worker(environment, tmp_path / "worker.log"):
        all_done(system, pings(system, 5))
        rabbitmq.freeze()
        try:
            before = time.monotonic()
            jobs = pings(system, 20)
            took_s = time.monotonic() - before
            time.sleep(7.0)  # past the time after which a confirmation is not waited for any more
            before = time.monotonic()
            jobs += pings(system, 20)
            took_s = max(took_s, time.monotonic() - before)
        finally:
            rabbitmq.thaw()
        thawed = time.monotonic()
        done = all_done(system, jobs, within_s=40)

    assert took_s < 1.5, took_s
    assert time.monotonic() - thawed < 30
    assert {job.attempt for job in done} == {1}


def test_a_memory_alarm_does_not_delay_submits_and_is_over_when_it_is_over(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    with worker(environment, tmp_path / "worker.log") as process:
        all_done(system, pings(system, 5))
        rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            before = time.monotonic()
            jobs = pings(system, 40)
            took_s = time.monotonic() - before
            eventually(lambda: not broker_of(system).can_publish(), within_s=10)
            assert "blocks publishers" in str(health.report(system, "test")[0]["rabbitmq"]["lastError"])
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", MEMORY)
        cleared = time.monotonic()
        done = all_done(system, jobs, within_s=40)
        said = process.text()

    assert took_s < 1.5, took_s
    assert time.monotonic() - cleared < 15
    assert {(job.attempt, job.fence) for job in done} == {(1, 1)}
    assert "Traceback" not in said


def test_a_wiped_broker_is_noticed_and_all_is_rung_again(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    with worker(environment, tmp_path / "before.log"):
        all_done(system, pings(system, 1))  # this broker is known from now on
    waiting = pings(system, 30)  # nobody reads: these rings are at the broker
    name = queue_name(system.settings.job_queue_name, "default")
    eventually(lambda: rabbitmq.ready_messages(name)[name] > 0)

    rabbitmq.wipe()

    with worker(environment, tmp_path / "worker.log"):
        back = time.monotonic()
        done = all_done(system, waiting, within_s=40)
        assert time.monotonic() - back < 10  # a lost ring alone would take 30 s

        more = pings(system, 5, sleep_ms=1500)
        eventually(lambda: read(system, more[-1].id).state == "running")
        rabbitmq.wipe()  # and while a worker is connected
        done += all_done(system, more + pings(system, 10), within_s=40)
        assert {job.attempt for job in done} == {1}


def test_a_deleted_queue_is_declared_again(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    lane = queue_name(system.settings.job_queue_name, "default")
    with worker(environment, tmp_path / "worker.log"):
        all_done(system, pings(system, 5))
        with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
            connection.channel().queue_delete(lane)

        deleted = time.monotonic()
        all_done(system, pings(system, 10), within_s=25)
        assert time.monotonic() - deleted < 10


def test_switching_to_quorum_queues_and_back_loses_no_row(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    """Each time with messages left in the queues that nobody will read any more."""
    quorum_environment = {**environment, "RABBITMQ_QUORUM": "true"}
    quorum_system = System(settings.load(quorum_environment), "quorum test")
    lane = queue_name(system.settings.job_queue_name, "default")

    with worker(environment, tmp_path / "classic.log"):
        all_done(system, pings(system, 3))
    jobs = pings(system, 20)
    eventually(lambda: rabbitmq.ready_messages(lane)[lane] > 0)
    with worker(quorum_environment, tmp_path / "quorum.log") as process:
        all_done(system, jobs, within_s=15)  # a ring that is lost takes 30 s
        assert f"{lane}.q\tquorum" in rabbitmq.ctl("list_queues", "name", "type", "--no-table-headers")
        assert process.terminate() == 0
        said = process.text()
    more = pings(quorum_system, 20)
    eventually(lambda: rabbitmq.ready_messages(f"{lane}.q")[f"{lane}.q"] > 0)
    quorum_system.close()
    with worker(environment, tmp_path / "again.log") as process:
        all_done(system, more, within_s=15)
        said += process.text()

    assert "PRECONDITION" not in said and "Traceback" not in said
    assert_each_ended_once(conn, [job.id for job in jobs + more])


# ---- more than one worker ----


def test_no_job_waits_behind_a_busy_worker_while_another_is_idle(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment["JOB_CONCURRENCY"] = "4"
    with worker(environment, tmp_path / "busy.log"):
        long = pings(system, 3, sleep_ms=60_000)  # one of its four threads is kept for critical jobs
        eventually(lambda: all(read(system, job.id).state == "running" for job in long))
        behind = pings(system, 6)  # read by the busy worker, and put back
        time.sleep(1.0)
        assert not any(read(system, job.id).terminal for job in behind)
        with worker(environment, tmp_path / "idle.log"):
            started = time.monotonic()
            all_done(system, behind)
            assert time.monotonic() - started < 5.0

            jobs = []
            for _ in range(20):
                jobs += pings(system, 2)
                time.sleep(0.05)
            done = all_done(system, jobs)

    assert latest_start_s(done) < 1.5


def test_a_busy_worker_holds_nothing_at_the_broker(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    rabbitmq: Node,
    tmp_path: Path,
) -> None:
    """What it cannot run is not kept unacknowledged: with a consumer_timeout of 5 s that would cost it its channel."""
    environment["JOB_CONCURRENCY"] = "4"  # three of them for jobs that are not critical
    with worker(environment, tmp_path / "busy.log") as process:
        long = pings(system, 3, sleep_ms=9_000)
        eventually(lambda: all(read(system, job.id).state == "running" for job in long))
        waiting = pings(system, 6)
        time.sleep(6.5)
        unacknowledged = [
            int(line.split()[-1])
            for line in rabbitmq.ctl(
                "list_queues", "name", "messages_unacknowledged", "--no-table-headers"
            ).splitlines()
            if system.settings.job_queue_name in line
        ]
        assert sum(unacknowledged) == 0
        # They wait at the broker, and are not rung for again and again. (A claim sets the count back: ask before.)
        assert most_sends(conn, waiting) <= 2
        done = all_done(system, long + waiting)
        assert "connection lost" not in process.text()

    assert {job.fence for job in done} == {1}


def _run(system: System, seconds: int, environment: dict[str, str], tmp_path: Path) -> None:
    environment["JOB_CONCURRENCY"] = "12"  # nine of them for jobs that are not critical
    with worker(environment, tmp_path / "worker.log") as process:
        long = pings(system, 1, sleep_ms=seconds * 1000)
        others = pings(system, 8, sleep_ms=(seconds - 2) * 1000)

        done = all_done(system, long + others, within_s=seconds + 20)

        assert {(job.attempt, job.fence) for job in done} == {(1, 1)}
        assert all(outcomes(system, job) == ["succeeded"] for job in done)
        assert "connection lost" not in process.text(), process.text()[-2000:]


def test_a_job_twice_as_long_as_the_consumer_timeout_runs_once_and_disturbs_nobody(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    _run(system, 10, environment, tmp_path)


@pytest.mark.long
def test_a_job_six_times_as_long_as_the_consumer_timeout_runs_once_and_disturbs_nobody(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    _run(system, 30, environment, tmp_path)


# ---- doctor ----


def test_doctor_shows_the_server_and_each_processs_connections_within_the_budget(
    environment: dict[str, str],
    system: System,
    rabbitmq: Node,
    tmp_path: Path,
    agentflow: Command,  # noqa: F811
) -> None:
    """A plan of 20 connections carries web, scheduler and four workers: what doctor says is what the server has."""
    scheduler = [sys.executable, "-m", "scheduler"]
    with (
        worker(environment, tmp_path / "worker.log") as process,
        started(scheduler, {**environment, "PORT": str(free_port())}, tmp_path / "scheduler.log") as other,
    ):
        all_done(system, pings(system, 3))
        other.wait_for("scheduler ready")
        said = agentflow("doctor")
        family = process.family()
        held = [name.split(" ") for name in rabbitmq.connections() if name.startswith("agentflow ")]

    assert said.status == 0, said.out
    assert re.search(
        r"^✓ rabbitmq +RabbitMQ \S+.*classic queues; a worker uses 2 connections, any other process 1", said.out, re.M
    )
    assert re.search(
        r"^✓ connections Postgres \d+ of \d+, Redis \d+ of \d+, RabbitMQ at most \d+$", said.out, re.MULTILINE
    )
    shown = {
        kind: (int(postgres), int(rabbit))
        for kind, postgres, rabbit in re.findall(
            r"^ +(\w+) \S+ \d+: Postgres (\d+), (?:Redis \d+, )?RabbitMQ (\d+)$", said.out, re.MULTILINE
        )
    }
    assert "worker" in shown, said.out  # a scheduler between two ticks holds no connection
    of_workers = [words for words in held if words[1] == "worker"]
    assert shown["worker"][1] == len(of_workers) == 2
    assert {int(words[3]) for words in of_workers} <= {member.pid for member in family}
    assert 1 <= shown["worker"][0] <= system.settings.database_pool_size + 6
    for kind, (_, allowed) in shown.items():
        assert len([words for words in held if words[1] == kind]) <= allowed <= 3
    assert 4 * shown["worker"][1] + 2 <= 20


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqp://guest:s3cret-wrong@{host}/%2F", r"auth: .*\n +→ .*RABBITMQ_URL"),
        ("amqp://guest:guest@{host}/nowhere", r"the virtual host is refused: .*\n +→ .*%2F is the default"),
        ("amqp://guest:s3cret-wrong@127.0.0.1:{closed}/", r"refused: nobody listens at .*\n +→ .*RABBITMQ_URL"),
        ("amqps://guest:s3cret-wrong@{host}/%2F", r"TLS: .*\n +→ amqp:// for a server without TLS"),
        ("amqp://guest:s3cret-wrong@no-such-host.invalid/", r"DNS: the name no-such-host\.invalid is not known"),
    ],
    ids=["password", "vhost", "refused", "TLS", "name"],
)
def test_doctor_tells_what_ails_rabbitmq(rabbitmq: Node, agentflow: Command, url: str, said: str) -> None:  # noqa: F811
    found = agentflow("doctor", RABBITMQ_URL=url.format(host=f"127.0.0.1:{rabbitmq.port}", closed=free_port()))

    assert found.status == 1
    assert re.search(rf"^✗ rabbitmq +{said}", found.out, re.MULTILINE), found.out
    assert "s3cret" not in found.out + found.err


# ---- the broker by itself ----


@pytest.fixture
def broker(rabbitmq: Node) -> Iterator[RabbitBroker]:
    made = RabbitBroker(rabbitmq.url, prefix=f"b{uuid4().hex[:8]}", middleware=[], client_name="broker test")
    made.allowance = lambda: 100
    yield made
    made.close()


def rings(count: int) -> list[Ring]:
    return [Ring(uuid4(), QUEUES[0], "ping") for _ in range(count)]


def test_a_thousand_rings_are_confirmed_together(broker: RabbitBroker) -> None:
    broker.ring(rings(1))
    before = time.monotonic()
    broker.ring(rings(1000))
    took_s = time.monotonic() - before

    print(f"{1000 / took_s:.0f} confirmed messages a second")
    assert took_s < 0.4  # one by one they take 0.5 to 1.3 ms each


def test_an_acknowledgement_goes_to_the_channel_that_delivered_and_to_no_other(
    broker: RabbitBroker,
    rabbitmq: Node,
) -> None:
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    broker.ring(rings(1))
    old = eventually(lambda: next(consumer))
    broker.consuming.call(lambda: broker.consuming.drop(ConnectionError("by a test")))
    again = eventually(lambda: next(consumer))
    assert again.message_id == old.message_id and again.tag == old.tag and again.channel is not old.channel

    old.acknowledge()  # the same number, another channel

    time.sleep(0.3)
    broker.close()
    assert rabbitmq.ready_messages(consumer.lanes[1].name) == {consumer.lanes[1].name: 1}


def test_a_message_passed_on_once_is_given_back_the_second_time(broker: RabbitBroker) -> None:
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    broker.ring(rings(1))
    first = eventually(lambda: next(consumer))

    assert first.pass_on()
    second = eventually(lambda: next(consumer))

    assert second.message_id == first.message_id and not second.pass_on()


def test_what_the_relay_picked_is_taken_here_as_far_as_there_is_room_past_the_broker(
    broker: RabbitBroker, rabbitmq: Node
) -> None:
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    broker.ring(rings(1))
    brought = eventually(lambda: next(consumer))
    broker.allowance, broker.reserved = (lambda: 4), (lambda: 1)
    picked = [*rings(5), Ring(uuid4(), QUEUES[0], "ping", 0), Ring(uuid4(), "gpu", "comfy_render")]

    rest = broker.take(picked)

    # One of four is held, one is kept for critical jobs; of a queue that is not read here nothing is taken.
    assert rest == [*picked[2:5], picked[6]]
    taken = [eventually(lambda: next(consumer)) for _ in range(2)]
    assert next(consumer) is None
    brought.acknowledge()
    taken.append(eventually(lambda: next(consumer)))
    assert [message.args[0] for message in taken] == [str(picked[n].job_id) for n in (5, 0, 1)]
    assert rabbitmq.ready_messages(consumer.lanes[1].name) == {consumer.lanes[1].name: 0}
    for message in taken:
        message.acknowledge()
    assert broker.room(critical=True) == 4


def test_what_was_taken_here_and_not_claimed_is_given_back_and_lost_with_no_channel(broker: RabbitBroker) -> None:
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    assert broker.consuming.ready.wait(30)
    given_back = list[Any]()
    broker.give_back = lambda messages, _delay_s: given_back.extend(messages)
    late, passed, left, waiting = picked = rings(4)

    assert broker.take(picked) == []
    messages = [eventually(lambda: next(consumer)) for _ in range(3)]
    broker.consuming.ready.clear()
    broker.consuming.call(lambda: broker.consuming.drop(ConnectionError("by a test")))
    assert broker.consuming.ready.wait(30)
    messages += [eventually(lambda: next(consumer))]

    assert [message.args[0] for message in messages] == [str(ring.job_id) for ring in (late, passed, left, waiting)]
    assert not messages[1].pass_on(), "no other consumer will hear of it"
    consumer.requeue([messages[2]])
    assert given_back == [messages[2]]
    eventually(lambda: next(consumer) is None and messages[3] in given_back)


def test_what_was_claimed_is_held_past_a_lost_channel_and_the_rest_is_the_brokers_again(broker: RabbitBroker) -> None:
    """Of a claimed job no other message is of use: it waits for its thread here, or is given back."""
    told, given_back = list[Any](), list[Any]()
    broker.on_handing_over, broker.give_back = told.append, lambda messages, _delay_s: given_back.extend(messages)
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    broker.ring(rings(2))
    claimed, unclaimed = [eventually(lambda: next(consumer)) for _ in range(2)]
    assert told == [claimed, unclaimed]
    claimed.claimed = True

    consumer.forget()

    assert list(consumer.held.values()) == [claimed]
    eventually(lambda: (next(consumer), claimed in given_back)[1])


def test_a_busy_worker_gives_back_what_it_took_for_itself(broker: RabbitBroker) -> None:
    consumer = broker.consume(queue_name(broker.prefix, "default"), prefetch=10)
    assert broker.consuming.ready.wait(30)
    given_back = list[Any]()
    broker.give_back = lambda messages, _delay_s: given_back.extend(messages)
    assert broker.take(rings(3)) == []

    broker.allowance = lambda: 0

    eventually(lambda: next(consumer) is None and len(given_back) == 3)


def test_closing_leaves_no_thread_and_no_socket(rabbitmq: Node) -> None:
    process = psutil.Process()
    before = (process.num_fds(), process.num_threads())
    for _ in range(5):
        made = RabbitBroker(rabbitmq.url, prefix="closing", middleware=[], client_name="closing")
        made.consume(queue_name("closing", "default"), 10)
        made.ring(rings(3))
        made.close()

    eventually(lambda: process.num_fds() <= before[0] + 1 and process.num_threads() <= before[1] + 1)
