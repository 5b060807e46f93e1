"""Half an hour of steady load and no faults: does any process grow? Memory and open descriptors, every ten seconds.

Memory is what a process has filled itself (anonymous pages, also those that were swapped out). Its share of libraries' pages,
as in PSS, rises and falls with the neighbours that use them, too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

import psutil

import agentflow
from agentflow.prove import history, report
from agentflow.prove.load import Load
from agentflow.prove.plan import Options
from agentflow.prove.requests import Requests
from agentflow.prove.run import Copy, Say, private_copy

_SAMPLE_EVERY_S: Final = 10.0
#: What a slope may be over the last two thirds: there the caches are full and the pools have their size.
MB_PER_H: Final = 1.0
DESCRIPTORS: Final = 1
_BATCHES: Final = 0.1

Samples = dict[str, list[tuple[float, float, int]]]  # name of the process -> (second, MB, descriptors)


def soak(options: Options, say: Say = lambda _: None) -> dict[str, Any]:
    """Run it, write soak.json and soak.html into `options.out`, and return the report."""
    options.out.mkdir(parents=True, exist_ok=True)
    samples: Samples = {}
    with private_copy(options, say) as copy:
        load = Load(
            copy.url,
            copy.admin_key,
            Requests(options.seed, copy.receiver.port, [], batches=_BATCHES),
            jobs_per_minute=options.jobs_per_minute,
            seconds=options.seconds,
            journal=options.out / "submissions.jsonl",
        )
        began = datetime.now(UTC)
        load.start()
        stop = threading.Event()
        sampler = threading.Thread(target=_sample, args=(copy, samples, stop, load, options, say), daemon=True)
        sampler.start()
        time.sleep(options.seconds)
        stop.set()
        sampler.join()
        load.finish()
        with copy.servers.connect() as conn:
            ends = [moment.timestamp() - began.timestamp() for moment in history.successes(conn)]
    made = make(options, samples, accepted=load.jobs, ends=ends, began=began)
    (options.out / "soak.json").write_text(json.dumps(made, indent=1) + "\n")
    (options.out / "soak.html").write_text(page(made))
    return made


def make(
    options: Options, samples: Samples, *, accepted: int, ends: Sequence[float], began: datetime
) -> dict[str, Any]:
    within = [second for second in ends if second <= options.seconds]
    processes = {}
    for name, taken in samples.items():
        late = [sample for sample in taken if sample[0] >= options.seconds / 3]
        if len(late) < 3 or taken[0][0] > options.seconds / 3:
            continue  # it came later, or went
        hours = [second / 3600 for second, _, _ in late]
        processes[name] = {
            "mb_first": round(taken[0][1], 2),
            "mb_last": round(taken[-1][1], 2),
            "mb_per_h": round(statistics.linear_regression(hours, [mb for _, mb, _ in late]).slope, 3),
            "descriptors_last": taken[-1][2],
            "descriptors_more": _more_stay(late),
        }
    grows = [
        f"{name}: {p['mb_per_h']:+.2f} MB/h, {p['descriptors_more']:+d} descriptors"
        for name, p in processes.items()
        if abs(p["mb_per_h"]) > MB_PER_H or abs(p["descriptors_more"]) > DESCRIPTORS
    ]
    per_s = len(within) / options.seconds
    weak = (
        [f"{per_s:.0f} jobs a second of {options.jobs_per_minute / 60:.0f}"]
        if per_s < 0.95 * options.jobs_per_minute / 60
        else []
    )
    return {
        "verdict": report.WRONG if grows else report.WEAK if weak else report.OK,
        "version": agentflow.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[1], 1),
        "began": began.isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "accepted": accepted,
        "jobs_per_s": round(per_s, 1),
        "grows": grows,
        "weak": weak,
        "processes": processes,
        "samples": {name: [[round(s), round(mb, 2), n] for s, mb, n in taken] for name, taken in samples.items()},
    }


def _more_stay(late: Sequence[tuple[float, float, int]]) -> int:
    """How many more descriptors stay open at the end than at the beginning: what a running job opens it closes again, so
    the fewest of a sixth of the time count."""
    sixth = max(1, len(late) // 6)
    return min(n for _, _, n in late[-sixth:]) - min(n for _, _, n in late[:sixth])


def _sample(copy: Copy, samples: Samples, stop: threading.Event, load: Load, options: Options, say: Say) -> None:
    began = time.monotonic()
    while not stop.wait(max(0.0, _SAMPLE_EVERY_S - (time.monotonic() - began) % _SAMPLE_EVERY_S)):
        second = time.monotonic() - began
        for name, process in _processes(copy).items():
            with suppress(OSError, psutil.Error):
                samples.setdefault(name, []).append((second, _filled_mb(process.pid), process.num_fds()))
        say(f"{second:.0f} of {options.seconds:.0f} s: {load.jobs} jobs accepted")


def _processes(copy: Copy) -> dict[str, psutil.Process]:
    """The long-lived ones, by member and place in its family: `worker-1`, `worker-1.1` …"""
    found = {}
    for name, member in copy.crew.members.items():
        for n, process in enumerate(member.family()):
            with suppress(psutil.Error):
                if "agentflow.worker.child" not in " ".join(process.cmdline()):
                    found[f"{name}.{n}" if n else name] = process
    return found


def _filled_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Swap:"))) / 1024


# ---- the picture ----

_WIDTH, _HEIGHT, _LEFT = 1100, 260, 60
_COLOURS: Final = ("#2f6fde", "#d2542f", "#35749d", "#d48a13", "#6b5bb5", "#1a7f4b", "#b03a6a", "#68707a")


def page(made: Mapping[str, Any]) -> str:
    """A page that needs nothing else: memory and descriptors of each process over time."""
    words = {"ok": "Nothing grows", "wrong": "Something grows", "weak": "Nothing grows, but the load was not reached"}
    rows = "".join(
        f'<tr><td><i style="background:{_COLOURS[n % len(_COLOURS)]}"></i>{escape(name)}</td><td>{p["mb_last"]:.1f} MB</td>'
        f"<td>{p['mb_per_h']:+.2f} MB/h</td><td>{p['descriptors_last']}</td><td>{p['descriptors_more']:+d}</td></tr>"
        for n, (name, p) in enumerate(made["processes"].items())
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>agentflow prove --soak</title><style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 32px auto; padding: 0 24px }}
svg text {{ font: 12px system-ui, sans-serif; fill: currentColor; opacity: .7 }} td, th {{ text-align: left; padding: 4px 24px 4px 0 }}
i {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px }} h2 {{ font-size: 16px }}
</style></head><body><h1>{words[made["verdict"]]}</h1>
<p>{made["minutes"]:g} minutes at {made["jobs_per_s"]:g} jobs a second, {escape(made["machine"])}. Slopes over the last two thirds; descriptors that stay open.</p>
<h2>Memory, MB</h2>{_plot(made, 1)}<h2>Open descriptors</h2>{_plot(made, 2)}
<table><tr><th>process</th><th>memory</th><th>slope</th><th>descriptors</th><th>more</th></tr>{rows}</table></body></html>
"""


def _plot(made: Mapping[str, Any], column: int) -> str:
    lines = [made["samples"][name] for name in made["processes"]]
    values = [sample[column] for line in lines for sample in line]
    most, end = max([*values, 1]) * 1.1, made["minutes"] * 60
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%">']
    for share in (0, 0.5, 1):
        y = _HEIGHT - 24 - share * (_HEIGHT - 40)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{share * most:.0f}</text>')
    for minute in range(0, int(made["minutes"]) + 1, max(1, int(made["minutes"] / 10))):
        x = _LEFT + minute * 60 / end * (_WIDTH - _LEFT)
        parts.append(f'<text x="{x:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{minute} min</text>')
    for n, line in enumerate(lines):
        points = " ".join(
            f"{_LEFT + s[0] / end * (_WIDTH - _LEFT):.1f},{_HEIGHT - 24 - s[column] / most * (_HEIGHT - 40):.1f}"
            for s in line
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{_COLOURS[n % len(_COLOURS)]}" stroke-width="1.6"/>'
        )
    return "".join([*parts, "</svg>"])
