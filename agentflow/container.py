"""What the container of this process may use of the machine's memory, and what it uses.

A cgroup of version 2 or 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html, …/cgroup-v1/memory.html). Inside most containers
it is mounted as if it were the root; elsewhere /proc/self/cgroup says where it is. Limits hold for everything below them, so the
least of those up to the root is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MOUNT: Final = Path("/sys/fs/cgroup")
#: Version 1 says "no limit" by a number that is about as large as an address can be.
_NO_LIMIT: Final = 1 << 60
_V2: Final = ("memory.max", "memory.current", "inactive_file")
_V1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def limit_bytes() -> int | None:
    """Above which the kernel kills. None: there is no limit, or no cgroup."""
    found = _tightest()
    return found[0] if found else None


def used_bytes() -> int:
    """What counts against the limit and could not be given back at once: without files that lie in the cache unused, as
    Kubernetes counts. Where there is no limit: what this process uses."""
    found = _tightest()
    return found[1] if found else _resident_bytes()


def _tightest() -> tuple[int, int] | None:
    """Limit and use of the cgroup that the kernel will look at first."""
    found = (_read(group, names) for group, names in _groups())
    return min(((limit, used) for limit, used in found if limit is not None), key=lambda f: f[0] - f[1], default=None)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The cgroup of this process and those above it, each with the names of its files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, names = (_MOUNT, _V2) if not controllers else (_MOUNT / "memory", _V1)
            own = root / path.lstrip("/")
            yield from ((group, names) for group in (own, *own.parents) if group == root or root in group.parents)
    yield _MOUNT, _V2


def _read(group: Path, names: tuple[str, str, str]) -> tuple[int | None, int]:
    limit, current, idle = names
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) >= _NO_LIMIT:
            return None, 0
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(text), max(0, int((group / current).read_text()) - int(stat.get(idle, 0)))
    except (OSError, ValueError):  # not there: another version, or another root than the one that is mounted
        return None, 0


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
