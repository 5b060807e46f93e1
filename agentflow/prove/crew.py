"""The processes of the private copy. Whoever dies is started again, as a platform would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from agentflow.prove.ports import free_port
from agentflow.prove.servers import family, send_all, until

_LOOK_EVERY_S: Final = 0.2
_START_WITHIN_S: Final = 90.0


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Member:
    """One process of the system: its command, its log, the run of it that lives now."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], log: Path, port: int | None = None
    ) -> None:
        self.name = name
        self.command = command
        self.environment = environment
        self.log = log
        self.fixed_port = port
        self.port = 0
        self.wanted = True
        self.starts = 0
        self.lock = threading.RLock()
        self.popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self.popen.pid if self.popen is not None else 0

    def start(self, **more: str) -> None:
        with self.lock:
            self.port = self.fixed_port or free_port()
            self.popen = start(self.command, {**self.environment, **more, "PORT": str(self.port)}, self.log)
            self.wanted = True
            self.starts += 1

    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def family(self) -> list[psutil.Process]:
        return family(self.pid) if self.popen is not None else []

    def ready(self) -> bool:
        return self.alive() and listens(self.port)

    def kill(self) -> None:
        """SIGKILL to it and all below it, at once."""
        send_all(self.family(), signal.SIGKILL)
        if self.popen is not None:
            self.popen.wait(20)


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**keep, "PYTHONUNBUFFERED": "1", **environment},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


class Crew:
    """All members, and the thread that looks after them."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._leaving: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="crew", daemon=True)

    def add(self, member: Member) -> None:
        self.members[member.name] = member
        member.start()

    def watch(self) -> None:
        self._thread.start()

    def wait_ready(self, name: str, within_s: float = _START_WITHIN_S) -> bool:
        return bool(until(lambda: self.members[name].ready(), within_s=within_s, every_s=0.1))

    def workers(self) -> list[Member]:
        return [member for name, member in self.members.items() if name.startswith("worker")]

    def relieve(self, member: Member, within_s: float, **more: str) -> None:
        """A deploy: the successor is ready before the old one gets its SIGTERM."""
        with member.lock:
            old = member.popen
            member.start(**more)
        self.wait_ready(member.name)
        if old is None:
            return
        self._leaving.append(old)
        old.send_signal(signal.SIGTERM)
        try:
            old.wait(within_s)
        except subprocess.TimeoutExpired:  # the platform's patience is over
            send_all(family(old.pid), signal.SIGKILL)
            old.wait(20)
        self._leaving.remove(old)

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)
        for member in self.members.values():
            member.wanted = False
        processes = [p for m in self.members.values() for p in m.family()]
        processes += [p for popen in self._leaving for p in family(popen.pid)]
        send_all(processes, signal.SIGCONT)
        for member in self.members.values():
            if member.alive() and member.popen is not None:
                member.popen.terminate()
        end = time.monotonic() + 8
        for member in self.members.values():
            if member.popen is not None:
                with suppress(subprocess.TimeoutExpired):
                    member.popen.wait(max(0.1, end - time.monotonic()))
        send_all(processes + [p for m in self.members.values() for p in m.family()], signal.SIGKILL)
        for member in self.members.values():
            if member.popen is not None:
                member.popen.wait(20)

    def _keep(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            for member in list(self.members.values()):
                if not member.lock.acquire(blocking=False):
                    continue  # somebody is at it, perhaps for seconds
                try:
                    if member.wanted and not member.alive():
                        member.start()
                finally:
                    member.lock.release()
