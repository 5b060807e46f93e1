"""Renders through one worker: how soon one begins after the one before has ended, and whether thousands leave anything behind.

    .venv/bin/python ops/bench/renders.py [--rounds 200] [--renders 20000] [--out …]

Starts private servers, a ComfyUI of the tests and one worker process. Pick-up: `--rounds` renders of 0.2 s wait in line for one
GPU; counted at the ComfyUI, from the end of a run to the beginning of the next. Soak: `--renders` small ones; each 5 s what the
worker holds (PSS, descriptors, threads; without the children of jobs, which come and go), and what of it the ComfyUI sees
(connections). Flat is: the last fifth's median is no more than 2 % of memory and 2 descriptors above that of the second fifth.
Writes ops/bench/results/renders.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fairness import BIN, LASTING, ROOT
from idle import machine
from private import private_system

from agentflow.prove.ports import free_port

sys.path.insert(0, str(ROOT))
import actors  # noqa: F401 - registers the job that renders
from agentflow.jobs.requests import NewJob
from agentflow.system import System
from tests.comfyui_server import Comfy, comfyui

ORGANIZATION = 1
SAMPLE_EVERY_S = 5.0
BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="renders of which the pick-up is measured")
    parser.add_argument("--renders", type=int, default=20_000, help="renders of the soak; 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/renders.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="agentflow-comfyui-") as folder, comfyui(Path(folder)) as comfy:
        with private_system(**LASTING) as (system, environment):
            with worker(system, {**environment, "COMFYUI_URL": comfy.url}) as process:
                figures["pick-up"] = pick_up(system, comfy, options.rounds)
                if options.renders:
                    figures["soak"] = soak(system, comfy, process, options.renders)
    figures["kept"] = {
        "the next render begins within 100 ms": figures["pick-up"]["p95 ms"] < 100,
        **figures.get("soak", {}).pop("kept", {}),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        for detail, figure in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name:10} {detail:44} {figure}")


def pick_up(system: System, comfy: Comfy, rounds: int) -> dict[str, Any]:
    comfy.durations = {"ImageInvert": 0.2}
    submit(system, range(rounds))
    wait_until_ended(system)
    comfy.durations = {}
    runs = sorted(comfy.runs, key=lambda run: run.began_at)
    gaps = [(after.began_at - run.ended_at) * 1000 for run, after in pairwise(runs)]
    comfy.runs.clear()
    return {
        "renders": rounds,
        "p50 ms": round(statistics.median(gaps), 1),
        "p95 ms": round(statistics.quantiles(gaps, n=20)[18], 1),
        "max ms": round(max(gaps), 1),
    }


def soak(system: System, comfy: Comfy, process: psutil.Process, renders: int) -> dict[str, Any]:
    began = time.monotonic()
    samples = []
    for first in range(0, renders, BATCH):
        submit(system, range(first, min(renders, first + BATCH)))
        while open_jobs(system) > BATCH // 5:
            time.sleep(SAMPLE_EVERY_S)
            samples.append(held(process, comfy))
            comfy.runs.clear()
    wait_until_ended(system)
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    before, after = (
        {name: statistics.median(sample[name] for sample in part) for name in samples[0]} for part in (early, late)
    )
    most = max(sample["connections"] for sample in samples)
    return {
        "renders": renders,
        "renders a second": round(renders / (time.monotonic() - began), 1),
        "succeeded": counted(system, "state = 'succeeded' and type = 'comfy_render'"),
        "samples": len(samples),
        **{f"{name}, second fifth": round(value, 1) for name, value in before.items()},
        **{f"{name}, last fifth": round(value, 1) for name, value in after.items()},
        "connections at most": most,
        "kept": {
            "memory is flat": after["PSS MB"] <= before["PSS MB"] * 1.02,
            "descriptors are flat": after["descriptors"] <= before["descriptors"] + 2,
            "at most 5 connections": most <= 5,
        },
    }


def held(process: psutil.Process, comfy: Comfy) -> dict[str, float]:
    family = [process, *(each for each in process.children(recursive=True) if not of_a_job(each))]
    pss = descriptors = threads = 0
    for each in family:
        with suppress(psutil.NoSuchProcess):
            pss += each.memory_full_info().pss
            descriptors += each.num_fds()
            threads += each.num_threads()
    return {"PSS MB": pss / 1e6, "descriptors": descriptors, "threads": threads, "connections": comfy.server.open_now}


def of_a_job(process: psutil.Process) -> bool:
    try:
        return "agentflow.worker.child" in process.cmdline()
    except psutil.NoSuchProcess:
        return True


def submit(system: System, numbers: Sequence[int]) -> None:
    prepared = [
        system.prepare(ORGANIZATION, NewJob("comfy_render", {"graph": graph(n)}), public_only=False) for n in numbers
    ]
    with system.transaction() as transaction:
        transaction.submit_many(ORGANIZATION, prepared)


def graph(color: int) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "out"}},
    }


def open_jobs(system: System) -> int:
    return counted(system, "state in ('queued', 'running') and type = 'comfy_render'")


def counted(system: System, where: str) -> int:
    with system.database.connection() as conn:
        row = conn.execute(f"select count(*) from agentflow.jobs where {where}".encode()).fetchone()  # noqa: S608
    return int(row[0]) if row else 0


def wait_until_ended(system: System, within_s: float = 3600) -> None:
    end = time.monotonic() + within_s
    while open_jobs(system):
        if time.monotonic() > end:
            raise SystemExit(f"{open_jobs(system)} renders have not ended within {within_s:g} s")
        time.sleep(0.5)


@contextmanager
def worker(system: System, environment: dict[str, str]) -> Iterator[psutil.Process]:
    log = Path(environment["AGENTFLOW_HOME"]) / "worker.log"
    command = [str(BIN / "dramatiq"), "actors", "--path", str(ROOT), "--processes", "1", "--threads", "8"]
    more = {"WORKER_LOG_LEVEL": "WARNING", "PORT": str(free_port())}
    with log.open("wb") as file:
        started = subprocess.Popen(
            command, env={**os.environ, **environment, **more}, cwd=ROOT, stdout=file, stderr=file
        )
    try:
        yield psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait(60)
        print(log.read_text()[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
