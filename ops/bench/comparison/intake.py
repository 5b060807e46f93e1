"""HTTP intake: single submits with a customer's key and all checks, against a bare Flask view under the same gunicorn; batches;
and round trips by long-poll."""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final
from uuid import uuid4

from agentflow import organizations
from agentflow.prove.ports import free_port
from ops.bench.comparison.crew import Crew, TrialFailed
from ops.bench.comparison.figures import quantile
from ops.bench.comparison.servers import Servers
from ops.bench.comparison.trials import agentflow_settings
from ops.bench.peers.catalogue import OURS, PEERS, clean_environment
from ops.bench.peers.payload import TEXT

#: What is measured in turns.
SIDES: Final = ("bare view", "agentflow")
CONNECTIONS: Final = 16
BATCH: Final = 1000
_BATCH_CONNECTIONS: Final = 4
_READY_S: Final = 60.0
_ANSWER_S: Final = 60.0
_ORGANIZATION: Final = 1
_SINGLE: Final = {"type": "ping", "payload": {}, "correlation_id": TEXT}
_BARE: Final = {"type": "ping", "payload": {"correlation_id": TEXT}}


def measure(servers: Servers, requests: int, batches: int, trips: int) -> dict[str, dict[str, Any]]:
    """Figures of the bare view and of AgentFlow, whose single submits are measured in turns; by name."""
    servers.clean()
    name = f"bench-{uuid4().hex[:8]}"
    with servers.connect() as conn:
        conn.execute("drop table if exists public.bare_jobs")
        _, key = organizations.create_key(conn, _ORGANIZATION, name, ["submit", "read"])
    environment = {**clean_environment(), **agentflow_settings(servers, name, embedded=False)}
    with (
        _web("ops.bench.peers.bare_view:application", servers, environment) as bare_port,
        _web("web.wsgi:app", servers, environment) as port,
    ):
        bare = Request("/jobs", _BARE)
        single = Request("/api/jobs", _SINGLE, key)
        figures: dict[str, dict[str, Any]] = {
            "bare view": {},
            "agentflow": _trips(servers, environment, port, key, trips),
        }
        for each, to in ((bare, bare_port), (single, port)):
            load(to, each, requests // 10 + 1, CONNECTIONS)  # connections, caches
        for connections in (1, CONNECTIONS):
            count = requests if connections > 1 else requests // 4 + 1
            figures["bare view"] |= _named(load(bare_port, bare, count, connections), connections)
            figures["agentflow"] |= _named(load(port, single, count, connections), connections)
        many = Request("/api/jobs/batch", {"jobs": [_SINGLE] * BATCH}, key)
        told = load(port, many, batches, _BATCH_CONNECTIONS)
        figures["agentflow"]["batch_jobs_per_s"] = told["per_s"] * BATCH
    return figures


def _named(told: dict[str, float], connections: int) -> dict[str, float]:
    return {f"{name}_at_{connections}": value for name, value in told.items()}


@contextmanager
def _web(application: str, servers: Servers, environment: dict[str, str]) -> Iterator[int]:
    """gunicorn with AgentFlow's own configuration, at the port that it yields."""
    port = free_port()
    log = servers.folder / f"web-{port}.log"
    crew = Crew(environment, log)
    crew.start([[str(OURS / "gunicorn"), "-c", "web/gunicorn_config.py", application]], PORT=str(port))
    try:
        end = time.monotonic() + _READY_S
        while not _is_ready(port):
            crew.check()
            if time.monotonic() > end:
                raise TrialFailed(f"{application} was not ready within {_READY_S:g} s: {crew.said()}")
            time.sleep(0.1)
        yield port
    finally:
        crew.stop()


def _is_ready(port: int) -> bool:
    with suppress(OSError), Client(port) as client:
        status, _ = client.send(b"GET /health/ready HTTP/1.1\r\nHost: bench\r\n\r\n")
        return status == 200
    return False


def _trips(servers: Servers, environment: dict[str, str], port: int, key: str, count: int) -> dict[str, float]:
    """Hand in and wait for the end, `Prefer: wait`, on idle workers."""
    workers = Crew(environment, servers.folder / "trips.log")
    workers.start(PEERS[0].worker(1, 8), PORT=str(free_port()))
    try:
        request = Request("/api/jobs", {"type": "ping", "payload": {}}, key, prefer="wait=20")
        took = []
        with Client(port) as client:
            _until_picked_up(client, request)
            for _ in range(count):
                time.sleep(random.uniform(0.02, 0.06))
                began = time.monotonic()
                status, _ = client.send(request.raw)
                took.append(1000 * (time.monotonic() - began))
                if status != 200:
                    raise TrialFailed(f"a ping was answered {status}: {workers.said()}")
    finally:
        workers.stop()
    return {"long_poll_p50_ms": quantile(took, 0.5), "long_poll_p99_ms": quantile(took, 0.99)}


def _until_picked_up(client: Client, request: Request) -> None:
    for _ in range(5):
        if client.send(request.raw)[0] == 200:
            return
    raise TrialFailed("no worker takes pings")


class Request:
    """A POST of JSON, as it goes over the wire."""

    def __init__(self, path: str, body: Any, key: str | None = None, prefer: str | None = None) -> None:
        text = json.dumps(body).encode()
        head = [
            f"POST {path} HTTP/1.1",
            "Host: bench",
            "Content-Type: application/json",
            f"Content-Length: {len(text)}",
        ]
        head += [f"Authorization: Bearer {key}"] if key else []
        head += [f"Prefer: {prefer}"] if prefer else []
        self.raw = "\r\n".join([*head, "", ""]).encode() + text


class Client:
    """One keep-alive connection that costs the machine little beside what it measures."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), _ANSWER_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, raw: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        self._socket.sendall(raw)
        data = b""
        while (at := data.find(b"\r\n\r\n")) < 0:
            data += self._received()
        head = data[:at].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        while len(data) < at + 4 + length:
            data += self._received()
        return int(head[9:12]), data[at + 4 :]

    def _received(self) -> bytes:
        if not (data := self._socket.recv(65536)):
            raise ConnectionError("the server closed the connection")
        return data


def load(port: int, request: Request, count: int, connections: int) -> dict[str, float]:
    """The same request so many times, each connection its next one when the one before is answered. Raises TrialFailed."""
    numbers = itertools.count()
    took: list[float] = []
    wrong: list[str] = []

    def run() -> None:
        try:
            with Client(port) as client:
                while next(numbers) < count and not wrong:
                    began = time.monotonic()
                    status, body = client.send(request.raw)
                    took.append(1000 * (time.monotonic() - began))
                    if status != 202:
                        wrong.append(f"{status}: {body[:300]!r}")
        except (OSError, ValueError) as error:
            wrong.append(str(error))

    began = time.monotonic()
    in_threads(run, connections)
    elapsed = time.monotonic() - began
    if wrong:
        raise TrialFailed(f"a request was answered {wrong[0]}")
    return {"per_s": len(took) / elapsed, "p50_ms": quantile(took, 0.5), "p99_ms": quantile(took, 0.99)}


def in_threads(run: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
