"""A memory cgroup of a test's own, below that of the tests, of version 2 or 1. Needs root, as namespaces do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import eventually

_MOUNT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._limit = next(n for n in ("memory.max", "memory.limit_in_bytes") if (folder / n).exists())

    def take(self, pid: int) -> None:
        """This process, and all that it starts from now on."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def limit(self, size_bytes: int) -> None:
        (self._folder / self._limit).write_text(str(size_bytes))


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    folder = _own() / f"agentflow-test-{os.getpid()}"
    folder.mkdir()
    try:
        yield MemoryCgroup(folder)
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def _own() -> Path:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if controllers == "memory":
            return _existing(_MOUNT / "memory", path)
    return _existing(_MOUNT, next(path for _, controllers, path in lines if not controllers))


def _existing(root: Path, path: str) -> Path:
    """Inside a container the path may be that outside of it."""
    own = root / path.lstrip("/")
    return own if own.exists() else root
