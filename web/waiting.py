"""Waiting for a job's end: `?wait=`, `Prefer: wait` and event streams hold a thread each, so their number is limited."""

from __future__ import annotations

import socket
import threading
import time
from typing import Final

import redis
from flask import request

from agentflow import health
from agentflow.jobs.model import Job
from agentflow.live import Progress
from agentflow.system import WAIT_MOST_S, System

#: One look at Redis and at the row in so many seconds; the end of a job wakes at once. Also how soon a stopping process
#: is noticed.
STEP_S: Final = 1.0
#: Redis is left alone for so long after it failed: each try may cost seconds.
REDIS_PAUSE_S: Final = 10.0


def hung_up() -> bool:
    """Whether the caller of this request has closed the connection: nobody is there to wait for."""
    connection: socket.socket | None = request.environ.get("gunicorn.socket")
    if connection is None:
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Seats:
    """The share of the threads that may wait. Whoever gets no seat does not wait."""

    def __init__(self, system: System) -> None:
        self.limit = max(1, int(system.settings.web_threads * system.settings.web_wait_share))
        self._system = system
        self._free = threading.BoundedSemaphore(self.limit)
        self._redis_again_at = 0.0

    def take(self) -> bool:
        return not self.draining and self._free.acquire(blocking=False)

    def leave(self) -> None:
        self._free.release()

    @property
    def draining(self) -> bool:
        """This process is stopping: whoever waits gets what is known now."""
        return health.of(self._system).draining

    def wait(self, job: Job, seconds: float) -> tuple[Job | None, bool]:
        """The job when it has ended or the time is over (None: it was cleaned up), and whether there was a seat to wait on."""
        if seconds <= 0 or job.terminal:
            return job, True
        if not self.take():
            return job, False
        try:
            end = time.monotonic() + min(seconds, WAIT_MOST_S)
            current: Job | None = job
            while current is not None and not current.terminal and not self.draining and not hung_up():
                left = end - time.monotonic()
                if left <= 0:
                    break
                current = self._system.wait_finished(current, min(left, STEP_S))
            return current, True
        finally:
            self.leave()

    def progress(self, job: Job) -> Progress | None:
        """The progress of a running job: Redis has it sooner than the row, which has it when Redis is away."""
        row = Progress(job.progress, job.stage) if job.progress is not None else None
        if job.state != "running" or time.monotonic() < self._redis_again_at:
            return row
        try:
            live = self._system.live.progress(job)
        except (redis.RedisError, ValueError, TypeError):
            self._redis_again_at = time.monotonic() + REDIS_PAUSE_S
            return row
        return live or row
