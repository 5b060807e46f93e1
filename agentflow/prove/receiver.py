"""The world outside: takes callbacks and effects over HTTP, applies each key once, and counts what it was sent."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

#: How often it refuses, and how often it does what it was asked and then fails to say so.
_REFUSES: Final = 0.03
_LOSES_ITS_ANSWER: Final = 0.03


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request. `at` is Unix time, when it had arrived; `fence` is of effects only; `applied`: it was the key's first."""

    what: Literal["effects", "callbacks"]
    key: str
    job: str
    fence: int | None
    at: float
    applied: bool
    status: int


class Receiver:
    def __init__(self, seed: int, journal: Path) -> None:
        self.deliveries: list[Delivery] = []
        self._applied: set[tuple[str, str]] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._chance = random.Random(f"{seed} receiver")
        self._journal = journal.open("w", buffering=1)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="receiver", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._journal.close()

    def take(self, what: Literal["effects", "callbacks"], key: str, body: dict[str, Any], at: float) -> int:
        """Apply it if it is new. Returns the status to answer; sometimes an unkind one."""
        with self._lock:
            luck = self._chance.random()
            if what == "callbacks" and key in self._told:
                luck = 1.0  # a callback's third attempt comes after five minutes: longer than a run waits for quiet
            self._told.add(key)
            if luck < _REFUSES:
                return self._write(Delivery(what, key, str(body["id"]), body.get("fence"), at, False, 503))
            new = (what, key) not in self._applied
            self._applied.add((what, key))
            status = 500 if luck < _REFUSES + _LOSES_ITS_ANSWER else 200
            return self._write(Delivery(what, key, str(body["id"]), body.get("fence"), at, new, status))

    def _write(self, delivery: Delivery) -> int:
        self.deliveries.append(delivery)
        self._journal.write(json.dumps([getattr(delivery, name) for name in Delivery.__slots__]) + "\n")
        return delivery.status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            text = self.rfile.read(length)
            if len(text) < length:
                self.close_connection = True  # the caller was killed in the middle of its request
                return
            body = json.loads(text)
            at = time.time()
            if self.path == "/effects":
                status = receiver.take("effects", self.headers["Idempotency-Key"], body, at)
            else:
                job = str(UUID(self.headers["webhook-id"].removeprefix("msg_")))
                status = receiver.take("callbacks", job, body["data"], at)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the journal has it."""

    return Handler
