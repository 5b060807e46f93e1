"""When each job of a trial began and ended: a file that all processes of the trial map into their memory.

A mark outlives its process, however that ends. Times are seconds of the machine's monotonic clock, one for all its processes.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import time
from functools import cache
from pathlib import Path

#: Of one job: its last beginning, its last end, and how often it came to its end.
RECORD = struct.Struct("=ddQ")


class Marks:
    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def make(cls, path: Path, count: int) -> Marks:
        path.write_bytes(bytes(RECORD.size * count))
        return cls(path)

    def begin(self, number: int) -> None:
        struct.pack_into("=d", self._map, number * RECORD.size, time.monotonic())

    def end(self, number: int) -> None:
        at = number * RECORD.size
        (runs,) = struct.unpack_from("=Q", self._map, at + 16)
        struct.pack_into("=dQ", self._map, at + 8, time.monotonic(), runs + 1)

    def of(self, number: int) -> tuple[float, float, int]:
        """(began, ended, runs); 0: not yet."""
        return RECORD.unpack_from(self._map, number * RECORD.size)  # type: ignore[return-value]

    def every(self) -> list[tuple[float, float, int]]:
        return list(RECORD.iter_unpack(self._map[:]))  # type: ignore[arg-type]

    def done(self) -> int:
        return sum(1 for _, _, runs in RECORD.iter_unpack(self._map[:]) if runs)

    def begun(self) -> int:
        return sum(1 for began, _, _ in RECORD.iter_unpack(self._map[:]) if began)


@cache
def _of_the_trial() -> Marks:
    return Marks(Path(os.environ["BENCH_MARKS"]))


def work(number: int, ms: int) -> None:
    """What every system's job does: mark its beginning, wait, mark its end."""
    marks = _of_the_trial()
    marks.begin(number)
    if ms:
        time.sleep(ms / 1000)
    marks.end(number)


async def work_as_coroutine(number: int, ms: int) -> None:
    """The same, for systems whose slots are no threads."""
    marks = _of_the_trial()
    marks.begin(number)
    if ms:
        await asyncio.sleep(ms / 1000)
    marks.end(number)
