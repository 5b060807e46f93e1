"""AgentFlow: a job type of the bench's own beside the product's. `dramatiq ops.bench.peers.agentflow` is its worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from agentflow import settings
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Payload, job
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from agentflow.worker.running import JobContext
from ops.bench.peers.marks import work
from ops.bench.peers.payload import RESULT_TIMEOUT_S, TEXT

_ORGANIZATION = 1


class Bench(Payload):
    number: int
    ms: int
    text: str


@job("bench", payload=Bench)
def bench(context: JobContext, payload: Bench) -> dict[str, int]:
    work(payload.number, payload.ms)
    return {"number": payload.number}


import actors  # noqa: E402, F401 - makes the worker, with an actor of each type that is declared by now


@cache
def _system() -> System:
    """The producer's."""
    return System.start(settings.current(), "bench")


if os.environ.get("BENCH_ROLE") == "producer":
    _system()


def submit(number: int, ms: int) -> Any:
    return _system().submit(_ORGANIZATION, _new(number, ms)).job


def submit_many(numbers: Sequence[int], ms: int) -> None:
    prepared = [_system().prepare(_ORGANIZATION, _new(number, ms), public_only=False) for number in numbers]
    with _system().transaction() as transaction:
        transaction.submit_many(_ORGANIZATION, prepared)


def result(handed_in: Job) -> None:
    ended = _system().wait_finished(handed_in, RESULT_TIMEOUT_S)
    assert ended is not None and ended.state == "succeeded", ended


def close() -> None:
    """What was handed in last is rung before the process ends; else the relay would ring when it is due again."""
    _system().close()


def _new(number: int, ms: int) -> NewJob:
    return NewJob("bench", {"number": number, "ms": ms, "text": TEXT})
