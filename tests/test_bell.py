"""Redis as the broker: lanes of a queue, and what a consumer holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import redis

from agentflow.broker import BellBroker, DeliveredMessage
from agentflow.broker.message import lane_name, queue_name
from agentflow.broker.redis import BellConsumer
from agentflow.jobs.model import Ring
from agentflow.system import System
from tests.core_support import rows, value
from tests.processes import Process, eventually, worker
from tests.test_worker import submit

Connection = psycopg.Connection
#: Of eight threads two are for critical jobs alone.
THREADS, REGULAR = 8, 6


@pytest.fixture
def broker(system: System) -> Iterator[BellBroker]:
    assert isinstance(system.broker, BellBroker)
    made = system.broker
    made.allowance, made.reserved = (lambda: 8), (lambda: 2)
    yield made
    made.close()


@pytest.fixture
def consumer(broker: BellBroker) -> BellConsumer:
    made = broker.consume(queue_name(broker.prefix, "default"), prefetch=100)
    eventually(broker.can_hear)
    return made


def rings(count: int, priority: int = 1) -> list[Ring]:
    return [Ring(uuid4(), "default", "ping", priority) for _ in range(count)]


def brought(consumer: BellConsumer, count: int) -> list[DeliveredMessage]:
    return [eventually(lambda: next(consumer)) for _ in range(count)]


def left(broker: BellBroker, *, critical: bool = False) -> int:
    """Messages of the queue's lane that nobody has fetched."""
    client: redis.Redis = broker.client
    return client.llen(f"{broker.namespace}:{lane_name(queue_name(broker.prefix, 'default'), critical)}")  # type: ignore[return-value]


def test_threads_kept_for_critical_jobs_fetch_nothing_else_and_those_find_them(
    broker: BellBroker, consumer: BellConsumer
) -> None:
    broker.ring(rings(20))
    brought(consumer, REGULAR)
    assert next(consumer) is None and left(broker) == 20 - REGULAR

    urgent = rings(3, priority=0)
    broker.ring(urgent)

    found = brought(consumer, 2)
    assert [message.args[0] for message in found] == [str(ring.job_id) for ring in urgent[:2]]
    assert next(consumer) is None and left(broker, critical=True) == 1


def test_critical_messages_come_first_and_never_more_than_there_is_room_for(
    broker: BellBroker, consumer: BellConsumer
) -> None:
    broker.ring([*rings(20), *rings(5, priority=0)])

    found = brought(consumer, 6)

    assert [message.options["priority"] for message in found] == [0] * 5 + [1]
    assert next(consumer) is None and len(consumer.held) == 6


def test_who_found_no_room_is_told_when_there_is_some(broker: BellBroker, consumer: BellConsumer) -> None:
    broker.ring(rings(REGULAR + 1))
    first, *_ = brought(consumer, REGULAR)
    assert next(consumer) is None and broker.saturated
    consumer.bell.clear()  # the ring itself is heard of by now
    first.acknowledge()

    broker.nudge()

    assert consumer.bell.is_set() and not broker.saturated
    assert next(consumer) is not None


def test_what_dramatiq_is_done_with_is_held_until_somebody_answers_for_it(
    broker: BellBroker, consumer: BellConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread returns from a message that it set aside, too."""
    given_back = list[Any]()
    broker.give_back = lambda messages, _delay_s: given_back.extend(messages)
    broker.ring(rings(2))
    claimed, aside = brought(consumer, 2)
    claimed.acknowledge()

    for message in (claimed, aside):
        consumer.ack(message)

    assert list(consumer.held.values()) == [aside] and not aside.acknowledged
    eventually(lambda: next(consumer) is None and given_back == [aside])


def test_what_a_consumer_held_is_others_when_it_closes(broker: BellBroker, consumer: BellConsumer) -> None:
    sent = [*rings(1), *rings(1, priority=0)]
    broker.ring(sent)
    brought(consumer, 2)

    consumer.close()

    again = brought(broker.consume(consumer.queue_name, prefetch=100), 2)
    assert {message.args[0] for message in again} == {str(ring.job_id) for ring in sent}


def test_each_message_is_told_of_on_its_way_to_the_threads(broker: BellBroker, consumer: BellConsumer) -> None:
    told = list[Any]()
    broker.on_handing_over = told.append
    broker.ring(rings(3))

    assert brought(consumer, 3) == told


@pytest.fixture
def busy_worker(environment: dict[str, str], system: System, tmp_path: Any) -> Iterator[Process]:
    with worker(environment, tmp_path / "worker.log") as process:
        yield process


def test_what_finds_no_free_thread_stays_at_the_broker_and_in_its_place(
    system: System, busy_worker: Process, conn: Connection
) -> None:
    first = [submit(system, "ping", {"sleep_ms": 4000}) for _ in range(REGULAR)]
    eventually(lambda: value(conn, "select count(*) from agentflow.jobs where state = 'running'") == len(first))
    waiting = [submit(system, "ping") for _ in range(12)]

    until = time.monotonic() + 2.5  # a second is how long an unclaimed message is held
    while time.monotonic() < until:
        taken_back = "select count(*) from agentflow.jobs where state = 'queued' and sends > 0 and sent_at is null"
        assert value(conn, taken_back) == 0
        assert value(conn, "select max(sends) from agentflow.jobs") == 1
        time.sleep(0.05)

    eventually(lambda: value(conn, "select count(*) from agentflow.jobs where state = 'succeeded'") == 18, within_s=30)
    begun = rows(conn, "select id from agentflow.jobs where id = any (%s) order by started_at", [j.id for j in waiting])
    places = {job.id: n for n, job in enumerate(waiting)}
    assert all(abs(places[row.id] - n) <= REGULAR for n, row in enumerate(begun))
