"""What a run is asked to do, and when each fault comes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Faults that come one after the other; the lanes run side by side. A lane's faults hurt the same part of the system.
LANES: Final[dict[str, tuple[str, ...]]] = {
    "worker": ("kill_worker", "kill_process", "freeze_worker", "deploy", "kill_child", "skew_clock"),
    "rabbitmq": (
        "restart_rabbitmq",
        "cut_rabbitmq",
        "freeze_rabbitmq",
        "refuse_publishes",
        "wipe_rabbitmq",
        "stray_messages",
        "kill_node",
    ),
    "redis": ("restart_redis", "cut_redis", "freeze_redis", "wipe_redis"),
    "postgres": ("cut_postgres", "restart_postgres", "freeze_postgres"),
    "web": ("kill_web", "fill_disk", "kill_scheduler"),
}
FAULTS: Final = tuple(kind for kinds in LANES.values() for kind in kinds)
#: While one of these is on, no row changes: the server is away, or somebody has locked the table.
STOPS_THE_TABLE: Final = (*LANES["postgres"], "cut_rabbitmq")
#: A lane goes through all its kinds in about so many seconds, hence each comes five times in ten minutes; where only some are
#: wanted they come more often.
_ROUND_S: Final = 100.0
_FIRST_S: Final = 3.0

LOAD_PER_MINUTE: Final = 3300.0
ENOUGH_JOBS_PER_MINUTE: Final = 3000
ENOUGH_OF_A_KIND_IN_10_MIN: Final = 5


@dataclass(frozen=True)
class Options:
    """A run. Times in seconds. `worker` and `web` are the modules that dramatiq and gunicorn load."""

    minutes: float
    seed: int
    faults: tuple[str, ...]
    jobs_per_minute: float
    out: Path
    worker: str
    web: str
    cluster: bool = False
    rabbitmq: bool = True
    lease_s: float = 6.0
    quiet_s: float = 330.0
    workers: int = 2
    threads: int = 16
    #: Share of the requests that are twenty jobs of one key.
    crowds: float = 0.015
    #: Called with a connection to the private copy's database, after the migrations: tests break the system here.
    prepared: object = None

    @property
    def seconds(self) -> float:
        return self.minutes * 60


def offers(*, rabbitmq: bool, cluster: bool = False) -> tuple[str, ...]:
    """The faults there are on this tier."""
    absent = set() if rabbitmq else set(LANES["rabbitmq"]) - {"stray_messages"}
    # Of a cluster, nodes are killed one at a time; all of it at once is what the runs with one node are for.
    absent |= {"restart_rabbitmq", "freeze_rabbitmq", "wipe_rabbitmq", "refuse_publishes"} if cluster else {"kill_node"}
    return tuple(kind for kind in FAULTS if kind not in absent)


def schedule(lane: str, kinds: Sequence[str], seed: int, seconds: float) -> Iterator[tuple[float, str]]:
    """(earliest second, kind) of one lane's faults: shuffled rounds of all its kinds, with uneven gaps."""
    wanted = [kind for kind in LANES[lane] if kind in kinds]
    if not wanted:
        return
    # Named by the lane: that a fault is left out of one lane changes nothing in the others.
    chance = random.Random(f"{seed} {lane}")
    gap_s = min(_ROUND_S, seconds) / len(LANES[lane])
    at = _FIRST_S + chance.uniform(0, gap_s / 2)
    while True:
        chance.shuffle(wanted)
        for kind in wanted:
            if at > seconds - 2.0:
                return
            yield round(at, 2), kind
            at += gap_s * chance.uniform(0.6, 1.3)
