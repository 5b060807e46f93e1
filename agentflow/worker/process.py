"""A worker process, put together: the broker with its middleware and its actors, the runtime, the way it is replaced.

All ways of running a worker come by here: `dramatiq actors` (Dramatiq's own command), `agentflow worker` and `agentflow up`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import dramatiq

from agentflow import health, log, probe, scraping, sentry, settings
from agentflow.broker import DeliveredMessage, queue_name
from agentflow.embedded import EmbeddedError
from agentflow.jobs import registry
from agentflow.jobs.model import PRIORITIES, QUEUES, USUAL_QUEUES
from agentflow.schema import SchemaError
from agentflow.signals import Signals
from agentflow.system import System
from agentflow.worker import middleware
from agentflow.worker.runtime import Runtime

logger = log.get(__name__)

USAGE = 2
CANNOT_START = 3
#: For sending what Sentry was not sent yet; in what the drain has left of its grace.
_REPORT_MOST_S = 2.0
_REPORT_LEAST_S = 0.5


class UnknownQueue(ValueError):
    """`-Q` names a queue that there is not. The text is a sentence for people."""


class WorkerProcess:
    """The worker of this process. Made at import, connected to nothing until Dramatiq starts it.

    `replace` ends the process so that a fresh one follows; `threads` is how many jobs it runs at once, where that is not
    JOB_CONCURRENCY; `listener` is a socket to serve `/health` and `/metrics` at, instead of `PORT`; `parent` is the process that
    started this one, without which it stops.
    """

    def __init__(
        self,
        system: System,
        *,
        replace: Callable[[], None] | None = None,
        serve_probe: bool = True,
        threads: int | None = None,
        listener: socket.socket | None = None,
        parent: int | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.system = system
        self.runtime: Runtime | None = None
        self._replace = replace or replace_dramatiq_child
        self._probe: probe.Probe | None = None
        self._serve_probe = serve_probe
        self._threads = threads
        self._listener = listener
        self._parent = parent
        self._on_ready = on_ready
        self._is_ready = False
        self._told_at: float | None = None
        self.broker = system.new_broker(
            # Lifecycle first: it must be up before any other sees a message. CurrentMessage hands the wrapper its message.
            # The four of the product wrap the job's function themselves (middleware.layers), in the order given there.
            [
                middleware.Lifecycle(
                    process_boot=self.start_system,
                    boot=self._boot,
                    ready=self._ready,
                    shutdown=self.shutdown,
                    give_up=self._give_up,
                ),
                middleware.CurrentMessage(),
                *(layers := middleware.layers(system)),
            ],
        )
        self._layers = layers
        system.__dict__["broker"] = self.broker  # the one that the system publishes by, too

    def declare_actors(self) -> None:
        """One Dramatiq actor per job type; all of them are the same wrapper around the registry's function."""
        for job_type in registry.every():
            if job_type.name in self.broker.actors:
                continue
            dramatiq.Actor(
                self._handle,
                actor_name=job_type.name,
                queue_name=queue_name(self.system.settings.job_queue_name, job_type.queue),
                priority=PRIORITIES.index(job_type.priority),
                broker=self.broker,
                options={},
            )

    def start_system(self) -> None:
        """In a process of its own: logging, signals, embedded servers, schema. Exits with one clear line when that fails."""
        log.configure(self.system.settings, "worker")
        sentry.start(self.system.settings, "worker")
        master = multiprocessing.parent_process()
        parent = self._parent or (master.pid if master is not None else None)
        Signals(stop=self._drain_early, hurry=self.hurry, parent=parent)
        try:
            settings.check_files(self.system.settings)
        except settings.SettingsError as error:
            print(f"agentflow: {error}", file=sys.stderr)  # noqa: T201 - as other wrong settings, which end the import
            raise SystemExit(2) from None
        try:
            for warning in self.system.settings.warnings():
                logger.warning(warning)
            self.system.join_embedded()
            self.system.check_schema()
        except (SchemaError, EmbeddedError) as error:
            logger.critical(str(error))
            raise SystemExit(CANNOT_START) from error

    def _boot(self, worker: dramatiq.Worker) -> None:
        queues = self._queues(worker)
        if self._threads is not None:
            worker.worker_threads = self._threads
        elif not threads_are_told():  # Dramatiq's own default is 8 threads whatever the instance
            worker.worker_threads = self.system.settings.job_concurrency
        worker.queue_prefetch = worker.worker_threads * 2
        self.runtime = Runtime(
            self.system,
            kind=self.system.kind,
            threads=worker.worker_threads,
            queues=queues,
            perform=partial(middleware.perform, self._layers),
            replace=self._replace,
            threads_ready=partial(self._consumes, worker),
            enqueue=lambda message: worker.consumers[message.queue_name].handle_message(message),
        )
        self.runtime.start()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again and again

    def _queues(self, worker: dramatiq.Worker) -> Sequence[str]:
        """Our own names of the queues to serve. Dramatiq compares with those at the broker. Exits with one clear line."""
        prefix = self.system.settings.job_queue_name
        try:
            queues = served_queues(worker.consumer_whitelist or USUAL_QUEUES, prefix)
        except UnknownQueue as error:
            print(f"agentflow: {error}", file=sys.stderr)  # noqa: T201 - as for wrong settings
            raise SystemExit(USAGE) from None
        worker.consumer_whitelist = {queue_name(prefix, queue) for queue in queues}
        return queues

    def _consumes(self, worker: dramatiq.Worker) -> bool:
        """Whether Dramatiq has all its consumers: its threads look for theirs after each message."""
        prefix = self.system.settings.job_queue_name
        consumers = [worker.consumers.get(queue_name(prefix, queue)) for queue in self._queues(worker)]
        return all(consumer is not None and consumer.consumer is not None for consumer in consumers)

    def _ready(self) -> None:
        if self._serve_probe:
            if multiprocessing.parent_process() is not None:  # one of `dramatiq`, whose processes have one port for all
                scraping.join(self.system)
            self._probe = probe.serve(self.system, "worker", self.system.settings.port, listener=self._listener)
        self._is_ready = True
        self._on_ready()

    def _drain_early(self) -> None:
        """Dramatiq's main loop looks once a second whether it was told to stop; messages and grace do not wait for that."""
        health.of(self.system).draining = True
        self._told_at = time.monotonic()
        if self.runtime is not None and self._is_ready:
            self.runtime.drain(self.system.settings.shutdown_grace)

    def hurry(self) -> None:
        """Told to stop again: running jobs are handed back now. May be called by a signal's handler."""
        if self.runtime is not None:
            self.runtime.hurry()

    def _give_up(self) -> None:
        """What was taken by a process that is not whole is handed back at once."""
        if self.runtime is not None:
            self.runtime.hurry()
            self.runtime.drain(self.system.settings.shutdown_grace)

    def shutdown(self) -> None:
        if self.runtime is None:
            return
        grace_s = self.system.settings.shutdown_grace
        all_ended = self.runtime.drain(grace_s)
        if self._serve_probe:  # else there is more in this process, which ends later
            left_s = grace_s - (time.monotonic() - self._told_at) if self._told_at is not None else grace_s
            sentry.stop(min(_REPORT_MOST_S, max(_REPORT_LEAST_S, left_s)))
        scraping.leave(self.system)
        if self._probe is not None:
            self._probe.close()
        if not all_ended:
            # Its thread would go on with work that was handed back, and its effects outside are not fenced.
            logger.warning("threads that do not end are left to die with the process")
            sys.stderr.flush()
            os._exit(0)

    def _handle(self, *_: Any) -> None:
        message = middleware.CurrentMessage.get_current_message()
        assert self.runtime is not None and message is not None  # noqa: S101 - set before any thread runs
        self.runtime.handle(cast(DeliveredMessage, message))


def served_queues(names: Iterable[str], prefix: str) -> list[str]:
    """Our own names for what `-Q` names, with or without the prefix. Raises UnknownQueue."""
    wanted = {name.removeprefix(f"{prefix}.") for name in names}
    if unknown := sorted(wanted - set(QUEUES)):
        raise UnknownQueue(f"-Q: there is no queue {', '.join(map(repr, unknown))}; the queues are {', '.join(QUEUES)}")
    return [queue for queue in QUEUES if queue in wanted]


def threads_are_told(arguments: Sequence[str] | None = None) -> bool:
    """Whether this is a `dramatiq` command that says how many threads: in what it hands on that is no other than its default."""
    arguments = sys.argv if arguments is None else arguments
    return "dramatiq" in arguments[0] and any(re.match(r"--t|-t(?!-)", argument) for argument in arguments[1:])


_lent: WorkerProcess | None = None


def lend(worker: WorkerProcess) -> None:
    """Before the package of actors is imported: make it take this worker, whose process and system it shares with others."""
    global _lent
    _lent = worker


def make_global() -> WorkerProcess:
    """The worker that `dramatiq` finds when it imports the package of actors. Exits with 2 and one line on wrong settings."""
    try:
        made = _lent or WorkerProcess(System(settings.current(), "worker"))
    except settings.SettingsError as error:
        print(f"agentflow: {error}", file=sys.stderr)  # noqa: T201 - before there is a log
        raise SystemExit(USAGE) from None
    made.declare_actors()
    dramatiq.set_broker(made.broker)
    return made


def replace_dramatiq_child() -> None:
    """End this child of `dramatiq`'s so that a fresh one follows: its master starts over when it gets SIGHUP."""
    if multiprocessing.parent_process() is not None and hasattr(signal, "SIGHUP"):
        os.kill(os.getppid(), signal.SIGHUP)
        threading.Event().wait(1.0)  # the master marks it as meant before it sees this child gone
    os._exit(0)
