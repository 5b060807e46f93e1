"""How much memory this process's container may have, how much of it is used, and how often the kernel killed for it.

Linux control groups of versions 1 and 2; without a limit the machine's memory counts. `limit_bytes` and `used_bytes` are what
platforms show and alarm at: used is the working set, which is all that is charged to the group less files that were read once.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from agentflow.settings import Settings

_SLASH: Final = Path("/")


class Memory(NamedTuple):
    """Bytes. `pinned` is what the kernel cannot take back without a kill: `used` less the cache of files that no process maps."""

    limit: int
    used: int
    pinned: int


@dataclass(frozen=True, slots=True)
class _Group:
    """One control group, and what its version calls things."""

    folder: Path
    version: Literal[1, 2]

    def limit(self) -> int | None:
        """None: no limit, or none that can be read."""
        text = _text(self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes"))
        return int(text) if text.isdigit() else None

    def used(self) -> tuple[int, int] | None:
        """The working set, and what of it cannot be taken back."""
        charged = _text(self.folder / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        if not charged.isdigit():
            return None
        of_all = "" if self.version == 2 else "total_"
        stat = _fields(self.folder / "memory.stat")
        working = max(0, int(charged) - stat.get(f"{of_all}inactive_file", 0))
        mapped = stat.get("file_mapped" if self.version == 2 else "total_mapped_file", 0)
        return working, max(0, working - max(0, stat.get(f"{of_all}active_file", 0) - mapped))

    def kills(self) -> int | None:
        return _fields(self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")).get("oom_kill")


class Container:
    """The one that this process runs in. `told`: its limit in bytes where a person said it, for platforms that hide theirs."""

    def __init__(self, *, told: int | None = None, root: Path = _SLASH) -> None:
        self._told = told
        self._root = root
        self._groups = _groups(root)

    def memory(self) -> Memory | None:
        """As it is now. None where this is no Linux."""
        machine = _fields(self._root / "proc/meminfo", unit=1024)
        total = machine.get("MemTotal:")
        if total is None:
            return None
        limit, group = self._tightest(total)
        if self._told is not None:
            limit = min(limit, self._told)
        if group is None and limit < total:
            group = self._groups[0] if self._groups else None
        used = group.used() if group is not None else None
        if used is not None:
            return Memory(limit, *used)
        of_all = self._of_processes() if limit < total else total - machine.get("MemAvailable:", 0)
        return Memory(limit, of_all, of_all)

    def kills(self) -> int | None:
        """How many processes of this container the kernel killed for want of memory. None: not known."""
        return self._groups[0].kills() if self._groups else None

    @property
    def identity(self) -> str:
        """The same for all processes of the container, and for no other one on this machine."""
        boot = _text(self._root / "proc/sys/kernel/random/boot_id")
        if not self._groups:
            return boot
        try:
            at = self._groups[0].folder.stat()
        except OSError:
            return boot
        return f"{boot} {at.st_dev} {at.st_ino}"

    def _tightest(self, total: int) -> tuple[int, _Group | None]:
        """The least limit of the group and those above it; where two are equal, the upper one's use is the whole of it."""
        found: tuple[int, _Group | None] = (total, None)
        for group in self._groups:
            limit = group.limit()
            if limit is not None and limit < total and limit <= found[0]:
                found = (limit, group)
        return found

    def _of_processes(self) -> int:
        """What all that can be seen hold but files: in a container whose groups are hidden no others can be seen."""
        pids = [int(entry.name) for entry in (self._root / "proc").iterdir() if entry.name.isdigit()]
        return sum(private_bytes(pid, self._root) for pid in pids)


def limit_bytes() -> int | None:
    """The container's limit, or the machine's memory. None where that is not known."""
    memory = _this().memory()
    return memory.limit if memory is not None else None


def used_bytes() -> int:
    """The container's working set, or what of the machine is used. 0 where that is not known."""
    memory = _this().memory()
    return memory.used if memory is not None else 0


def resident_bytes(pid: int | Literal["self"] = "self") -> int:
    """Of one process; 0 once it is gone."""
    pages = _text(_SLASH / f"proc/{pid}/statm").split()
    return int(pages[1]) * _page() if len(pages) > 1 else 0


def private_bytes(pid: int, root: Path = _SLASH) -> int:
    """The same without its files and what it shares."""
    pages = _text(root / f"proc/{pid}/statm").split()
    return max(0, int(pages[1]) - int(pages[2])) * _page() if len(pages) > 2 else 0


def peak_bytes(pid: int | Literal["self"] = "self") -> int | None:
    """The most that a process ever held. Since its own `exec`, as `ru_maxrss` is not: that begins with the parent's."""
    return _fields(_SLASH / f"proc/{pid}/status", unit=1024).get("VmHWM:")


def of(settings: Settings) -> Container:
    """With MEMORY_LIMIT_MB, where that is set."""
    return Container(told=settings.memory_limit_mb << 20 if settings.memory_limit_mb else None)


@functools.lru_cache(maxsize=1)
def _this() -> Container:
    from agentflow import settings  # children of jobs ask for their own peak alone: they stay light

    return of(settings.current())


@functools.lru_cache(maxsize=1)
def _page() -> int:
    return os.sysconf("SC_PAGE_SIZE")


# ---- where the groups are ----


def _groups(root: Path) -> list[_Group]:
    """The process's own group first, then those above it as far as they can be seen. Version 1 goes first where both are mounted:
    memory is counted by one of them alone, and version 2 has no files for it then."""
    own = _own_paths(_text(root / "proc/self/cgroup"))
    mounts = _mounts(_text(root / "proc/self/mountinfo"))
    for version in (1, 2):
        path = own.get(version)
        for mounted, point in mounts.get(version, ()):
            top = root / point.lstrip("/")
            folder = top / _below(path or "/", mounted)
            if not folder.is_dir():  # another namespace's name for it: what is mounted is the container's own
                folder = top
            groups = [_Group(each, version) for each in (folder, *folder.parents) if each.is_relative_to(top)]
            if any(group.used() is not None for group in groups):
                return groups
    return []


def _own_paths(text: str) -> dict[int, str]:
    """Of /proc/self/cgroup: `4:memory:/docker/1f` and `0::/docker/1f`."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = path
        elif "memory" in controllers.split(","):
            found[1] = path
    return found


def _mounts(text: str) -> dict[int, list[tuple[str, str]]]:
    """Of /proc/self/mountinfo: version -> (which part of the hierarchy, where)."""
    found: dict[int, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        where, what = left.split(), right.split()
        if len(where) < 5 or len(what) < 3:
            continue
        if what[0] == "cgroup2":
            found.setdefault(2, []).append((where[3], where[4]))
        elif what[0] == "cgroup" and "memory" in what[2].split(","):
            found.setdefault(1, []).append((where[3], where[4]))
    return found


def _below(path: str, mounted: str) -> str:
    """A group's path from where its hierarchy is mounted, of which the part `mounted` is."""
    if mounted != "/" and (path == mounted or path.startswith(f"{mounted}/")):
        path = path[len(mounted) :]
    return "" if ".." in path.split("/") else path.lstrip("/")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _fields(path: Path, unit: int = 1) -> dict[str, int]:
    """Lines of a name and a number, and of more that is left out."""
    found = {}
    for line in _text(path).splitlines():
        name, *rest = line.split() or [""]
        if rest and rest[0].isdigit():
            found[name] = int(rest[0]) * unit
    return found
