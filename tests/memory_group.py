"""Real control groups of the kernel's, below the one that the tests run in: what is started in one is killed at its limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from agentflow.container import _groups
from tests.processes import eventually

#: Starts a command in the group that its first argument names.
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class MemoryGroup:
    """A container's memory, as platforms make it. `limit_mb` MB, and no swap beyond it."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self.version = version

    def inside(self, arguments: list[str]) -> list[str]:
        """A command that runs there, with all that it starts."""
        return ["/bin/sh", "-c", _ENTER, str(self.folder), *arguments]

    def limit(self, size_bytes: int) -> None:
        """From now on, whatever it was made with. Raises OSError where more is in use than the kernel can take back."""
        (self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).write_text(str(size_bytes))

    @property
    def kills(self) -> int:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        found = re.search(r"^oom_kill (\d+)$", (self.folder / name).read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    @property
    def most_charged(self) -> int:
        """Bytes, caches of files among them."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())


@contextmanager
def memory_group(limit_mb: int) -> Iterator[MemoryGroup]:
    """Whoever starts processes in it ends them. Fails where the kernel lets us make no group: that takes root and a writable
    /sys/fs/cgroup."""
    found = _groups(Path("/"))
    assert found, "no control group counts memory here"
    own = found[0]
    folder = own.folder / f"agentflow-test-{uuid4().hex[:8]}"
    if own.version == 2 and "memory" not in (own.folder / "cgroup.subtree_control").read_text().split():
        (own.folder / "cgroup.subtree_control").write_text("+memory")
    folder.mkdir()
    try:
        limits = ("memory.max",) if own.version == 2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in limits:
            if (folder / name).exists():
                (folder / name).write_text(str(limit_mb << 20))
        if own.version == 2 and (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        yield MemoryGroup(folder, own.version)
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text().strip())
        folder.rmdir()
