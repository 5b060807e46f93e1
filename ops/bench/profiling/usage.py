"""CPU seconds of a system's processes, by what they are."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil


class Meter:
    """Of a worker with its children, and of the servers below a keeper of this home. Of `took`: by the 10 ms of the kernel."""

    def __init__(self, worker: int, home: Path) -> None:
        self._first = psutil.Process(worker)
        self._home = home
        self._before: Counter[str] = Counter()

    def begin(self) -> None:
        self._before = self._used()

    def took(self) -> dict[str, float]:
        """Since `begin`: worker, child (that a job ran in and that has ended), encoder, Postgres, Valkey."""
        now = self._used()
        return {name: round(now[name] - self._before[name], 2) for name in ("worker", "child", "encoder", *SERVERS)}

    def pids(self) -> dict[int, str]:
        """What is there now, each with its name; children of jobs that come later are not in it."""
        found = {}
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = _role(process)
        return found | {process.pid: name for name in SERVERS for process in servers(self._home, name)}

    def workers(self) -> list[int]:
        return [pid for pid, role in self.pids().items() if role == "worker"]

    def _family(self) -> list[psutil.Process]:
        """Without what watches it."""
        found = []
        for process in [self._first, *self._first.children(recursive=True)]:
            with suppress(psutil.Error):
                if "py-spy" not in process.name():
                    found.append(process)
        return found

    def _used(self) -> Counter[str]:
        used: Counter[str] = Counter()
        for process in self._family():
            with suppress(psutil.Error):
                times, role = process.cpu_times(), _role(process)
                used[role] += times.user + times.system
                if role == "worker":
                    used["child"] += times.children_user + times.children_system
        for name in SERVERS:
            for process in servers(self._home, name):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    used[name] += times.user + times.system + times.children_user + times.children_system
        return used


SERVERS = ("postgres", "valkey")


def servers(home: Path, name: str) -> list[psutil.Process]:
    """The processes of the server that keeps its data in this home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if name in process.name() and str(home) in f"{process.cwd()} {' '.join(process.cmdline())}":
                found.append(process)
    return found


def _role(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.ZombieProcess:
        return "child"
    if any(word.endswith("knowledge.encoder") for word in words):
        return "encoder"
    return "child" if "agentflow.worker.child" in words else "worker"
