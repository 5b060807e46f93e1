"""Procrastinate, in a database of its own. It keeps no results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

from ops.bench.peers.marks import work_as_coroutine
from ops.bench.peers.payload import POSTGRES, QUEUE, TEXT

_SLOTS = int(os.environ.get("BENCH_SLOTS", "8"))
_IS_PRODUCER = os.environ.get("BENCH_ROLE") == "producer"  # which is no coroutine
app = App(
    connector=SyncPsycopgConnector(conninfo=POSTGRES)
    if _IS_PRODUCER
    else PsycopgConnector(conninfo=POSTGRES, max_size=min(20, _SLOTS + 2))
)


@app.task(queue=QUEUE, name="bench")
async def bench(number: int, ms: int, text: str) -> None:
    await work_as_coroutine(number, ms)


if _IS_PRODUCER:
    app.open()
    if not app.check_connection():
        app.schema_manager.apply_schema()


def submit(number: int, ms: int) -> Any:
    return bench.defer(number=number, ms=ms, text=TEXT)


def submit_many(numbers: Sequence[int], ms: int) -> None:
    bench.batch_defer(*({"number": number, "ms": ms, "text": TEXT} for number in numbers))
