"""The canary: does as little, or as badly, as it is asked to. For health checks, benchmarks and failure tests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agentflow.errors import Transient, Wait
from agentflow.jobs.registry import Payload, job
from agentflow.worker.running import JobContext


class Ping(Payload):
    """What this ping does, in this order."""

    wait_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        0, description="park once for so long before anything else"
    )
    sleep_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(0, description="sleep in the worker's thread")
    native_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(0, description="block in C, in a child process")
    fail_attempts: Annotated[int, Field(ge=0, le=100)] = Field(0, description="fail the first so many attempts")
    result_bytes: Annotated[int, Field(ge=0, le=1 << 20)] = Field(0, description="return a string of this length, too")


@job("ping", payload=Ping, time_limit_s=3600.0)
def ping(context: JobContext, payload: Ping) -> dict[str, Any]:
    """Answer, after sleeping, failing or waiting as asked."""
    job = context.job
    # Parking gives the attempt back but not the fence: the first claim is the only one at which the two are equal to 1.
    if payload.wait_ms and job.fence == 1:
        raise Wait(payload.wait_ms / 1000, "asked")
    if payload.sleep_ms:
        context.sleep(payload.sleep_ms / 1000)
    if payload.native_ms:
        context.run_child("actors.ping.native:block", milliseconds=payload.native_ms)
    if job.attempt <= payload.fail_attempts:
        raise Transient(f"attempt {job.attempt} fails as asked", code="asked")
    answer: dict[str, Any] = {"pong": True, "attempt": job.attempt}
    if payload.result_bytes:
        answer["data"] = "x" * payload.result_bytes
    return answer
