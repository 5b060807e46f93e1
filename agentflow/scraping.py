"""What `/metrics` answers: what each process of those that share the port counts, and what the whole installation does, once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge

from agentflow import gauges, health, metrics, siblings
from agentflow.siblings import Siblings

if TYPE_CHECKING:
    from agentflow.system import System

_JOBS = ("total", "completed", "failed", "processing")
_of_systems: weakref.WeakKeyDictionary[System, Siblings] = weakref.WeakKeyDictionary()


def join(system: System) -> None:
    """This process shares its port with others of the same parent: they are asked with it from now on."""
    known = weakref.ref(system)

    def report() -> dict[str, Any]:
        system = known()
        return _report(system) if system is not None else {}

    _of_systems[system] = joined = Siblings(report)
    joined.join()


def leave(system: System) -> None:
    if system in _of_systems:
        _of_systems[system].leave()


def document(system: System) -> dict[str, Any]:
    """The JSON form: the connections as this process sees them, and the jobs of all that share the port."""
    connections = health.of(system).connections()
    told = _ask(system).reports
    counts = sum_jobs(report["jobs"] for report in told.values()) if told else metrics.jobs()
    return {**{name: each.view() for name, each in connections.items()}, "jobs": counts}


def text(system: System, *, own: bool = True, shared: bool = True) -> bytes:
    """The text form. `own`: of the processes; `shared`: of the installation, without the database's part while that is away."""
    is_there = health.of(system).connections()["database"].connected  # the checks bring the statuses up to date
    return (_own(system) if own else b"") + (gauges.text(system, ask=is_there) if shared else b"")


def sum_jobs(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    each = list(counts)
    return {name: sum(count.get(name, 0) for count in each) for name in _JOBS}


def _own(system: System) -> bytes:
    told = _ask(system)
    if not told.reports:
        return metrics.own_text(system)
    merged = siblings.side_by_side((number, report["text"]) for number, report in told.reports.items())
    registry = CollectorRegistry()
    processes = Gauge("agentflow_processes", "Processes that share this port", ["state"], registry=registry)
    processes.labels("answering").set(len(told.reports))
    processes.labels("silent").set(len(told.silent))
    return merged.encode() + prometheus_client.generate_latest(registry)


def _ask(system: System) -> siblings.Told:
    return _of_systems[system].ask() if system in _of_systems else siblings.Told()


def _report(system: System) -> dict[str, Any]:
    health.of(system).connections()
    return {"jobs": metrics.jobs(), "text": metrics.own_text(system).decode()}
