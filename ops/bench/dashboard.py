"""What open dashboards cost: one on an idle system, and fifty beside the intake of jobs.

    .venv/bin/python ops/bench/dashboard.py [--seconds 60] [--open 50] [--rate 50] [--rounds 5]

Starts private servers, and web as gunicorn runs it. An open dashboard is a visitor who has signed in and looks at the overview:
the page, then its parts as often as the page says (`data-every`) and its charts. First the processor time of web and of the
servers with none and with one of them; then rounds of single submits at a steady rate, in turns without and with many of them.
Writes ops/bench/results/dashboard.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import psutil
from idle import BIN, ROOT, family, machine, servers
from private import private_system

from agentflow.prove.ports import free_port
from ops.bench.comparison.figures import quantile
from ops.bench.comparison.intake import Client, Request

KEY = "bench-operator-key-0123456789"
_CHARTS = re.compile(r'data-points="([^"]+)"')
#: As charts.js has it.
_CHARTS_EVERY_S = 15
_PART = re.compile(r'data-every="(\d+)" hx-get="([^"]+)"')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement of an idle system")
    parser.add_argument("--open", type=int, default=50, help="dashboards beside the intake")
    parser.add_argument("--rate", type=float, default=50.0, help="submits a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/dashboard.json")
    options = parser.parse_args()
    with private_system(ADMIN_API_KEY=KEY) as (system, environment), web(environment) as (port, process):
        home = Path(environment["AGENTFLOW_HOME"])
        figures = {
            "machine": machine(),
            "idle": idle(port, process.pid, home, options.seconds),
            **intake(port, options),
        }
        system.close()
    kept = {
        "one open dashboard costs less than 1 % of a core": figures["idle"]["one_costs_percent_of_a_core"] < 1,
        f"{options.open} leave the intake's p99 within 1.5 times": figures["p99_ratio"] <= 1.5,
    }
    options.out.write_text(json.dumps({**figures, "kept": kept}, indent=2) + "\n")
    print(options.out.read_text())
    return 0 if all(kept.values()) else 1


@contextmanager
def web(environment: dict[str, str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"]
    told = {**os.environ, **environment, "PORT": str(port)}
    with (Path(environment["AGENTFLOW_HOME"]) / "web.log").open("ab") as log:
        process = subprocess.Popen(command, env=told, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                    break
            except OSError:
                if time.monotonic() > end:
                    raise SystemExit("web is not ready within 60 s") from None
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


class Visitor:
    """A browser with the overview open, until `leave`. `looks` counts its requests, `wrong` holds what went wrong."""

    def __init__(self, port: int) -> None:
        self.looks = 0
        self.wrong: list[str] = []
        self._base = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def come(self) -> None:
        form = urllib.parse.urlencode({"key": KEY}).encode()
        request = urllib.request.Request(f"{self._base}/dashboard/sign-in", form, {"Sec-Fetch-Site": "same-origin"})
        with self._opener.open(request, timeout=30) as answer:
            page = answer.read().decode()
        parts = [(int(every), unescape(path)) for every, path in _PART.findall(page)]
        charts = _CHARTS.search(page)
        if not parts or charts is None:
            raise SystemExit("the overview has no part that is looked at again, or no charts")
        parts.append((_CHARTS_EVERY_S, f"{unescape(charts[1])}?window=1h"))
        for every, path in parts:
            thread = threading.Thread(target=self._follow, args=(every, path), daemon=True)
            self._threads.append(thread)
            thread.start()

    def leave(self) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, every_s: float, path: str) -> None:
        pause = random.uniform(0, every_s)  # they were not opened at one moment
        while not self._left.wait(pause):
            try:
                self._get(path)
            except OSError as error:
                self.wrong.append(f"{path}: {error}")
            self.looks += 1
            pause = every_s

    def _get(self, path: str) -> str:
        request = urllib.request.Request(self._base + path, headers={"HX-Request": "true"})
        with self._opener.open(request, timeout=30) as answer:
            return str(answer.read().decode())


@contextmanager
def opened(port: int, count: int) -> Iterator[list[Visitor]]:
    visitors = [Visitor(port) for _ in range(count)]
    try:
        for visitor in visitors:
            visitor.come()
        yield visitors
    finally:
        for visitor in visitors:
            visitor.leave()
    wrong = [problem for visitor in visitors for problem in visitor.wrong]
    if wrong:
        raise SystemExit(f"a look at the dashboard failed: {wrong[0]}")


def idle(port: int, pid: int, home: Path, seconds: float) -> dict[str, Any]:
    """Percent of a core of web and of the servers, without a dashboard and with one."""
    time.sleep(5)  # what a start leaves to do
    without = percent_of_a_core(pid, home, seconds)
    with opened(port, 1) as (visitor,):
        time.sleep(2)
        before = visitor.looks
        beside = percent_of_a_core(pid, home, seconds)
        looks = visitor.looks - before
    return {
        "seconds": seconds,
        "without_percent_of_a_core": round(without, 2),
        "with_one_percent_of_a_core": round(beside, 2),
        "one_costs_percent_of_a_core": round(beside - without, 2),
        "looks": looks,
    }


def percent_of_a_core(pid: int, home: Path, seconds: float) -> float:
    def used() -> dict[tuple[int, float], float]:
        found = {}
        for each in [*family(pid), *servers(home)]:
            try:
                found[each.pid, each.create_time()] = sum(each.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return found

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    after = used()
    spent = sum(value - before.get(key, 0.0) for key, value in after.items())
    return 100 * spent / (time.monotonic() - began)


def intake(port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of single submits in rounds, in turns without and with open dashboards; the median of the rounds' ratios."""
    submits(port, options.rate, 3)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        each = {}
        for name, count in (("without", 0), ("with", options.open)):
            with ExitStack() as stack:
                if count:
                    stack.enter_context(opened(port, count))
                    time.sleep(2)
                each[name] = submits(port, options.rate, options.round_seconds)
        rounds.append(each)
    ratios = sorted(each["with"]["p99_ms"] / each["without"]["p99_ms"] for each in rounds)
    return {
        "open": options.open,
        "rate_per_s": options.rate,
        "rounds": rounds,
        "p99_ratio": round(quantile(ratios, 0.5), 2),
        "p99_ratios": [round(each, 2) for each in ratios],
    }


def submits(port: int, rate: float, seconds: float) -> dict[str, float]:
    """One connection; a submit that is due while the one before is under way waits, and its time counts from when it was due."""
    request = Request("/api/jobs", {"type": "ping", "payload": {}}, KEY)
    took = []
    with Client(port) as client:
        began = time.monotonic()
        for n in range(int(rate * seconds)):
            due = began + n / rate
            time.sleep(max(0.0, due - time.monotonic()))
            status, body = client.send(request.raw)
            took.append(1000 * (time.monotonic() - due))
            if status != 202:
                raise SystemExit(f"a submit was answered {status}: {body[:300]!r}")
    return {"p50_ms": round(quantile(took, 0.5), 2), "p99_ms": round(quantile(took, 0.99), 2)}


if __name__ == "__main__":
    sys.exit(main())
