"""Where the `agentflow up` of a home serves, for the other commands: a file that is true as long as its lock is held."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Final

_NAME: Final = "up.url"


class Advertisement:
    """Holds the file for as long as the `with` block, or the process, lasts. The first of a home wins; others go without."""

    def __init__(self, home: Path, url: str) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd: int | None = os.open(home / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            self._fd = None
            return
        os.ftruncate(self._fd, 0)
        os.write(self._fd, url.encode())

    def __enter__(self) -> Advertisement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)


def url_of(home: Path) -> str | None:
    """Where the home's `agentflow up` serves; None when there is none."""
    try:
        fd = os.open(home / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held by its writer
        return os.read(fd, 200).decode() or None
    finally:
        os.close(fd)
    return None
