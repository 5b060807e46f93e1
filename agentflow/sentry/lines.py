"""What is logged as an error outside of jobs, as events."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import redis
import structlog

from agentflow.database import Unavailable

#: Of one kind of error an event is sent so often; the next one says how many there were.
AGAIN_S: Final = 600.0
_MOST_KINDS: Final = 1000
_OWN: Final = ("sentry_sdk", "urllib3")
#: The operator hears of a lost connection from health and metrics; each thread's own error says nothing more.
_CONNECTION_LOST: Final = (*Unavailable, redis.RedisError, OSError)
#: What structlog puts into each line for its own use.
_NO_FIELDS: Final = frozenset({"exc_info", "level", "logger", "timestamp", "stack_info"})


class Errors(logging.Handler):
    """Makes an event of what is logged as an error outside of jobs: of each kind one in `AGAIN_S`. What goes wrong in a job is
    told when the job has failed for good; a lost connection is no event."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._kinds: dict[tuple[str, ...], tuple[float, int]] = {}  # when it was sent last, and how many came since

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._look_at(record)
        except Exception:  # noqa: BLE001 - as logging wants it: whoever logs must not fail by it
            self.handleError(record)

    def _look_at(self, record: logging.LogRecord) -> None:
        if record.name.startswith(_OWN) or "job_id" in structlog.contextvars.get_contextvars():
            return
        error = _exception_of(record)
        if isinstance(error, _CONNECTION_LOST):
            return
        fields = dict(record.msg) if isinstance(record.msg, dict) else {"event": record.getMessage()}
        text = str(fields.pop("event", ""))
        kind = (record.name, text if isinstance(record.msg, dict) else str(record.msg), type(error).__name__)
        if (before := self._take(kind)) is None:
            return
        _send_line(record, text, {name: fields[name] for name in fields.keys() - _NO_FIELDS}, error, kind, before)

    def _take(self, kind: tuple[str, ...]) -> int | None:
        """How many of this kind were not sent since the last one; None: nor is this. Called under the handler's lock."""
        now = time.monotonic()
        sent_at, since = self._kinds.get(kind, (-math.inf, 0))
        if now - sent_at < AGAIN_S:
            self._kinds[kind] = (sent_at, since + 1)
            return None
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (now, 0)
        return since


def _exception_of(record: logging.LogRecord) -> BaseException | None:
    said: Any = record.msg.get("exc_info") if isinstance(record.msg, dict) else record.exc_info
    if said is True:
        said = sys.exc_info()
    if isinstance(said, tuple):
        said = said[1]
    return said if isinstance(said, BaseException) else None


def _send_line(
    record: logging.LogRecord,
    text: str,
    fields: Mapping[str, Any],
    error: BaseException | None,
    kind: tuple[str, ...],
    before: int,
) -> None:
    import sentry_sdk
    from sentry_sdk.utils import event_from_exception

    event: dict[str, Any] = {}
    if error is not None:
        event, _ = event_from_exception(  # type: ignore[assignment]
            error, client_options=sentry_sdk.get_client().options, mechanism={"type": "logging", "handled": True}
        )
    event |= {
        "level": "fatal" if record.levelno >= logging.CRITICAL else "error",
        "logger": record.name,
        "logentry": {"message": text, "params": []},
        "extra": {**fields, **({"not_sent_before": before} if before else {})},
    }
    event["fingerprint"] = ["{{ default }}", *kind[:2]] if error is not None else list(kind[:2])
    sentry_sdk.capture_event(event)  # type: ignore[arg-type]
