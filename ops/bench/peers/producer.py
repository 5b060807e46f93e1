"""Hands jobs to one system, as it is told by lines of JSON: `python -m ops.bench.peers.producer dramatiq`.

A system's module has `submit(number, ms)`, which returns a handle, and may have `submit_many(numbers, ms)`, `close()`, and
`result(handle)`, which waits for the job's result by the system's own means.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ops.bench.peers.marks import Marks

BATCH = 1000
_END_TIMEOUT_S = 30.0
#: How often the end of a job is looked for, where a system has no results.
_LOOK_S = 0.001


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    module = importlib.import_module(f"ops.bench.peers.{sys.argv[1]}")
    print(json.dumps({"ready": True, "batches": hasattr(module, "submit_many")}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(DO[asked.pop("do")](module, **asked)), file=answers)
    if hasattr(module, "close"):
        module.close()


def submit(module: Any, first: int, count: int, ms: int) -> dict[str, float]:
    """One by one."""
    began, cpu = time.monotonic(), time.process_time()
    for number in range(first, first + count):
        module.submit(number, ms)
    return {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu}


def submit_by_callers(module: Any, first: int, count: int, ms: int, callers: int) -> dict[str, float]:
    """One by one, by so many threads at a time."""
    with ThreadPoolExecutor(callers) as pool:
        began, cpu = time.monotonic(), time.process_time()
        for _ in pool.map(lambda number: module.submit(number, ms), range(first, first + count)):
            pass
        return {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu}


def submit_many(module: Any, first: int, count: int, ms: int) -> dict[str, float]:
    """By the system's call for many, `BATCH` at a time."""
    began, cpu = time.monotonic(), time.process_time()
    for start in range(first, first + count, BATCH):
        module.submit_many(range(start, min(start + BATCH, first + count)), ms)
    return {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu}


def one_at_a_time(module: Any, first: int, count: int) -> dict[str, list[float]]:
    """Each when the one before has ended, after a pause; milliseconds from before the call that hands it in."""
    marks = Marks(Path(os.environ["BENCH_MARKS"]))
    figures: dict[str, list[float]] = {"call_ms": [], "pick_up_ms": [], "round_trip_ms": []}
    for number in range(first, first + count):
        time.sleep(random.uniform(0.01, 0.05))
        began = time.monotonic()
        handle = module.submit(number, 0)
        figures["call_ms"].append(1000 * (time.monotonic() - began))
        if hasattr(module, "result"):
            module.result(handle)
            figures["round_trip_ms"].append(1000 * (time.monotonic() - began))
        _wait_ended(marks, number)
        figures["pick_up_ms"].append(1000 * (marks.of(number)[0] - began))
    return figures


def _wait_ended(marks: Marks, number: int) -> None:
    end = time.monotonic() + _END_TIMEOUT_S
    while not marks.of(number)[2]:
        if time.monotonic() > end:
            raise TimeoutError(f"job {number} did not end within {_END_TIMEOUT_S:g} s")
        time.sleep(_LOOK_S)


DO = {
    "submit": submit,
    "submit_by_callers": submit_by_callers,
    "submit_many": submit_many,
    "one_at_a_time": one_at_a_time,
}

if __name__ == "__main__":
    main()
