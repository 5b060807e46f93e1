"""A server that takes what Sentry's SDK sends, and opens its envelopes: https://develop.sentry.dev/sdk/data-model/envelopes/"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.http_server import Reply, Request, Server, serve

KEY = "publickey"


class Item(NamedTuple):
    kind: str  # event, transaction, profile, check_in, client_report …
    document: dict[str, Any]
    trace: dict[str, Any]  # of the envelope's header


class Sink:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.reply = Reply(body=b"{}")
        server.on("/api/", lambda _request: self.reply)

    @property
    def dsn(self) -> str:
        return f"http://{KEY}@{self.server.netloc}/42"

    def items(self, kind: str) -> list[Item]:
        return [item for request in list(self.server.requests) for item in _opened(request) if item.kind == kind]

    def events(self) -> list[dict[str, Any]]:
        return [item.document for item in self.items("event")]

    def transactions(self, name: str) -> list[dict[str, Any]]:
        return [item.document for item in self.items("transaction") if item.document["transaction"] == name]

    def check_ins(self, slug: str) -> list[dict[str, Any]]:
        return [item.document for item in self.items("check_in") if item.document["monitor_slug"] == slug]

    def text(self) -> str:
        """Everything that was ever sent."""
        return "\n".join(f"{request.headers}\n{_body(request)!r}" for request in list(self.server.requests))


@contextmanager
def listening() -> Iterator[Sink]:
    with serve() as server:
        yield Sink(server)


def _body(request: Request) -> bytes:
    return gzip.decompress(request.body) if request.headers.get("content-encoding") == "gzip" else request.body


def _opened(request: Request) -> Iterator[Item]:
    assert f"sentry_key={KEY}" in request.headers["x-sentry-auth"]
    head, _, rest = _body(request).partition(b"\n")
    trace = json.loads(head).get("trace") or {}
    while rest:
        line, _, rest = rest.partition(b"\n")
        item = json.loads(line)
        payload, rest = rest[: item["length"]], rest[item["length"] + 1 :]
        yield Item(item["type"], json.loads(payload), trace)
