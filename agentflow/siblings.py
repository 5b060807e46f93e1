"""Processes that share a port: gunicorn's, and those of `dramatiq --processes N`. Whoever is asked for metrics asks them all.

Each serves its own at a socket in a folder of their parent's, and is known there by the first number that was free: a process
that is replaced goes on with its predecessor's, and counts from 0, as Prometheus expects of a restart. Prometheus' own library
would add up files that all of them write: it knows neither the memory nor the processor's time of each, nor gauges that are
asked for at a scrape, and the files of the dead stay.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agentflow import log

logger = log.get(__name__)

#: For the answers of all; who is frozen is left out.
_ANSWER_S: Final = 1.0
#: The path of a socket may not be longer than 107 bytes, and is wherever TMPDIR says.
_PREFIX: Final = "af-"

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """What each process said, by its number; and the numbers of those that said nothing."""

    reports: Mapping[str, Report] = field(default_factory=dict)
    silent: tuple[str, ...] = ()


class Siblings:
    """One in a process that shares its port, from `join` to `leave`. `report` is what this process says of itself, as JSON."""

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report
        self._folder: Path | None = None
        self._server: socketserver.BaseServer | None = None
        self.number: str | None = None

    def join(self) -> None:
        """A machine without a folder for the sockets goes without siblings, which is logged."""
        folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}-{_identity(os.getppid())}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} is somebody else's")
            with _alone_in(folder):
                number = next(n for n in map(str, range(1, 10_000)) if not _lives(folder / n))
                (folder / number).unlink(missing_ok=True)
                self._server = _Server(str(folder / number), self._report)
        except OSError as error:
            logger.warning("metrics are of this process alone", error=str(error))
            return
        self._folder, self.number = folder, number
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 60.0}, name="siblings", daemon=True
        ).start()
        _forget_the_dead(folder.parent)

    def leave(self) -> None:
        if self._folder is not None and self.number is not None:
            with suppress(OSError):
                (self._folder / self.number).unlink(missing_ok=True)

    def ask(self) -> Told:
        """All of them, this process among them. None joined: nothing was told."""
        if self._folder is None or self.number is None:
            return Told()
        reports: dict[str, Report] = {self.number: self._report()}
        others = sorted((path for path in self._folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
        asked = [(path, _connect(path)) for path in others if path.name != self.number]  # all work at the same time
        end, silent = time.monotonic() + _ANSWER_S, []
        for path, connection in asked:
            if connection is None:
                continue  # it has died
            with connection:
                said = _hear(connection, end)
            if said is None:
                silent.append(path.name)
            else:
                reports[path.name] = said
        return Told(reports, tuple(silent))


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, path: str, report: Callable[[], Report]) -> None:
        self.report = report
        super().__init__(path, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a sibling's connection broke off", exc_info=True)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.request.settimeout(_ANSWER_S)
        self.request.sendall(json.dumps(self.server.report()).encode())


def _lives(path: Path) -> bool:
    connection = _connect(path)
    if connection is not None:
        connection.close()
    return connection is not None


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_S)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return connection


def _hear(connection: socket.socket, end: float) -> Report | None:
    pieces: list[bytes] = []
    try:
        while True:
            connection.settimeout(max(0.01, end - time.monotonic()))
            piece = connection.recv(1 << 16)
            if not piece:
                found: Report = json.loads(b"".join(pieces))
                return found
            pieces.append(piece)
    except (OSError, ValueError):
        return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _identity(pid: int) -> str:
    """Of a process, for as long as it lives: its number may be another's tomorrow."""
    try:
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not Linux, or gone
        began = "0"
    return f"{pid}-{began}"


def _forget_the_dead(parent: Path) -> None:
    """Remove what parents left that are gone: they were killed, or nobody of theirs was there to do it."""
    for folder in parent.glob(f"{_PREFIX}{os.getuid()}-*-*"):
        pid = folder.name.split("-")[2]
        if not pid.isdecimal() or folder.name.endswith(f"-{_identity(int(pid))}"):
            continue
        with suppress(OSError):  # somebody else has just removed it
            if not any(_lives(path) for path in folder.iterdir() if path.name.isdecimal()):
                shutil.rmtree(folder, ignore_errors=True)


def side_by_side(texts: Iterable[tuple[str, str]]) -> str:
    """Prometheus' text of several processes as one: each sample with its label `process`, each family once.

    By lines and not by the library's parser, which would take longer than everything else of a scrape.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for number, text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                _, kind, family, *_ = line.split(" ", 3)
                if kind == "HELP":
                    heads.setdefault(family, [])
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line:
                name, brace, rest = line.partition("{")
                if brace:
                    labelled = f'{name}{{process="{number}",{rest}'
                else:
                    name, _, value = line.partition(" ")
                    labelled = f'{name}{{process="{number}"}} {value}'
                samples.setdefault(family, []).append(labelled)
    return "".join(f"{line}\n" for family, head in heads.items() for line in (*head, *samples.get(family, ())))
