"""The end of a worker's loops: at once, whatever they wait for, for a stop's own time comes off what running jobs get."""

from __future__ import annotations

import threading
import time

import pytest

from agentflow.database import BoundedConnection
from agentflow.jobs.settlement import Verdict
from agentflow.system import System
from agentflow.worker.loops import Loop
from agentflow.worker.runtime import Runtime
from tests.processes import eventually
from tests.test_worker import runtime_of

#: A stop that would wait for its loop in vain waits so long.
NO_END_S = 3600.0


class Resting(Loop):
    """With nothing to do for an hour."""

    def __init__(self, system: System) -> None:
        super().__init__("resting", system.database)
        self.rounds = 0

    def step(self, conn: BoundedConnection) -> float:
        self.rounds += 1
        return 3600.0


class StoppedJustThen(threading.Event):
    """An event that its loop clears a moment after somebody stopped the loop."""

    loop: Loop

    def clear(self) -> None:
        self.loop._stop.set()
        self.set()
        super().clear()


@pytest.fixture
def runtime(system: System) -> Runtime:
    return runtime_of(system, lambda running, _context: Verdict(*running.key, "succeeded"))


def assert_stops(loop: Loop) -> None:
    stopping = threading.Thread(target=loop.stop, args=(NO_END_S,), daemon=True)
    stopping.start()
    stopping.join(30.0)
    assert not stopping.is_alive() and not loop._thread.is_alive()


@pytest.mark.parametrize("name", ["claimer", "settler"])
def test_a_loop_that_waits_for_work_stops_at_once(runtime: Runtime, name: str) -> None:
    loop: Loop = getattr(runtime, name)
    loop.start()
    eventually(lambda: loop._conn is not None and loop._in_round_since is None)

    assert_stops(loop)


def test_a_loop_that_rests_stops_at_once(system: System) -> None:
    loop = Resting(system)
    loop.start()
    eventually(lambda: loop.rounds == 1)

    assert_stops(loop)


def test_a_stop_between_two_rounds_is_not_slept_through(system: System) -> None:
    loop = Resting(system)
    loop._wake = StoppedJustThen()
    loop._wake.loop = loop

    loop.start()

    loop._thread.join(30.0)
    assert not loop._thread.is_alive()


def test_a_claimer_that_takes_long_to_stop_does_so_in_the_grace_of_running_jobs(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.start()
    stop, waits = runtime.claimer.stop, list[float]()
    monkeypatch.setattr(runtime.claimer, "stop", lambda timeout_s: (time.sleep(0.3), stop(timeout_s)))
    monkeypatch.setattr(runtime, "_wait_empty", lambda seconds, **_: waits.append(seconds))

    assert runtime.drain(2.0)

    assert waits[0] <= 2.0 - 1.0 - 0.3, "half of a short grace is for handing back"
