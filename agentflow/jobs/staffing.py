"""How many worker processes the work that is due now wants: for the gauge that autoscalers follow.

Every count is bounded, so that a million waiting jobs cost what a few thousand do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agentflow.database import Connection
from agentflow.jobs import forecasts
from agentflow.jobs.estimates import Durations
from agentflow.jobs.statistics import Queue

#: What is due is to be through within so long. A new instance takes about a minute until it works: less would be wished in vain.
SOON_S: Final = 60.0
#: Of each queue so many due jobs are looked at, in the order of the index; what is beyond them is taken to be like them.
_LOOKED_AT: Final = 2000
#: Of types that never ran here, while none did.
_UNKNOWN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Kind:
    """Jobs of a queue that are of one type and concurrency key: due ones, with the slots of their key, or running ones."""

    queue: str
    type: str
    due: float = 0.0
    slots: int | None = None
    running: int = 0


@dataclass(frozen=True, slots=True)
class Staff:
    """Worker processes that are wanted: of such as serve all queues, one at least; and of such as serve one queue alone."""

    of_all: int
    of_queues: dict[str, int]


def staff(conn: Connection, queues: Sequence[Queue], *, threads: int, limits: Mapping[str, int]) -> Staff:
    """For what waits and runs now. `threads` of one process, where no live one says how many; `limits`: most of a type that one
    process runs at once."""
    found = kinds(conn, {queue.name: queue.due for queue in queues})
    known = {type_: Durations(seconds) for type_, seconds in forecasts.durations(conn).items() if seconds}

    def processes(of: Sequence[Queue]) -> int:
        names, workers = {queue.name for queue in of}, sum(queue.workers for queue in of)
        each = sum(queue.threads for queue in of) / workers if workers else threads
        # One in four is kept for critical jobs.
        return wanted([kind for kind in found if kind.queue in names], known, threads=each - each // 4, limits=limits)

    return Staff(max(1, processes(queues)), {queue.name: processes([queue]) for queue in queues})


def kinds(conn: Connection, due: Mapping[str, int]) -> list[Kind]:
    """What waits and runs, by queue. `due`: how many jobs of each queue are due in all."""
    waiting = conn.execute(
        "select q, x.type, x.slots, count(*) from unnest(%s::text[]) q cross join lateral ("
        " select j.type, j.concurrency_key, k.slots from agentflow.jobs j"
        " left join agentflow.concurrency_keys k on k.key = j.concurrency_key"
        " where j.queue = q and j.state = 'queued' and j.run_at <= statement_timestamp()"
        " and j.wait_reason is distinct from 'busy' limit %s"
        ") x group by q, x.type, x.slots, x.concurrency_key",
        (list(due), _LOOKED_AT),
    ).fetchall()
    looked_at: Counter[str] = Counter()
    for queue, _, _, number in waiting:
        looked_at[queue] += number
    running = conn.execute(
        "select queue, type, count(*) from agentflow.jobs where state = 'running' group by 1, 2"
    ).fetchall()
    return [
        *(
            Kind(queue, type_, number * max(1.0, due[queue] / looked_at[queue]), slots)
            for queue, type_, slots, number in waiting
        ),
        *(Kind(queue, type_, running=number) for queue, type_, number in running),
    ]


def wanted(found: Sequence[Kind], known: Mapping[str, Durations], *, threads: float, limits: Mapping[str, int]) -> int:
    """Worker processes for these jobs: enough for those that run, and for what is due to be through within SOON_S.

    `threads`: of one process, those that any job may have. Never more than one for each job, nor than the slots of keys can use.
    """
    usual_s = sum(each.mean for each in known.values()) / len(known) if known else _UNKNOWN_S
    at_once: Counter[str] = Counter()
    for kind in found:
        each_s = known[kind.type].mean if kind.type in known else usual_s
        most = kind.due if kind.slots is None else min(kind.due, kind.slots)
        at_once[kind.type] += math.ceil(min(most, kind.due * each_s / SOON_S)) + kind.running
    by_threads = at_once.total() / max(1.0, threads)
    by_limits = max((number / limits[type_] for type_, number in at_once.items() if type_ in limits), default=0.0)
    return math.ceil(max(by_threads, by_limits))
