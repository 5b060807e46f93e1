"""Huey."""

from __future__ import annotations

from typing import Any

from huey import RedisHuey

from ops.bench.peers.marks import work
from ops.bench.peers.payload import QUEUE, REDIS, RESULT_TIMEOUT_S, TEXT

huey = RedisHuey(QUEUE, url=REDIS)


@huey.task()
def bench(number: int, ms: int, text: str) -> dict[str, int]:
    work(number, ms)
    return {"number": number}


def submit(number: int, ms: int) -> Any:
    return bench(number, ms, TEXT)


def result(handle: Any) -> None:
    handle.get(blocking=True, timeout=RESULT_TIMEOUT_S)
