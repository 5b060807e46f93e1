"""Bare Dramatiq on RabbitMQ."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from ops.bench.peers.marks import work
from ops.bench.peers.payload import QUEUE, RABBITMQ, REDIS, RESULT_TIMEOUT_S, TEXT

broker = RabbitmqBroker(url=RABBITMQ, confirm_delivery=True)
broker.add_middleware(Results(backend=RedisBackend(url=REDIS)))
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=QUEUE, store_results=True)
def bench(number: int, ms: int, text: str) -> dict[str, int]:
    work(number, ms)
    return {"number": number}


def submit(number: int, ms: int) -> Any:
    return bench.send(number, ms, TEXT)


def result(message: Any) -> None:
    message.get_result(block=True, timeout=int(RESULT_TIMEOUT_S * 1000))
