"""gunicorn's side of the web process: what it does at the start and the end, and its answers to what is no request."""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
import sys
import threading
from functools import partial
from typing import Any, Final

from flask import Flask
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]

from agentflow import health, log, metrics, scraping, sentry
from agentflow.database import Unavailable
from agentflow.embedded import EmbeddedError
from agentflow.jobs import registry
from agentflow.schema import SchemaError
from agentflow.system import System
from web.problems import MEDIA_TYPE

logger = log.get(__name__)

#: For each read of a request and each write of an answer. gunicorn itself waits for ever on a caller who stopped
#: sending in the middle of a head or a body, and on one who stopped reading: each would hold a thread.
SOCKET_TIMEOUT_S: Final = 30
HEARTBEAT_S: Final = 5.0
#: At the end, for sending what Sentry was not sent yet.
REPORT_S: Final = 2.0
_HEAD: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ([^\r\n]*)\r\n(.*?)\r\n\r\n", re.DOTALL)
_DETAILS: Final = {
    400: "this is no HTTP request that can be understood",
    403: "this connection is not allowed",
    414: "the request line is too long; put long things in a body",
    417: "the Expect header cannot be met",
    431: "the headers are too large",
    501: "this transfer coding is not known",
}


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's threads, whose own errors are problem documents like all others."""

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        super().handle_error(req, _ProblemSocket(client), addr, exc)

    def enqueue_req(self, conn: Any) -> None:
        # gunicorn closes in its one main loop, and waits there up to 2 s for a caller who does not close, too: nobody else
        # would be accepted meanwhile.
        conn.close = partial(self._close, conn)
        super().enqueue_req(conn)

    def _close(self, conn: Any, graceful: bool = False) -> None:
        if graceful and self.alive:
            self.tpool.submit(TConn.close, conn, True)
        else:
            TConn.close(conn, graceful)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: whoever waits or follows is answered now, with what is known."""
        system = _system_of(self)
        if system is not None:
            health.of(system).draining = True
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """Ctrl-C, which gunicorn takes for a reason to cut requests off: a stop like any other."""
        self.handle_exit(sig, frame)


class _ProblemSocket:
    """A socket that turns gunicorn's HTML error into a problem document; everything else goes through."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def sendall(self, data: bytes) -> None:
        match = _HEAD.match(data)
        if match and b"text/html" in match.group(3):
            status, reason = int(match.group(1)), match.group(2).decode("latin-1")
            problem = {"type": "about:blank", "title": reason, "status": status}
            if status in _DETAILS:
                problem["detail"] = _DETAILS[status]
            body = json.dumps(problem).encode()
            data = (
                f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: {MEDIA_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode("latin-1") + body
        self._client.sendall(data)


class Log(Logger):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's messages go through our formatter, like those of every other library."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers[:] = []
        self.error_log.propagate = True
        # "Starting gunicorn", "Booting worker" and so on are of no use to whoever reads; the few that are, are warnings.
        self.error_log.setLevel(logging.WARNING)


def limit_waits(listeners: list[Any]) -> None:
    """Sockets inherit these limits from the one they were accepted at (Linux, macOS), threads or not."""
    limit = struct.pack("ll", SOCKET_TIMEOUT_S, 0)
    for listener in listeners:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def start(worker: Any) -> None:
    """In each worker process, after the fork. What cannot work ends gunicorn with one line, instead of trying for ever."""
    system = _system_of(worker)
    if system is None:
        return
    log.configure(system.settings, "web")
    sentry.start(system.settings, "web", flask=True)
    for warning in system.settings.warnings():
        logger.warning(warning)
    try:
        system.join_embedded()
        system.check_schema()
    except Unavailable as error:
        # Not a reason to stop: health says so, and requests are answered with 503 until it is back.
        logger.warning("the database cannot be reached yet", error=" ".join(str(error).split()))
    except (SchemaError, EmbeddedError) as error:
        logger.error(str(error))
        sys.exit(Arbiter.WORKER_BOOT_ERROR)
    system.admin_key()  # made now, so that it stands there when the process is ready
    metrics.known_types(registry.every())
    scraping.join(system)
    threading.Thread(target=_keep, args=(system,), name="web-heartbeat", daemon=True).start()
    logger.info("web is ready", address=", ".join(worker.cfg.bind), threads=worker.cfg.threads)


def stop(worker: Any) -> None:
    system = _system_of(worker)
    if system is not None:
        health.of(system).draining = True
        sentry.stop(REPORT_S)
        scraping.leave(system)
        system.close()


def _keep(system: System) -> None:
    stopping = threading.Event()
    while not health.of(system).draining and not stopping.wait(HEARTBEAT_S):
        system.heartbeat()


def _system_of(worker: Any) -> System | None:
    """The system of the app that this worker serves; None before it was loaded."""
    app = getattr(worker, "wsgi", None)
    return app.extensions["agentflow"].system if isinstance(app, Flask) else None
