"""The parts of ops/bench/compare.py, generate.py and scale.py, without any of the systems that are compared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import psycopg
import pytest

from agentflow import embedded
from agentflow.jobs import dispatch, leases
from agentflow.worker.threads import regular
from ops.bench import far, generate, grow, scale
from ops.bench.comparison import intake, report
from ops.bench.comparison.crew import TrialFailed
from ops.bench.comparison.distance import Distance, name_of
from ops.bench.comparison.figures import ratios, shown
from ops.bench.peers import catalogue, producer
from ops.bench.peers.marks import Marks
from ops.bench.profiling import samplers
from tests import core_support, http_server
from tests.http_server import Reply
from tests.processes import ROOT

KILLED_IN_ITS_SECOND_JOB = """
import os, signal, sys
from pathlib import Path
from ops.bench.peers.marks import Marks
marks = Marks(Path(sys.argv[1]))
marks.begin(0); marks.end(0); marks.begin(0); marks.end(0); marks.begin(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
AMOUNTS = generate.Amounts(finished=600, waiting=300, events=100, organizations=20, days=2.0)


# ---- what jobs leave behind ----


def test_marks_outlive_a_killed_process(tmp_path: Path) -> None:
    marks = Marks.make(tmp_path / "marks", 3)

    died = subprocess.run(
        [sys.executable, "-c", KILLED_IN_ITS_SECOND_JOB, str(tmp_path / "marks")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )

    assert died.returncode == -signal.SIGKILL
    assert (marks.done(), marks.begun()) == (1, 2)
    began, ended, runs = marks.of(0)
    assert 0 < began <= ended and runs == 2
    assert marks.of(2) == (0.0, 0.0, 0)


def test_a_producer_hands_in_every_number_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marks = Marks.make(tmp_path / "marks", 20)
    monkeypatch.setenv("BENCH_MARKS", str(tmp_path / "marks"))
    batches: list[list[int]] = []

    def submit(number: int, ms: int) -> int:
        marks.begin(number)
        marks.end(number)
        return number

    system = SimpleNamespace(
        submit=submit, submit_many=lambda numbers, ms: batches.append(list(numbers)), result=lambda handle: None
    )
    many = producer.submit_many(system, 100, 2_500, 0)
    by_callers = producer.submit_by_callers(system, 3, 17, 0, callers=4)
    single = producer.one_at_a_time(system, 0, 3)

    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert [number for batch in batches for number in batch] == list(range(100, 2_600))
    assert many["seconds"] > 0 and by_callers["seconds"] > 0
    assert [runs for _, _, runs in marks.every()] == [1] * 20
    assert all(len(values) == 3 for values in single.values())


# ---- the systems ----


def test_every_system_has_what_it_is_started_with_and_says_its_settings() -> None:
    for peer in catalogue.PEERS:
        assert peer.worker(2, 8) and peer.producer and peer.stores
        assert all(page.startswith("https://") or (ROOT / page).exists() for _, page in peer.settings) and peer.settings
        module = catalogue.FOLDER / (f"{peer.module}/worker.mjs" if peer.node else f"{peer.module}.py")
        assert module.exists(), peer.name
    with pytest.raises(SystemExit, match="no peer nobody"):
        catalogue.named("agentflow,nobody")


def test_dramatiq_is_compared_in_our_version_with_our_slots_and_our_prefetch() -> None:
    locked = (catalogue.FOLDER / "requirements.txt").read_text()
    [bare] = catalogue.named("dramatiq")

    assert f"dramatiq=={version('dramatiq')} " in locked and f"pika=={version('pika')} " in locked
    for slots in (1, 8, 19, 500):
        threads = catalogue.threads_for(slots)
        assert regular(threads) == slots
        assert bare.environment(slots) == {"dramatiq_queue_prefetch": str(2 * threads)}


# ---- the report ----


def test_a_report_pairs_rounds_names_failures_and_judges_targets(tmp_path: Path) -> None:
    cells = {
        "drain": {
            "agentflow": [{"jobs_per_s": 500.0, "submit_many_per_s": 12_000.0}, {"jobs_per_s": 900.0}],
            "dramatiq": [{"jobs_per_s": 1000.0}, {"jobs_per_s": 1000.0}],
            "rq": [{"failed": "a worker has ended: no module"}],
        },
        "kill": {"agentflow": [{"lost": 0, "not_recorded": 1}], "huey": [{"lost": 7}]},
    }
    figures: dict[str, Any] = {"cells": cells}

    report.write(figures, tmp_path / "compare.json")

    said = (tmp_path / "compare.md").read_text()
    verdicts = {each["what"]: each["met"] for each in json.loads((tmp_path / "compare.json").read_text())["targets"]}
    assert ratios(cells["drain"]["agentflow"], cells["drain"]["dramatiq"], "jobs_per_s") == [0.5, 0.9]
    assert verdicts == {
        "drain, of bare Dramatiq's": True,
        "`submit_many`, jobs/s": True,
        "lost by kill -9 in a drain": True,
    }
    assert shown([0.5, 0.9]) == "0.70 (0.50–0.90, 2)" and shown([0.5, 0.9]) in said
    assert "a worker has ended: no module" in said
    assert report.lost(figures), "a job that is not recorded counts as lost"
    chart = ElementTree.parse(tmp_path / "compare_drain.svg")  # noqa: S314 - our own
    assert "AgentFlow, RabbitMQ" in "".join(chart.getroot().itertext())


def test_a_load_counts_answers_and_fails_with_what_was_refused() -> None:
    request = intake.Request("/jobs", {"type": "ping"}, key="k")
    with http_server.serve() as server:
        server.on("/jobs", Reply(202, b"{}"))
        told = intake.load(server.port, request, 20, connections=2)
        server.on("/jobs", Reply(202, b"{}"), Reply(422, b"a wrong type"))
        with pytest.raises(TrialFailed, match=r"422.*a wrong type"):
            intake.load(server.port, request, 4, connections=1)

    assert {(each.headers["authorization"], each.body) for each in server.requests} == {
        ("Bearer k", b'{"type": "ping"}')
    }
    assert len(server.requests) == 22 and server.connections == 3
    assert told["per_s"] > 0 and 0 < told["p50_ms"] <= told["p99_ms"]


# ---- distance ----


def test_a_relay_delays_both_ways_keeps_the_order_and_counts_the_trips(stack: embedded.Embedded) -> None:
    distance = Distance(stack.database_url, 10.0)
    try:
        with psycopg.connect(distance.url, autocommit=True, prepare_threshold=None) as conn:
            distance.trips()
            began = time.monotonic()
            assert conn.execute("select string_agg(n::text, ' ') from generate_series(1, 200000) n").fetchone() == (
                " ".join(map(str, range(1, 200_001))),
            )
            assert time.monotonic() - began >= 0.02
            with conn.transaction():
                conn.execute("select %s", ("x" * 1_000_000,))
            with conn.pipeline():  # all that is under way goes together
                began = time.monotonic()
                answers = [conn.execute("select %s::int", (n,)) for n in range(100)]
                assert [answer.fetchone() for answer in answers] == [(n,) for n in range(100)]
                assert time.monotonic() - began >= 0.02
            counted = distance.trips()
    finally:
        distance.close()

    assert (counted["begin"], counted["commit"]) == (1, 1)
    assert counted["select"] >= 3


def test_trips_are_named_by_the_function_or_by_verb_and_table() -> None:
    assert name_of("select * from agentflow.claim_1(%s, %s) j") == "claim_1"
    assert name_of("update agentflow.jobs set x = 1") == "update jobs"
    assert name_of("COMMIT") == "commit"


# ---- growth ----


@pytest.mark.parametrize(
    ("workers", "share", "said"),
    [
        (1.4, 0.5, "the machine's 2 cores"),
        (0.3, 0.95, "slots"),
        (0.95, 0.5, "one core for each process"),
        (0.3, 0.5, "slots, each held for 40 ms by a job; 40% of the cores"),
    ],
)
def test_a_limit_is_what_is_used_up(monkeypatch: pytest.MonkeyPatch, workers: float, share: float, said: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    assert grow.limit({"workers": workers, "postgres": 0.4, "foreign": 0.1}, share, 1, per_s=200.0).startswith(said)


def test_reports_of_distance_and_growth_have_a_line_for_each_trial() -> None:
    about = {
        "machine": {"processor": "p", "python": "3", "at": "today"},
        "versions": {"postgres": "18", "rabbitmq": "3"},
    }
    line = {"select_1_p50_ms": 20.0}
    submits = {
        "submit_per_s": 40.0, "submit_per_s_by_16_threads": 200.0, "submit_many_per_s": 5000.0,
        "trips_per_submit": 1.0, "trips_per_submit_many": 3.0,
    }  # fmt: skip
    drained = {
        "jobs_per_s": 195.0, "claims_per_s": 225.0, "jobs_per_claim": 6.0, "jobs_per_end": 6.0, "claim_trips_per_s": 37.5,
        "worker_cores": 0.2,
    }  # fmt: skip
    one_at_a_time = {"pick_up_p50_ms": 47.0, "round_trip_p50_ms": 94.0}
    rows = {"line": [line], "submits": [submits], "one at a time": [one_at_a_time], "8 threads": [drained, drained]}
    grown = {
        "jobs_per_s": 300.0, "share_of_slots": 0.75, "workers_cores": 0.4, "postgres_cores": 0.3, "rabbitmq_cores": 0.0,
        "redis_cores": 0.0, "foreign_cores": 0.1, "limit": "slots",
    }  # fmt: skip

    of_distance = far.page({**about, "slots": {"8": 6}, "cells": {"20 ms": rows}})
    of_growth = grow.page({**about, "slots": 8, "cells": {"one, 20 ms": {"1 on 1": [grown]}}})

    assert "| 20 ms | 20.0 | 40.0 | 200 | 5,000 | 1.00, 3.00 | 47.0 | 94.0 |" in of_distance
    assert "| 20 ms | 8 (6) | 225 (225–225, 2) | 195 (195–195, 2) | 0.75 | 6.00, 6.00 | 37.5 | 0.20 |" in of_distance
    assert "## RabbitMQ: one node(s); jobs of 20 ms" in of_growth
    assert "| 1 on 1 | 300 | 75% | 0.40 | 0.30 | 0.00 | 0.00 | 0.10 | slots |" in of_growth


# ---- size ----


@pytest.fixture(scope="module")
def full(stack: embedded.Embedded) -> Iterator[str]:
    with core_support.database(stack) as url:
        with psycopg.connect(url, autocommit=True) as conn:
            generate.generate(conn, AMOUNTS)
        yield url


def test_generated_rows_are_those_of_a_large_installation(full: str) -> None:
    with psycopg.connect(full, autocommit=True) as conn:
        states = dict(conn.execute("select state, count(*) from agentflow.jobs group by state").fetchall())
        sizes = _column(conn, "select count(*) from agentflow.jobs group by organization_id order by 1 desc")
        oldest = _column(conn, "select extract(epoch from now() - min(created_at)) / 86400 from agentflow.jobs")
        kinds = _column(conn, "select count(distinct type) from agentflow.jobs")
        history = _column(conn, "select sum(succeeded) from agentflow.job_history where seconds = 3600")
        events = _column(conn, "select count(*) from agentflow.webhook_events")
        conn.execute("begin")
        leases.announce_worker(conn, uuid4(), _worker(), lease_s=30.0)
        rings, _ = dispatch.pick_due(conn, "default")
        conn.execute("rollback")

    assert states["queued"] == 300 and sum(states.values()) == 900
    assert 550 <= states["succeeded"] <= 590 and states["failed"] > 0 and states["cancelled"] > 0
    assert len(sizes) > 10 and sizes[0] > 4 * sizes[len(sizes) // 2]
    assert 1.9 < oldest[0] < 2.1 and kinds[0] == 8 and events[0] == 100
    assert history[0] > 500
    assert rings


def test_both_sides_of_the_scale_are_measured_alike(full: str, stack: embedded.Embedded, tmp_path: Path) -> None:
    with core_support.database(stack) as empty:
        sides = [scale.side(name, url, stack.redis_url, tmp_path) for name, url in (("empty", empty), ("full", full))]
        for each in sides:
            scale.measure(each, 20)
            each.conn.close()
            each.system.close()
    costs = {each.name: each.costs for each in sides}
    found = scale.ratios(costs)

    of_one = {name for name in costs["full"] if name.startswith("page: a")}  # on the empty side there is none of them
    assert of_one and costs["full"].keys() - of_one == costs["empty"].keys() - of_one
    by_itself = {name: cost for name, cost in costs["full"].items() if name.startswith(("job", "list", "status: q"))}
    assert len(by_itself) > 10 and all(cost[0]["buffers"] > 0 for cost in by_itself.values())
    assert found["buffers"] > 0
    page = scale.page(
        {
            "machine": "m",
            "amounts": vars(AMOUNTS),
            "costs": costs,
            "ratios": found,
            "slow pages": {"page: CRM": 200},
            "sequential scans": {},
        }
    )
    assert len(re.findall(r"^\| job: ", page, re.MULTILINE)) == 5
    assert "longer than 150 ms: CRM 200 ms" in page and "to the other: none" in page


def _column(conn: psycopg.Connection[Any], query: str) -> Sequence[Any]:
    return [row[0] for row in conn.execute(query.encode()).fetchall()]


def _worker() -> dict[str, Any]:
    return {
        "kind": "worker", "host": "h", "pid": 1, "version": "", "queues": ["default"], "threads": 25,
        "demand": {"default": 100}, "memory_bytes": None, "busy": 0,
    }  # fmt: skip


# ---- profiles ----

POSTGRES_LOG = """2026-01-01 10:00:00 UTC [7] LOG:  duration: 0.100 ms  parse <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  duration: 0.200 ms  bind <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  duration: 1.000 ms  execute <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  checkpoint starting: time
2026-01-01 10:00:01 UTC [8] LOG:  duration: 2.000 ms  statement: update t
\tset a = 1
2026-01-01 10:00:01 UTC [8] LOG:  duration: 2.500 ms  statement: update t set a = 1
2026-01-01 10:00:01 UTC [9] LOG:  duration: 9.000 ms  statement: select own
"""


def test_statements_are_counted_once_with_the_time_of_all_their_steps() -> None:
    found = samplers.statements(POSTGRES_LOG, own=9)

    assert found == {"select 1": (1, pytest.approx(1.3)), "update t set a = 1": (2, pytest.approx(4.5))}


@pytest.mark.parametrize(
    ("stack", "function"),
    [
        (["main (a.py:1)", "read (actors/x.py:5)", "loads (json/__init__.py:9)"], "read (actors/x.py:5)"),
        (["read (/srv/agentflow/x.py:5)", "f (numpy/x.py:1)"], "read (/srv/agentflow/x.py:5)"),
        (["main (a.py:1)", "_load (<frozen importlib._bootstrap>:3)", "f (b.py:2)"], "(imports)"),
        (["main (a.py:1)", "f (b.py:2)"], "f (b.py:2)"),
    ],
)
def test_what_a_library_takes_is_charged_to_who_called_it(stack: list[str], function: str) -> None:
    assert samplers.of_ours(stack) == function


@pytest.mark.parametrize(
    ("path", "thread", "name"),
    [
        ("/x/av.libs/libavcodec-d61378e8.so.63.1.102", "av:h264:df1", "libavcodec (h264 threads)"),
        ("/x/libavcodec-d61378e8.so.63.1.102", "python", "libavcodec"),
        ("/x/_multiarray_umath.cpython-313-x86_64-linux-gnu.so", "python", "_multiarray_umath"),
        ("/x/cv2.abi3.so", "python", "cv2"),
        ("/x/bin/postgres", "postgres", "postgres"),
        ("[kernel.kallsyms]", "python", "kernel"),
    ],
)
def test_a_module_is_named_without_its_version(path: str, thread: str, name: str) -> None:
    assert samplers.module_name(path, thread) == name
