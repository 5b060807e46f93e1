"""Workers and callers far from Postgres: claims, ends and submits a second with 0, 20 and 80 ms for a round trip.

    .venv/bin/python ops/bench/far.py [--rounds 2] [--trips 0,20,80] [--threads 8,25,100] [--add]

Between them and Postgres stands a relay that passes on all that it gets half of that later, each way, and counts the round
trips by statement (ops/bench/comparison/distance.py); RabbitMQ and Redis are near. In each round every distance in turn: single
submits by one caller and by 16 threads, batches of 1,000, jobs one at a time on an idle worker, and the drain of jobs that do
nothing by one worker process of so many threads, of which a quarter is kept for critical jobs. --add keeps the rounds that are
in --out. Writes ops/bench/results/far.json and far.md; RabbitMQ (/usr/lib/rabbitmq) has to be there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agentflow.worker.threads import regular  # noqa: E402
from ops.bench.comparison import servers, trials  # noqa: E402
from ops.bench.comparison.distance import Distance  # noqa: E402
from ops.bench.comparison.figures import Round, quantile, shown, values_of  # noqa: E402
from ops.bench.comparison.machine import end_when_told, keep, machine, said_of  # noqa: E402
from ops.bench.comparison.servers import Servers  # noqa: E402
from ops.bench.comparison.trials import Size, Trial, Usage  # noqa: E402
from ops.bench.peers import catalogue  # noqa: E402
from ops.bench.peers.catalogue import OURS, Peer  # noqa: E402

CALLERS: Final = 16
#: What a drain is made long enough for, and the jobs a second that it is expected to have at most.
_DRAIN_S: Final = 6.0
_FASTEST: Final = 1_000
_SUBMIT_S: Final = 3.0
_BATCHED: Final = 5_000
[_AGENTFLOW] = catalogue.named("agentflow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trips", default="0,20,80", help="ms of a round trip, comma-separated")
    parser.add_argument("--threads", default="8,25,100", help="of the worker, comma-separated")
    parser.add_argument("--pings", type=int, default=20, help="jobs one at a time")
    parser.add_argument("--add", action="store_true", help="to the rounds that are in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/far.json")
    options = parser.parse_args()
    end_when_told()
    distances = [float(each) for each in options.trips.split(",")]
    threads = [int(each) for each in options.threads.split(",")]
    figures: dict[str, Any] = json.loads(options.out.read_text()) if options.add and options.out.exists() else {}
    with servers.running() as started:
        figures |= {"machine": machine(), "versions": started.versions(), "slots": {n: regular(n) for n in threads}}
        cells: dict[str, dict[str, list[Round]]] = figures.setdefault("cells", {})
        for number in range(options.rounds):
            for trip_ms in distances[number % len(distances) :] + distances[: number % len(distances)]:
                rows = cells.setdefault(f"{trip_ms:g} ms", {})
                with far(started, trip_ms) as distance:
                    measured(rows, "line", distance.checked())
                    measured(rows, "submits", submits(started, distance, trip_ms))
                    measured(rows, "one at a time", one_at_a_time(started, distance, options.pings))
                    for count in threads:
                        measured(rows, f"{count} threads", drain(started, distance, trip_ms, count))
                keep(figures, options.out)
    options.out.with_suffix(".md").write_text(page(figures))
    print(page(figures))


def measured(rows: dict[str, list[Round]], name: str, found: Round) -> None:
    rows.setdefault(name, []).append(found)
    print(
        name, {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}, flush=True
    )


@contextmanager
def far(started: Servers, trip_ms: float) -> Iterator[Distance]:
    distance = Distance(started.joined.database_url, trip_ms / 2)
    try:
        yield distance
    finally:
        distance.close()


def peer(threads: int) -> Peer:
    """A worker with so many threads in each process, whatever a comparison's slots would want."""
    module = ["ops.bench.peers.agentflow", "--path", str(ROOT), "--processes", "1", "--threads", str(threads)]
    return replace(_AGENTFLOW, worker=lambda _processes, _slots: [[str(OURS / "dramatiq"), *module]])


@contextmanager
def trial(started: Servers, distance: Distance, threads: int, jobs: int) -> Iterator[Trial]:
    size = Size(jobs, processes=1, slots=regular(threads), patience_s=120.0)
    with trials.trial(started, peer(threads), size, DATABASE_URL=distance.url) as made:
        yield made


def submits(started: Servers, distance: Distance, trip_ms: float) -> Round:
    """A second, with nobody who runs them."""
    alone = max(20, round(_SUBMIT_S / max(0.003, trip_ms / 1000)))
    crowd = 4 * alone
    with trial(started, distance, 8, alone + crowd + _BATCHED) as made:
        made.producer.ask("submit", first=0, count=1, ms=0)  # which connects
        distance.trips()
        told = made.producer.ask("submit", first=0, count=alone, ms=0)
        trips = distance.trips()
        by_callers = made.producer.ask("submit_by_callers", first=alone, count=crowd, ms=0, callers=CALLERS)
        distance.trips()
        many = made.producer.ask("submit_many", first=alone + crowd, count=_BATCHED, ms=0)
        trips_of_many = distance.trips()
    return {
        "submit_per_s": alone / told["seconds"],
        "trips_per_submit": trips.total() / alone,
        f"submit_per_s_by_{CALLERS}_threads": crowd / by_callers["seconds"],
        "submit_many_per_s": _BATCHED / many["seconds"],
        "trips_per_submit_many": trips_of_many.total() / (_BATCHED / 1000),
        "trips": trips,
        "trips_of_many": trips_of_many,
    }


def one_at_a_time(started: Servers, distance: Distance, pings: int) -> Round:
    """Milliseconds from before the call, on an idle worker."""
    with trial(started, distance, 25, pings) as made:
        made.start_warm()
        told = made.producer.ask("one_at_a_time", first=0, count=pings)
    return {name.replace("_ms", "_p50_ms"): quantile(values, 0.5) for name, values in told.items()}


def drain(started: Servers, distance: Distance, trip_ms: float, threads: int) -> Round:
    """Jobs that do nothing, handed in before the worker starts."""
    slots = regular(threads)
    jobs = round(_DRAIN_S * min(_FASTEST, slots / max(1e-3, 1.5 * trip_ms / 1000)))
    with trial(started, distance, threads, jobs) as made:
        made.producer.ask("submit_many", first=0, count=jobs, ms=0)
        made.let_producer_go()
        made.start_workers()
        made.wait(lambda: made.marks.begun() > 0)
        usage, began = Usage(made), time.monotonic()
        distance.trips()
        made.wait(lambda: made.marks.done() == jobs)
        trips, took = distance.trips(), time.monotonic() - began
        made.wait(lambda: made.recorded() == jobs)
        used = usage.until_now(jobs)
        begins = sorted(begin for begin, _, _ in made.marks.every()[:jobs])
        recorded_at = made.recorded_at()
    tenth = jobs // 10
    return {
        "jobs": jobs,
        "jobs_per_s": jobs / (recorded_at - begins[0]),
        "claims_per_s": (jobs - 2 * tenth) / (begins[-1 - tenth] - begins[tenth]),
        "claim_trips_per_s": trips["claim_1"] / took,
        "jobs_per_claim": jobs / max(1, trips["claim_1"]),
        "jobs_per_end": jobs / max(1, trips["settle_1"]),
        "trips_per_job": trips.total() / jobs,
        "worker_cores": used["workers_cpu_us"] * jobs / 1e6 / took,
        "foreign_cores": used["foreign_cores"],
        "trips": trips,
    }


# ---- the report ----


def page(figures: dict[str, Any]) -> str:
    cells: dict[str, dict[str, list[Round]]] = figures["cells"]
    slots = {int(count): number for count, number in figures["slots"].items()}
    single = ("select_1_p50_ms", "submit_per_s", f"submit_per_s_by_{CALLERS}_threads", "submit_many_per_s")
    lines = [
        "# Far from Postgres",
        "",
        said_of(figures),
        "",
        f"| a round trip | as measured, ms | single submits/s, one caller | by {CALLERS} threads | in batches, jobs/s"
        " | trips of a submit, of a batch | from the call to the start, p50 ms | to the caller's result, p50 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in cells.items():
        ways = rows["line"], *([rows["submits"]] * 3)
        told = [shown(values_of(way, figure)) for way, figure in zip(ways, single, strict=True)]
        trips = [shown_middle(rows["submits"], figure) for figure in ("trips_per_submit", "trips_per_submit_many")]
        waits = [shown(values_of(rows["one at a time"], figure)) for figure in ("pick_up_p50_ms", "round_trip_p50_ms")]
        lines.append(f"| {' | '.join([name, *told, ', '.join(trips), *waits])} |")
    lines += [
        "",
        "| a round trip | threads (for ordinary jobs) | claims/s | drain, jobs/s | of slots / trip | jobs of a claim, of an end"
        " | claims' trips/s | cores of the worker |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in cells.items():
        for count, number in slots.items():
            rounds = rows[f"{count} threads"]
            trip_s = statistics.median(values_of(rows["line"], "select_1_p50_ms")) / 1000
            share = statistics.median(values_of(rounds, "claims_per_s")) * trip_s / number
            lines.append(
                f"| {name} | {count} ({number}) | {shown(values_of(rounds, 'claims_per_s'))}"
                f" | {shown(values_of(rounds, 'jobs_per_s'))} | {share:.2f}"
                f" | {shown_middle(rounds, 'jobs_per_claim')}, {shown_middle(rounds, 'jobs_per_end')}"
                f" | {shown_middle(rounds, 'claim_trips_per_s')} | {shown_middle(rounds, 'worker_cores')} |"
            )
    return "\n".join(lines) + "\n"


def shown_middle(rounds: list[Round], name: str) -> str:
    return shown([statistics.median(values_of(rounds, name))])


if __name__ == "__main__":
    main()
