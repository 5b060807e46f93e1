"""Jobs that have failed for good, told to Sentry: by who wrote their last verdict, or found them without their workers."""

from __future__ import annotations

import json

from agentflow import log, sentry
from agentflow.database import Database, Unavailable
from agentflow.jobs import records
from agentflow.jobs.model import Settled, Verdict
from agentflow.worker.running import Running

logger = log.get(__name__)


def failed(running: Running, verdict: Verdict) -> None:
    """The verdict is written, and was the last one."""
    sentry.job_failed(
        running.job,
        json.loads(verdict.error) if verdict.error else None,
        cause=running.cause,
        trace=running.seen.context if running.seen is not None else None,
        lines=running.lines.breadcrumbs() if running.lines is not None else (),
    )
    running.cause = None  # and with it whatever its frames hold


def lost(database: Database, settled: Settled) -> None:
    """What was rescued, and of that the jobs that have failed since too many workers died under them."""
    ids = [id_ for id_, _, _, state in settled.finished if state == "failed"]
    if not ids or not sentry.wants_failures():
        return
    try:
        with database.connection() as conn:
            found = [records.get(conn, records.EVERY_ORGANIZATION, id_) for id_ in ids]
    except Unavailable:
        logger.debug("failed jobs are not reported: the database is away")
        return
    for job in found:
        if job is not None:
            sentry.job_failed(job, job.error)
