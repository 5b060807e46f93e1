"""Which request a job, its lines and its errors belong to: a trace, one id of 32 hex digits for all that the request set off.

A job carries it as `ID`, `ID-SPAN` or `ID-SPAN-SAMPLED` (the form of Sentry's header `sentry-trace`), and after a space what
Sentry's `baggage` says. A job that came without one begins its own, under its own id; what follows from a job belongs to its.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final
from uuid import UUID

#: https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
_current: ContextVar[str | None] = ContextVar("agentflow_trace", default=None)


def begin(carried: str | None) -> None:
    """From now on this thread works for that trace; None: for none."""
    _current.set(carried)


@contextmanager
def following(carried: str) -> Iterator[None]:
    """While the block runs."""
    token = _current.set(carried)
    try:
        yield
    finally:
        _current.reset(token)


def carried() -> str | None:
    """What a job that is handed in here carries."""
    return _current.get()


def of_job(job_id: UUID, trace: str | None) -> str:
    """What a job carries, or begins."""
    return trace or job_id.hex


def id_of(carried: str) -> str:
    return carried[:32]


def from_traceparent(header: str | None) -> str | None:
    """Of a caller that traces by the W3C's standard, as OpenTelemetry does. None for what is no such header."""
    match = _TRACEPARENT.fullmatch(header) if header else None
    return f"{match[1]}-{match[2]}" if match else None
