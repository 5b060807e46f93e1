"""What the jobs of all worker processes of one container may still take: a small file that they share, under a lock.

A process that dies leaves nothing behind: it holds a lock of its own while it lives, which the kernel takes back, and whoever
opens the ledger next strikes out what was the dead one's. Where no file can be shared each process has a ledger of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from agentflow import log

logger = log.get(__name__)

_MOST_WAITING: Final = 500
#: Whoever clears temporary folders takes what was not touched for days.
_TOUCH_S: Final = 3600.0


@dataclass(slots=True)
class Held:
    """Of a job that runs: how much it is taken to need at most, and the processes that are at its work (beside the worker's)."""

    owner: str
    job: str
    need: int
    pids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Waiting:
    """Of a parked job. Seconds of the machine's clock since its start; after `until` it is taken for gone."""

    job: str
    need: int
    since: float
    until: float


@dataclass(slots=True)
class State:
    """What is in the ledger. `explained`: of the kernel's kills those of which it is known whom they met."""

    owners: dict[str, str] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    explained: int | None = None

    def growth(self, resident: Callable[[int], int]) -> int:
        """How many bytes those that run may still take beyond what they have."""
        return sum(max(0, held.need - sum(resident(pid) for pid in held.pids)) for held in self.held)

    @property
    def pids(self) -> list[int]:
        """Of the worker processes."""
        return [int(owner.partition("-")[0]) for owner in self.owners]

    def first(self) -> Waiting | None:
        """The job that has waited longest."""
        return min(self.waiting, key=lambda waiting: waiting.since, default=None)

    def hold(self, owner: str, job: str, need: int, pids: Sequence[int] = ()) -> None:
        self.leave(job)
        self.held.append(Held(owner, job, need, list(pids)))

    def wait(self, job: str, need: int, now: float) -> Waiting:
        """Note that a job waits, as it may have before. The caller says until when."""
        for waiting in self.waiting:
            if waiting.job == job:
                waiting.need = need
                return waiting
        waiting = Waiting(job, need, now, now)
        if len(self.waiting) < _MOST_WAITING:
            self.waiting.append(waiting)
        return waiting

    def leave(self, job: str) -> None:
        """The job waits no longer."""
        self.waiting = [waiting for waiting in self.waiting if waiting.job != job]

    def release(self, owner: str, job: str) -> None:
        self.held = [held for held in self.held if (held.owner, held.job) != (owner, job)]

    def of(self, owner: str, job: str) -> Held | None:
        return next((held for held in self.held if (held.owner, held.job) == (owner, job)), None)

    def forget_late(self, now: float) -> None:
        self.waiting = [waiting for waiting in self.waiting if waiting.until > now >= waiting.since]


class Ledger:
    """One per worker process. `identity` says which container; `worker` is this process's worker."""

    def __init__(self, identity: str, worker: UUID, *, parent: Path | None = None) -> None:
        self.owner: Final = f"{os.getpid()}-{worker.hex[:12]}"
        self._worker = worker
        self._private = State()
        self._private_lock = threading.Lock()
        self._alive: int | None = None
        self._touched_at = time.monotonic()
        self._folder = self._shared_folder(identity, parent or Path(tempfile.gettempdir()))

    def close(self) -> None:
        """After its last job: strike out what is this process's."""
        with self.open() as (state, _):
            state.held = [held for held in state.held if held.owner != self.owner]
            state.owners.pop(self.owner, None)
        if self._alive is not None and self._folder is not None:
            with suppress(OSError):
                (self._folder / self.owner).unlink()
            os.close(self._alive)
            self._alive = None
            self._folder = None

    @contextmanager
    def open(self) -> Iterator[tuple[State, Sequence[UUID]]]:
        """The state, to be changed in place, and the workers that were found dead. Be short: nobody else can open it."""
        folder, lock = self._folder, self._lock_file()
        if folder is None or lock is None:
            with self._private_lock:
                yield self._private, ()
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = _read(folder / "state.json")
            before = asdict(state)
            dead = self._strike_out_dead(folder, state)
            state.owners[self.owner] = str(self._worker)
            yield state, dead
            try:
                if asdict(state) != before:
                    _write(folder / "state.json", state)
            except OSError as error:  # a full disk: what is counted here is an estimate
                logger.warning("what jobs may still take could not be noted", error=str(error))
        finally:
            os.close(lock)

    def _lock_file(self) -> int | None:
        """None: each process is alone."""
        if self._folder is None or self._alive is None:
            return None
        try:
            if time.monotonic() - self._touched_at > _TOUCH_S:
                os.utime(self._alive)
                self._touched_at = time.monotonic()
            return os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.warning("the ledger of the container's memory is gone", error=str(error))
            self._folder = None
            return None

    def _strike_out_dead(self, folder: Path, state: State) -> list[UUID]:
        dead = [owner for owner in state.owners if owner != self.owner and _is_dead(folder / owner)]
        found = [UUID(state.owners.pop(owner)) for owner in dead]
        state.held = [held for held in state.held if held.owner in state.owners or held.owner == self.owner]
        return found

    def _shared_folder(self, identity: str, parent: Path) -> Path | None:
        uid = os.geteuid()
        folder = parent / f"agentflow-memory-{uid}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink() or folder.stat().st_uid != uid:
                raise PermissionError(f"{folder} is somebody else's")
            self._alive = os.open(folder / self.owner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            logger.warning("processes of this container cannot see each other's jobs' memory", error=str(error))
            return None
        return folder


def _is_dead(alive: Path) -> bool:
    """Whether nobody holds the lock of a process; then its file goes, too."""
    try:
        fd = os.open(alive, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    with suppress(OSError):
        alive.unlink()
    return True


def _read(path: Path) -> State:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return State(
            found["owners"],
            [Held(**held) for held in found["held"]],
            [Waiting(**waiting) for waiting in found["waiting"]],
            found["explained"],
        )
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another version
        return State()


def _write(path: Path, state: State) -> None:
    """Whole or not at all: its writer may be killed."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(state)), encoding="utf-8")
    new.replace(path)
