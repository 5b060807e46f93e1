"""Traces: from the request that handed a job in to each of its attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from agentflow import traces
from agentflow.jobs.model import Job
from agentflow.sentry.process import started

_MOST_BAGGAGE: Final = 2000
_STATUS: Final = {
    "succeeded": "ok",
    "failed": "internal_error",
    "retry": "internal_error",
    "cancelled": "cancelled",
    "wait": "resource_exhausted",
    "handback": "aborted",
}


def trace_of_request(traceparent: str | None) -> str | None:
    """What jobs carry that the request at hand hands in."""
    return traces.from_traceparent(traceparent) if started() is None else _current()


def _current() -> str:
    import sentry_sdk

    baggage = sentry_sdk.get_baggage() or ""  # which a caller may have begun
    return f"{sentry_sdk.get_traceparent()} {baggage if len(baggage) <= _MOST_BAGGAGE else ''}".rstrip()


class Attempt:
    """One attempt of a job, as Sentry sees it; without Sentry nothing."""

    context: Mapping[str, Any] | None = None

    def ended(self, outcome: str) -> None:
        pass


_UNSEEN: Final = Attempt()


class _Seen(Attempt):
    def __init__(self, transaction: Any) -> None:
        self._transaction = transaction
        context = transaction.get_trace_context()
        self.context = {name: context[name] for name in ("trace_id", "span_id", "parent_span_id", "op")}

    def ended(self, outcome: str) -> None:
        self._transaction.set_status(_STATUS.get(outcome, "unknown_error"))


def attempt(job: Job, pickup_s: float) -> AbstractContextManager[Attempt]:
    """A transaction around an attempt, in the trace of the request that handed the job in."""
    return nullcontext(_UNSEEN) if started() is None else _attempt(job, pickup_s)


@contextmanager
def _attempt(job: Job, pickup_s: float) -> Iterator[Attempt]:
    import sentry_sdk

    trace, _, baggage = traces.of_job(job.id, job.trace).partition(" ")
    with sentry_sdk.isolation_scope() as scope:
        scope.set_tags(tags(job))
        continued = sentry_sdk.continue_trace(
            {"sentry-trace": trace, "baggage": baggage}, op="queue.process", name=job.type, source="task"
        )
        with sentry_sdk.start_transaction(continued) as transaction:
            transaction.set_data("messaging.system", "agentflow")
            transaction.set_data("messaging.message.id", str(job.id))
            transaction.set_data("messaging.destination.name", job.queue)
            transaction.set_data("messaging.message.retry.count", job.attempt - 1)
            transaction.set_data("messaging.message.receive.latency", round(pickup_s * 1000))
            with traces.following(_current()):
                yield _Seen(transaction)


def tags(job: Job) -> dict[str, str]:
    return {
        "job_type": job.type,
        "job_id": str(job.id),
        "organization": str(job.organization_id),
        "attempt": str(job.attempt),
        "queue": job.queue,
    }
