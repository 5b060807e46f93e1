"""Job types that only the tests have. `dramatiq tests.job_types` starts a worker that knows them beside the product's."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import actors
from agentflow.errors import Permanent, Wait
from agentflow.jobs.registry import Payload, Rate, job
from agentflow.worker.running import JobContext


class Keyed(Payload):
    key: str = "k"
    slots: int = 1
    sleep_ms: int = 0


@job("test_keyed", payload=Keyed, concurrency=lambda p: (p.key, p.slots))
def keyed(context: JobContext, payload: Keyed) -> dict[str, Any]:
    context.sleep(payload.sleep_ms / 1000)
    return {"slot": context.job.slot}


class Stubborn(Payload):
    seconds: float = 60.0


@job("test_stubborn", payload=Stubborn, time_limit_s=1.0)
def stubborn(context: JobContext, payload: Stubborn) -> dict[str, Any]:
    """Swallows whatever should end it."""
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)
    return {"ended": True}


class Limited(Payload):
    pass


@job("test_limited", payload=Limited, rate=Rate(5, 1))
def limited(context: JobContext, payload: Limited) -> dict[str, Any]:
    return {"at": time.time()}


class Unstorable(Payload):
    kind: str


@job("test_unstorable", payload=Unstorable)
def unstorable(context: JobContext, payload: Unstorable) -> Any:
    return {
        "nul": {"text": "a\x00b"},
        "surrogate": {"text": "a\ud800b"},
        "object": object(),
        "large": "x" * (5 << 20),
        "error": None,
    }[payload.kind]


class Gate(Payload):
    file: str


@job("test_gate", payload=Gate)
def gate(context: JobContext, payload: Gate) -> dict[str, Any]:
    """Waits for a file."""
    while not Path(payload.file).exists():
        context.sleep(0.02)
    return {}


class Spender(Payload):
    then: str = "succeed"


@job("test_spender", payload=Spender)
def spender(context: JobContext, payload: Spender) -> dict[str, Any]:
    """Spends, and ends as it is told to."""
    context.spent(usd=0.25, tokens_in=100)
    context.spent(usd=0.5, gpu_s=1.5)
    if payload.then == "fail":
        raise Permanent("it went wrong")
    if payload.then == "wait" and context.job.fence == 1:
        raise Wait(0.0, "asked")
    return {}


actors.worker.declare_actors()
