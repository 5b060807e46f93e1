"""Tables, charts, and what the figures say to the targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from ops.bench.comparison.charts import bars
from ops.bench.comparison.figures import Round, ratios, shown, values_of
from ops.bench.peers.catalogue import PEERS

Cells = dict[str, dict[str, list[Round]]]

#: Of each workload: its heading, and its columns with the figures' names.
TABLES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "drain": (
        "Jobs that do nothing: handed in by one process, then run by two with 8 slots each",
        {
            "jobs_per_s": "run, jobs/s",
            "jobs_per_s_in_the_middle": "10–90 %, jobs/s",
            "submit_per_s": "one by one, jobs/s",
            "submit_many_per_s": "in batches, jobs/s",
            "workers_cpu_us": "workers, µs/job",
            "postgres_cpu_us": "Postgres, µs/job",
            "rabbitmq_cpu_us": "RabbitMQ, µs/job",
            "redis_cpu_us": "Redis, µs/job",
            "foreign_cores": "others, cores",
        },
    ),
    "sleep": (
        "Jobs that wait 20 ms, two processes with 8 slots each (of those without threads: 1)",
        {"jobs_per_s": "jobs/s", "share_of_ideal": "of slots / 20 ms", "workers_cpu_us": "workers, µs/job"},
    ),
    "latency": (
        "One job at a time, milliseconds from before the call",
        {
            "call_p50_ms": "call, p50",
            "pick_up_p50_ms": "pick-up, p50",
            "pick_up_p99_ms": "p99",
            "round_trip_p50_ms": "round trip with the result, p50",
            "round_trip_p99_ms": "p99",
        },
    ),
    "waits": (
        "All at once: jobs that wait for seconds, a slot for each, two processes",
        {
            "jobs_per_s": "jobs/s",
            "share_of_slots": "of slots / (wait + 0.5 s)",
            "all_begun_after_s": "all begun after, s",
            "pss_mb": "memory, MB",
            "kb_per_slot": "a slot, kB",
            "threads": "threads",
            "postgres_connections": "connections to Postgres",
            "redis_connections": "to Redis",
            "rabbitmq_connections": "to RabbitMQ",
        },
    ),
    "idle": (
        "Idle: one process with 25 slots (of those without threads: two)",
        {
            "processes": "processes",
            "pss_mb": "memory (PSS of all), MB",
            "idle_cpu_percent": "processor, % of a core",
            "idle_cpu_percent_per_process": "a process",
            "postgres_cpu_percent": "Postgres",
            "redis_cpu_percent": "Redis",
            "rabbitmq_cpu_percent": "RabbitMQ",
        },
    ),
    "http": (
        "HTTP intake: a bare Flask view that inserts a row, and single submits with a customer's key; one gunicorn process each",
        {
            "per_s_at_16": "16 connections, requests/s",
            "p50_ms_at_16": "p50, ms",
            "p99_ms_at_16": "p99, ms",
            "per_s_at_1": "1 connection, requests/s",
            "p99_ms_at_1": "p99, ms",
            "batch_jobs_per_s": "batches of 1,000, jobs/s",
            "long_poll_p50_ms": "round trip by `Prefer: wait`, p50, ms",
            "long_poll_p99_ms": "p99, ms",
        },
    ),
    "kill": (
        "kill -9 of every worker in the middle of the drain, then started again",
        {
            "jobs": "jobs",
            "done_at_the_kill": "done at the kill",
            "under_way_at_the_kill": "under way",
            "lost": "lost",
            "ran_twice": "ran twice",
            "not_recorded": "not recorded",
        },
    ),
}
_CHARTS: Final = (
    ("drain", "jobs_per_s", "Jobs that do nothing, jobs/s"),
    ("latency", "pick_up_p50_ms", "Pick-up of a single job, ms (p50)"),
    ("idle", "pss_mb", "Memory of a worker with 25 slots, MB"),
)


class Target(NamedTuple):
    """What `found` gives of the cells is wanted to be at least, or at most, `bound`."""

    what: str
    found: Callable[[Cells], list[float]]
    bound: float
    at_least: bool = True


def _of(workload: str, name: str, peer: str = "agentflow") -> Callable[[Cells], list[float]]:
    return lambda cells: values_of(cells.get(workload, {}).get(peer, []), name)


def _ratio(workload: str, name: str, to: str) -> Callable[[Cells], list[float]]:
    def found(cells: Cells) -> list[float]:
        rows = cells.get(workload, {})
        return ratios(rows.get("agentflow", []), rows.get(to, []), name)

    return found


TARGETS: Final = (
    Target("drain, of bare Dramatiq's", _ratio("drain", "jobs_per_s", "dramatiq"), 0.6),
    Target("drain, of Celery's (threads)", _ratio("drain", "jobs_per_s", "celery-threads"), 1.3),
    Target("drain, of Procrastinate's", _ratio("drain", "jobs_per_s", "procrastinate"), 3.0),
    Target("drain, of RQ's", _ratio("drain", "jobs_per_s", "rq"), 4.0),
    Target("`submit_many`, jobs/s", _of("drain", "submit_many_per_s"), 10_000),
    Target("batches over HTTP, jobs/s", _of("http", "batch_jobs_per_s"), 4_000),
    Target("single submits over HTTP, of the bare view's rate", _ratio("http", "per_s_at_16", "bare view"), 0.7),
    Target("their p99, of the bare view's", _ratio("http", "p99_ms_at_16", "bare view"), 1.5, at_least=False),
    Target("pick-up p50, ms", _of("latency", "pick_up_p50_ms"), 4, at_least=False),
    Target("pick-up p99, ms", _of("latency", "pick_up_p99_ms"), 15, at_least=False),
    Target("round trip by long-poll p50, ms", _of("http", "long_poll_p50_ms"), 10, at_least=False),
    Target("idle, % of a core for each process", _of("idle", "idle_cpu_percent_per_process"), 0.5, at_least=False),
    Target("worker with 25 threads, MB", _of("idle", "pss_mb"), 110, at_least=False),
    Target("waiting jobs, of slots / (wait + 0.5 s)", _of("waits", "share_of_slots"), 0.9),
    Target("lost by kill -9 in a drain", _of("kill", "lost"), 0, at_least=False),
)


def write(figures: dict[str, Any], out: Path) -> None:
    """The JSON with the verdicts, the tables as Markdown, and a chart for each of three workloads."""
    cells: Cells = figures.get("cells", {})
    figures["targets"] = [verdict for target in TARGETS if (verdict := _verdict(target, cells))]
    out.write_text(json.dumps(figures, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(figures, cells))
    for workload, name, title in _CHARTS:
        rows = {_title(peer): values_of(rounds, name) for peer, rounds in cells.get(workload, {}).items()}
        if any(rows.values()):
            out.with_name(f"{out.stem}_{workload}.svg").write_text(bars(title, rows))


def lost(figures: dict[str, Any]) -> bool:
    """Whether any job of AgentFlow's was lost, or not recorded, by a kill."""
    rows = figures.get("cells", {}).get("kill", {})
    return any(
        each.get("lost") or each.get("not_recorded")
        for name, rounds in rows.items()
        if name.startswith("agentflow")
        for each in rounds
    )


def _verdict(target: Target, cells: Cells) -> dict[str, Any] | None:
    values = target.found(cells)
    if not values:
        return None
    middle = statistics.median(values)
    met = middle >= target.bound if target.at_least else middle <= target.bound
    return {"what": target.what, "bound": target.bound, "at_least": target.at_least, "values": values, "met": met}


def _markdown(figures: dict[str, Any], cells: Cells) -> str:
    machine, versions = figures.get("machine", {}), figures.get("versions", {})
    parts = [
        "# AgentFlow beside other job queues",
        f"{machine.get('processor')}; {machine.get('system')}; Python {machine.get('python')}; {machine.get('at')}; load at the"
        f" start {machine.get('load_at_start')}; a flush to disk takes {machine.get('flush_ms')} ms."
        f" {', '.join(f'{name} {value}' for name, value in versions.items())}."
        " Medians; in brackets the least, the most and the rounds. Machines differ and drift: compare within a table, not with"
        " another day's. Made by `ops/bench/compare.py`.",
    ]
    if figures.get("targets"):
        parts += ["## Targets", _table(["", "wanted", "found", ""], [_target_row(each) for each in figures["targets"]])]
    for workload, (heading, columns) in TABLES.items():
        rows = cells.get(workload, {})
        if rows:
            parts += [f"## {heading}", _figures_table(rows, columns)]
    if len(drained := cells.get("drain", {})) > 1:
        parts += ["## The drain, as a ratio to bare Dramatiq in the same round", _ratios_table(drained)]
    settings = [
        [peer.title, f"{peer.stores}", "; ".join(f"{what} [↗]({page})" for what, page in peer.settings)]
        for peer in PEERS
    ]
    parts += ["## Settings", _table(["", "keeps jobs in", "settings, with the vendor's page"], settings)]
    return "\n\n".join(parts) + "\n"


def _target_row(verdict: dict[str, Any]) -> list[str]:
    bound = f"{'≥' if verdict['at_least'] else '≤'} {verdict['bound']:,g}"
    return [verdict["what"], bound, shown(verdict["values"]), "met" if verdict["met"] else "**missed**"]


def _figures_table(rows: dict[str, list[Round]], columns: dict[str, str]) -> str:
    used = {name: title for name, title in columns.items() if any(values_of(rounds, name) for rounds in rows.values())}
    lines = []
    for peer, rounds in rows.items():
        why = next((each.get("failed") or each.get("skipped") for each in rounds if each), None)
        if why and not any(values_of(rounds, name) for name in used):
            lines.append([_title(peer), _short(why), *[""] * (len(used) - 1)])
        else:
            lines.append([_title(peer), *(shown(values_of(rounds, name)) for name in used)])
    return _table(["", *used.values()], lines)


def _ratios_table(rows: dict[str, list[Round]]) -> str:
    base = rows.get("dramatiq", [])
    found = {peer: ratios(rounds, base, "jobs_per_s") for peer, rounds in rows.items()}
    return _table(["", "ratio"], [[_title(peer), shown(values)] for peer, values in found.items() if values])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}…"


def _title(name: str) -> str:
    return next((peer.title for peer in PEERS if peer.name == name), name)
