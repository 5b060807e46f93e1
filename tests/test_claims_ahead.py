"""Jobs that are claimed before a thread asks for them: how many, and what becomes of those that no thread takes up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agentflow import metrics
from agentflow.broker import DeliveredMessage, message_for
from agentflow.jobs.model import Job, Ring, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from agentflow.worker.claimer import ClaimAbandoned
from agentflow.worker.running import JobContext, Running
from agentflow.worker.runtime import Runtime
from agentflow.worker.watchdog import Watchdog
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.processes import eventually
from tests.test_worker import Nobody, ended, outcomes, read, submit

ORGANIZATION = 1


class Worker:
    """A runtime of eight threads, two of them kept for critical jobs; `performed` says what was run."""

    def __init__(self, system: System, *, started: bool = True) -> None:
        self.system = system
        self.performed: list[Job] = []
        self.gate = threading.Event()
        self.gate.set()
        self.runtime = Runtime(
            system,
            kind="test",
            threads=8,
            perform=self._perform,
            replace=lambda: None,
            threads_ready=lambda: True,
            enqueue=lambda _message: None,
        )
        if started:
            self.runtime.claimer.start()
            self.runtime.settler.start()

    def _perform(self, running: Running, context: JobContext) -> Verdict:
        context.check()
        self.performed.append(running.job)
        self.gate.wait(60)
        return Verdict(*running.key, "succeeded")

    def message(self, job: Job) -> DeliveredMessage:
        """As a consumer hands it over."""
        ring = Ring(job.id, job.queue, job.type, 0 if job.priority == "critical" else 1)
        message = DeliveredMessage(message_for(ring, self.system.settings.job_queue_name), Nobody())
        self.runtime.ahead.expect(message)
        return message

    def has_no_trip(self) -> None:
        """To Postgres, whatever was measured on a busy machine."""
        eventually(lambda: 0 < self.runtime.claimer.trip_s < 0.5)
        self.runtime.claimer.trip_s = 0.0

    def fill(self) -> list[threading.Thread]:
        """With long jobs: every thread that any job may have, and every place to wait here for one, whatever was measured of
        earlier jobs. Opening the gate ends them."""
        self.runtime.threads.claims_per_s = lambda: 0.0  # type: ignore[method-assign]
        self.gate.clear()
        threads = [threading.Thread(target=self.runtime.handle, args=(unasked(self.system),)) for _ in range(6)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(self.performed) == 6)
        for _ in range(2):
            self.runtime.handle(unasked(self.system))
        return threads

    def close(self) -> None:
        self.gate.set()
        self.runtime.claimer.stop()
        self.runtime.settler.flush(30)
        self.runtime.settler.stop()


class Elsewhere(Nobody):
    """A consumer that hands messages on to others."""

    def __init__(self, passed: list[Any]) -> None:
        self.passed = passed

    def pass_on(self, message: Any) -> bool:
        self.passed.append(message)
        return True


def unasked(system: System) -> DeliveredMessage:
    """Of a new job, straight to a thread."""
    job = submit(system, "ping")
    return DeliveredMessage(message_for(Ring(job.id, job.queue, job.type), system.settings.job_queue_name), Nobody())


@pytest.fixture
def worker(system: System) -> Iterator[Worker]:
    made = Worker(system)
    yield made
    made.close()


def states(system: System, jobs: list[Job]) -> list[str]:
    return [read(system, job.id).state for job in jobs]


def test_what_free_threads_will_take_is_claimed_before_they_ask_and_run_once(system: System, worker: Worker) -> None:
    jobs = [submit(system, "ping") for _ in range(8)]
    messages = [worker.message(job) for job in jobs]

    eventually(lambda: states(system, jobs)[:6] == ["running"] * 6)
    assert states(system, jobs)[6:] == ["queued", "queued"]  # for these there are only threads kept for critical jobs
    assert [message.claimed for message in messages] == [True] * 6 + [False] * 2
    assert worker.performed == []
    for message in messages:
        worker.runtime.handle(message)

    assert [ended(system, job).fence for job in jobs] == [1] * 8
    assert sorted(job.id for job in worker.performed) == sorted(job.id for job in jobs)


def test_with_short_jobs_more_are_claimed_and_many_at_once(
    system: System, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.has_no_trip()
    monkeypatch.setattr(worker.runtime.threads, "claims_per_s", lambda: 400.0)  # ten in 25 ms
    asked = list[int]()
    ask = worker.runtime.claimer.ask
    monkeypatch.setattr(
        worker.runtime.claimer, "ask", lambda job_id: (asked.append(len(worker.performed)), ask(job_id))[1]
    )
    jobs = [submit(system, "ping") for _ in range(24)]
    messages = [worker.message(job) for job in jobs]
    assert 6 < len(asked) <= 16  # six threads, and ten more at most

    for message in messages:
        worker.runtime.handle(message)

    assert all(ended(system, job).fence == 1 for job in jobs)
    assert len(asked) == 24
    assert max(Counter(asked[9:]).values()) >= 8  # together, when half of what was claimed was used up


def test_what_no_thread_takes_up_is_handed_back_as_it_was(system: System, worker: Worker) -> None:
    job = submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: read(system, job.id).state == "running")

    message.given_back = True  # as consumers do after a second
    worker.runtime.give_back([message], 0.0)
    again = eventually(lambda: now if (now := read(system, job.id)).state == "queued" else None)
    worker.runtime.handle(message)  # a thread gets there after all

    assert (again.attempt, again.wait_reason) == (0, "handback")
    assert outcomes(system, job) == ["handback"]
    assert worker.performed == [] and worker.runtime.held() == []
    worker.runtime.handle(worker.message(job))
    assert (ended(system, job).attempt, read(system, job.id).fence) == (1, 2)


def test_what_is_given_back_while_its_claim_is_under_way_is_handed_back_when_it_comes(
    system: System, worker: Worker
) -> None:
    job = submit(system, "ping")
    with system.database.connection() as conn, conn.transaction():
        conn.execute("select 1 from agentflow.jobs where id = %s for update", (job.id,))  # the claim waits for the row
        message = worker.message(job)
        message.given_back = True
        with system.database.connection() as other:
            eventually(
                lambda: (
                    other.execute(
                        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%claim_1%'"
                    ).fetchone()
                    == (1,)
                )
            )
        taking_back = threading.Thread(target=worker.runtime.give_back, args=([message], 0.0))
        taking_back.start()

    taking_back.join(30)
    eventually(lambda: read(system, job.id).state == "queued" and not worker.runtime.held())
    assert worker.performed == []
    worker.runtime.handle(worker.message(job))
    assert ended(system, job).attempt == 1


def test_what_no_thread_took_up_is_no_work_done(system: System, worker: Worker) -> None:
    """Neither in the metrics of what runs, nor in what its organization is charged for."""
    processing = metrics.jobs()["processing"]
    job = submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: read(system, job.id).state == "running")

    worker.runtime.give_back([message], 0.0)
    eventually(lambda: not worker.runtime.held())

    assert metrics.jobs()["processing"] == processing
    assert worker.runtime.admission._done == {}


def test_a_claimed_job_whose_thread_is_long_in_coming_is_not_taken_for_a_stuck_one(
    system: System, worker: Worker
) -> None:
    job = submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: worker.runtime.held())
    stuck = list[Running]()
    watchdog = Watchdog(held=worker.runtime.held, publish=lambda _changed: None, stuck=stuck.append, grace_s=0.0)

    worker.runtime.held()[0].stop("cancelled")
    watchdog.step()

    assert stuck == [] and not worker.runtime.held()[0].abandoned
    worker.runtime.handle(message)
    assert worker.performed == []


def test_a_job_that_is_cancelled_between_its_claim_and_its_thread_is_not_begun(system: System, worker: Worker) -> None:
    job = submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: worker.runtime.held())
    system.cancel(ORGANIZATION, job.id)
    with system.database.connect() as conn:
        worker.runtime.heart.step(conn)
    assert worker.runtime.held()[0].stop_reason == "cancelled"
    worker.runtime.watchdog.step()

    worker.runtime.handle(message)

    assert ended(system, job).state == "cancelled"
    assert worker.performed == []


def test_a_worker_that_drains_claims_nothing_ahead_and_hands_back_what_it_had(system: System, worker: Worker) -> None:
    job, late = submit(system, "ping"), submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: read(system, job.id).state == "running")
    worker.runtime.draining = True

    after = worker.message(late)
    worker.runtime.handle(message)
    worker.runtime.handle(after)

    eventually(lambda: states(system, [job, late]) == ["queued", "queued"])
    assert outcomes(system, job) == ["handback"] and outcomes(system, late) == []
    assert worker.performed == []


def test_of_types_that_a_process_runs_only_so_many_of_none_is_claimed_ahead(system: System, worker: Worker) -> None:
    narrow = system.submit(ORGANIZATION, NewJob("test_narrow", {"file": "/nowhere"})).job
    message = worker.message(narrow)
    plain = submit(system, "ping")
    worker.message(plain)

    eventually(lambda: read(system, plain.id).state == "running")
    assert not worker.runtime.ahead.has(message) and read(system, narrow.id).state == "queued"


def test_a_message_that_is_passed_on_is_not_claimed_afterwards(system: System, worker: Worker) -> None:
    """Another worker has it by then: claimed here, nobody would run it."""
    threads, passed = worker.fill(), submit(system, "ping")

    ring = Ring(passed.id, passed.queue, passed.type)
    message = DeliveredMessage(message_for(ring, system.settings.job_queue_name), Elsewhere([]))
    worker.runtime.ahead.expect(message)
    worker.runtime.handle(message)
    worker.gate.set()
    for thread in threads:
        thread.join(30)
    one_more = submit(system, "ping")
    worker.runtime.handle(worker.message(one_more))

    assert message.given_back and ended(system, one_more).state == "succeeded"
    assert read(system, passed.id).state == "queued"


def test_a_message_whose_job_is_claimed_is_not_passed_on_but_handed_back(system: System, worker: Worker) -> None:
    """Whoever got it would find a job that runs."""
    job = submit(system, "ping")
    message = worker.message(job)
    eventually(lambda: read(system, job.id).state == "running")
    passed = list[Any]()
    message.origin = Elsewhere(passed)
    threads = worker.fill()

    worker.runtime.handle(message)

    eventually(lambda: read(system, job.id).state == "queued")
    assert passed == [] and outcomes(system, job) == ["handback"]
    worker.gate.set()
    for thread in threads:
        thread.join(30)


def test_a_worker_hears_of_what_its_consumers_hand_over(system: System) -> None:
    worker = Worker(system, started=False)

    worker.runtime.start()

    assert system.broker.on_handing_over == worker.runtime.ahead.expect
    assert worker.runtime.drain(5.0)


def test_jobs_that_a_worker_found_itself_are_claimed_together(
    system: System, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [submit(system, "ping") for _ in range(4)]
    enqueued = list[DeliveredMessage]()
    monkeypatch.setattr(worker.runtime, "_enqueue", enqueued.append)

    worker.runtime._deliver([Ring(job.id, job.queue, job.type) for job in jobs])

    eventually(lambda: states(system, jobs) == ["running"] * 4)
    for message in enqueued:
        worker.runtime.handle(message)
    assert [ended(system, job).fence for job in jobs] == [1] * 4


def test_far_from_postgres_the_trip_is_claimed_for_as_well(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = worker.runtime.threads
    monkeypatch.setattr(threads, "claims_per_s", lambda: 100.0)
    worker.has_no_trip()
    near = threads.soon()
    worker.runtime.claimer.trip_s = 0.08

    assert (near, threads.soon()) == ((6, 2), (6, 10))


def test_a_claim_that_the_claimer_does_not_get_to_leaves_the_job_queued(system: System, worker: Worker) -> None:
    worker.runtime.claimer.stop()
    job = submit(system, "ping")
    message = worker.message(job)
    claim = worker.runtime.ahead.take(message)
    assert claim is not None
    with pytest.raises(ClaimAbandoned):
        worker.runtime.claimer.answer_to(claim)
    assert read(system, job.id).state == "queued"
