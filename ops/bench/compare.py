"""AgentFlow beside other job queues, on the same servers, with the same jobs, in turns: rates, latencies, memory, idle cost.

    .venv/bin/python ops/bench/compare.py [--quick] [--resume] [--rounds 3] [--peers agentflow,dramatiq] [--workloads drain]
    .venv/bin/python ops/bench/compare.py --kill       the drain with kill -9 of every worker in its middle: what is lost?
    .venv/bin/python ops/bench/compare.py --report     writes the tables and charts of what was measured anew

Installs the peers into an environment of their own (ops/bench/peers), starts private servers on the loopback, and goes through
the workloads, in each round with every system in turn. What was measured is kept after each trial, so that --resume goes on
where a run was cut off. A system that fails is noted with what it said, and the others go on. Writes
ops/bench/results/compare.json, compare.md and compare_*.svg; exit status 1 where a job of AgentFlow's was lost.

Needs RabbitMQ (/usr/lib/rabbitmq) and, for BullMQ, Node.js. Ratios within one run are to be trusted, not the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agentflow.worker.threads import regular  # noqa: E402
from ops.bench.comparison import intake, report, servers, trials  # noqa: E402
from ops.bench.comparison.crew import TrialFailed  # noqa: E402
from ops.bench.comparison.machine import keep, machine  # noqa: E402
from ops.bench.comparison.servers import Servers  # noqa: E402
from ops.bench.comparison.trials import Size  # noqa: E402
from ops.bench.peers import catalogue, installing  # noqa: E402
from ops.bench.peers.catalogue import Peer  # noqa: E402

WORKLOADS = ("drain", "sleep", "latency", "waits", "idle", "http")
#: Long ones, whose figures hardly differ between rounds.
ONCE = ("waits", "idle")
Trial = Callable[[Servers, Peer], dict[str, Any]]


def main() -> int:
    options = arguments()
    out: Path = options.out
    figures = kept(out) if options.resume or options.report or options.kill else {}
    if not options.report:
        peers = available(catalogue.named(options.peers))
        with servers.running() as started:
            figures |= {"machine": machine(), "versions": {**started.versions(), **installing.versions()}}
            figures.setdefault("options", {})["kill" if options.kill else "all"] = sizes(options)
            try:
                measure(started, peers, options, figures)
            except KeyboardInterrupt:
                print("cut off; --resume goes on from here")
    report.write(figures, out)
    print(out.with_suffix(".md").read_text())
    return 1 if report.lost(figures) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="comma-separated, of " + ", ".join(peer.name for peer in catalogue.PEERS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=10_000, help="of a drain")
    parser.add_argument("--sleep-jobs", type=int, default=2_000, help="jobs of 20 ms, for two processes with 8 slots")
    parser.add_argument("--pings", type=int, default=200, help="jobs one at a time")
    parser.add_argument("--wait-jobs", type=int, default=1_000, help="jobs, and slots, that wait at once")
    parser.add_argument("--wait-s", type=float, default=17.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=4_000, help="single submits over HTTP")
    parser.add_argument("--patience-s", type=float, default=300.0, help="after which a trial counts as failed")
    parser.add_argument("--quick", action="store_true", help="one round of small numbers: does everything work?")
    parser.add_argument("--kill", action="store_true", help="only the drain with kill -9 in its middle; the rest stays")
    parser.add_argument("--resume", action="store_true", help="keep what is measured in --out, and measure the rest")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/compare.json")
    options = parser.parse_args()
    if options.quick:
        small = {
            "rounds": 1,
            "jobs": 400,
            "sleep_jobs": 100,
            "pings": 20,
            "wait_jobs": 100,
            "wait_s": 2.0,
            "idle_s": 3.0,
        }
        vars(options).update(small, requests=300)
    options.workloads = ["kill"] if options.kill else options.workloads.split(",")
    if unknown := set(options.workloads) - {*WORKLOADS, "kill"}:
        parser.error(f"there is no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return options


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rounds", "jobs", "sleep_jobs", "pings", "wait_jobs", "wait_s", "idle_s", "requests")
    return {name: getattr(options, name) for name in names}


def kept(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found


def available(peers: list[Peer]) -> list[Peer]:
    installing.install_python()
    if any(peer.node for peer in peers) and (why := installing.install_node()):
        print(f"without BullMQ: {why}")
        return [peer for peer in peers if not peer.node]
    return peers


def measure(started: Servers, peers: list[Peer], options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Each round begins with another system, so that none always runs after the same one."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = figures.setdefault("cells", {})
    if options.kill:
        cells["kill"] = cells.get("kill", {}) if options.resume else {}
    doing = workloads(options)
    for number in range(options.rounds):
        first = number * len(peers) // options.rounds
        for name in options.workloads:
            if number and name in ONCE:
                continue
            rows = cells.setdefault(name, {})
            if name == "http":
                web(started, options, rows, number)
                keep(figures, options.out)
                continue
            for peer in peers[first:] + peers[:first]:
                rounds = rows.setdefault(peer.name, [])
                if is_missing(rounds, number):
                    found = tried(f"{number + 1} {name} {peer.name}", partial(doing[name], started, peer))
                    rounds[number:] = [found]
                    keep(figures, options.out)


def is_missing(rounds: list[dict[str, Any]], number: int) -> bool:
    return len(rounds) <= number or "failed" in rounds[number]


def workloads(options: argparse.Namespace) -> dict[str, Trial]:
    def size(jobs: int, **more: Any) -> Size:
        return replace(Size(jobs, patience_s=options.patience_s), **more)

    half = max(1, options.wait_jobs // 2)
    waiting = size(2 * half, ms=round(1000 * options.wait_s), slots=half)
    return {
        "drain": lambda started, peer: trials.drain(started, peer, size(options.jobs)),
        "kill": lambda started, peer: trials.kill(started, peer, size(options.jobs)),
        "sleep": lambda started, peer: trials.drain(
            started, peer, size(max(20, options.sleep_jobs * min(8, peer.slots_most) // 8), ms=20)
        ),
        "latency": lambda started, peer: trials.one_at_a_time(started, peer, size(options.pings)),
        "waits": lambda started, peer: trials.waits(started, peer, waiting),
        # One process with AgentFlow's usual 25 threads; two of those that take one job at a time.
        "idle": lambda started, peer: trials.idle(
            started,
            peer,
            size(0, processes=1 if peer.slots_most > 1 else 2, slots=regular(25) if peer.records else 25),
            options.idle_s,
        ),
    }


def web(started: Servers, options: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], number: int) -> None:
    sides = [rows.setdefault(name, []) for name in intake.SIDES]
    if not any(is_missing(rounds, number) for rounds in sides):
        return
    batches = max(2, options.jobs // intake.BATCH)
    told = tried(f"{number + 1} http", lambda: intake.measure(started, options.requests, batches, options.pings))
    for name, rounds in zip(intake.SIDES, sides, strict=True):
        rounds[number:] = [told if "failed" in told else told[name]]


def tried(what: str, measuring: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its figures, or why there are none."""
    began = time.monotonic()
    try:
        found = measuring()
    except (TrialFailed, OSError) as error:
        found = {"failed": str(error)}
    said = {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}
    print(f"[{time.monotonic() - began:5.1f} s] {what}: {said}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
