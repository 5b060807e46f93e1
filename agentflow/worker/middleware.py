"""The middleware of Dramatiq's broker, and what wraps each job's function, in one explicit list.

Dramatiq's own hooks swallow errors, so nothing that must not fail silently happens in them: the claim and the finish are done
by the actor's wrapper (`Runtime.handle`), and the four layers around a job's function (`around`) are plain nested calls whose
errors are real. The hooks are used for the process's life only.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import dramatiq
from dramatiq.middleware import CurrentMessage, Middleware
from pydantic import BaseModel, ValidationError

from agentflow import log, sentry
from agentflow.database import Unavailable
from agentflow.errors import JobError, OutOfMemory, Permanent, Transient, Wait
from agentflow.jobs import registry
from agentflow.jobs.model import Verdict
from agentflow.jobs.text import storable_json
from agentflow.limits import Bucket, Window
from agentflow.system import System
from agentflow.worker import lines
from agentflow.worker.running import JobContext, Running, Stopped

logger = log.get(__name__)

Call = Callable[[], Any]
_DATABASE_AWAY_S: Final = 5.0
_TRACEBACK_LINES: Final = 30


class Layer(Middleware):
    """One layer around a job's function. `call` runs the layers inside it."""

    def around(self, running: Running, call: Call) -> Any:
        raise NotImplementedError


class Retries(Layer):
    """Outermost: whatever comes out of the job becomes a verdict here, so that nothing is left without one.

    Permanent errors fail the job; a Wait parks it and gives the attempt back; anything else is tried again with the back-off
    of the type's retry class. Attempts are counted in the row at the claim, so a killed process cannot lose count.
    """

    def around(self, running: Running, call: Call) -> Verdict:
        job = running.job
        try:
            return Verdict(*running.key, "succeeded", result=call())
        except Stopped as stopped:
            return self.verdict_for_stop(running, stopped.note)
        except (Wait, *Unavailable) as error:
            return self.verdict_for_wait(running, error)
        except Permanent as error:
            logger.info("failed for good", error=str(error), code=error.code)
            _keep_cause(running, error)
            return Verdict(*running.key, "failed", error=described(error))
        except Exception as error:  # noqa: BLE001 - the one place where a job's errors end
            return self._again(running, error, job.attempt >= job.max_attempts)

    def _again(self, running: Running, error: Exception, last: bool) -> Verdict:
        delay_s = retry_delay_s(running)
        if isinstance(error, Transient):
            delay_s = max(delay_s, error.retry_after_s or 0.0)
        if last:
            _keep_cause(running, error)
        say = logger.error if last else logger.warning
        say(
            "out of attempts" if last else "will be tried again",
            error=str(error),
            exc_info=not isinstance(error, JobError),
        )
        return Verdict(*running.key, "retry", delay_s=delay_s, reason="retry", error=described(error))

    @staticmethod
    def verdict_for_wait(running: Running, error: Exception) -> Verdict:
        """How a job is parked. Without our own database too: that is not the job's fault, no attempt is spent."""
        if isinstance(error, Wait):
            logger.info("parked", reason=error.reason, seconds=round(error.seconds, 3))
            because = described(error.because) if error.because is not None else None
            return Verdict(*running.key, "wait", delay_s=max(0.0, error.seconds), reason=error.reason, error=because)
        return Verdict(*running.key, "wait", delay_s=_DATABASE_AWAY_S, reason="database", error=described(error))

    @staticmethod
    def verdict_for_stop(running: Running, note: str | None = None) -> Verdict:
        """How a job ends that was stopped from outside."""
        if running.stop_reason == "cancelled":
            said = " ".join(filter(None, ["Cancelled while it was running.", note]))
            return Verdict(*running.key, "cancelled", error=_say("cancelled", said))
        if running.stop_reason == "time_limit":
            limit = f"{running.limit_s:g}"
            error = _say("time_limit", f"The job ran longer than its time limit of {limit} s and was stopped.")
            return Verdict(*running.key, "retry", delay_s=retry_delay_s(running), reason="retry", error=error)
        return Verdict(*running.key, "handback")  # shut down, or the lease is lost (then nothing is written at all)


class Results(Layer):
    """Inside Retries, since a result that cannot be stored is a failure of the job: turns it into JSON text.

    The row gets it in the finishing transaction; Dramatiq's results backend after that commit (Runtime._after_settle), under
    the message's id, which is the job's.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def around(self, running: Running, call: Call) -> str | None:
        value = call()
        if value is None:
            return None
        try:
            text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Permanent(f"The result is not JSON: {error}", code="unrecordable") from error
        text, replaced = storable_json(text)
        if replaced:
            logger.warning("characters that Postgres cannot store were replaced in the result")
        if len(text) > self._max_bytes:
            raise Permanent(
                f"The result is larger than {self._max_bytes} bytes (JOB_RESULT_BYTES).", code="result_too_large"
            )
        return text


class RateLimits(Layer):
    """Inside Results and Retries, which park what is over the limit; outside TimeLimits, so that no limit runs while it asks.

    A type's `rate` holds per organization over all workers; `agentflow rules limit` may set another one, of `type:NAME`.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    def around(self, running: Running, call: Call) -> Any:
        job = running.job
        rate = registry.get(job.type).rate
        of_type = (Window(rate.amount, rate.per_s),) if rate is not None else ()
        if windows := self._system.rules.now().limit_of(job.organization_id, f"type:{job.type}", of_type):
            bucket = Bucket(f"type:{job.type}:{job.organization_id}", windows)
            if (seconds := self._system.limits.take([bucket], str(job.id))) > 0:
                raise Wait(seconds, "limit")
        return call()


class TimeLimits(Layer):
    """Innermost: the limit is armed around the function alone, so that it can hit nothing else.

    The watchdog ends the job when the time is over: its child processes are killed, its thread is interrupted, and a thread
    that ignores that for 10 s has its process replaced (agentflow/worker/watchdog.py).
    """

    def around(self, running: Running, call: Call) -> Any:
        running.deadline = time.monotonic() + running.limit_s
        try:
            return running.call(call)
        finally:
            running.deadline = None


def layers(system: System) -> list[Layer]:
    """The four, from the outermost to the innermost; the reason for each place stands in its class."""
    settings = system.settings
    return [
        Retries(),
        Results(settings.job_result_bytes),
        RateLimits(system),
        TimeLimits(),
    ]


def perform(around: list[Layer], running: Running, context: JobContext) -> Verdict:
    """Run the job's function inside the layers. Always gives a verdict."""

    def function() -> Any:
        job_type = registry.get(running.job.type)
        try:
            payload = job_type.payload.model_validate_json(json.dumps(running.job.payload))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Permanent(f"payload.{where}: {first['msg']}", code="invalid_payload") from None
        with lines.collected(running):
            return job_type.function(context, payload)

    call: Call = function
    for layer in reversed(around):
        call = _wrapped(layer, running, call)
    verdict: Verdict = call()
    return verdict


def _wrapped(layer: Layer, running: Running, call: Call) -> Call:
    return lambda: layer.around(running, call)


class Lifecycle(Middleware):
    """First in the list: a worker process's beginning and end.

    `boot(broker, worker)` runs before Dramatiq starts its threads, `ready()` afterwards, `shutdown()` before it stops them,
    `process_boot()` once in each process that `dramatiq` starts. Errors there end the process (SystemExit), since hooks swallow
    any other; where threads run already, `give_up()` hands back what they have taken by then.
    """

    def __init__(
        self,
        *,
        process_boot: Callable[[], None],
        boot: Callable[[dramatiq.Worker], None],
        ready: Callable[[], None],
        shutdown: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        self._process_boot = process_boot
        self._boot = boot
        self._ready = ready
        self._shutdown = shutdown
        self._give_up = give_up

    def after_process_boot(self, broker: Any) -> None:
        self._or_exit(self._process_boot)

    def before_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:
        self._or_exit(lambda: self._boot(worker))

    def after_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:
        self._or_exit(self._ready, self._give_up)

    def before_worker_shutdown(self, broker: Any, worker: dramatiq.Worker) -> None:
        self._shutdown()

    @staticmethod
    def _or_exit(step: Callable[[], None], undo: Callable[[], None] = lambda: None) -> None:
        try:
            step()
        except Exception as error:  # any: a worker that is not whole must take no work, and hooks swallow errors
            logger.critical("the worker could not start", error=str(error), exc_info=not isinstance(error, OSError))
            try:
                undo()
            except Exception:  # the exit must come
                logger.exception("what was taken meanwhile is not handed back; it is rescued when its lease ends")
            threading.Timer(5.0, os._exit, (1,)).start()  # in case threads that run already keep it alive
            raise SystemExit(1) from error


def _keep_cause(running: Running, error: Exception) -> None:
    """Until it is settled: only then it is known that the job has failed for good."""
    if sentry.wants_failures():
        running.cause = error


def retry_delay_s(running: Running) -> float:
    job = running.job
    retry = registry.get(job.type).retry if registry.known(job.type) else registry.STANDARD
    return retry.delay_s(job.attempt, random.random())


def described(error: Exception) -> str:
    """An error as the row keeps it: JSON with code, message and, where it was not expected, its type and traceback."""
    said: dict[str, Any]
    if isinstance(error, JobError):
        said = {
            "code": error.code or ("permanent" if isinstance(error, Permanent) else "transient"),
            "message": str(error),
        }
        if isinstance(error, OutOfMemory):
            said["peak_bytes"] = error.peak_bytes
        notes = getattr(error, "__notes__", None)
        if notes:
            said["traceback"] = "\n".join(notes)
    else:
        lines = traceback.format_exception(error)
        said = {
            "code": "unexpected",
            "message": f"{type(error).__name__}: {error}",
            "traceback": "".join(lines[-_TRACEBACK_LINES:]),
        }
    return storable_json(json.dumps(said))[0]


def _say(code: str, message: str) -> str:
    return json.dumps({"code": code, "message": message})


__all__ = ["CurrentMessage", "Lifecycle", "RateLimits", "Results", "Retries", "TimeLimits", "layers", "perform"]
