"""Which servers are there: what is said of an outage, and what is tried meanwhile."""

from __future__ import annotations

from agentflow import metrics, settings
from agentflow.presence import Presence
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.connection_support import (
    HOST,
    Log,
    Servers,
    reach,
    reachable,
)
from tests.processes import eventually


def test_while_a_server_is_away_one_attempt_at_a_time_is_made_for_all(said: Log) -> None:
    presence = Presence("Redis", variable="REDIS_URL", where={"host": "h"})
    assert presence.begin() is None
    assert presence.begin() is None  # not known to be away: whoever wants may try
    presence.failed("refused")
    presence.failed("refused")

    eventually(lambda: presence.begin() is None, every_s=0.01)
    assert presence.begin() == "Redis is away: refused"
    presence.came()
    assert presence.begin() is None

    ready = said.of("connection ready")
    assert len(ready) == 1 and ready[0]["suppressed_errors"] > 1
    assert len(said.of("cannot be reached")) == 1


def test_a_server_is_there_when_all_its_parts_are(said: Log) -> None:
    changes: list[bool] = []
    presence = Presence("RabbitMQ", variable="RABBITMQ_URL", on_change=changes.append)
    for part in ("publishing", "consuming"):
        presence.came(part)
    presence.failed("closed", "consuming")
    presence.failed("closed", "publishing")
    presence.came("consuming")
    assert presence.away

    presence.came("publishing")

    assert not presence.away
    assert changes == [True, False, True]
    assert [event for event, _ in said.lines] == [
        "RabbitMQ URL constructed",
        "RabbitMQ connection ready",
        "RabbitMQ connection lost",
        "RabbitMQ connection ready",
    ]


def test_other_reasons_of_an_outage_are_told_and_not_without_end(said: Log) -> None:
    presence = Presence("Postgres", variable="DATABASE_URL")
    for n in range(50):
        presence.failed(f"connection to server at 10.0.0.{n}, port {n} failed")
    for n in range(20):
        presence.failed("password authentication failed")
        presence.failed("the server takes no writes" + "!" * n)

    assert len(said.of("cannot be reached")) == 1
    assert len(said.of("for another reason")) == 3


def test_the_metrics_of_redis_follow_its_connection(
    environment: dict[str, str], servers: Servers, names: dict[str, list[str]]
) -> None:
    def sample(name: str) -> float:
        return metrics.OF_REDIS.get_sample_value(name) or 0.0

    with servers.behind() as middlemen:
        system = System(settings.load({**environment, **servers.environment(HOST)}), "test")
        reach(system, "Redis")
        assert sample("worker_redis_connection_status") == 1
        before = sample("worker_redis_reconnect_attempts_total")
        middlemen["Redis"].refuse()
        assert not reachable(system, "Redis")
        assert sample("worker_redis_connection_status") == 0
        assert sample("worker_redis_reconnect_attempts_total") == before  # the first was no repeated one
        middlemen["Redis"].listen()
        eventually(lambda: reachable(system, "Redis"))
        system.close()

    assert sample("worker_redis_connection_status") == 1
    assert sample("worker_redis_reconnect_attempts_total") > before
