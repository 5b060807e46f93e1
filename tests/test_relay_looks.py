"""When the relay looks at which queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest

from agentflow.broker import DeliveredMessage, message_for
from agentflow.database import BoundedConnection
from agentflow.jobs import dispatch
from agentflow.jobs.model import Ring
from agentflow.system import System
from agentflow.worker import chores, threads
from agentflow.worker.chores import Relay
from agentflow.worker.threads import Threads
from tests.test_worker import Nobody

QUEUES = ("one", "two", "three")


pick_due = dispatch.pick_due


class Looks(list[str]):
    """Stands before `pick_due`: which queues were looked at; `error` is raised at the next look."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def pick_due(self, conn: BoundedConnection, queue: str) -> tuple[list[Ring], float | None]:
        self.append(queue)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return pick_due(conn, queue)

    def taken(self) -> list[str]:
        found = list(self)
        self.clear()
        return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    made = Looks()
    monkeypatch.setattr(chores.dispatch, "pick_due", made.pick_due)
    return made


@pytest.fixture
def connection(system: System) -> Iterator[BoundedConnection]:
    with system.database.connect() as conn:
        yield conn


def ring_nobody(_rings: Sequence[Ring]) -> None:
    pass


@pytest.fixture
def relay(system: System) -> Relay:
    return Relay(system.database, QUEUES, poll_s=1000.0, publish=ring_nobody)


def test_room_in_a_queue_is_a_reason_to_look_there_alone(
    looks: Looks, relay: Relay, connection: BoundedConnection
) -> None:
    relay.step(connection)
    assert looks.taken() == [*QUEUES]  # at the start, all
    relay.step(connection)
    assert looks.taken() == []

    relay.room_in("two")
    relay.step(connection)

    assert looks.taken() == ["two"]
    relay.wake()
    relay.step(connection)
    assert looks.taken() == [*QUEUES]


def test_a_look_that_failed_is_done_again_and_so_is_what_came_after_it(
    looks: Looks, relay: Relay, connection: BoundedConnection
) -> None:
    relay.step(connection)
    looks.clear()
    relay.wake()
    looks.error = psycopg.OperationalError("the server went away")

    with pytest.raises(psycopg.OperationalError):
        relay.step(connection)
    assert looks.taken() == ["one"]
    relay.step(connection)

    assert looks.taken() == [*QUEUES]


def test_a_pause_is_no_longer_than_until_the_next_row_is_due(
    system: System, looks: Looks, connection: BoundedConnection
) -> None:
    relay = Relay(system.database, QUEUES, poll_s=1000.0, publish=ring_nobody)

    assert 790 < relay.step(connection) < 1201
    connection.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, run_at, wake_at)"
        " select gen_random_uuid(), 1, 'ping', 'two', 3, 60, at, at from (select clock_timestamp() + '9 s' as at) _"
    )
    relay.room_in("two")

    assert relay.step(connection) < 9.1


def test_the_measured_rate_of_claims_follows_a_rise_at_once_and_a_fall_slowly(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: now))
    measuring = Threads(system.settings, 4, ready=lambda: True, draining=lambda: False)

    def quarter_of_a_second(claims: int) -> float:
        nonlocal now
        for _ in range(claims):
            measuring.claimed()
        now += 0.25
        return measuring.claims_per_s()

    assert quarter_of_a_second(0) == 0
    assert quarter_of_a_second(100) == pytest.approx(400)  # not a quarter of it, as a mean over a second would say
    assert quarter_of_a_second(200) == pytest.approx(800)
    fallen = [quarter_of_a_second(0) for _ in range(8)]
    assert fallen[0] == pytest.approx(600)
    assert fallen == sorted(fallen, reverse=True) and 0 < fallen[-1] < 100


def a_message(priority: int) -> DeliveredMessage:
    return DeliveredMessage(message_for(Ring(uuid4(), "default", "ping", priority), "test"), Nobody())


def test_next_jobs_are_held_where_threads_take_many_and_those_set_aside_are_in_nobodys_way_but_of_their_class(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    trip_s = 0.0
    measuring = Threads(system.settings, 4, ready=lambda: True, draining=lambda: False, trip_s=lambda: trip_s)
    monkeypatch.setattr(measuring, "claims_per_s", lambda: measuring._rate)

    def regular_and_critical() -> tuple[int, int]:
        return measuring.allowance() - measuring.reserved(), measuring.allowance()

    assert regular_and_critical() == (3, 4)
    measuring._rate = 20.0  # one in 200 ms for each thread: long jobs, of which others may have the next
    assert regular_and_critical() == (3, 4)
    measuring._rate = 400.0
    assert regular_and_critical() == (79, 80)
    trip_s = 0.08
    assert measuring.on_the_way() == 64 and regular_and_critical() == (143, 144)
    measuring._rate = 4.0  # of long jobs none is needed sooner than a look for it brings it
    assert measuring.on_the_way() == 0 and regular_and_critical() == (3, 4)
    measuring._rate, trip_s = 400.0, 0.0

    assert all(measuring.enter(a_message(1)) for _ in range(3))
    aside = a_message(1)
    assert measuring.set_aside(aside)
    assert regular_and_critical() == (76, 78)  # it is held itself: one of the 78
    aside.given_back = True
    assert regular_and_critical() == (76, 77)
