"""A scripted HTTP server on this machine: the far side of the network, with its faults.

    with serve() as server:
        server.on("/clip.mp4", Reply(body=b"..."))
        server.on("/busy", Reply(429, headers={"Retry-After": "7"}), Reply(body=b"now"))
        server.on("/any/", lambda request: Reply(body=request.body))

A path that ends in `/` answers for all below it. Several replies are given one after the other; the last one stays.
"""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, parse_qsl, urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    pairs: Sequence[tuple[str, str]] = ()  # the whole query, doubled names and all


@dataclass
class Reply:
    """One answer. `body` may be an iterable of pieces, sent one by one with `pause_s` before each."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    # The Content-Length to claim: None is the true one (chunked coding where the body is an iterable).
    length: int | None = None
    # Reset the connection after the body, so that the reader sees an error and not an end.
    reset: bool = False
    # Sent as they are in place of status line, headers and body: for answers that are no HTTP, or trickle their head.
    raw: Iterable[bytes] | None = None
    # Gets the connection in place of an answer, until it returns: for protocols that begin as HTTP.
    takeover: Callable[[socket.socket], None] | None = None


Script = Reply | Callable[[Request], Reply]


class Server:
    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self.port = port  # 0: a free one, from the first listen() on
        self.tls = tls
        self.scheme = "http" if tls is None else "https"
        self.requests: list[Request] = []
        self.connections = 0
        self.open_now = 0
        self.open_most = 0
        self.server_names: list[str | None] = []  # what TLS clients asked for (SNI)
        self.stopping = threading.Event()
        self._scripts: dict[str, list[Script]] = {}
        self._lock = threading.Lock()
        self._listener: _Listener | None = None
        if tls is not None:
            tls.sni_callback = lambda _socket, name, _context: self.server_names.append(name)

    def listen(self) -> None:
        self.stopping = threading.Event()
        self._listener = _Listener(self)
        self.port = self._listener.server_address[1]
        serving = partial(self._listener.serve_forever, poll_interval=0.02)
        threading.Thread(target=serving, daemon=True).start()

    def hang_up(self) -> None:
        """Nobody can connect until the next listen(), which takes the same port; open connections are closed."""
        self.stopping.set()
        if (listener := self._listener) is not None:
            self._listener = None
            listener.shutdown()
            listener.server_close()
            for connection in list(listener.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                with suppress(OSError):
                    connection.close()

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, path: str = "/") -> str:
        return f"{self.scheme}://{self.netloc}{path}"

    def on(self, path: str, *replies: Script) -> None:
        with self._lock:
            self._scripts[path] = list(replies)

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            script = self._script_of(request.path)
        return script(request) if callable(script) else script

    def _script_of(self, path: str) -> Script:
        below = [known for known in self._scripts if known.endswith("/") and path.startswith(known)]
        key = path if path in self._scripts else max(below, key=len, default=None)
        if key is None:
            return Reply(404, b"nothing here")
        replies = self._scripts[key]
        return replies.pop(0) if len(replies) > 1 else replies[0]


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, server: Server) -> None:
        self.address_family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        self.server = server
        self.connections: set[socket.socket] = set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body are two writes: without this the second waits for the client's delayed ACK, 40 ms.
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                _handle(self, server)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__((server.host, server.port), Handler)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        if self.server.tls is not None:
            # The handshake happens in the thread of the connection, at its first read.
            connection = self.server.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.connections.add(connection)
        with self.server._lock:
            self.server.connections += 1
            self.server.open_now += 1
            self.server.open_most = max(self.server.open_most, self.server.open_now)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:
        with self.server._lock:
            self.server.open_now -= 1
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is what these tests are about


@contextmanager
def serve(*, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serve on a port of `host`, a free one if it is 0, until the block ends; connections still open are closed then."""
    server = Server(host, port, tls)
    server.listen()
    try:
        yield server
    finally:
        server.hang_up()


def _handle(handler: BaseHTTPRequestHandler, server: Server) -> None:
    address = urlsplit(handler.path)
    length = int(handler.headers.get("Content-Length") or 0)
    request = Request(
        method=handler.command,
        path=address.path,
        query={name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()},
        headers={name.lower(): value for name, value in handler.headers.items()},
        body=handler.rfile.read(length) if length else b"",
        pairs=parse_qsl(address.query, keep_blank_values=True),
    )
    reply = server.answer(request)
    if reply.takeover is not None:
        handler.close_connection = True
        with suppress(OSError):
            reply.takeover(handler.connection)
        return
    with suppress(OSError):
        _send(handler, server, request, reply)
    handler.wfile.flush()


def _send(handler: BaseHTTPRequestHandler, server: Server, request: Request, reply: Reply) -> None:
    if reply.raw is not None:
        handler.close_connection = True
        _send_pieces(handler, server, reply.raw, reply.pause_s, chunked=False)
        return

    whole = isinstance(reply.body, bytes)
    chunked = not whole and reply.length is None
    handler.send_response(reply.status)
    for name, value in reply.headers.items():
        handler.send_header(name, value)
    if chunked:
        handler.send_header("Transfer-Encoding", "chunked")
    elif not any(name.lower() == "content-length" for name in reply.headers):
        true_length = len(reply.body) if isinstance(reply.body, bytes) else 0
        handler.send_header("Content-Length", str(true_length if reply.length is None else reply.length))
    handler.end_headers()

    if request.method != "HEAD":
        pieces = [reply.body] if isinstance(reply.body, bytes) else reply.body
        finished = _send_pieces(handler, server, pieces, reply.pause_s, chunked=chunked)
        if chunked and finished and not reply.reset:
            handler.wfile.write(b"0\r\n\r\n")
    if reply.length is not None:
        handler.close_connection = True  # the claim may be a lie: hang up where the body ends
    if reply.reset:
        handler.close_connection = True
        # SO_LINGER of 0 s makes close() send RST.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def _send_pieces(
    handler: BaseHTTPRequestHandler, server: Server, pieces: Iterable[bytes], pause_s: float, *, chunked: bool
) -> bool:
    for piece in pieces:
        if pause_s and server.stopping.wait(pause_s):
            return False
        if piece:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            handler.wfile.flush()
    return True
