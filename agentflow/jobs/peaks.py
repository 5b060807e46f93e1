"""How much memory jobs take, learned from what they took: by type and size of input, shared by all workers.

Sizes of inputs are kept in powers of two, peaks in quarters of them; what was measured counts half after two weeks, so that
a new version's needs show. What a job is taken to need is what 19 in 20 like it stayed below.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

from agentflow.database import Connection, Database, Unavailable

#: Without an input, or of one whose size nobody knows.
NO_SIZE: Final = -1
#: Peaks below it are one class: they are no more than what a worker's own heap moves by.
_LEAST_CLASS: Final = 0
_MB: Final = 1 << 20
_QUANTILE: Final = 0.95
#: So much has to be measured before it goes before the first guess: three times within some days.
_ENOUGH: Final = 2.5
_HALF_AFTER_DAYS: Final = 14.0
_FORGOTTEN: Final = 0.05
_FRESH_S: Final = 30.0


class Noted(NamedTuple):
    """Of what kind a measurement is."""

    type: str
    size_class: int
    peak_class: int


def size_class(input_bytes: int | None) -> int:
    return NO_SIZE if input_bytes is None else max(0, math.ceil(math.log2(max(1, input_bytes))))


def peak_class(peak_bytes: int) -> int:
    return max(_LEAST_CLASS, math.ceil(4 * math.log2(max(1, peak_bytes) / _MB) - 1e-9))


def class_bytes(number: int) -> int:
    """The most that a peak of this class may be; nothing for the least class."""
    return 0 if number <= _LEAST_CLASS else int(_MB * 2 ** (number / 4))


class Learned:
    """What was measured, as it was read once."""

    def __init__(self, weights: Mapping[Noted, float]) -> None:
        self._by_class: defaultdict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        of_type: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for noted, weight in weights.items():
            self._by_class[noted.type, noted.size_class][noted.peak_class] = weight
            of_type[noted.type][noted.peak_class] += weight  # type: ignore[assignment]
        self._of_type = {type_: _quantile(peaks) for type_, peaks in of_type.items()}
        self._needs = {key: _quantile(peaks) for key, peaks in self._by_class.items()}

    def need(self, type_: str, input_bytes: int | None, guess: int) -> int:
        """Bytes. Of a size that was not measured often enough the guess, and no less than smaller inputs took; of an unknown
        size what all of the type took."""
        wanted = size_class(input_bytes)
        if wanted == NO_SIZE:
            found = self._of_type.get(type_)
            return guess if found is None else found
        if (known := self._needs.get((type_, wanted))) is not None:
            return known
        smaller = [need for (t, size), need in self._needs.items() if t == type_ and size < wanted and need is not None]
        return max([guess, *smaller])


class Peaks:
    """One per worker process: `note` where attempts end, `step` in a loop that has time, `need` where jobs begin."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._noted: Counter[Noted] = Counter()
        self._learned = Learned({})
        self._read_at = -math.inf

    def note(self, type_: str, input_bytes: int | None, peak_bytes: int) -> None:
        with self._lock:
            self._noted[Noted(type_, size_class(input_bytes), peak_class(peak_bytes))] += 1

    def need(self, type_: str, input_bytes: int | None, guess: int) -> int:
        return self._learned.need(type_, input_bytes, guess)

    def step(self, conn: Connection) -> None:
        """Write what was noted here, and read what was noted anywhere."""
        with self._lock:
            noted, self._noted = self._noted, Counter()
        if noted:
            try:
                write(conn, noted)
            except Unavailable:
                with self._lock:
                    self._noted.update(noted)
                raise
        if noted or time.monotonic() - self._read_at > _FRESH_S:
            self._learned = Learned(read(conn))
            self._read_at = time.monotonic()


def write(conn: Connection, noted: Mapping[Noted, float]) -> None:
    rows = sorted(noted.items())
    conn.execute(
        "insert into agentflow.memory_peaks as p (type, size_class, peak_class, weight)"
        " select * from unnest(%(types)s::text[], %(sizes)s::smallint[], %(peaks)s::smallint[], %(weights)s::float8[])"
        " on conflict (type, size_class, peak_class) do update set noted_at = clock_timestamp(), weight = excluded.weight"
        " + p.weight * power(0.5, extract(epoch from clock_timestamp() - p.noted_at) / 86400 / %(half)s)",
        {
            "types": [row.type for row, _ in rows],
            "sizes": [row.size_class for row, _ in rows],
            "peaks": [row.peak_class for row, _ in rows],
            "weights": [weight for _, weight in rows],
            "half": _HALF_AFTER_DAYS,
        },
    )


def read(conn: Connection) -> dict[Noted, float]:
    rows = conn.execute(
        "select type, size_class, peak_class, weight * power(0.5,"
        " extract(epoch from clock_timestamp() - noted_at)::float8 / 86400 / %s) from agentflow.memory_peaks",
        (_HALF_AFTER_DAYS,),
    ).fetchall()
    return {Noted(*row[:3]): row[3] for row in rows if row[3] >= _FORGOTTEN}


def _quantile(weights: Mapping[int, float]) -> int | None:
    """None where too little was measured."""
    total = sum(weights.values())
    if total < _ENOUGH:
        return None
    below = 0.0
    for number in sorted(weights):
        below += weights[number]
        if below >= _QUANTILE * total:
            break
    return class_bytes(number)
