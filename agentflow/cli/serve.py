"""`agentflow up`: web, worker and schedule in one process, under gunicorn's arbiter, which replaces that process when it dies.

The arbiter's process only listens, watches, and holds the embedded servers. Everything else is in its one child, which has
one System, and so one pool, one broker and one set of metrics.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gunicorn import sock  # type: ignore[import-untyped]
from gunicorn.app.base import Application  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]

from agentflow import health, log, sentry, settings
from agentflow.cli import running, servers
from agentflow.cli.errors import CANNOT_START, Failure, one_line
from agentflow.database import Unavailable
from agentflow.embedded import Embedded
from agentflow.schema import SchemaError
from agentflow.settings import Settings
from agentflow.signals import SAME_SIGNAL_S
from agentflow.system import System
from agentflow.worker.process import WorkerProcess, lend
from web import server

logger = log.get(__name__)

DEFAULT_PORT: Final = 8000
#: On top of SHUTDOWN_GRACE: for handing back, the broker's consumers, and the last answers.
STOP_MARGIN_S: Final = 4
#: After a second signal: for handing back what runs, before the process is killed.
HURRY_S: Final = 5.0
#: A worker process that ends by itself (it is replaced) gives the requests it holds so long.
REPLACE_S: Final = 3.0
_RETRY_S: Final = 2.0


def up(host: str | None, port: int | None, announce: int | None) -> None:
    """Runs until a signal ends it. Raises Failure, SettingsError, EmbeddedError, SchemaError before anything is served."""
    read = settings.current()
    settings.check_files(read, alone=True)
    by_platform = bool(os.environ.get("PORT"))
    address = (
        host or ("0.0.0.0" if by_platform else "127.0.0.1"),  # noqa: S104 - a platform routes to all addresses
        port if port is not None else read.port if by_platform else DEFAULT_PORT,
    )
    arbiter = _Arbiter(_Application(read, address), announce)
    log.configure(read, "up")
    arbiter.listen(address)
    arbiter.stack = servers.check(read)
    with running.Advertisement(read.agentflow_home, arbiter.url):
        status = 0
        try:
            arbiter.run()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    servers.leave(arbiter.stack, for_a_while=announce is not None)
    if status:
        raise Failure("stopped, since the process inside could not start; the lines above say why", CANNOT_START)


class _Application(Application):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's settings are those of the web process, but for what follows from the company it has here."""

    def __init__(self, read: Settings, address: tuple[str, int]) -> None:
        self.read = read
        self.arbiter: _Arbiter
        self._address = address
        super().__init__()

    def load_config(self) -> None:
        self.load_config_from_module_name_or_filename("python:web.gunicorn_config")
        host, port = self._address
        changed: dict[str, Any] = {
            "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "workers": 1,
            "worker_class": Worker,
            "graceful_timeout": int(self.read.shutdown_grace) + STOP_MARGIN_S,
            "proc_name": "agentflow-up",
            "post_worker_init": lambda worker: None,
            "worker_exit": lambda _arbiter, _worker: None,
        }
        for name, value in changed.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        raise AssertionError("the worker makes its own application")


class _Arbiter(Arbiter):  # type: ignore[misc]  # gunicorn is untyped
    """One worker process, never more; SIGINT and SIGHUP stop as SIGTERM does; a second signal ends the grace, a third all."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    _IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH)

    def __init__(self, app: _Application, announce: int | None) -> None:
        super().__init__(app)
        app.arbiter = self
        self.stack: Embedded | None = None
        self._starter = socket.socket(fileno=announce) if announce is not None else None
        self._told_at: list[float] = []

    def listen(self, address: tuple[str, int]) -> None:
        """Raises Failure. Done first: a port that is taken is found before any server is started."""
        kind = sock.TCP6Socket if ":" in address[0] else sock.TCPSocket
        try:
            self.LISTENERS = [kind(address, self.cfg, self.log)]
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Failure(
                f"cannot listen at {address[0]} port {address[1]} ({reason.lower()}); take another one with --port",
                CANNOT_START,
            ) from None

    @property
    def url(self) -> str:
        host, port = self.LISTENERS[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - how to reach it from here
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def init_signals(self) -> None:
        hang_up = signal.getsignal(signal.SIGHUP)
        super().init_signals()
        if hang_up == signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in self._IGNORED:  # gunicorn would start more workers, or itself again
            signal.signal(number, signal.SIG_IGN)

    def signal(self, sig: int, frame: Any) -> None:
        # Closer together they are one: platforms signal a whole group, and wrappers pass theirs on as well.
        now = time.monotonic()
        if sig != signal.SIGQUIT and self._told_at and now - self._told_at[-1] <= SAME_SIGNAL_S:
            return
        self._told_at.append(now)
        if sig == signal.SIGQUIT or len(self._told_at) > 2:
            self._signal_workers(signal.SIGKILL)
            os._exit(128 + sig)
        if len(self._told_at) == 2:
            self._signal_workers(signal.SIGUSR2)
        else:
            super().signal(sig, frame)

    def _signal_workers(self, sig: int) -> None:
        for pid in list(self.WORKERS):
            with suppress(ProcessLookupError):
                os.kill(pid, sig)

    def handle_int(self) -> None:
        self.handle_term()

    def handle_hup(self) -> None:
        self.handle_term()

    def manage_workers(self) -> None:
        if self._starter_is_gone():
            raise StopIteration
        super().manage_workers()

    def spawn_worker(self) -> Any:
        gc.collect()
        gc.freeze()  # what is shared with the child stays shared
        parent = os.getpid()
        try:
            return super().spawn_worker()
        except SystemExit as ended:
            if (
                os.getpid() != parent
            ):  # the child could not start: what is below on the stack is its parent's to tidy up
                sys.stderr.flush()
                os._exit(ended.code if isinstance(ended.code, int) else 1)
            raise

    def ready(self) -> None:
        """Called in the first worker process, when it serves."""
        if self._starter is not None:
            self._starter.sendall(self.url.encode() + b"\n")
        else:
            _print_banner(self.url, self.app.read)

    def _starter_is_gone(self) -> bool:
        """Whoever started us for a while (`analyze`) holds the other end."""
        return self._starter is not None and bool(select.select([self._starter], [], [], 0)[0])


class Worker(server.Worker):
    """The one process: gunicorn's threads for HTTP, Dramatiq's for jobs, one more for the schedule."""

    def __init__(self, age: int, *arguments: Any) -> None:
        super().__init__(age, *arguments)
        self._told_to_stop = False
        self.worker: WorkerProcess | None = None
        self._stop_asked = threading.Event()
        self._drained = threading.Event()

    def init_signals(self) -> None:
        super().init_signals()
        # Ctrl-C reaches the whole group; the arbiter's SIGTERM follows. Both mean the same, and the second changes nothing.
        signal.signal(signal.SIGINT, self.handle_exit)
        signal.signal(signal.SIGQUIT, lambda *_: os._exit(128 + signal.SIGQUIT))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, self._hurry)

    def load_wsgi(self) -> None:
        read = self.app.read
        log.configure(read, "up")
        sentry.start(read, "up", flask=True)
        self.system = system = System(read, "up")
        try:
            system.join_embedded()
            system.check_schema()
        except Unavailable as error:
            logger.warning("the database cannot be reached; trying again", error=one_line(error))
            time.sleep(_RETRY_S)
            sys.exit(1)
        except SchemaError as error:
            logger.critical(str(error))
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        self._start(system)

    def _start(self, system: System) -> None:
        import dramatiq

        from agentflow import metrics
        from agentflow.jobs import registry
        from scheduler import schedule

        # Before the actors are imported, which would make a worker, a system and a broker of their own.
        self.worker = WorkerProcess(system, replace=self._replace, serve_probe=False)
        lend(self.worker)
        import actors
        from web import create_app

        self.wsgi = create_app(system)
        metrics.known_types(registry.every())
        self.jobs = dramatiq.Worker(actors.worker.broker, worker_threads=system.settings.job_concurrency)
        self.jobs.start()
        self.schedule = schedule.start(system)
        threading.Thread(target=self._drain_when_asked, name="drain", daemon=True).start()

    def run(self) -> None:
        if self.age == 1:
            for warning in self.system.settings.warnings():
                logger.warning(warning)
            self.app.arbiter.ready()
        super().run()
        # HTTP is done; the worker has been draining since the same signal.
        self._stop_asked.set()
        self._drained.wait(self.system.settings.shutdown_grace + STOP_MARGIN_S)
        sentry.stop(server.REPORT_S)
        self.system.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a thread that does not end must not hold up the exit

    def handle_exit(self, sig: int, frame: Any) -> None:
        """HTTP stops accepting and the worker stops taking jobs, both now."""
        # A second signal may come in the middle of the first one's locks: that would be a deadlock.
        if self._told_to_stop:
            return
        self._told_to_stop = True
        super().handle_exit(sig, frame)
        self._stop_asked.set()

    def _hurry(self, _sig: int, _frame: Any) -> None:
        """The parent was told to stop a second time: requests are cut off, running jobs handed back now."""
        if self.worker is not None:
            self.worker.hurry()
        threading.Thread(target=self._leave_soon, name="hurry", daemon=True).start()

    def _leave_soon(self) -> None:
        self._drained.wait(HURRY_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def is_parent_alive(self) -> bool:
        """Asked every second. Without the parent nobody would ever stop this process."""
        alive: bool = super().is_parent_alive()
        if not alive:
            logger.warning("the parent process is gone: stopping")
            self.handle_exit(signal.SIGTERM, None)
        return alive

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            for listener in self.sockets:  # else the kernel would go on taking connections for us
                listener.close()

    def _drain_when_asked(self) -> None:
        self._stop_asked.wait()
        health.of(self.system).draining = True
        self.schedule.shutdown(wait=False)
        self.jobs.stop(timeout=int(STOP_MARGIN_S * 1000 / 2))
        self._drained.set()

    def _replace(self) -> None:
        """A job does not end: this process has drained the others, and a fresh one follows."""
        health.of(self.system).draining = True
        self.alive = False
        time.sleep(REPLACE_S)
        os._exit(1)


def _print_banner(url: str, read: Settings) -> None:
    key = "in ADMIN_API_KEY" if read.admin_api_key else f"in {read.agentflow_home / 'admin.key'}"
    print(
        f"AgentFlow is ready at {url}\n"
        f"  API documentation   {url}/docs\n"
        f"  the operator's key  {key}\n"
        f"  data                {_tier(read)}\n"
        f"Ctrl-C stops it.",
        flush=True,
    )


def _tier(read: Settings) -> str:
    home: Path = read.agentflow_home
    if read.tier == "embedded":
        return f"Postgres and Valkey of its own, in {home}"
    parts = [f"Postgres of its own, in {home}" if read.embedded_database else "the Postgres of DATABASE_URL"]
    if read.redis_url is not None:
        parts.append("the Redis of REDIS_URL")
    if read.rabbitmq_url is not None:
        parts.append("the RabbitMQ of RABBITMQ_URL")
    if read.tier == "database only":
        parts.append("no broker: it looks for work there")
    return "; ".join(parts)
