"""The lines that a job's code logs, kept with the job. Whoever logs does not wait: one thread writes those of all jobs of the
process, about once a second. A job that logs nothing costs nothing; what a killed process had not written is lost.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from agentflow import log, redaction
from agentflow.database import Database, Unavailable
from agentflow.jobs import lines
from agentflow.jobs.lines import Line, Place
from agentflow.jobs.model import Job
from agentflow.jobs.text import storable, storable_json
from agentflow.redaction import Redactor

if TYPE_CHECKING:
    from agentflow.worker.running import Running

logger = log.get(__name__)

EVERY_S: Final = 1.0
_AGAIN_S: Final = 5.0
#: Jobs whose lines wait while the database is away; those of the oldest are dropped.
_MOST_JOBS: Final = 500
_MESSAGE_CHARACTERS: Final = 2000
_FIELDS_CHARACTERS: Final = 4000
_TRACEBACK_LINES: Final = 12
#: On each line, and columns of their own here.
_BOUND: Final = frozenset(
    {
        *("event", "level", "logger", "timestamp", "exc_info", "stack_info"),
        *("job_id", "job_type", "organization", "attempt", "trace"),
    }
)


class Lines:
    """Of one attempt: the newest, up to the cap, and which of them are not written yet."""

    def __init__(self, job: Job, redactor: Redactor) -> None:
        self.job = job
        self._redactor = redactor.also(redaction.secrets_in(job.payload))
        self.kept: deque[Line] = deque()
        self._bytes = 0
        self._written = self._n = 0
        self._untrimmed = (0, 0)
        self._lock = threading.Lock()

    def add(self, record: logging.LogRecord) -> None:
        fields = dict(record.msg) if isinstance(record.msg, dict) else {}
        message = str(fields["event"]) if "event" in fields else record.getMessage()
        message = storable(self._redactor.text(message[: 2 * _MESSAGE_CHARACTERS]))[:_MESSAGE_CHARACTERS]
        if error := _traceback(fields.get("exc_info") or record.exc_info):
            fields["exception"] = error
        extra = self._extra({name: value for name, value in fields.items() if name not in _BOUND})
        size = len(message) + (len(json.dumps(extra)) if extra else 0)
        at = datetime.fromtimestamp(record.created, UTC)
        level = min(50, record.levelno // 10 * 10)
        with self._lock:
            self._n += 1
            place = Place(self.job.fence, self._n)
            self.kept.append(Line(place, self.job.attempt, at, level, record.name[:200], message, extra, size))
            self._bytes += size
            while len(self.kept) > lines.MOST_LINES or (self._bytes > lines.MOST_BYTES and len(self.kept) > 1):
                self._bytes -= self.kept.popleft().bytes

    def _extra(self, fields: dict[str, Any]) -> dict[str, Any]:
        text, _ = storable_json(json.dumps(self._redactor.value(fields), default=str))
        if len(text) > _FIELDS_CHARACTERS:
            return {"shortened": text[:_FIELDS_CHARACTERS]}
        found: dict[str, Any] = json.loads(text)
        return found

    def unwritten(self) -> list[Line]:
        with self._lock:
            return [line for line in self.kept if line.place.n > self._written]

    def written(self, those: list[Line]) -> bool:
        """They are. Whether the job may have more in the table than the cap allows."""
        with self._lock:
            self._written = those[-1].place.n
            count, size = self._untrimmed
            self._untrimmed = count, size = count + len(those), size + sum(line.bytes for line in those)
            # Earlier attempts left up to the cap.
            over = count > lines.MOST_LINES or size > lines.MOST_BYTES or self.job.fence > 1
            if over:
                self._untrimmed = (lines.MOST_LINES // 2, lines.MOST_BYTES // 2)  # so not with each batch
            return over

    def breadcrumbs(self) -> list[dict[str, Any]]:
        """In Sentry's form. Copies: its SDK writes into what it is given."""
        with self._lock:
            return [
                {
                    "timestamp": line.at.isoformat(),
                    "level": line.level_name,
                    "category": line.logger,
                    "message": line.message,
                    "data": copy.deepcopy(line.fields),
                }
                for line in list(self.kept)[-100:]
            ]


_collecting: ContextVar[Running | None] = ContextVar("agentflow_job_lines", default=None)


@contextmanager
def collected(running: Running) -> Iterator[None]:
    """While the block runs, what is logged in this thread belongs to the job."""
    token = _collecting.set(running)
    try:
        yield
    finally:
        _collecting.reset(token)


class Writer(logging.Handler):
    """One per worker process."""

    def __init__(self, database: Database, redactor: Redactor) -> None:
        super().__init__(logging.INFO)
        self._database = database
        self._redactor = redactor
        self._waiting: dict[tuple[UUID, int], Lines] = {}
        self._waiting_lock = threading.Lock()
        self._some = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-lines", daemon=True)
        self.failures = 0  # since the database was there last

    def start(self) -> None:
        logging.getLogger().addHandler(self)
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Write what waits, for so long at most."""
        logging.getLogger().removeHandler(self)
        self._stop.set()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def emit(self, record: logging.LogRecord) -> None:
        running = _collecting.get()
        if running is None:
            return
        try:
            if running.lines is None:
                running.lines = Lines(running.job, self._redactor)
            running.lines.add(record)
            with self._waiting_lock:
                self._waiting[running.key] = running.lines
                while len(self._waiting) > _MOST_JOBS:
                    del self._waiting[next(iter(self._waiting))]
            self._some.set()
        except Exception:  # noqa: BLE001 - as logging wants it: whoever logs must not fail by it
            self.handleError(record)

    def _run(self) -> None:
        pause_s = EVERY_S
        while not self._stop.is_set():
            self._some.wait()
            self._stop.wait(pause_s)  # what else comes until then goes along
            self._some.clear()
            pause_s = EVERY_S if self._write() else _AGAIN_S
        self._write()

    def _write(self) -> bool:
        """False when the database is away: those lines are kept, as far as the cap goes."""
        with self._waiting_lock:
            waiting, self._waiting = self._waiting, {}
        batch = [(each, new) for each in waiting.values() if (new := each.unwritten())]
        if not batch:
            return True
        try:
            with self._database.connection() as conn:
                lines.write(conn, [(each.job.id, line) for each, new in batch for line in new])
                if full := sorted({each.job.id for each, new in batch if each.written(new)}):
                    lines.trim(conn, full)
        except Unavailable:
            self.failures += 1
            with self._waiting_lock:
                self._waiting = {**waiting, **self._waiting}
            self._some.set()
            return False
        except Exception:  # whatever it is, the next lines are worth a try
            logger.exception("lines of jobs could not be kept", jobs=len(batch))
            for each, new in batch:
                each.written(new)
        self.failures = 0
        return True


def _traceback(said: Any) -> str | None:
    if said is True:
        said = sys.exc_info()
    error = said[1] if isinstance(said, tuple) else said
    if not isinstance(error, BaseException):
        return None
    return "".join(traceback.format_exception(error, limit=-_TRACEBACK_LINES))
