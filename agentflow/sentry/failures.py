"""One event for each job that has failed for good, whatever its attempts were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agentflow import redaction, traces
from agentflow.jobs.model import Job
from agentflow.sentry.attempts import tags
from agentflow.sentry.limiting import Allowance
from agentflow.sentry.process import started

#: One process reports so many at once, and so many a second after that: an outage outside fails thousands alike.
AT_ONCE: Final = 100
PER_S: Final = 1.0

_allowance = Allowance(AT_ONCE, PER_S)


def wants_failures() -> bool:
    """Whether the exception of a failure is worth keeping until it is known to be the last."""
    return started() is not None


def job_failed(
    job: Job,
    error: Mapping[str, Any] | None,
    *,
    cause: BaseException | None = None,
    trace: Mapping[str, Any] | None = None,
    lines: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A job has failed for good: `error` as its row has it, `cause` the exception, `lines` what its code logged (breadcrumbs)."""
    if started() is None or (before := _allowance.take()) is None:
        return
    import sentry_sdk
    from sentry_sdk.utils import capture_internal_exceptions

    with capture_internal_exceptions():  # the thread that calls has jobs to settle
        event = _event(job, dict(error or {}), cause, lines)
        event["contexts"]["trace"] = dict(trace) if trace else _context_of(job)
        event["extra"] = {"not_sent_before": before} if before else {}
        with sentry_sdk.new_scope() as scope:
            scope.capture_event(event, hint={"secrets": redaction.secrets_in(job.payload)})  # type: ignore[arg-type]


def _event(
    job: Job, said: Mapping[str, Any], cause: BaseException | None, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    import sentry_sdk
    from sentry_sdk.utils import event_from_exception

    code, message = str(said.get("code", "failed")), str(said.get("message", "The job failed."))
    event: dict[str, Any] = {"level": "error"}
    if cause is not None:
        event, _ = event_from_exception(  # type: ignore[assignment]
            cause, client_options=sentry_sdk.get_client().options, mechanism={"type": "agentflow", "handled": False}
        )
    else:
        event["exception"] = {"values": [{"type": code, "value": message}]}
    event |= {
        "transaction": job.type,
        "tags": {**tags(job), "code": code},
        "contexts": {
            "job": {
                "id": str(job.id),
                "attempt": job.attempt,
                "max_attempts": job.max_attempts,
                "crashes": job.crashes,
                "created_at": job.created_at.isoformat(),
                "correlation_id": job.correlation_id,
            },
        },
        "breadcrumbs": {"values": list(lines)},
    }
    if code != "unexpected":  # which is told apart by its stack
        event["fingerprint"] = [job.type, code]
    return event


def _context_of(job: Job) -> dict[str, str]:
    """Of a job whose attempt was another process's."""
    return {"trace_id": traces.id_of(traces.of_job(job.id, job.trace)), "span_id": job.id.hex[16:]}
