"""Job types that only the workers of `agentflow prove` know: work whose effect outside can be counted."""

from __future__ import annotations

import http.client
import json
from typing import Annotated, Any

from pydantic import Field

from agentflow.errors import Transient
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.worker.running import JobContext

_TIMEOUT_S = 20.0


class Effect(Payload):
    """`port`: of the receiver, on this machine."""

    port: Annotated[int, Field(ge=1, le=65535)]
    sleep_ms: Annotated[int, Field(ge=0, le=600_000)] = 0
    native_ms: Annotated[int, Field(ge=0, le=600_000)] = 0


# Not repeatable, as a charge or a message to a customer is: what a worker does after it lost its lease would be seen.
@job("prove_effect", payload=Effect, retry=CRITICAL, time_limit_s=600.0, repeatable=False)
def effect(context: JobContext, payload: Effect) -> dict[str, Any]:
    """Work for a while, then have one effect outside: a POST with the job's id as its key, and the fence."""
    if payload.sleep_ms:
        context.sleep(payload.sleep_ms / 1000)
    if payload.native_ms:
        context.run_child("agentflow.prove.native:block", milliseconds=payload.native_ms)
    connection = http.client.HTTPConnection("127.0.0.1", payload.port, timeout=_TIMEOUT_S)
    try:
        connection.connect()
        context.check()  # the last moment before the effect: a thread that slept through its lease goes no further
        connection.request(
            "POST",
            "/effects",
            json.dumps({"id": str(context.job.id), "fence": context.job.fence}),
            {"Content-Type": "application/json", "Idempotency-Key": str(context.job.id)},
        )
        status = connection.getresponse().status
    except OSError as error:
        raise Transient(f"the receiver did not answer: {error}", code="effect_refused") from None
    finally:
        connection.close()
    if status != 200:
        raise Transient(f"the receiver answered {status}", code="effect_refused")
    return {"status": status}
