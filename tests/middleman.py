"""A TCP proxy between a client and a server, with what networks do: cut, freeze, forget, lead elsewhere. It can end TLS, too."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: A host and port, or the path of a socket.
Target = tuple[str, int] | Path

# https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class Middleman:
    """Listens at `host` and `port` and passes on to `target`. `tls` ends TLS here; `postgres`: as Postgres begins it."""

    def __init__(
        self,
        target: Target,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        postgres: bool = False,
    ) -> None:
        self.target = target
        self.host = host
        self.accepted = 0  # connections that were tried
        self.frozen = False  # accepts, as a kernel does for a stopped process, and answers nothing
        self._tls = tls
        self._postgres = postgres
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.port = port
        self.listen()

    def listen(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="middleman", daemon=True).start()

    def refuse(self) -> None:
        """Nobody listens any more, and what is connected is cut."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut.set()

    def forget(self) -> None:
        """Of the connections there are, nothing is passed on any more and nobody is told, as a NAT does; new ones work."""
        with self._lock:
            for link in self._links:
                link.forgotten = True

    @property
    def open(self) -> int:
        with self._lock:
            return len(self._links)

    def close(self) -> None:
        self._closed.set()
        self.frozen = False
        self.refuse()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            link = _Link(client)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=self._serve, args=(link,), name="middleman-link", daemon=True).start()

    def _serve(self, link: _Link) -> None:
        client, server = link.client, None
        try:
            client.settimeout(10)
            while self.frozen and not (self._closed.is_set() or link.cut.is_set()):
                time.sleep(0.02)
            if self._tls is not None:
                if self._postgres:
                    assert client.recv(8) == _SSL_REQUEST
                    client.sendall(b"S")
                client = link.client = self._tls.wrap_socket(client, server_side=True)
            server = _connected(self.target)
            self._pass_on(link, client, server)
        except (OSError, AssertionError):
            pass
        finally:
            with self._lock:
                self._links.discard(link)
            for sock in (client, server):
                if sock is not None:
                    sock.close()

    def _pass_on(self, link: _Link, client: socket.socket, server: socket.socket) -> None:
        while not (link.cut.is_set() or self._closed.is_set()):
            if self.frozen or link.forgotten:
                time.sleep(0.02)
                continue
            buffered = isinstance(client, ssl.SSLSocket) and client.pending() > 0
            readable = [client] if buffered else select.select([client, server], [], [], 0.05)[0]
            for source, sink in ((client, server), (server, client)):
                if source in readable:
                    data = source.recv(65536)
                    if not data:
                        return
                    if not (self.frozen or link.forgotten):
                        sink.sendall(data)


class _Link:
    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.cut = threading.Event()
        self.forgotten = False


def _connected(target: Target) -> socket.socket:
    if isinstance(target, Path):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(target))
        return sock
    return socket.create_connection(target, timeout=5)


@contextmanager
def between(target: Target, **options: object) -> Iterator[Middleman]:
    middleman = Middleman(target, **options)  # type: ignore[arg-type]
    try:
        yield middleman
    finally:
        middleman.close()
