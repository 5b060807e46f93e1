"""What an hour of doing nothing leaves behind, with RabbitMQ restarted every two minutes.

    .venv/bin/python ops/bench/idle_hour.py [--minutes 60]

Starts web, scheduler and a worker with their default settings on a Postgres, a Valkey and a RabbitMQ of their own. Every
minute it counts the connections at the three servers, and the descriptors, threads, memory (PSS and USS) and CPU of each
process; health and metrics are asked every 10 s, as platforms do, and one ping a minute shows that it all still works. RabbitMQ
is stopped and started every two minutes, every second time by kill -9. At the end the first ten minutes after the warm-up are
compared with the last ten. Writes ops/bench/results/idle_hour.json and idle_hour.svg; `--chart` only draws anew. Ends with
status 1 when something has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from ops.bench.comparison.charts import lines  # noqa: E402 - found by the path above
from tests.fleet import Fleet, fleet  # noqa: E402
from tests.servers import Servers, production  # noqa: E402

RESULTS = ROOT / "ops/bench/results"
KEY = "idle-hour-operator-key"
WARM_UP_MINUTES = 5
RESTART_EVERY_MINUTES = 2
#: Restarts are so long after a full minute, when samples are taken: by the next one all are connected again.
RESTART_AFTER_S = 15.0
ASK_EVERY_S = 10.0
#: Growth of memory in an hour that is not called a leak: the allocator's, and what the first restarts load.
MEMORY_SLACK = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "idle_hour.json")
    parser.add_argument("--chart", action="store_true", help="draw the chart of --out, and nothing else")
    options = parser.parse_args()
    if not options.chart:
        figures = run(options.minutes, options.out)
    figures = json.loads(options.out.read_text())
    figures["verdict"] = verdict(figures["samples"])
    options.out.write_text(json.dumps(figures) + "\n")
    options.out.with_suffix(".svg").write_text(chart(figures))
    grown = table(figures)
    return 1 if grown else 0


def run(minutes: int, out: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "restarts": [],
        "samples": [],
    }
    with tempfile.TemporaryDirectory(prefix="agentflow-idle-") as folder, production() as servers:
        environment = {
            **servers.environment,
            "AGENTFLOW_ENV": "production",
            "AGENTFLOW_HOME": f"{folder}/home",
            "STORAGE_URL": Path(folder, "storage").as_uri(),
            "STORAGE_SHARED": "true",
            "ADMIN_API_KEY": KEY,
        }
        with fleet(environment, Path(folder)) as members:
            for member in (members.web(), members.scheduler(), members.worker(actors="actors")):
                member.wait_ready()
            watch(servers, members, minutes, figures, out)
            figures["log_lines"] = {
                name: Counter(line.split('"event": "')[-1].split('"')[0][:60] for line in m.process.text().splitlines())
                for name, m in members.members.items()
            }
            out.write_text(json.dumps(figures) + "\n")
    return figures


def watch(servers: Servers, members: Fleet, minutes: int, figures: dict[str, Any], out: Path) -> None:
    began = time.monotonic()
    cpu: dict[str, float] = {}
    for minute in range(minutes + 1):
        ask_until(members, began + 60 * minute)
        figures["samples"].append(sample(servers, members, minute, cpu))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures) + "\n")
        print(summary(figures["samples"][-1]), flush=True)
        if minute % RESTART_EVERY_MINUTES == 0 and minute < minutes:
            ask_until(members, began + 60 * minute + RESTART_AFTER_S)
            hard = minute // RESTART_EVERY_MINUTES % 2 == 1
            servers.rabbitmq.kill() if hard else servers.rabbitmq.stop()
            servers.rabbitmq.start()
            figures["restarts"].append({"minute": minute, "how": "kill -9" if hard else "stop"})


def ask_until(members: Fleet, end: float) -> None:
    """Health and metrics of everybody, as a platform and a Prometheus do."""
    while (left := end - time.monotonic()) > 0:
        for member in members.members.values():
            for path in ("/health/ready", "/metrics"):
                with suppress(httpx2.TransportError):
                    member.get(path)
        time.sleep(max(0.0, min(ASK_EVERY_S, left)))


def sample(servers: Servers, members: Fleet, minute: int, cpu: dict[str, float]) -> dict[str, Any]:
    connections = {
        server: dict(sorted(count_by_kind(clients(one.clients)).items()))
        for server, one in (("postgres", servers.postgres), ("redis", servers.redis), ("rabbitmq", servers.rabbitmq))
    }
    processes = {}
    for name, member in members.members.items():
        for role, process in roles(name, member.process.family()):
            with process.oneshot():
                memory = process.memory_full_info()
                used = sum(process.cpu_times()[:2])
                processes[role] = {
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "pss_mb": round(memory.pss / 1e6, 2),
                    "uss_mb": round(memory.uss / 1e6, 2),
                    "cpu_s": round(used - cpu.get(role, used), 2),  # since the last sample
                }
                cpu[role] = used
    return {"minute": minute, "connections": connections, "processes": processes, "ping": ping(members)}


def clients(ask: Callable[[], Counter[str]]) -> Counter[str]:
    """Asked again where the machine was too busy for an answer: an hour must not be lost by that."""
    for _ in range(4):
        with suppress(subprocess.TimeoutExpired, AssertionError, OSError):
            return ask()
    return ask()


def roles(name: str, family: list[psutil.Process]) -> list[tuple[str, psutil.Process]]:
    if len(family) == 1:
        return [(name, family[0])]
    children = sorted(family[1:], key=lambda process: process.pid)
    named = [(name if number == 0 else f"{name} child {number}", child) for number, child in enumerate(children)]
    return [(f"{name} parent", family[0]), *named]


def count_by_kind(clients: Counter[str]) -> Counter[str]:
    """`agentflow worker host 1234` of Postgres, `agentflow-worker-host-1234` of Redis: by kind."""
    kinds: Counter[str] = Counter()
    for name, count in clients.items():
        words = name.replace("-", " ").split()
        kinds[words[1] if words[:1] == ["agentflow"] and len(words) > 1 else name or "unnamed"] += count
    return kinds


def ping(members: Fleet) -> dict[str, Any]:
    with httpx2.Client(
        base_url=members.members["web"].url, headers={"Authorization": f"Bearer {KEY}"}, timeout=40
    ) as http:
        began = time.perf_counter()
        job = http.post("/api/jobs", json={"type": "ping", "payload": {}}).json()
        done = http.get(f"/api/jobs/{job['id']}", params={"wait": 20}).json()
    return {"state": done["state"], "round_trip_ms": round((time.perf_counter() - began) * 1000, 1)}


def summary(one: dict[str, Any]) -> str:
    connections = " ".join(f"{server} {sum(kinds.values())}" for server, kinds in one["connections"].items())
    processes = " ".join(
        f"{role}: {p['descriptors']} fd {p['threads']} thr {p['pss_mb']:.1f} MB {p['cpu_s']:.1f} s"
        for role, p in one["processes"].items()
        if "parent" not in role
    )
    return f"{one['minute']:3} min  {connections}  {processes}  ping {one['ping']}"


# ---- at the end ----


def series(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What is compared: name -> a value per sample."""
    found: dict[str, list[float]] = {}
    for server in ("postgres", "redis", "rabbitmq"):
        for kind in sorted({kind for one in samples for kind in one["connections"][server]}):
            found[f"{server} connections, {kind}"] = [one["connections"][server].get(kind, 0) for one in samples]
    for role in samples[-1]["processes"]:
        for measure in ("descriptors", "threads", "pss_mb", "uss_mb", "cpu_s"):
            found[f"{role} {measure}"] = [
                one["processes"][role][measure] for one in samples if role in one["processes"]
            ]
    return found


def verdict(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """For each series: the median at the start (after the warm-up) and at the end, and whether it grew."""
    warm = [one for one in samples if one["minute"] >= WARM_UP_MINUTES] or samples
    span = max(1, min(10, len(warm) // 3))
    found = {}
    for name, values in series(warm).items():
        start, end = statistics.median(values[:span]), statistics.median(values[-span:])
        if name.endswith("_mb"):
            grown = end > start * (1 + MEMORY_SLACK)
        elif name.endswith("cpu_s"):
            grown = end > start * 1.5 + 0.5
        else:  # a pool breathes; what counts is whether it is beyond what it was at the start
            grown = end > max(values[:span])
        found[name] = {"start": start, "end": end, "least": min(values), "most": max(values), "grown": grown}
    return found


def table(figures: dict[str, Any]) -> list[str]:
    samples = figures["samples"]
    print(
        f"\n{figures['machine']}; {samples[-1]['minute']} minutes, RabbitMQ restarted {len(figures['restarts'])} times"
    )
    print(f"{'':44} {'start':>9} {'end':>9} {'least':>9} {'most':>9}")
    for name, each in figures["verdict"].items():
        mark = "  GREW" if each["grown"] else ""
        values = " ".join(f"{each[column]:9.2f}" for column in ("start", "end", "least", "most"))
        print(f"{name:44} {values}{mark}")
    pings = [one["ping"] for one in samples]
    print(
        f"pings: {Counter(p['state'] for p in pings)}, median {statistics.median(p['round_trip_ms'] for p in pings)} ms"
    )
    return [name for name, each in figures["verdict"].items() if each["grown"]]


def chart(figures: dict[str, Any]) -> str:
    """Four small charts below each other: connections, descriptors, threads, memory."""
    samples = figures["samples"]
    found = series(samples)
    roles_ = [role for role in samples[-1]["processes"] if "parent" not in role]
    totals = {
        server: [float(sum(one["connections"][server].values())) for one in samples]
        for server in ("postgres", "redis", "rabbitmq")
    }
    charts = [("connections at the server", totals)]
    for measure, title in (("descriptors", "descriptors"), ("threads", "threads"), ("pss_mb", "memory, PSS in MB")):
        charts.append((title, {role: found[f"{role} {measure}"] for role in roles_}))
    minutes = [float(one["minute"]) for one in samples]
    drawn = [
        (title, {name: list(zip(minutes, values, strict=False)) for name, values in named.items()})
        for title, named in charts
    ]
    return lines(drawn, samples[-1]["minute"])


if __name__ == "__main__":
    sys.exit(main())
