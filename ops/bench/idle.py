"""What an idle system costs and how fast it answers: pick-up of single pings, memory (PSS) and CPU of each process kind.

    .venv/bin/python ops/bench/idle.py [--pings 200] [--seconds 60]

Starts `agentflow up` on a home of its own, then `gunicorn` alone on the same one; prints a table and writes
ops/bench/results/idle.json. The embedded servers are counted apart. Pick-up is started_at − run_at by the database's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from agentflow.prove.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
SERVERS = ("postgres", "valkey-server", "keeper.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pings", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long idle CPU is watched")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/idle.json")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    home.chmod(0o755)
    try:
        figures = {"machine": machine(), **all_in_one(home, options.pings, options.seconds), **web_alone(home)}
    finally:
        shutil.rmtree(home, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:32} {value}")


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def all_in_one(home: Path, pings: int, seconds: float) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "agentflow.cli", "up", "--port", str(port)]
    with running(command, home, port) as process:
        key = (home / "admin.key").read_text().strip()
        for _ in range(5):
            ping(port, key)
        jobs = []
        for _ in range(pings):
            time.sleep(random.uniform(0.05, 0.15))
            jobs.append(ping(port, key))
        time.sleep(3)
        cpu = idle_cpu(process.pid, seconds)
        return {
            "pick-up p50 ms": round(statistics.median(pick_up_ms(job) for job in jobs), 1),
            "pick-up p95 ms": round(statistics.quantiles([pick_up_ms(job) for job in jobs], n=20)[18], 1),
            "pick-up max ms": round(max(pick_up_ms(job) for job in jobs), 1),
            "round trip p50 ms": round(statistics.median(job["round_trip_s"] * 1000 for job in jobs), 1),
            "all-in-one PSS MB": pss_mb(family(process.pid)),
            "all-in-one idle CPU %": round(cpu, 2),
            "servers PSS MB": pss_mb(servers(home)),
        }


def web_alone(home: Path) -> dict[str, Any]:
    port = free_port()
    command = [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"]
    with running(command, home, port) as process:
        for _ in range(20):
            get(port, "/openapi.json", None)
        return {"web alone PSS MB": pss_mb(family(process.pid))}


@contextmanager
def running(command: list[str], home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "AGENTFLOW_HOME": str(home), "PORT": str(port), "AGENTFLOW_ENV": "production"}
    for name in ("DATABASE_URL", "REDIS_URL", "ADMIN_API_KEY", "STORAGE_URL"):
        environment.pop(name, None)
    with (home / "bench.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if get(port, "/health/ready", None):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit(f"not ready within 60 s:\n{(home / 'bench.log').read_text()[-3000:]}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ping(port: int, key: str) -> dict[str, Any]:
    started = time.perf_counter()
    body = json.dumps({"type": "ping", "payload": {}}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/jobs",
        body,
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        job = json.load(answer)
    done: dict[str, Any] = get(port, f"/api/jobs/{job['id']}?wait=10", key)
    assert done["state"] == "succeeded", done
    done["round_trip_s"] = time.perf_counter() - started
    return done


def get(port: int, path: str, key: str | None) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)) as answer:
        return json.load(answer)


def pick_up_ms(job: dict[str, Any]) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(job["started_at"]) - datetime.fromisoformat(job["run_at"])).total_seconds() * 1000


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it, without the embedded servers (which are not below it anyway)."""
    parent = psutil.Process(pid)
    return [p for p in [parent, *parent.children(recursive=True)] if not is_server(p)]


def servers(home: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if is_server(p) and belongs_to(p, home)]


def is_server(process: psutil.Process) -> bool:
    try:
        return any(name in " ".join(process.cmdline()[:5]) for name in SERVERS)
    except psutil.Error:
        return False


def belongs_to(process: psutil.Process, home: Path) -> bool:
    try:
        around = " ".join([*process.cmdline(), process.cwd(), *(p.cwd() for p in process.parents()[:1])])
        return str(home) in around
    except psutil.Error:
        return False


def pss_mb(processes: list[psutil.Process]) -> float:
    return round(sum(p.memory_full_info().pss for p in processes) / 1e6, 1)


def idle_cpu(pid: int, seconds: float) -> float:
    """Percent of one core, over all processes of the family."""

    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in family(pid))

    before, started = used(), time.monotonic()
    time.sleep(seconds)
    return 100 * (used() - before) / (time.monotonic() - started)


if __name__ == "__main__":
    main()
