"""From a claimed job to its verdict, and what logs and traces say of it meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final

import structlog

from agentflow import log, metrics, sentry, traces
from agentflow.database import Unavailable
from agentflow.errors import Permanent, Wait
from agentflow.jobs.model import Verdict
from agentflow.system import System
from agentflow.worker.admission import Admission
from agentflow.worker.memory import Memory
from agentflow.worker.running import JobContext, Running

logger = log.get(__name__)

_NO_VERDICT_S: Final = 30.0


class Performing:
    """`perform` runs the job's function. Safe in threads."""

    def __init__(
        self,
        system: System,
        admission: Admission,
        memory: Memory,
        perform: Callable[[Running, JobContext], Verdict],
    ) -> None:
        self._system = system
        self._admission = admission
        self._memory = memory
        self._perform = perform

    def verdict_of(self, running: Running) -> Verdict:
        """Whatever happens to it, there is one."""
        job = running.job
        pickup_s, trace = _pickup_s(running), traces.of_job(job.id, job.trace)
        bound = structlog.contextvars.bound_contextvars(
            job_id=str(job.id),
            job_type=job.type,
            organization=job.organization_id,
            attempt=job.attempt,
            trace=traces.id_of(trace),
        )
        verdict: Verdict | None = None
        with bound, traces.following(trace):
            running.began = time.monotonic()
            metrics.job_started(job.type, job.queue, pickup_s)
            try:
                with (
                    self._admission.admitted(job),
                    self._memory.admitted(running),
                    sentry.attempt(job, pickup_s) as running.seen,
                ):
                    verdict = self._perform(running, JobContext(running, self._system, self._memory))
                    verdict = self._memory.settled(running, verdict)
                    running.seen.ended(verdict.outcome)
            except (Wait, *Unavailable) as error:
                verdict = verdict or _parked(running, error)
            except Permanent as error:
                verdict = verdict or _refused(running, error)
            except BaseException as error:
                logger.exception("a job came to no verdict")
                said = json.dumps({"code": "internal", "message": f"{type(error).__name__}: {error}"})
                verdict = verdict or Verdict(*running.key, "retry", delay_s=_NO_VERDICT_S, reason="retry", error=said)
        return verdict


def verdict_for_stop(running: Running) -> Verdict:
    """Of a job that was told to stop and did not."""
    from agentflow.worker.middleware import Retries

    return Retries.verdict_for_stop(running)


def _parked(running: Running, error: Exception) -> Verdict:
    from agentflow.worker.middleware import Retries

    return Retries.verdict_for_wait(running, error)


def _refused(running: Running, error: Permanent) -> Verdict:
    from agentflow.worker.middleware import described

    logger.error("cannot be run here", error=str(error), code=error.code)
    return Verdict(*running.key, "failed", error=described(error))


def _pickup_s(running: Running) -> float:
    job = running.job
    return max(0.0, (job.started_at - job.run_at).total_seconds()) if job.started_at else 0.0
