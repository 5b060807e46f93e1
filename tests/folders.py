"""Where servers that tests start keep their files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Bytes. Each process of the tests has some 200 MB of databases, and there are a few.
_PLENTY = 4 << 30


@contextmanager
def server_folder(name: str) -> Iterator[Path]:
    """An empty folder that Postgres' account may enter, unlike pytest's own; removed at the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix=f"agentflow-{name}-", dir=_in_memory()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_memory() -> str | None:
    """Where files are pages of memory, if there is plenty of it: a database is a thousand files, and a disk's file system takes
    ten times as long to make and remove them. Those servers' processes are killed, not their machine."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        return None
    available_kb = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    plenty = available_kb is not None and int(available_kb[1]) > _PLENTY >> 10
    return str(memory) if plenty and shutil.disk_usage(memory).free > _PLENTY else None
