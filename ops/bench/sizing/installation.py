"""What one instance carries, what a load needs, and the cheapest way to buy it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentflow.worker.threads import regular
from ops.bench.sizing.figures import Figures, Kind

#: What the README's settings say: a worker uses five connections beside its pool's five; web has a pool; the scheduler two.
WORKER, WEB, SCHEDULER = 10, 5, 2
#: For a deploy, which starts a new worker before the old one has gone.
SPARE: Final = WORKER
#: So long a result stays in Redis (agentflow.live), and so many MB no job is counted on to leave free (MEMORY_RESERVE_MB).
RESULT_S: Final = 600
RESERVE_MB: Final = 48
ROLES: Final = ("web", "workers", "heavy workers", "scheduler")
Plan = Mapping[str, Any]


# ---- one instance ----


def carries(figures: Figures, kind: Kind, threads: int, *, mb: float = 512, vcpu: float = 1.0) -> tuple[float, str]:
    """Jobs a second, and what is used up by them."""
    limits = {
        "processor": figures.busy * vcpu / kind.computes_s,
        "slots": min(regular(threads), kind.at_once) / (kind.waits_s + kind.computes_s / vcpu),
    }
    if kind.at_once < regular(threads):
        limits["GPU"] = limits.pop("slots")
    if kind.memory_mb:
        fit = fitting(figures, kind, mb)
        if not fit:
            return 0.0, "memory"
        limits["memory"] = fit * vcpu / kind.computes_s
    name = min(limits, key=lambda each: limits[each])
    return limits[name], name


def fitting(figures: Figures, kind: Kind, mb: float) -> int:
    """Such jobs at once in the memory of an instance."""
    return max(0, int((mb - figures.worker_mb(25) - RESERVE_MB) // kind.memory_mb))


# ---- an installation ----


@dataclass(frozen=True)
class Need:
    """Of a load at its peak."""

    a_day: float
    peak: float
    slots: float
    waiting_cores: float
    heavy_cores: float
    heavy_mb: float
    postgres_cores: float
    postgres_gb: float
    disk_gb: float
    redis_mb: float


def need(figures: Figures, a_day: float, mix: Mapping[str, float]) -> Need:
    total = sum(mix.values())
    peak = figures.peak(a_day)
    light = [
        (peak * n / total, figures.kinds[name]) for name, n in mix.items() if figures.kinds[name].queue == "default"
    ]
    heavy = [(peak * n / total, figures.kinds[name]) for name, n in mix.items() if figures.kinds[name].queue == "heavy"]
    kept_days = figures.assumed["days kept"]
    return Need(
        a_day=a_day,
        peak=peak,
        slots=sum(rate * (kind.waits_s + kind.computes_s) for rate, kind in light),
        waiting_cores=sum(rate * kind.computes_s for rate, kind in light),
        heavy_cores=sum(rate * kind.computes_s for rate, kind in heavy),
        heavy_mb=max((kind.memory_mb for _, kind in heavy), default=0.0),
        postgres_cores=peak * figures.postgres_s,
        postgres_gb=a_day * kept_days * figures.index_bytes / 1e9,
        disk_gb=disk(figures, a_day),
        redis_mb=peak * RESULT_S * figures.result_bytes / 1e6,
    )


def disk(figures: Figures, a_day: float) -> float:
    """GB with a fifth free: what is kept, flight records, and an hour's WAL at the peak."""
    rows = (
        figures.kept_bytes * figures.assumed["days kept"]
        + figures.deleted_bytes * figures.assumed["days of flight records"]
    )
    return (a_day * rows + figures.peak(a_day) * 3600 * figures.wal_bytes) / 1e9 / 0.8


@dataclass(frozen=True)
class Bought:
    """So many of a plan."""

    role: str
    count: int
    plan: Plan
    more_usd: float = 0.0

    @property
    def usd(self) -> float:
        return float(self.count * self.plan["usd"] + self.more_usd)

    def __str__(self) -> str:
        many = f"{self.count} × " if self.count > 1 else ""
        more = f" + {self.more_usd:,.0f} disk" if self.more_usd else ""
        return f"{many}{self.plan['plan']} {self.count * self.plan['usd']:,.0f}{more}"


def instances(figures: Figures, wanted: Need, plans: Sequence[Plan], role: str) -> list[Bought]:
    """The ways to have a role: as many of one plan or of another."""
    found = []
    for plan in plans:
        cores = figures.busy * plan["vcpu"]
        if role == "web":
            count, mb = max(1, math.ceil(wanted.peak / figures.web_per_vcpu / plan["vcpu"])), figures.web_mb
        elif role == "scheduler":
            count, mb = 1, figures.web_mb
        elif role == "workers":
            by_slots = math.ceil(wanted.slots / regular(figures.threads))
            count, mb = max(2, by_slots, math.ceil(wanted.waiting_cores / cores)), figures.worker_mb(figures.threads)
        else:
            mb = figures.worker_mb(25) + RESERVE_MB + wanted.heavy_mb
            count = max(2, math.ceil(wanted.heavy_cores / cores)) if wanted.heavy_cores else 0
        if plan["mb"] >= mb:
            found.append(Bought(role, count, plan))
    return found


def databases(figures: Figures, wanted: Need, plans: Iterable[Plan], connections: int) -> list[Bought]:
    """Those that are large enough."""
    found = []
    for plan in plans:
        usd_a_gb = plan.get("usd a GB")
        large = (
            plan["vcpu"] * figures.busy >= wanted.postgres_cores
            and plan["gb"]
            >= wanted.postgres_gb + connections * figures.assumed["MB of a connection to Postgres"] / 1000
            and plan["connections"] >= connections
            and (usd_a_gb is not None or plan["disk GB"] >= wanted.disk_gb)
        )
        if large:
            disk_usd = 0.0 if usd_a_gb is None else usd_a_gb * 5 * math.ceil(wanted.disk_gb / 5)
            found.append(Bought("Postgres", 1, plan, disk_usd))
    return found


def cheapest(figures: Figures, wanted: Need, platform: str) -> list[Bought] | None:
    """Of all ways to buy it there; None: no plan is large enough. Where the database has no pooler, one may stand before it."""
    plans = {part: of(platform, figures.plans[part]) for part in ("instances", "postgres", "redis")}
    roles = [instances(figures, wanted, plans["instances"], role) for role in ROLES]
    stores = [Bought("Redis", 1, plan) for plan in plans["redis"] if plan["mb"] * figures.busy >= wanted.redis_mb]
    pooler = Bought("pooler", 1, min(plans["instances"], key=lambda plan: plan["usd"]))
    best: list[Bought] | None = None
    for processes in itertools.product(*roles):
        web, workers, heavy, _ = processes
        connections = WEB * web.count + WORKER * (workers.count + heavy.count) + SCHEDULER + SPARE
        held = redis_connections(figures) * (workers.count + heavy.count + web.count)
        fit = [store for store in stores if store.plan.get("connections", math.inf) >= held]
        direct = databases(figures, wanted, plans["postgres"], connections)
        own = [plan for plan in plans["postgres"] if not plan.get("pooled")]
        pooled = databases(figures, wanted, own, figures.assumed["connections of a pooler to Postgres"])
        for before, found in (((), direct), ((pooler,), pooled)):
            for database, store in itertools.product(found, fit):
                way = [*processes, *before, database, store]
                if best is None or total(way) < total(best):
                    best = way
    return best


def redis_connections(figures: Figures) -> float:
    """Of a worker; of a producer as many are taken."""
    return float(figures.of("footprint.json", "rung by Redis/connections of a worker and a producer/redis")) / 2


def of(platform: str, plans: Iterable[Plan]) -> list[Plan]:
    return [plan for plan in plans if plan["platform"] == platform]


def total(way: Iterable[Bought]) -> float:
    return sum(each.usd for each in way)


def railway(figures: Figures, wanted: Need) -> dict[str, float]:
    """USD a month by what is used: memory all the time, processors on average of the day."""
    rate = figures.plans["by use"]["Railway"]
    workers = max(2, math.ceil(wanted.slots / regular(figures.threads)))
    heavy_at_once = max(2.0, wanted.heavy_cores) if wanted.heavy_cores else 0.0
    gb = (
        figures.web_mb * 3
        + figures.worker_mb(figures.threads) * workers
        + (figures.worker_mb(25) + wanted.heavy_mb) * heavy_at_once
        + max(250.0, 1000 * wanted.postgres_gb)
        + 20
        + wanted.redis_mb
    ) / 1000
    cores = (wanted.waiting_cores + wanted.heavy_cores + wanted.postgres_cores) / figures.assumed["peak of the mean"]
    return {
        f"memory, {gb:,.1f} GB": gb * rate["gb"],
        f"processors, {cores:,.2f} on average": cores * rate["vcpu"],
        f"disk of Postgres, {wanted.disk_gb:,.0f} GB": wanted.disk_gb * rate["disk GB"],
    }
