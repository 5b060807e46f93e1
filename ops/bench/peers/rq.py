"""RQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue

from ops.bench.peers.marks import work
from ops.bench.peers.payload import QUEUE, REDIS, RESULT_TIMEOUT_S, TEXT

queue = Queue(QUEUE, connection=Redis.from_url(REDIS))


def bench(number: int, ms: int, text: str) -> dict[str, int]:
    work(number, ms)
    return {"number": number}


def submit(number: int, ms: int) -> Any:
    return queue.enqueue(bench, number, ms, TEXT, result_ttl=3600)


def submit_many(numbers: Sequence[int], ms: int) -> None:
    queue.enqueue_many([Queue.prepare_data(bench, args=(number, ms, TEXT), result_ttl=3600) for number in numbers])


def result(job: Any) -> None:
    job.latest_result(timeout=int(RESULT_TIMEOUT_S))
