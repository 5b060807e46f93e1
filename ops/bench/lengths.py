"""Two types of jobs for benches, whose lengths differ as those of types do. `dramatiq lengths` runs them and all others."""

from __future__ import annotations

import actors
from actors.ping.job import Ping
from agentflow.jobs.registry import job
from agentflow.worker.running import JobContext


@job("bench_short", payload=Ping)
def short(context: JobContext, payload: Ping) -> None:
    """Sleeps, some tenths of a second."""
    context.sleep(payload.sleep_ms / 1000)


@job("bench_long", payload=Ping)
def long(context: JobContext, payload: Ping) -> None:
    """Sleeps, some seconds."""
    context.sleep(payload.sleep_ms / 1000)


actors.worker.declare_actors()
