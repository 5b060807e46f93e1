"""A Postgres that stands milliseconds away: a relay in a process of its own, which counts the round trips.

    python -m ops.bench.comparison.distance /folder/.s.PGSQL.5432 10

listens on a port of the loopback and passes on what arrives 10 ms later, each way, in its order; how much is under way is not
limited. Prints its port, and for each line that it reads the trips since the line before, by statement, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from typing import Any, Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ops.bench.comparison.figures import quantile
from ops.bench.peers.catalogue import ROOT

# SSLRequest and GSSENCRequest, after which the client begins anew:
# https://www.postgresql.org/docs/current/protocol-message-formats.html
_BEFORE_THE_START: Final = (80877103, 80877104)
_CALLED: Final = re.compile(r"\bagentflow\.(\w+)\s*\(")
_TABLE: Final = re.compile(r"\bagentflow\.(\w+)")
_STOP_S: Final = 10.0
_LARGE_BYTES: Final = 50_000_000
_PIPELINED: Final = 5_000


class Distance:
    """The relay to the server behind `url` (a socket's), `each_way_ms` away. `url` is what far clients are given."""

    def __init__(self, url: str, each_way_ms: float) -> None:
        given = conninfo_to_dict(url)
        socket = f"{given['host']}/.s.PGSQL.{given['port']}"
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "ops.bench.comparison.distance", socket, str(each_way_ms)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        port = self._line()
        self.url = f"postgresql://{quote(str(given['user']))}@127.0.0.1:{port}/{given['dbname']}"

    @property
    def pid(self) -> int:
        return self._popen.pid

    def trips(self) -> Counter[str]:
        """Since the last call: how often a client waited for Postgres, by the function, or the verb and the table."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(b"\n")
        self._popen.stdin.flush()
        return Counter(json.loads(self._line()))

    def checked(self) -> dict[str, float]:
        """What a `select 1` takes through it, and how many statements and bytes a second one connection gets through."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            times = [_seconds(conn, "select 1") for _ in range(50)]
            began = time.monotonic()
            with conn.pipeline():
                for _ in range(_PIPELINED):
                    conn.execute("select 1")
            statements_s = time.monotonic() - began
            large_s = _seconds(conn, "select repeat('x', %s)", _LARGE_BYTES)
        return {
            "select_1_p50_ms": 1000 * quantile(times, 0.5),
            "select_1_p95_ms": 1000 * quantile(times, 0.95),
            "pipelined_statements_per_s": _PIPELINED / statements_s,
            "megabytes_per_s": _LARGE_BYTES / 1e6 / large_s,
        }

    def close(self) -> None:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(_STOP_S)
        self._popen.stdout.close()

    def _line(self) -> str:
        assert self._popen.stdout is not None
        if not (line := self._popen.stdout.readline()):
            raise RuntimeError("the relay has ended")
        return line.decode().strip()


def _seconds(conn: psycopg.Connection[Any], statement: str, *values: Any) -> float:
    began = time.monotonic()
    conn.execute(statement.encode(), values or None).fetchall()
    return time.monotonic() - began


class Client:
    """What a client says to Postgres, read along: each message that asks for an answer is a trip of its statement."""

    def __init__(self, trips: Counter[str]) -> None:
        self._trips = trips
        self._data = bytearray()
        self._started = False
        self._statement = ""

    def says(self, data: bytes) -> None:
        self._data += data
        while (length := self._whole()) is not None:
            message = bytes(self._data[:length])
            del self._data[:length]
            if not self._started:
                self._started = struct.unpack_from("!i", message, 4)[0] not in _BEFORE_THE_START
                self._trips["connecting"] += 1
            elif message[:1] == b"P":
                self._statement = message[5:].split(b"\0")[1].decode()
            elif message[:1] in (b"S", b"Q"):
                said = self._statement if message[:1] == b"S" else message[5:-1].decode()
                self._trips[name_of(said)] += 1

    def _whole(self) -> int | None:
        """The length of the next message, if all of it is there."""
        at = 1 if self._started else 0
        if len(self._data) < at + 4:
            return None
        length = at + int(struct.unpack_from("!i", self._data, at)[0])
        return length if len(self._data) >= length else None


def name_of(statement: str) -> str:
    if called := _CALLED.search(statement):
        return called.group(1)
    verb = statement.split(maxsplit=1)[0].lower()
    table = _TABLE.search(statement)
    return f"{verb} {table.group(1)}" if table else verb


class _Way:
    """One direction: what is put in comes out at `into` after the delay, in its order. None is the end."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._pieces: deque[bytes | None] = deque()
        self._ripe = 0
        self.into: asyncio.Transport | None = None

    def put(self, piece: bytes | None) -> None:
        self._pieces.append(piece)
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._ripens)
        else:
            self._ripens()

    def _ripens(self) -> None:
        self._ripe += 1
        self.pour()

    def pour(self) -> None:
        while self._ripe and self.into is not None:
            self._ripe -= 1
            piece = self._pieces.popleft()
            if piece is None:
                self.into.close()
            else:
                self.into.write(piece)


class _End(asyncio.Protocol):
    """One end of a connection: what it says goes the one way, what comes the other is written to it."""

    def __init__(self, out: _Way, back: _Way, client: Client | None = None) -> None:
        self._out = out
        self._back = back
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._back.into = transport
        self._back.pour()

    def data_received(self, data: bytes) -> None:
        if self._client is not None:
            self._client.says(data)
        self._out.put(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._out.put(None)


async def relay(socket: str, delay_s: float) -> None:
    """Until the input ends."""
    loop = asyncio.get_running_loop()
    trips: Counter[str] = Counter()
    connecting = set()

    def accepted() -> _End:
        there, back = _Way(delay_s), _Way(delay_s)
        task = loop.create_task(loop.create_unix_connection(lambda: _End(back, there), socket))
        connecting.add(task)
        task.add_done_callback(connecting.discard)
        return _End(there, back, Client(trips))

    server = await loop.create_server(accepted, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    asked = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    while await asked.readline():
        print(json.dumps(trips), flush=True)
        trips.clear()


if __name__ == "__main__":
    # The usual selector waits for whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(relay(sys.argv[1], float(sys.argv[2]) / 1000))
