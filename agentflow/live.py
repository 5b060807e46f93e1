"""What is known of a job between two looks at Postgres: its progress now, and the moment it ended. Kept in Redis, for minutes.

Redis may be away or empty at any time: readers fall back to the row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import redis
from dramatiq.message import Message
from dramatiq.results.backends import RedisBackend
from dramatiq.results.result import wrap_exception, wrap_result

from agentflow.broker import message_for
from agentflow.jobs.model import Job, Ring, State

RESULT_TTL_MS: Final = 600_000
PROGRESS_TTL_S: Final = 120
#: A result larger than this is not copied to Redis; the row has it.
MAX_RESULT_CHARS: Final = 64 << 10
_ROW_POLL_S: Final = 0.5
#: A wait at Redis; its client gives up on an answer a little later (System.live).
_BLOCK_S: Final = 1.0
#: After a failure the rows alone are asked for so long: each try may cost seconds of somebody's wait.
_PAUSE_S: Final = 5.0
#: Between two looks at a row that has not ended though its result is there.
_SPIN_S: Final = 0.002


#: A job's id and the fence of one claim of it.
Claim = tuple[UUID, int]


class Progress(NamedTuple):
    fraction: float
    stage: str | None


#: The commands of Dramatiq's backend for a result, for many: three commands each cost more here than the job's own.
_STORE_RESULTS: Final = """
for n, key in ipairs(KEYS) do
    redis.call('DEL', key)
    redis.call('LPUSH', key, ARGV[n])
    redis.call('PEXPIRE', key, ARGV[#ARGV])
end
"""


class Finished(NamedTuple):
    """A job's end, for Dramatiq's results backend. `result` and `error` are JSON text, or None."""

    job_id: UUID
    queue: str
    type: str
    state: State
    result: str | None
    error: str | None


class Live:
    """Reads and writes through one client with short timeouts; each call may raise redis.RedisError, but for `wait_finished`."""

    def __init__(self, client: redis.Redis, waiting_client: redis.Redis, *, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._results = RedisBackend(client=client)
        self._waiting = waiting_client
        self._waiting_again_at = 0.0

    def write_progress(self, changed: Sequence[tuple[Claim, Progress]]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for claim, progress in changed:
                pipe.set(self._key(*claim), json.dumps(progress), ex=PROGRESS_TTL_S)
            pipe.execute()

    def progress(self, job: Job) -> Progress | None:
        """How far the attempt that runs now is; what an earlier one said does not count."""
        data: Any = self._client.get(self._key(job.id, job.fence))
        return Progress(*json.loads(data)) if data else None

    def write_finished(self, finished: Sequence[Finished]) -> None:
        """Store results under the jobs' ids as Dramatiq does, so that `message.get_result()` finds them."""
        keys = [self._results.build_message_key(self._message(end.job_id, end.queue, end.type)) for end in finished]
        values = [self._results.encoder.encode(_wrap(end)) for end in finished]
        self._client.eval(_STORE_RESULTS, len(keys), *keys, *values, RESULT_TTL_MS)

    def wait_finished(self, job: Job, timeout_s: float, reread: Callable[[], Job | None]) -> Job | None:
        """The job when it has ended, or as it is after `timeout_s`. `reread` reads its row; None: it is gone."""
        end = time.monotonic() + timeout_s
        current: Job | None = job
        while current is not None and not current.terminal and (left := end - time.monotonic()) > 0:
            heard = self._wait_some(job, left)
            current = reread()
            if heard and current is not None and not current.terminal:
                time.sleep(
                    _SPIN_S
                )  # a result of an earlier life of the same id, or the row of a replica that is behind
        return current

    def _wait_some(self, job: Job, left_s: float) -> bool:
        """Until the result is there, at most a second: the row is looked at in between, in case Redis lost it. Returns whether it
        is."""
        if time.monotonic() < self._waiting_again_at:
            time.sleep(min(_ROW_POLL_S, left_s))
            return False
        key = self._results.build_message_key(self._message(job.id, job.queue, job.type))
        try:
            return self._waiting.brpoplpush(key, key, timeout=min(left_s, _BLOCK_S)) is not None
        except redis.RedisError:
            self._waiting_again_at = time.monotonic() + _PAUSE_S
            return False

    def _message(self, job_id: UUID, queue: str, type_: str) -> Message[Any]:
        return message_for(Ring(job_id, queue, type_), self._prefix)

    def _key(self, job_id: UUID, fence: int) -> str:
        return f"{self._prefix}:progress:{job_id}:{fence}"


class Rows(Live):
    """Where there is no Redis: nothing is kept beside the rows, whose progress is as old as the last heartbeat."""

    def __init__(self) -> None:
        """Nothing to connect to."""

    def write_progress(self, changed: Sequence[tuple[Claim, Progress]]) -> None:
        """The heartbeat does."""

    def progress(self, job: Job) -> Progress | None:
        return None

    def write_finished(self, finished: Sequence[Finished]) -> None:
        """The rows have it."""

    def _wait_some(self, job: Job, left_s: float) -> bool:
        time.sleep(min(_ROW_POLL_S, left_s))
        return False


class JobFailed(Exception):
    """How a failed job looks to a Dramatiq program that asks for its result."""


class Cancelled(Exception):
    """The same for a cancelled one."""


def _wrap(end: Finished) -> Any:
    if end.state == "succeeded":
        small = end.result is None or len(end.result) <= MAX_RESULT_CHARS
        return wrap_result(json.loads(end.result) if end.result is not None and small else None)
    error = json.loads(end.error) if end.error else {}
    kind = Cancelled if end.state == "cancelled" else JobFailed
    return wrap_exception(kind(error.get("message", end.state)))
