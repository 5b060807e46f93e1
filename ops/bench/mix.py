"""An hour of everything at once: twice the mean of five million jobs a day, and a quarter of an hour at four times that.

    .venv/bin/python ops/bench/mix.py [--minutes 60] [--rate 116] [--surge 4] [--surge-minutes 15]
    .venv/bin/python ops/bench/mix.py --alone 10            what a letter of each kind costs by itself

Starts the production tier on this machine: Postgres as `agentflow up` brings it (durable), Valkey (appendfsync everysec),
RabbitMQ, web, scheduler and two workers with their default settings, the outside services of ops/bench/mixing/vendors.py, and who
hands work in. ops/bench/mixing/letters.py has the kinds and their shares; what comes in is Poisson, by the public API with
customers' keys and by signed webhooks, and does not wait for what came before. The surge is in the middle. All of it shares the
cores of this machine.

Once a minute: what was handed in and ended, pick-up and time in the system by kind, how soon who hands in was answered, memory
and processor of each process, connections, sizes and dead rows of tables. In the end each job that was accepted is looked up.
Writes ops/bench/results/mix.json (after each minute) and mix.svg. Ends with status 1 when something was lost or done twice, or
when memory has grown; whether the times were kept is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from agentflow.prove.clip import write_clip  # noqa: E402 - found by the path above
from ops.bench.comparison.charts import Line, lines  # noqa: E402
from ops.bench.mixing import judging, letters, system  # noqa: E402
from ops.bench.mixing.load import Plan, Span  # noqa: E402
from ops.bench.mixing.system import Child, Setting  # noqa: E402
from ops.bench.mixing.watching import Watch  # noqa: E402

RESULTS = ROOT / "ops/bench/results"
#: So that processes are there and connected when the first letter is due.
BEGIN_IN_S = 5.0
#: After a full minute: by then who hands in has said what it was like.
LOOK_AFTER_S = 2.0
#: How long who hands in may try again what was not accepted, and some more.
LAST_WORD_S = 150.0
#: How long the last jobs are waited for.
QUIET_S = 300.0
AUDIT_TRIES, AUDIT_AGAIN_S = 3, 10.0
#: Rates of the kinds by themselves: enough to be seen beside what is idle.
ALONE_PER_S = {
    "bot message": 40.0, "CRM event": 40.0, "payment event": 40.0, "forwarded event": 20.0, "short job": 40.0, "batch": 3.0,
    "note": 15.0, "document": 1.5, "document with graph": 1.0, "render": 0.8, "video": 0.5,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rate", type=float, default=116.0, help="jobs a second")
    parser.add_argument("--surge", type=float, default=4.0, help="times that")
    parser.add_argument("--surge-minutes", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--alone", type=float, metavar="SECONDS", help="each kind by itself for so long, and nothing else"
    )
    parser.add_argument("--logs", type=Path, help="keep the processes' logs in this folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "mix.json")
    parser.add_argument("--chart", action="store_true", help="judge and draw --out anew, and nothing else")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends with it
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.alone:
        print_costs(alone(options))
        return 0
    figures = json.loads(options.out.read_text()) if options.chart else run(options)
    figures["verdict"] = judging.verdict(figures)
    options.out.write_text(json.dumps(figures) + "\n")
    options.out.with_suffix(".svg").write_text(chart(figures))
    print("\n".join(judging.table(figures)))
    kept = figures["verdict"]["kept"]
    return 1 if not kept["nothing lost"] or kept["memory is flat"] is False else 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    figures = described(options)
    with system.setting(options.logs) as made:
        figures["versions"] = made.servers.versions()
        began = time.time() + BEGIN_IN_S
        plan = planned(made, began, spans(options), options.seed)
        load = hand_in(made, plan)
        time.sleep(max(0.0, began - time.time()))
        watch, starts = Watch(made, began), made.starts()
        for minute in range(options.minutes):
            time.sleep(max(0.0, began + 60 * (minute + 1) + LOOK_AFTER_S - time.time()))
            figures["samples"].append(watch.sample(minute))
            figures["load"] = told(plan)
            figures["processes started anew"] = {n: s - starts[n] for n, s in made.starts().items() if s > starts[n]}
            options.out.write_text(json.dumps(figures) + "\n")
            print(summary(figures, minute), flush=True)
        with suppress(TimeoutError):  # the audit says what it has not said
            load.read(LAST_WORD_S)
        figures["load"] = told(plan)
        types = [type_ for kind in letters.KINDS for type_ in kind.makes]
        figures["all ended"] = system.wait_quiet(made.servers, types, time.time(), QUIET_S)
        figures["seconds until all had ended"] = round(time.time() - began - 60 * options.minutes, 1)
        again(watch, made, figures)
        figures["audit"] = audited(made, plan)
    return figures


def audited(made: Setting, plan: Plan) -> dict[str, Any] | None:
    """None where the database does not answer any more; that is said, and nothing is held for kept."""
    try:
        done = made.vendors.ask()
    except OSError as error:
        print(f"the outside services do not say what was done: {error}")
        done = {}
    for _ in range(AUDIT_TRIES):
        try:
            with made.servers.connect() as conn:
                return judging.audit(conn, Path(plan.journal), done)
        except psycopg.Error as error:
            print(f"the audit failed: {error}")
            time.sleep(AUDIT_AGAIN_S)
    return None


def described(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "jobs_per_s": options.rate,
        "surge": options.surge,
        "minutes": options.minutes,
        "surge_minutes": options.surge_minutes,
        "planned": round(60 * options.rate * (options.minutes + (options.surge - 1) * options.surge_minutes)),
        "system": {
            "workers": system.WORKERS,
            "threads": system.THREADS,
            "web processes": system.WEB_PROCESSES,
            "customers": system.CUSTOMERS,
            "GPUs": system.GPUS,
        },
        "kinds": [{**dataclasses.asdict(kind), "makes": dict(kind.makes)} for kind in letters.KINDS],
        "shares": {type_: round(share, 5) for type_, share in letters.shares().items()},
        "samples": [],
        "load": [],
    }


def spans(options: argparse.Namespace) -> list[Span]:
    """Before, the surge in the middle, and after."""
    whole, surge = 60.0 * options.minutes, 60.0 * options.surge_minutes
    first = 60.0 * ((options.minutes - options.surge_minutes) // 2)
    slow, fast = letters.rates(options.rate), letters.rates(options.rate * options.surge)
    return [Span(end, rates) for end, rates in ((first, slow), (first + surge, fast), (whole, slow)) if end]


def planned(made: Setting, began: float, wanted: Sequence[Span], seed: int, first: int = 0) -> Plan:
    clip = made.folder / "clip.mp4"
    if not clip.exists():
        write_clip(clip, seed)
    paths = {name: str(made.folder / f"{name}-{first}") for name in ("journal", "figures")}
    return Plan(made.port, began, list(wanted), made.customers, str(clip), **paths, seed=seed, first=first)


def hand_in(made: Setting, plan: Plan) -> Child:
    path = made.folder / f"plan-{plan.first}.json"
    path.write_text(json.dumps(dataclasses.asdict(plan)))
    for empty in (plan.journal, plan.figures):
        Path(empty).touch()
    child = Child("ops.bench.mixing.load", str(path), log=made.folder / "load.log")
    made.children["who hands in"] = child
    return child


def told(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(plan.figures).read_text().splitlines()]


def again(watch: Watch, made: Setting, figures: dict[str, Any]) -> None:
    """Rows of each minute, now that all have ended: a sample saw those of its last seconds on their way."""
    with suppress(psycopg.Error), made.servers.connect() as conn:
        for sample in figures["samples"]:
            sample["jobs"] = watch.jobs_of(conn, sample["minute"])


def summary(figures: Mapping[str, Any], minute: int) -> str:
    one = figures["samples"][-1]
    load = figures["load"][-1] if figures["load"] else {}
    cores = one["cpu"]
    short = (one.get("jobs") or {}).get("short_pickup_ms")
    return (
        f"{minute:3} min  {load.get('jobs', 0) / 60:5.0f} jobs/s in, {one.get('open', -1)} open, answers {load.get('accept_ms')}"
        f" late {load.get('behind_ms')}, pick-up {short}, cores {cores} {' '.join(one['trouble'])}"
    )


# ---- each kind by itself ----


def alone(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a processor that a letter costs, by process; what is used without any is taken off."""
    costs: dict[str, dict[str, float]] = {}
    with system.setting(options.logs) as made:
        idle = used(made, lambda: time.sleep(options.alone))
        idle_per_s = {name: value / options.alone for name, value in idle.items()}
        for number, (name, per_s) in enumerate(ALONE_PER_S.items()):
            began_at = time.time() + BEGIN_IN_S
            plan = planned(
                made,
                began_at,
                [Span(options.alone, {name: per_s})],
                options.seed,
                first=(number + 1) * 1_000_000,
            )

            load = hand_in(made, plan)
            time.sleep(max(0.0, began_at - 0.5 - time.time()))

            def one(load: Child = load, name: str = name) -> None:
                load.read(options.alone + LAST_WORD_S)
                system.wait_quiet(made.servers, list(letters.BY_NAME[name].makes), time.time(), 120)

            began = time.monotonic()
            total = used(made, one)
            took = time.monotonic() - began
            load.close()
            count = sum(minute["letters"] for minute in told(plan)) or 1
            costs[name] = {
                each: round(1000 * (value - took * idle_per_s.get(each, 0.0)) / count, 2)
                for each, value in total.items()
            }
            costs[name]["letters"] = count
            print(name, costs[name], flush=True)
    return costs


def used(made: Setting, meanwhile: Any) -> dict[str, float]:
    """Seconds of a processor; without the machine's own."""
    before = made.cpu_s()
    meanwhile()
    return {name: value - before.get(name, 0.0) for name, value in made.cpu_s().items() if name != "machine"}


def print_costs(costs: Mapping[str, Mapping[str, float]]) -> None:
    for jobs_per_s in (116.0, 464.0):
        rates = letters.rates(jobs_per_s)
        cores: dict[str, float] = {}
        for kind, cost in costs.items():
            for name, ms in cost.items():
                if name != "letters":
                    cores[name] = cores.get(name, 0.0) + rates[kind] * ms / 1000
        said = ", ".join(f"{name} {value:.2f}" for name, value in cores.items())
        print(f"{jobs_per_s:g} jobs/s: {sum(cores.values()):.2f} cores ({said})")


# ---- the picture ----


def chart(figures: Mapping[str, Any]) -> str:
    samples, load = figures["samples"], figures["load"]

    def line(path: Sequence[str], of: Sequence[Mapping[str, Any]] = samples) -> Line:
        points = []
        for each in of:
            value: Any = each
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None:
                points.append((each["minute"] + 1.0, float(value)))
        return points

    ended = [
        (each["minute"] + 1.0, sum(t["ended"] for t in each["jobs"]["by_type"].values()) / 60)
        for each in samples
        if "jobs" in each
    ]
    connections = [
        (each["minute"] + 1.0, float(sum(each["connections"].values()))) for each in samples if "connections" in each
    ]
    roles = [
        role
        for role in (samples[-1].get("processes", {}) if samples else {})
        if role.startswith(("web", "scheduler", "worker")) and not any(w in role for w in ("parent", "children"))
    ]
    charts: list[tuple[str, Mapping[str, Line]]] = [
        ("jobs a second", {"handed in": [(m + 1.0, n / 60) for m, n in handed_in(load)], "of these ended": ended}),
        (
            "pick-up of short jobs, ms",
            {share: line(("jobs", "short_pickup_ms", share)) for share in ("p50", "p95", "p99")},
        ),
        ("answer to who hands in, ms", {share: line(("accept_ms", share), load) for share in ("p50", "p95", "p99")}),
        ("memory, PSS in MB", {role: line(("processes", role, "pss_mb")) for role in roles}),
        ("memory of servers, PSS in MB", {s: line(("servers", s)) for s in ("postgres", "valkey", "rabbitmq")}),
        ("cores", {name: line(("cpu", name)) for name in (samples[0]["cpu"] if samples else ())}),
        ("connections to Postgres", {"all": connections}),
        ("dead rows of jobs", {"jobs": line(("tables", "jobs", "dead"))}),
    ]  # fmt: skip
    return lines(charts, figures["minutes"])


def handed_in(load: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return [(each["minute"], each["jobs"]) for each in load]


if __name__ == "__main__":
    sys.exit(main())
