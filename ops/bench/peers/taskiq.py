"""Taskiq on RabbitMQ."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from taskiq_aio_pika import AioPikaBroker, Exchange, Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend

from ops.bench.peers.marks import work
from ops.bench.peers.payload import QUEUE, RABBITMQ, REDIS, RESULT_TIMEOUT_S, TEXT

broker = AioPikaBroker(
    RABBITMQ,
    qos=int(os.environ.get("BENCH_PREFETCH", "10")),
    exchange=Exchange(name=QUEUE),
    task_queues=[Queue(name=QUEUE, type=QueueType.CLASSIC)],
    dead_letter_queue=Queue(name=f"{QUEUE}.dead", type=QueueType.CLASSIC),
).with_result_backend(RedisAsyncResultBackend(REDIS, result_ex_time=3600))
_loop: asyncio.AbstractEventLoop | None = None


@broker.task
def bench(number: int, ms: int, text: str) -> dict[str, int]:
    work(number, ms)
    return {"number": number}


def _run(doing: Any) -> Any:
    """In the producer, which is no coroutine."""
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        _loop.run_until_complete(broker.startup())
    return _loop.run_until_complete(doing)


def submit(number: int, ms: int) -> Any:
    return _run(bench.kiq(number, ms, TEXT))


def result(handle: Any) -> None:
    _run(handle.wait_result(check_interval=0.005, timeout=RESULT_TIMEOUT_S))
