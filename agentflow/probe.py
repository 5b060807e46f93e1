"""`/health*` and `/metrics` for processes without a web server of their own: worker, scheduler.

The first process to bind the port serves for its siblings. `agentflow worker` serves for all that it started.
"""

from __future__ import annotations

import errno
import json
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from agentflow import health, log, metrics, scraping

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

#: Probes and a scraper or two; whoever comes while all are busy is hung up on and asks again.
MOST_AT_ONCE: Final = 8
#: For reading the request's head, and for each write.
SOCKET_TIMEOUT_S: Final = 5.0


class Answers(Protocol):
    """What is served. Paths that are not there give None; `authorization` is that header as it came; `only` what stands after
    `/metrics?`: `own`, `shared` (agentflow.scraping) or, for all, nothing."""

    def health(self, path: str) -> tuple[int, dict[str, Any]] | None: ...

    def permitted(self, authorization: str | None) -> bool: ...

    def metrics_document(self, authorization: str | None) -> dict[str, Any]: ...

    def metrics_text(self, authorization: str | None, only: str) -> bytes: ...


class _OwnAnswers:
    """Those of this process."""

    def __init__(self, system: System, service: str) -> None:
        self._system = system
        self._service = service

    def health(self, path: str) -> tuple[int, dict[str, Any]] | None:
        return health.answer(self._system, self._service, path)

    def permitted(self, authorization: str | None) -> bool:
        return metrics.permitted(self._system, authorization)

    def metrics_document(self, authorization: str | None) -> dict[str, Any]:
        return scraping.document(self._system)

    def metrics_text(self, authorization: str | None, only: str) -> bytes:
        return scraping.text(self._system, own=only != "shared", shared=only != "own")


class Probe:
    """A server in threads of its own, until `close`."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self.port: int = server.server_address[1]
        self._thread = threading.Thread(
            target=lambda: server.serve_forever(poll_interval=0.5), name="probe", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)


def serve(
    system: System, service: str, port: int, *, host: str = "", listener: socket.socket | None = None
) -> Probe | None:
    """Serve on all addresses; port 0 takes a free one. None where somebody has the port already, which is logged.

    `listener`: a socket that listens already, and is served instead.
    """
    return serve_answers(_OwnAnswers(system, service), port, host=host, listener=listener)


def serve_answers(
    answers: Answers, port: int, *, host: str = "", listener: socket.socket | None = None
) -> Probe | None:
    try:
        server = _Server((host, port), answers, listener)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        logger.info("health and metrics are not served by this process", port=port, reason=error.strerror)
        return None
    return Probe(server)


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], answers: Answers, listener: socket.socket | None) -> None:
        self.answers = answers
        self._free = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__(address, _Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name, which may take seconds
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a probe's connection broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SOCKET_TIMEOUT_S
    server_version = "agentflow"
    sys_version = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/metrics":
            self._metrics(self.server.answers, url.query)
            return
        found = self.server.answers.health(url.path)
        if found is None:
            self._problem(404, "Not Found", "this process serves /health, /health/live, /health/ready and /metrics")
        else:
            self._send(found[0], "application/json", json.dumps(found[1]).encode())

    do_HEAD = do_GET

    def _metrics(self, answers: Answers, only: str) -> None:
        authorization = self.headers.get("Authorization")
        if not answers.permitted(authorization):
            self._problem(
                401, "Unauthorized", "METRICS_TOKEN is wanted as a bearer token", {"WWW-Authenticate": "Bearer"}
            )
        elif metrics.wants_json(self.headers.get("Accept", "")):
            self._send(200, "application/json", json.dumps(answers.metrics_document(authorization)).encode())
        else:
            self._send(200, metrics.CONTENT_TYPE, answers.metrics_text(authorization, only))

    def _problem(self, status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail}).encode()
        self._send(status, "application/problem+json", body, headers)

    def _send(self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": content_type, "Cache-Control": "no-store"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds: not worth a line each."""
