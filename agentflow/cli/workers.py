"""`agentflow worker`: worker processes, each like the one of `dramatiq actors --processes 1`, started again when they die.

This process only watches, and answers on PORT for all of them (agentflow.cli.worker_health). A child is this command again, with
`--child`: it has one pool, one broker and one set of metrics, and stops when this process is gone.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

from agentflow import container, log, probe, settings
from agentflow.cli import servers
from agentflow.cli.errors import CANNOT_START, USAGE, WRONG, Failure
from agentflow.cli.worker_health import WorkerHealth
from agentflow.settings import Settings
from agentflow.signals import SAME_SIGNAL_S, Inbox
from agentflow.system import System
from agentflow.worker.process import UnknownQueue, WorkerProcess, lend, served_queues

logger = log.get(__name__)

#: Seconds until a dead process is started again: 1, 2, 4 … 30.
BACKOFF_MOST_S: Final = 30.0
#: A process that lived so long is not taken for one that cannot live.
HEALTHY_S: Final = 60.0
#: On top of SHUTDOWN_GRACE, until a process that does not end is killed.
STOP_MARGIN_S: Final = 10.0
_TOLD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def work(number: int, names: Sequence[str], threads: int | None, module: str) -> None:
    """Runs until a signal ends it. Raises Failure and SettingsError before anything is started, or when nothing can be."""
    read = settings.current()
    try:
        queues = served_queues(names, read.job_queue_name)
    except UnknownQueue as error:
        raise Failure(str(error), USAGE) from None
    settings.check_files(read)
    log.configure(read, "workers")
    for warning in read.warnings():
        logger.warning(warning)
    stack = servers.check(read)
    arguments = ["--module", module]
    arguments += ["--threads", str(threads)] if threads else []
    arguments += [word for name in queues for word in ("-Q", name)]
    supervisor = Supervisor(read, number, arguments)
    served = probe.serve_answers(WorkerHealth(System(read, "workers"), supervisor.children), read.port)
    try:
        status = supervisor.run()
    finally:
        if served is not None:
            served.close()
        servers.leave(stack)
    if status == CANNOT_START:
        raise Failure("no worker process could start; the lines above say why", CANNOT_START)
    if status:
        sys.exit(status)  # whoever is to blame has said so


class Child:
    """One of the worker processes, and its successors."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=8)
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.starts = 0
        self.draining = False
        self._failures = 0
        self._ready_fd: int | None = None
        self._ready = False
        self._lock = threading.Lock()  # whoever asks for health asks from threads

    @property
    def port(self) -> int:
        """Where it serves `/health` and `/metrics`, for this process."""
        return int(self.listener.getsockname()[1])

    @property
    def ready(self) -> bool:
        """Whether the process that runs now, or ran last, has come so far as to take jobs."""
        with self._lock:
            if not self._ready and self._ready_fd is not None:
                with suppress(BlockingIOError):
                    self._ready = bool(os.read(self._ready_fd, 1))
            return self._ready

    def start(self, arguments: list[str]) -> None:
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        with self._lock:
            if self._ready_fd is not None:
                os.close(self._ready_fd)
            self._ready_fd, self._ready = read_fd, False
        told = f"{os.getpid()}:{self.listener.fileno()}:{write_fd}"
        # Signals to the whole group wait until it has handlers for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agentflow.cli", "worker", "--child", told, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[self.listener.fileno(), write_fd],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(write_fd)
        self.started = time.monotonic()
        self.starts += 1

    def pause_s(self) -> float:
        """After its death: until it is started again."""
        if time.monotonic() - self.started >= HEALTHY_S:
            self._failures = 0
        self._failures += 1
        return float(min(BACKOFF_MOST_S, 2.0 ** (self._failures - 1)))


class Supervisor:
    """Starts `number` children with `arguments`. `run` returns the exit status."""

    def __init__(self, read: Settings, number: int, arguments: list[str]) -> None:
        self.children = [Child(n) for n in range(1, number + 1)]
        self._arguments = arguments
        self._stop_s = read.shutdown_grace + STOP_MARGIN_S
        self._due: dict[Child, float] = dict.fromkeys(self.children, 0.0)
        self._events = Inbox()
        self._stopping_since: float | None = None
        self._any_was_ready = False
        self._status = 0
        self._container = container.of(read)
        self._memory_kills = self._container.kills()

    def run(self) -> int:
        for heard in (*_TOLD, signal.SIGCHLD):
            if signal.getsignal(heard) != signal.SIG_IGN:  # nohup
                signal.signal(heard, self._events.put)
        while True:
            self._start_due()
            number = self._next_event()
            self._reap()
            if number is not None and number in _TOLD:
                self._told(signal.Signals(number))
            if self._stopping_since is not None:
                self._kill_late()
                if not self._alive():
                    return self._status

    def _next_event(self) -> int | None:
        ends = [*self._due.values()]
        if self._stopping_since is not None:
            ends.append(self._stopping_since + self._stop_s)
        return self._events.get(max(0.0, min(ends) - time.monotonic()) if ends else None)

    def _alive(self) -> list[Child]:
        return [child for child in self.children if child.process is not None and child.process.poll() is None]

    # ---- deaths ----

    def _start_due(self) -> None:
        for child, due in list(self._due.items()):
            if due <= time.monotonic():
                del self._due[child]
                child.start(self._arguments)
                assert child.process is not None  # noqa: S101 - just started
                logger.info("worker process started", number=child.number, worker_pid=child.process.pid)

    def _reap(self) -> None:
        for child in self.children:
            if child.process is not None and (status := child.process.poll()) is not None:
                self._died(child, child.process.pid, status)
                child.process = None

    def _died(self, child: Child, pid: int, status: int) -> None:
        said = {"number": child.number, "worker_pid": pid, **_how(status)}
        if status == -signal.SIGKILL and self._kernel_killed():
            said["cause"] = "killed by the kernel: out of memory"
        said["lived_s"] = round(time.monotonic() - child.started, 1)
        self._any_was_ready = self._any_was_ready or child.ready
        if self._stopping_since is not None:
            logger.info("worker process ended", **said)
            return
        if status == USAGE:  # its settings are wrong, as those of its successor would be
            logger.error("a worker process cannot work with these settings", **said)
            self._end_with(USAGE)
            return
        pause_s = child.pause_s()
        if not self._any_was_ready and all(c.starts and c.process in (None, child.process) for c in self.children):
            logger.error("no worker process could start", **said)
            self._end_with(CANNOT_START)
            return
        logger.warning("a worker process died", **said, again_in_s=pause_s)
        self._due[child] = time.monotonic() + pause_s

    def _kernel_killed(self) -> bool:
        """Whether the container's counter has risen since a process died last."""
        before, self._memory_kills = self._memory_kills, self._container.kills()
        return before is not None and (self._memory_kills or 0) > before

    def _end_with(self, status: int) -> None:
        self._status = status
        self._told(signal.SIGTERM)

    # ---- the end ----

    def _told(self, number: signal.Signals) -> None:
        """The first one, and one that is not its copy, is passed on. A child takes the second for the end of the grace."""
        now = time.monotonic()
        if self._stopping_since is None:
            logger.info("stopping", signal=number.name, processes=len(self._alive()))
            self._stopping_since = now
            self._due.clear()
        elif now - self._stopping_since <= SAME_SIGNAL_S:
            return
        for child in self._alive():
            child.draining = True
            assert child.process is not None  # noqa: S101 - it is alive
            child.process.send_signal(signal.SIGTERM)

    def _kill_late(self) -> None:
        assert self._stopping_since is not None  # noqa: S101 - asked by the caller
        if time.monotonic() < self._stopping_since + self._stop_s:
            return
        for child in self._alive():
            assert child.process is not None  # noqa: S101 - it is alive
            logger.error("a worker process did not end and is killed", number=child.number)
            child.process.kill()
            self._status = WRONG
        self._stop_s += STOP_MARGIN_S


def _how(status: int) -> dict[str, object]:
    if status >= 0:
        return {"status": status}
    try:
        return {"signal": signal.Signals(-status).name}
    except ValueError:  # a real-time signal
        return {"signal": -status}


# ---- in a child ----


def run_child(told: str, names: Sequence[str], threads: int | None, module: str) -> NoReturn:
    """What Dramatiq's own command does in each process that it starts, without that command's process above it."""
    import dramatiq

    parent, listener_fd, ready_fd = map(int, told.split(":"))
    told_to_end = Inbox()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent's SIGTERM follows
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, told_to_end.put)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)
    worker = WorkerProcess(
        System(settings.current(), "worker"),
        replace=lambda: os._exit(0),  # the parent starts another
        threads=threads,
        listener=socket.socket(fileno=listener_fd),
        parent=parent,
        on_ready=lambda: _say_ready(ready_fd),
    )
    lend(worker)
    importlib.import_module(module)
    broker = worker.broker
    broker.emit_after("process_boot")
    running = dramatiq.Worker(broker, queues=set(names) or None)
    running.start()
    told_to_end.get()
    running.stop()
    broker.close()
    worker.system.close()
    sys.stderr.flush()
    os._exit(0)  # a thread that does not end must not hold up the exit


def _say_ready(fd: int) -> None:
    with suppress(BrokenPipeError):  # the parent is gone, for which this process will stop in a moment
        os.write(fd, b"1")
    os.close(fd)
