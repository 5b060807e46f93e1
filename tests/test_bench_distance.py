"""What stands between a worker and Postgres in ops/bench/far.py, and what far.py and grow.py say of what they measured."""

from __future__ import annotations

import os
import time

import psycopg
import pytest

from agentflow import embedded
from ops.bench import far, grow
from ops.bench.comparison.distance import Distance, name_of


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
