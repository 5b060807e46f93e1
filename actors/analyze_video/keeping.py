"""The files of an analysis in storage: its pictures, and while it runs what another worker needs to go on with it.

Below the job's prefix, `checkpoint/<fence>-<number>.zip` is the last state. A worker that lost the job may still write
one: it then has a lower fence, is as true as any other (the analysis of a file has one result), and is deleted with the
rest. Pictures are stored before the state that no longer has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from agentflow import log
from agentflow.errors import Permanent, Transient
from agentflow.storage import StorageError
from agentflow.worker.running import JobContext, Stopped

_CONTENT_TYPES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".vtt": "text/vtt",
    ".flac": "audio/flac",
}

#: How much of the progress storing the files takes.
STORE_SHARE: Final = 0.02

logger = log.get(__name__)


class Keeping:
    """As a context: what was kept half-way is removed at the end of the block, unless another run will want it."""

    def __init__(self, context: JobContext, prefix: str, out: Path) -> None:
        self._context = context
        self._storage = context.system.storage
        self.prefix: Final = prefix
        self._out = out
        self._stored: set[str] = set()
        self._pending: list[str] = []

    def __enter__(self) -> Keeping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_over = error is None or isinstance(error, Permanent)
        if is_over or (isinstance(error, Stopped) and error.reason == "cancelled"):
            self._forget()

    def resume(self) -> str | None:
        """The local path of the last state that an earlier run left, if one did."""
        path = self._out / "resume.zip"
        try:
            left = sorted(stored.key for stored in self._storage.list(f"{self.prefix}/checkpoint"))
            if not left:
                return None
            self._storage.fetch_to(left[-1], path)
        except StorageError as error:  # it only costs time
            logger.warning("the state of an interrupted analysis cannot be read", error=str(error))
            return None
        return str(path)

    def keep(self, files: list[str]) -> None:
        """New files of the analysis, the last one being its state. That one is removed here, stored or not."""
        *pictures, state = files
        self._pending += pictures
        key = f"{self.prefix}/checkpoint/{self._context.job.fence:010d}-{state.removeprefix('state-')}"
        try:
            while self._pending:
                self._put(self._pending[0])
                self._pending.pop(0)
            self._storage.put_file(key, self._out / state)
            for old in list(self._storage.list(f"{self.prefix}/checkpoint")):
                if old.key < key:
                    self._storage.delete(old.key)
        except StorageError as error:  # the next one may do better, and at the end it counts
            logger.warning("the state of an analysis cannot be stored", error=str(error))
        finally:
            (self._out / state).unlink(missing_ok=True)

    def store(self, analysis: dict[str, Any], *, share_done: float) -> None:
        """Put each file in storage, and its key beside its name in the analysis."""
        files = list(_files(analysis))
        for number, facts in enumerate(files):
            if facts["file"] not in self._stored:
                self._put(facts["file"])
            facts["key"] = f"{self.prefix}/{facts['file']}"
            self._context.progress(share_done + STORE_SHARE * (number + 1) / len(files), "store")

    def _put(self, name: str) -> None:
        path, key = self._out / name, f"{self.prefix}/{name}"
        if path.exists():
            self._storage.put_file(key, path, content_type=_CONTENT_TYPES[path.suffix])
        elif self._storage.stat(key) is None:  # an earlier run's, who said that it is there
            self._forget()
            raise Transient(f"a picture of an earlier run is gone: {name}", code="picture_gone")
        self._stored.add(name)

    def _forget(self) -> None:
        with suppress(StorageError):
            self._storage.delete_prefix(f"{self.prefix}/checkpoint")


def _files(facts: Any) -> Iterator[dict[str, Any]]:
    """Everything in an analysis that names a file."""
    if isinstance(facts, dict):
        if facts.get("file"):
            yield facts
        for each in facts.values():
            yield from _files(each)
    elif isinstance(facts, list):
        for each in facts:
            yield from _files(each)
