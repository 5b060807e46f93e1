"""Celery on RabbitMQ."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from ops.bench.peers.marks import work
from ops.bench.peers.payload import QUEUE, RABBITMQ, REDIS, RESULT_TIMEOUT_S, TEXT

app = Celery("bench", broker=RABBITMQ, backend=REDIS)
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH_MULTIPLIER", "4")),
    broker_transport_options={"confirm_publish": True},
    result_expires=3600,
)


@app.task(name="bench")
def bench(number: int, ms: int, text: str) -> dict[str, int]:
    work(number, ms)
    return {"number": number}


def submit(number: int, ms: int) -> Any:
    return bench.delay(number, ms, TEXT)


def result(handle: Any) -> None:
    handle.get(timeout=RESULT_TIMEOUT_S)
