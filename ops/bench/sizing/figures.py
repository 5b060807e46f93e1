"""What was measured (ops/bench/results) and what is assumed (kinds.json, plans.json), by name."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

BENCH: Final = Path(__file__).resolve().parent.parent
DAY_S: Final = 86_400


@dataclass(frozen=True)
class Kind:
    """Seconds that a job waits for others and seconds of a core; MB beside the worker's own while it runs."""

    title: str
    waits_s: float
    computes_s: float
    memory_mb: float
    queue: str
    source: str
    at_once: float


class Figures:
    """What was measured and what is assumed. Raises KeyError where a results file lacks a figure."""

    def __init__(self, bench: Path = BENCH) -> None:
        self._results = bench / "results"
        self.assumed: dict[str, Any] = json.loads((bench / "kinds.json").read_text())
        self.plans: dict[str, Any] = json.loads((bench / "plans.json").read_text())
        self._read: dict[str, Any] = {}
        self.busy: float = self.assumed["busy at most"]
        self.threads: int = self.assumed["threads of a waiting worker"]

    def of(self, file: str, figure: str) -> Any:
        """By its path of names, with slashes."""
        if file not in self._read:
            self._read[file] = json.loads((self._results / file).read_text())
        found = self._read[file]
        for name in figure.split("/"):
            if name not in found:
                raise KeyError(f"{file} has no {figure}: {name} is missing")
            found = found[name]
        return found

    def compared(self, workload: str, name: str) -> float:
        """The median of AgentFlow's rounds in compare.json; those that failed have no figures."""
        found = [each[name] for each in self.of("compare.json", f"cells/{workload}/agentflow") if name in each]
        if not found:
            raise KeyError(f"compare.json has no {name} of {workload}: each round failed")
        return statistics.median(found)

    @cached_property
    def growth(self) -> float:
        """How much more of Postgres a job takes with ten million rows there, and a million that wait."""
        full, empty = (
            statistics.median(each["cpu_ms"] for each in self.of("scale.json", "costs")[side]["job: whole way"])
            for side in ("full", "empty")
        )
        return max(1.0, full / empty)

    def number(self, said: Any) -> float:
        """A number, or where one stands: {file, figure, times}."""
        if isinstance(said, Mapping):
            return float(self.of(said["file"], said["figure"])) * float(said.get("times", 1.0))
        return float(said)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        return {name: self._kind(said) for name, said in self.assumed["kinds"].items()}

    def _kind(self, said: dict[str, Any]) -> Kind:
        return Kind(
            title=said["title"],
            waits_s=self.number(said.get("waits s", 0)) + self.number(said.get("pause s", 0)),
            computes_s=self.number(said.get("computes s", 0)) + self.worker_s,
            memory_mb=self.number(said.get("memory MB", 0)),
            queue=said.get("queue", "default"),
            source=said["from"],
            at_once=float(said.get("at once", math.inf)),
        )

    # ---- of one job ----

    @cached_property
    def worker_s(self) -> float:
        return self.compared("drain", "workers_cpu_us") / 1e6

    @cached_property
    def postgres_s(self) -> float:
        """Where tables are large."""
        return self.compared("drain", "postgres_cpu_us") / 1e6 * self.growth

    @cached_property
    def kept_bytes(self) -> float:
        return float(self.of("footprint.json", "kept/bytes of a job") + self.assumed["bytes of payload and result"])

    @property
    def index_bytes(self) -> float:
        return float(self.of("footprint.json", "kept/of it indexes"))

    @property
    def deleted_bytes(self) -> float:
        return float(self.of("footprint.json", "kept/bytes of a deleted job"))

    @property
    def wal_bytes(self) -> float:
        return self.asked("rung by RabbitMQ", "WAL bytes") + self.assumed["bytes of payload and result"]

    @property
    def result_bytes(self) -> float:
        return float(
            self.of("footprint.json", "kept/bytes of a result in Redis") + self.assumed["bytes of payload and result"]
        )

    def asked(self, tier: str, what: str) -> float:
        return float(self.of("footprint.json", f"{tier}/for each job")[what])

    def idle(self, tier: str, what: str) -> float:
        return float(self.of("footprint.json", f"{tier}/idle, a second")[what])

    # ---- of a process ----

    def worker_mb(self, threads: int) -> float:
        return float(self.of("footprint.json", f"slots/{threads}/pss_mb"))

    @cached_property
    def web_per_vcpu(self) -> float:
        """Single submits a second: those of one web process beside its servers, on two cores."""
        return self.compared("http", "per_s_at_16") / 2

    @property
    def web_mb(self) -> float:
        return float(self.of("idle.json", "web alone PSS MB"))

    def peak(self, a_day: float) -> float:
        """Jobs a second."""
        return a_day / DAY_S * float(self.assumed["peak of the mean"])

    def a_day(self, peak: float) -> float:
        return peak * DAY_S / float(self.assumed["peak of the mean"])

    @property
    def loads(self) -> list[int]:
        return list(self.assumed["loads a day"])
