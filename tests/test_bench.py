"""The parts of ops/bench/compare.py, generate.py and scale.py, without any of the systems that are compared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
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
from ops.bench import generate, scale
from ops.bench.comparison import intake, report
from ops.bench.comparison.crew import TrialFailed
from ops.bench.comparison.figures import ratios, shown
from ops.bench.peers import catalogue, producer
from ops.bench.peers.marks import Marks
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
