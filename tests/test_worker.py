"""A worker process on real servers: every way in which a job can end, wait, or be interrupted."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import dramatiq
import psycopg
import pytest
from dramatiq.results import ResultFailure
from dramatiq.results.backends import RedisBackend
from standardwebhooks.webhooks import Webhook

from agentflow import live, signing
from agentflow.broker import DeliveredMessage, message_for
from agentflow.jobs import batches, records, rules
from agentflow.jobs.model import Job, Ring, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from agentflow.worker.running import JobContext, Running
from agentflow.worker.runtime import Runtime
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.http_server import Reply, serve
from tests.processes import Process, eventually, worker

ORGANIZATION = 1


@pytest.fixture
def running_worker(environment: dict[str, str], system: System, tmp_path: Path) -> Iterator[Process]:
    with worker(environment, tmp_path / "worker.log") as process:
        yield process


def submit(system: System, type_: str, payload: dict[str, Any] | None = None, **options: Any) -> Job:
    return system.submit(ORGANIZATION, NewJob(type_, payload or {}, **options)).job


def read(system: System, job_id: UUID) -> Job:
    with system.database.connection() as conn:
        job = records.get(conn, None, job_id)
    assert job is not None
    return job


def ended(system: System, job: Job, within_s: float = 30.0) -> Job:
    return eventually(lambda: now if (now := read(system, job.id)).terminal else None, within_s=within_s)


def outcomes(system: System, job: Job) -> list[str]:
    with system.database.connection() as conn:
        return [attempt.outcome for attempt in records.attempts(conn, job.id)]


def test_a_ping_succeeds_and_its_result_is_in_the_row_and_in_dramatiqs_backend(
    system: System, running_worker: Process
) -> None:
    job = submit(system, "ping", {"result_bytes": 3})

    done = ended(system, job)

    assert (done.state, done.attempt, done.fence, done.progress) == ("succeeded", 1, 1, 1.0)
    assert done.result == {"pong": True, "attempt": 1, "data": "xxx"}
    message = message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name)
    backend = RedisBackend(client=system.redis_client())
    assert eventually(lambda: message.get_result(backend=backend, block=True, timeout=5000)) == done.result


def test_waiting_for_the_end_returns_the_ended_job(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"sleep_ms": 300})

    done = system.wait_finished(job, 20)

    assert done is not None and done.state == "succeeded"


@pytest.mark.parametrize("behind", [0, 3])
def test_a_result_is_heard_of_at_once_and_a_row_that_is_behind_is_not_asked_for_in_a_spin(
    system: System, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    job = submit(system, "ping")
    system.live.write_finished([live.Finished(job.id, job.queue, job.type, "succeeded", "{}", None)])
    rows = iter([job] * behind + [dataclasses.replace(job, state="succeeded")])
    pauses = list[float]()
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))

    done = system.live.wait_finished(job, 20, lambda: next(rows))

    assert done is not None and done.terminal
    assert len(pauses) == behind


def test_a_failing_attempt_is_tried_again_after_a_back_off(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"fail_attempts": 1})

    done = ended(system, job)

    assert (done.state, done.attempt, done.fence) == ("succeeded", 2, 2)
    assert outcomes(system, job) == ["retry", "succeeded"]
    with system.database.connection() as conn:
        first, second = records.attempts(conn, job.id)
    assert first.error is not None and first.error["code"] == "asked"
    assert second.started_at is not None and second.started_at - first.ended_at > timedelta(seconds=1.4)


def test_a_job_out_of_attempts_fails_and_a_retry_of_it_is_a_new_job_that_points_to_it(
    system: System, running_worker: Process
) -> None:
    job = submit(system, "ping", {"fail_attempts": 1}, max_attempts=1)
    failed = ended(system, job)
    assert (failed.state, failed.error and failed.error["code"]) == ("failed", "asked")

    with system.transaction() as transaction:
        again = records.retry(transaction.conn, failed, max_payload_bytes=1000)
        transaction.rings.extend(again.rings)

    assert again.job.retry_of == job.id and again.job.id != job.id
    assert ended(system, again.job).state == "failed"
    assert read(system, job.id) == failed
    backend = RedisBackend(client=system.redis_client())
    message = message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name)
    with pytest.raises(ResultFailure, match="attempt 1 fails as asked"):
        message.get_result(backend=backend, block=True, timeout=5000)


def test_parking_gives_the_attempt_back(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"wait_ms": 300}, max_attempts=1)

    done = ended(system, job)

    assert (done.state, done.attempt, done.fence) == ("succeeded", 1, 2)
    assert outcomes(system, job) == ["wait", "succeeded"]


def test_a_job_does_not_start_before_its_time(system: System, running_worker: Process) -> None:
    due = datetime.now(UTC) + timedelta(seconds=1.5)
    job = submit(system, "ping", run_at=due)

    done = ended(system, job)

    assert done.started_at is not None and done.started_at >= due


def test_a_queued_job_is_cancelled_at_once(system: System) -> None:
    job = submit(system, "ping")

    assert system.cancel(ORGANIZATION, job.id) == "cancelled"

    assert read(system, job.id).state == "cancelled"
    assert outcomes(system, job) == []


@pytest.mark.parametrize("how", ["sleep_ms", "native_ms"])
def test_a_running_job_is_cancelled_within_seconds(system: System, running_worker: Process, how: str) -> None:
    job = submit(system, "ping", {how: 600_000})
    eventually(lambda: read(system, job.id).state == "running")
    if how == "native_ms":
        eventually(lambda: len(running_worker.family()) == 3, within_s=20)

    assert system.cancel(ORGANIZATION, job.id) == "running"

    assert ended(system, job, within_s=15).state == "cancelled"
    assert outcomes(system, job) == ["cancelled"]
    eventually(lambda: len(running_worker.family()) == 2)  # the child is gone


@pytest.mark.parametrize("how", ["sleep_ms", "native_ms"])
def test_a_time_limit_ends_python_and_native_work(system: System, running_worker: Process, how: str) -> None:
    job = submit(system, "ping", {how: 600_000}, time_limit_s=1.0, max_attempts=1)

    done = ended(system, job)

    assert done.state == "failed" and done.error is not None and done.error["code"] == "time_limit"
    eventually(lambda: len(running_worker.family()) == 2)


def test_a_killed_child_costs_one_attempt_and_nothing_else(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"native_ms": 3000})
    child = eventually(lambda: family[2] if len(family := running_worker.family()) == 3 else None)

    child.kill()

    done = ended(system, job)
    assert (done.state, done.attempt) == ("succeeded", 2)
    with system.database.connection() as conn:
        error = records.attempts(conn, job.id)[0].error
    assert error is not None and error["code"] == "child_died" and "signal 9" in error["message"]


def test_the_child_has_no_secrets_in_its_environment(system: System, running_worker: Process) -> None:
    submit(system, "ping", {"native_ms": 5000})
    child = eventually(lambda: family[2] if len(family := running_worker.family()) == 3 else None)

    # Until its program is loaded it shows its parent's.
    environment = eventually(lambda: found if "AGENTFLOW_CHILD" in (found := child.environ()) else None)

    assert not {"ADMIN_API_KEY", "DATABASE_URL", "REDIS_URL", "STORAGE_URL"} & set(environment)


@pytest.mark.parametrize(
    ("kind", "state", "seen"),
    [
        ("nul", "succeeded", {"text": "a\ufffdb"}),
        ("surrogate", "succeeded", {"text": "a\ufffdb"}),
        ("object", "failed", "unrecordable"),
        ("large", "failed", "result_too_large"),
    ],
)
def test_a_result_that_cannot_be_stored_as_it_is(
    system: System, running_worker: Process, kind: str, state: str, seen: Any
) -> None:
    done = ended(system, submit(system, "test_unstorable", {"kind": kind}))

    assert done.state == state
    assert (done.result if state == "succeeded" else done.error and done.error["code"]) == seen


def test_an_unexpected_error_is_kept_with_its_traceback(system: System, running_worker: Process) -> None:
    done = ended(system, submit(system, "test_unstorable", {"kind": "no such kind"}, max_attempts=1))

    assert done.error is not None and done.error["code"] == "unexpected"
    assert "KeyError" in done.error["message"] and "job_types.py" in done.error["traceback"]


def test_then_jobs_run_after_success_only_and_carry_the_chain(system: System, running_worker: Process) -> None:
    chain = (NewJob("ping", {"result_bytes": 1}, then=(NewJob("ping", {"result_bytes": 2}),)),)
    good = submit(system, "ping", then=chain, correlation_id="c1")
    bad = submit(system, "ping", {"fail_attempts": 1}, max_attempts=1, then=chain)

    def chain_of(job: Job) -> list[Job]:
        with system.database.connection() as conn:
            found = records.children(conn, job.id)
            return found + [grand for child in found for grand in records.children(conn, child.id)]

    eventually(lambda: len(chain_of(good)) == 2 and all(job.terminal for job in chain_of(good)))
    assert [(j.state, j.correlation_id, len(j.result["data"])) for j in chain_of(good)] == [
        ("succeeded", "c1", 1),
        ("succeeded", "c1", 2),
    ]
    assert ended(system, bad).state == "failed"
    assert chain_of(bad) == []


def test_a_callback_is_delivered_once_for_each_end_and_signed(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    with serve() as receiver:
        receiver.on("/done", Reply(200))
        environment["FETCH_ALLOW"] = receiver.netloc
        with system.database.transaction() as conn:
            _, secret = signing.create_secret(conn, ORGANIZATION, system.sealer)
        with worker(environment, tmp_path / "worker.log"):
            url = receiver.url("/done")
            good = ended(system, submit(system, "ping", callback_url=url))
            bad = ended(system, submit(system, "ping", {"fail_attempts": 1}, max_attempts=1, callback_url=url))
            late = submit(system, "ping", run_at=datetime.now(UTC) + timedelta(hours=1), callback_url=url)
            system.cancel(ORGANIZATION, late.id)
            with system.transaction() as transaction:
                pings = [system.prepare(ORGANIZATION, NewJob("ping", {})) for _ in range(3)]
                batch = batches.submit(transaction.conn, ORGANIZATION, pings, callback_url=url)
                transaction.rings.extend(batch.rings)
            eventually(lambda: len(receiver.requests) >= 4)
            time.sleep(0.5)

    assert len(receiver.requests) == 4
    events = [Webhook(secret).verify(request.body, dict(request.headers)) for request in receiver.requests]
    said = {event["data"]["id"]: event for event in events}
    assert {key: event["type"] for key, event in said.items()} == {
        str(good.id): "job.succeeded",
        str(bad.id): "job.failed",
        str(late.id): "job.cancelled",
        str(batch.id): "batch.finished",
    }
    assert said[str(good.id)]["data"]["result"] == {"pong": True, "attempt": 1}
    assert said[str(bad.id)]["data"]["error"]["code"] == "asked"
    assert said[str(batch.id)]["data"]["succeeded"] == 3


def test_a_concurrency_key_lets_so_many_run_at_once_and_nobody_waits_for_the_safety_time(
    system: System, running_worker: Process, conn: psycopg.Connection
) -> None:
    jobs = [submit(system, "test_keyed", {"slots": 2, "sleep_ms": 150}) for _ in range(12)]

    most = 0
    while not all(read(system, job.id).terminal for job in jobs):
        row = conn.execute("select count(*) from agentflow.jobs where state = 'running'").fetchone()
        most = max(most, row[0] if row else 0)
    done = [read(system, job.id) for job in jobs]

    assert most == 2
    assert {job.result["slot"] for job in done} == {0, 1}
    last = max(job.finished_at for job in done if job.finished_at)
    assert last - done[0].created_at < timedelta(seconds=20)  # six rounds of 0.15 s; the safety time is a minute
    assert all(job.attempt == 1 for job in done)


def test_a_rate_limit_parks_what_is_over_it_without_spending_attempts(system: System, running_worker: Process) -> None:
    jobs = [submit(system, "test_limited") for _ in range(12)]

    done = [ended(system, job) for job in jobs]

    starts = sorted(job.result["at"] for job in done)
    assert all(job.state == "succeeded" and job.attempt == 1 for job in done)
    assert any("wait" in outcomes(system, job) for job in jobs)
    assert (
        max(sum(start <= other < start + 1 for other in starts) for start in starts) <= 10
    )  # sliding: at most twice 5


def test_critical_jobs_run_while_default_ones_take_all_the_room(system: System, running_worker: Process) -> None:
    for _ in range(20):  # eight threads, two of them kept for critical
        submit(system, "ping", {"sleep_ms": 3000})
    time.sleep(0.5)

    urgent = submit(system, "ping", priority="critical")

    done = ended(system, urgent)
    assert done.finished_at is not None and done.finished_at - done.created_at < timedelta(seconds=2.5)


class Nobody:
    """A consumer that only hears."""

    def acknowledge(self, message: Any) -> None:
        message.acknowledged = True

    def pass_on(self, message: Any) -> bool:
        return False


def runtime_of(
    system: System,
    perform: Callable[[Running, JobContext], Verdict],
    enqueue: Callable[[DeliveredMessage], None] = lambda _message: None,
) -> Runtime:
    """Four threads, one of them kept for critical jobs."""
    return Runtime(
        system,
        kind="test",
        threads=4,
        perform=perform,
        replace=lambda: None,
        threads_ready=lambda: True,
        enqueue=enqueue,
    )


def test_a_job_that_meets_a_thread_kept_for_critical_ones_waits_there_for_the_next_free_one(system: System) -> None:
    gate, brought_up = threading.Event(), list[Any]()

    def perform(running: Running, _context: JobContext) -> Verdict:
        gate.wait(60)
        return Verdict(*running.key, "succeeded")

    runtime = runtime_of(system, perform, brought_up.append)
    runtime.claimer.start()
    runtime.settler.start()
    jobs = [submit(system, "ping") for _ in range(5)]
    messages = [
        DeliveredMessage(message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name), Nobody())
        for job in jobs
    ]
    threads = [threading.Thread(target=runtime.handle, args=(message,)) for message in messages[:3]]
    for thread in threads:
        thread.start()
    eventually(lambda: all(read(system, job.id).state == "running" for job in jobs[:3]))

    runtime.handle(messages[3])
    runtime.handle(messages[4])  # more than will soon be begun

    assert not messages[3].given_back and not messages[3].acknowledged
    assert messages[4].given_back
    assert brought_up == []
    gate.set()
    for thread in threads:
        thread.join(30)
    assert brought_up == messages[3:4]
    runtime.handle(messages[3])
    assert ended(system, jobs[3]).fence == 1
    runtime.claimer.stop()
    runtime.settler.stop()


@pytest.mark.parametrize(("counted", "after"), [("nothing", []), ("shares", ["looks at default"]), ("caps", ["looks"])])
def test_where_what_runs_counts_the_relay_looks_again_when_a_job_ends(
    system: System, monkeypatch: pytest.MonkeyPatch, counted: str, after: list[str]
) -> None:
    with system.database.connection() as conn:
        if counted == "shares":
            conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
        if counted == "caps":
            rules.set_cap(conn, ORGANIZATION, "", 2)
    woken = list[str]()

    def perform(running: Running, _context: JobContext) -> Verdict:
        woken.append("begun")
        return Verdict(*running.key, "succeeded")

    runtime = runtime_of(system, perform)
    monkeypatch.setattr(runtime.relay, "wake", lambda: woken.append("looks"))
    monkeypatch.setattr(runtime.relay, "room_in", lambda queue: woken.append(f"looks at {queue}"))
    runtime.claimer.start()
    runtime.settler.start()
    job = submit(system, "ping")
    message = message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name)

    runtime.handle(DeliveredMessage(message, Nobody()))
    runtime.settler.stop(30.0)

    assert read(system, job.id).state == "succeeded"
    assert woken == ["looks at default", "begun", *after]
    runtime.claimer.stop()


def test_a_worker_takes_what_its_relay_picked_but_for_types_of_which_it_runs_only_so_many(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(system, lambda running, _context: Verdict(*running.key, "succeeded"))
    offered, rung = list[Ring](), list[Ring]()
    monkeypatch.setattr(system.broker, "take", lambda rings: offered.extend(rings) or rings[1:])
    jobs = [submit(system, "ping") for _ in range(2)] + [submit(system, "test_narrow", {"file": "/nowhere"})]
    monkeypatch.setattr(system.publisher, "ring", rung.extend)
    with system.database.connection() as conn:
        conn.execute("update agentflow.jobs set sent_at = null, sends = 0, wake_at = clock_timestamp()")

    with system.database.connect() as conn:
        runtime.relay.step(conn)

    assert {ring.job_id for ring in offered} == {job.id for job in jobs[:2]}
    assert {ring.job_id for ring in rung} == {offered[1].job_id, jobs[2].id}


def test_the_window_grows_as_soon_as_the_work_does(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(system, lambda running, _context: Verdict(*running.key, "succeeded"))
    woken = list[str]()
    monkeypatch.setattr(runtime.heart, "wake", lambda: woken.append("told"))
    runtime.claimer.start()
    runtime.settler.start()

    def run_one() -> None:
        job = submit(system, "ping")
        message = message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name)
        runtime.handle(DeliveredMessage(message, Nobody()))
        assert runtime.settler.flush(30)

    run_one()
    assert woken == []  # four threads' worth is what everybody counts with
    monkeypatch.setattr(runtime.threads, "claims_per_s", lambda: 90.0)  # 9 in 100 ms
    run_one()
    assert woken == ["told"]
    assert runtime._facts()["demand"]["default"] == 9
    run_one()
    assert woken == ["told"]
    runtime.settler.stop()
    runtime.claimer.stop()


def test_a_doubled_a_stale_and_a_malformed_message_change_nothing(system: System, running_worker: Process) -> None:
    job = ended(system, submit(system, "ping"))
    busy = submit(system, "ping", {"sleep_ms": 1500})
    eventually(lambda: read(system, busy.id).state == "running")
    for known in (job, busy):
        for _ in range(3):
            system.broker.ring([Ring(known.id, known.queue, known.type)])
    broken = message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name)
    system.broker.enqueue(broken.copy(args=("not an id",)))
    system.broker.enqueue(dramatiq.Message(broken.queue_name, "ping", (), {}, {}))

    assert ended(system, busy).fence == 1
    assert read(system, job.id) == job
    assert ended(system, submit(system, "ping")).state == "succeeded"  # and the worker lives


def test_a_type_that_this_worker_does_not_know_stays_queued_for_another(
    system: System, running_worker: Process, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at)"
        " values (gen_random_uuid(), 1, 'from_the_future', 'default', 5, 60, clock_timestamp())"
    )

    def given_back() -> Any:
        return conn.execute(
            "select 1 from agentflow.jobs where type = 'from_the_future' and state = 'queued' and sent_at is null"
            " and sends > 0 and wake_at > clock_timestamp() + interval '10 s'"
        ).fetchone()

    assert eventually(given_back)


def test_progress_is_seen_while_a_job_runs(system: System, running_worker: Process) -> None:
    job = submit(system, "ping", {"native_ms": 4000})

    progress = eventually(lambda: system.live.progress(read(system, job.id)))

    assert progress.stage == "blocking"


def test_a_thread_that_ignores_its_limit_gets_its_process_replaced(system: System, running_worker: Process) -> None:
    innocent = submit(system, "ping", {"sleep_ms": 3_000_000})
    eventually(lambda: read(system, innocent.id).state == "running")
    child = running_worker.family()[1].pid
    job = submit(system, "test_stubborn", {"seconds": 600.0}, max_attempts=1)

    done = ended(system, job, within_s=40)

    assert done.state == "failed" and done.error is not None and done.error["code"] == "time_limit"
    eventually(lambda: read(system, innocent.id).fence == 2, within_s=120)  # handed back, and taken by the successor
    assert read(system, innocent.id).attempt == 1
    assert child not in [process.pid for process in running_worker.family()]
