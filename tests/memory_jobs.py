"""A job type that takes as much memory as it is told to, beside those of `tests.job_types`."""

from __future__ import annotations

from typing import Any

import actors
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Memory, Payload, RetryClass, job
from agentflow.system import System
from agentflow.worker.running import JobContext
from tests import job_types, memory_child  # noqa: F401 - the other types, and statements that are written down

QUICKLY = RetryClass("quickly", 5, ladder_s=(0.2,))


class Hungry(Payload):
    megabytes: int
    said_mb: int = 0
    until: str | None = None
    in_child: bool = True


def said(_system: System, running: Job) -> int:
    return int(running.payload["said_mb"]) << 20


@job("test_hungry", payload=Hungry, retry=QUICKLY, memory=Memory(guess=lambda size: size or 0, input_bytes=said))
def hungry(context: JobContext, payload: Hungry) -> dict[str, Any]:
    """Says that it needs `said_mb`, takes `megabytes`, and holds them until a file is there."""
    wanted = {"megabytes": payload.megabytes, "until": payload.until}
    if payload.in_child:
        return {"megabytes": context.run_child("tests.memory_child:eat", **wanted)}
    return {"megabytes": memory_child.eat(**wanted, report=context.progress)}


actors.worker.declare_actors()
