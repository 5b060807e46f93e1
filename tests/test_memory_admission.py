"""Admission in a worker's own process: light jobs, inputs whose size is seen late, and what is left behind by jobs that end."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow.container import Memory as Figures
from agentflow.errors import OutOfMemory, Wait
from agentflow.jobs.model import Job, Verdict
from agentflow.system import System
from agentflow.worker import memory as memory_module
from agentflow.worker.ledger import Ledger
from agentflow.worker.memory import Memory, TooLarge
from agentflow.worker.running import Running
from tests import core_support
from tests.core_support import claimed
from tests.memory_jobs import Hungry  # noqa: F401 - makes the type known

MB = 1 << 20


@dataclass
class Inside:
    """A container of 512 MB, of which so much is used."""

    used_mb: int = 120
    killed: int = 0
    asked: int = 0
    spared: list[int] = field(default_factory=list)
    woken: list[int] = field(default_factory=list)
    identity: str = field(default_factory=lambda: uuid4().hex)

    def memory(self) -> Figures:
        self.asked += 1
        return Figures(512 * MB, self.used_mb * MB, self.used_mb * MB)

    def kills(self) -> int:
        return self.killed


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Inside:
    """Of which the processes hold nothing that is known."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(memory_module.container, "private_bytes", lambda _pid: 0)
    made = Inside()
    monkeypatch.setattr(memory_module.container, "of", lambda _settings: made)
    return made


@pytest.fixture
def memory(system: System, inside: Inside) -> Iterator[Memory]:
    made = Memory(system, uuid4(), spare=lambda: inside.spared.append(1), woken=lambda: inside.woken.append(1))
    yield made
    made.close()


def hungry(conn: psycopg.Connection, said_mb: int, worker: UUID | None = None) -> Running:
    job = claimed(conn, worker, payload=f'{{"megabytes": 1, "said_mb": {said_mb}}}')
    return Running(replace(job, type="test_hungry"), time.monotonic() + 600)


def ping(conn: psycopg.Connection, **changes: Any) -> Running:
    return Running(replace(claimed(conn), type="ping", **changes), time.monotonic() + 600)


def held(memory: Memory) -> list[str]:
    with memory.ledger.open() as (state, _):
        return [held.job for held in state.held]


def test_a_job_has_its_place_while_it_runs_and_none_after_however_it_ended(
    memory: Memory, conn: psycopg.Connection
) -> None:
    running = hungry(conn, 200)

    with pytest.raises(RuntimeError), memory.admitted(running):
        assert held(memory) == [str(running.job.id)]
        raise RuntimeError

    assert held(memory) == []
    with memory.admitted(running):  # the same job again
        memory.done(running)
        assert held(memory) == []


def test_what_does_not_fit_waits_and_is_woken_when_another_one_leaves(
    memory: Memory, inside: Inside, conn: psycopg.Connection
) -> None:
    worker = uuid4()
    first, second = hungry(conn, 200), hungry(conn, 200, worker)
    with memory.admitted(first):
        with pytest.raises(Wait) as refused, memory.admitted(second):
            pytest.fail("it was let in")
        assert (refused.value.reason, inside.spared, inside.woken) == ("memory", [1], [])
        verdict = core_support.verdict(second.job, "wait", 600.0, reason="memory")
        core_support.settle(conn, worker, verdict)

    (again,) = core_support.claim(conn, worker, second.job)
    assert inside.woken == [1]
    with memory.admitted(Running(replace(again, type="test_hungry"), time.monotonic() + 600)):
        assert held(memory) == [str(second.job.id)]


def test_light_jobs_ask_nothing_that_is_younger_than_a_fifth_of_a_second(
    memory: Memory, inside: Inside, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, now = ping(conn), time.monotonic()
    monkeypatch.setattr(memory_module.time, "monotonic", lambda: now)
    before = inside.asked

    for _ in range(50):
        with memory.admitted(running):
            pass

    assert inside.asked == before + 1


def test_light_jobs_wait_in_a_full_container_only_while_heavy_ones_will_leave_it(
    memory: Memory, inside: Inside, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "_SAMPLE_S", -1.0)
    with memory.admitted(hungry(conn, 200)):
        inside.used_mb = 510
        with pytest.raises(Wait, match="full"), memory.admitted(ping(conn)):
            pytest.fail("it was let in")
        with memory.admitted(ping(conn, priority="critical")):
            pass

    with memory.admitted(ping(conn)):
        pass


def test_an_input_that_turns_out_larger_waits_for_its_memory_or_is_refused(
    memory: Memory, conn: psycopg.Connection
) -> None:
    with memory.admitted(hungry(conn, 100)):
        running = hungry(conn, 100)
        with pytest.raises(Wait), memory.admitted(running):
            memory.sized(running, 300 * MB)
        assert held(memory)[0] != str(running.job.id) and len(held(memory)) == 1
        with pytest.raises(Wait), memory.admitted(running):  # it is known by now
            pytest.fail("it was let in")

    with pytest.raises(TooLarge, match="need 500 MB"), memory.admitted(running):
        memory.sized(running, 500 * MB)
    assert held(memory) == []


def test_what_jobs_took_is_learned_from_those_that_succeed_and_those_that_were_killed(
    memory: Memory, conn: psycopg.Connection
) -> None:
    for number in range(3):
        running = hungry(conn, 100)
        with memory.admitted(running):
            assert running.work is not None
            running.work.had(250 * MB)
            if number == 2:
                running.work.killed = OutOfMemory("killed", peak_bytes=250 * MB)
        memory.settled(running, Verdict(*running.key, "succeeded"))
    memory.step(conn)

    assert memory.peaks.need("test_hungry", 100 * MB, guess=0) >= 250 * MB * 1.25


def test_the_first_kill_is_tried_again_and_the_second_one_ends_it(memory: Memory, conn: psycopg.Connection) -> None:
    said = '{"code": "out_of_memory", "message": "killed by the kernel: out of memory"}'

    def killed(job: Job) -> Verdict:
        running = Running(replace(job, type="test_hungry"), time.monotonic() + 600)
        with memory.admitted(running):
            assert running.work is not None
            running.work.killed = OutOfMemory("killed", peak_bytes=MB)
        return memory.settled(running, Verdict(*running.key, "retry", reason="retry", error=said))

    worker = uuid4()
    job = claimed(conn, worker, payload='{"megabytes": 1, "said_mb": 1}')
    first = killed(job)
    core_support.settle(conn, worker, first)
    (again,) = core_support.claim(conn, worker, job)

    assert (first.outcome, killed(again).outcome) == ("retry", "failed")


def test_workers_that_the_kernel_killed_are_told_from_those_that_died_otherwise(
    memory: Memory, inside: Inside, conn: psycopg.Connection
) -> None:
    workers = [core_support.rescuer(conn) for _ in range(2)]
    for worker, kills in zip(workers, (0, 1), strict=True):
        memory.step(conn)
        dead = Ledger(inside.identity, worker)
        with dead.open():
            pass
        assert dead._alive is not None
        inside.killed = kills
        os.close(dead._alive)
        memory.step(conn)

    named = dict(conn.execute("select id, out_of_memory from agentflow.workers").fetchall())
    assert [named[worker] for worker in workers] == [False, True]
