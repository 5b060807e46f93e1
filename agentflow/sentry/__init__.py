"""What Sentry is told, where SENTRY_DSN is set: each job that fails for good, each request's and attempt's trace, what else goes
wrong here, and that the calendar turns. Without it nothing of the SDK is even imported.

The SDK's own integrations are left out, but for those of Flask and httpx2: they would report each attempt, and send what must not
leave (payloads, headers, addresses, local variables).
"""

from agentflow.sentry.attempts import Attempt, attempt, trace_of_request
from agentflow.sentry.check_ins import calendar_turns, watched
from agentflow.sentry.failures import job_failed, wants_failures
from agentflow.sentry.process import start, stop

__all__ = [
    "Attempt",
    "attempt",
    "calendar_turns",
    "job_failed",
    "start",
    "stop",
    "trace_of_request",
    "wants_failures",
    "watched",
]
