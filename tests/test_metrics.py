"""Metrics: the fixed names, what is counted, and what a scrape costs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from agentflow import metrics, scraping, settings
from agentflow.jobs import registry, statistics
from agentflow.system import System
from tests.processes import eventually
from tests.web_support import claim, client, run, submit
from web import create_app

__all__ = ["client"]


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(system: System, name: str, **labels: str) -> float:
    return samples(metrics.own_text(system)).get((name, tuple(sorted(labels.items()))), 0.0)


def test_the_contracts_names_are_there_before_anything_happened(system: System) -> None:
    metrics.known_types([registry.get("ping")])
    names = {name for name, _ in samples(metrics.own_text(system))}

    assert {
        "worker_jobs_total",
        "worker_jobs_completed_total",
        "worker_jobs_failed_total",
        "worker_jobs_processing",
        "worker_job_duration_seconds_count",
        "worker_redis_connection_status",
        "agentflow_database_pool_wait_seconds_total",
        "worker_redis_reconnect_attempts_total",
        "agentflow_rescued_total",
        "agentflow_lost_leases_total",
        "process_resident_memory_bytes",
    } <= names
    assert not any(name.endswith("_created") or "total_total" in name for name in names)


def test_an_attempt_is_counted_from_start_to_end(system: System) -> None:
    labels = {"job_type": "metrics_test", "queue": "default"}
    metrics.job_started("metrics_test", "default", 0.02)
    during = value(system, "worker_jobs_processing", **labels)
    metrics.job_ended("metrics_test", "default", "succeeded", 0.5)
    for state in ("failed", "queued", None):
        metrics.job_started("metrics_test", "default", -1.0)
        metrics.job_ended("metrics_test", "default", state, 0.1)  # type: ignore[arg-type]

    assert during == 1
    assert value(system, "worker_jobs_processing", **labels) == 0
    assert value(system, "worker_jobs_total", **labels) == 4
    assert value(system, "worker_jobs_completed_total", **labels) == 1
    assert value(system, "worker_jobs_failed_total", **labels) == 1
    assert value(system, "worker_job_duration_seconds_count", **labels) == 4
    assert metrics.jobs()["total"] >= 4


def test_the_other_counters_have_helpers(system: System) -> None:
    before = samples(metrics.own_text(system))
    metrics.redis_connected(True)
    metrics.redis_reconnect()
    metrics.rescued(3)
    metrics.message_dropped("not_claimable")
    metrics.time_limit("ping")
    metrics.lease_lost(2)
    after = samples(metrics.own_text(system))

    def rise(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert after["worker_redis_connection_status", ()] == 1
    assert rise("worker_redis_reconnect_attempts_total") == 1
    assert rise("agentflow_rescued_total") == 3
    assert rise("agentflow_messages_dropped_total", why="not_claimable") == 1
    assert rise("agentflow_time_limits_total", job_type="ping") == 1
    assert rise("agentflow_lost_leases_total") == 2


def fill(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    """Two due, one scheduled, one busy, one after a failure, one running, one done."""
    jobs = [submit(client)["id"] for _ in range(5)]
    submit(client, run_at="2099-01-01T00:00:00Z")
    conn.execute("update agentflow.jobs set wait_reason = 'busy' where id = %s", (jobs[1],))
    conn.execute("update agentflow.jobs set run_at = clock_timestamp() - interval '100 s' where id = %s", (jobs[0],))
    claim(conn, jobs[2])
    run(system, conn, jobs[3])
    retried = submit(client)["id"]
    taken = claim(conn, retried)
    conn.execute(
        "select * from agentflow.settle_1(array[%s]::uuid[], array[%s], array['retry'], array[60.0]::float8[],"
        " array['rate_limit'], array[null]::jsonb[], array[null]::jsonb[], %s, interval '30 s', 3)",
        (taken.id, taken.fence, taken.worker),
    )


def announce(conn: psycopg.Connection, seen: str = "0 s", queues: str = "{default,heavy}") -> None:
    conn.execute(
        "insert into agentflow.workers (id, kind, host, pid, version, queues, threads, seen_at)"
        " values (%s, 'worker', 'h', 1, '0', %s, 8, clock_timestamp() - %s::interval)",
        (uuid4(), queues, seen),
    )


def test_queues_tell_due_from_parked_and_running(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    fill(client, system, conn)
    announce(conn)
    announce(conn, seen="5 min")

    queues = {each["name"]: each for each in client.get("/api/system/queue-stats").json["queues"]}

    default = queues["default"]
    assert (default["due"], default["running"]) == (2, 1)
    assert default["parked"] == {"busy": 1, "scheduled": 1, "rate_limit": 1}
    assert 100 <= default["oldest_due_age_s"] < 130
    assert (default["workers"], default["threads"]) == (1, 8)
    assert default["window"] >= 16
    assert (queues["heavy"]["due"], queues["heavy"]["threads"], queues["gpu"]["threads"]) == (0, 8, 0)


def test_the_whole_picture(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    fill(client, system, conn)
    announce(conn)

    stats = client.get("/api/system/stats").json

    assert stats["lately"] == {"seconds": 300, "created": 7, "ended": {"succeeded": 1, "failed": 0, "cancelled": 0}}
    assert [worker["threads"] for worker in stats["workers"]] == [8]
    assert stats["versions"]["schema"].endswith(".sql") and stats["versions"]["postgres"][0].isdigit()
    assert stats["connections"]["database"] == {"connected": True, "lastError": None}


def test_many_reasons_are_gathered(client: FlaskClient, conn: psycopg.Connection) -> None:
    for number in range(statistics.MOST_REASONS + 3):
        job = submit(client, run_at="2099-01-01T00:00:00Z")["id"]
        conn.execute("update agentflow.jobs set wait_reason = %s where id = %s", (f"r{number:02}", job))

    parked = client.get("/api/system/queue-stats").json["queues"][0]["parked"]

    assert len(parked) == statistics.MOST_REASONS + 1
    assert parked["other"] == 3


def test_statistics_do_not_read_the_finished_rows(conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, state, max_attempts, time_limit_s, finished_at)"
        " select ('0190' || lpad(to_hex(n), 8, '0') || '70008000000000000000')::uuid, 1, 't', 'default', 'succeeded', 1, 1, now()"
        " from generate_series(1, 20000) n"
    )
    conn.execute("analyze agentflow.jobs")
    conn.execute("set track_io_timing = off")

    def read(ask: Any) -> int:
        conn.execute("select pg_stat_force_next_flush()")
        with conn.transaction():
            before = _blocks(conn)
            ask(conn)
            return _blocks(conn) - before

    assert read(statistics.queues) < 60
    assert read(statistics.lately) < 60
    assert (
        read(lambda c: c.execute("select count(*) from agentflow.jobs where finished_at is not null").fetchall()) > 200
    )


def _blocks(conn: psycopg.Connection) -> int:
    row = conn.execute(
        "select coalesce(sum(pg_stat_get_xact_blocks_fetched(oid)), 0) from pg_class"
        " where relnamespace = 'agentflow'::regnamespace and relname like 'jobs%'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_gauges_of_the_queues_are_asked_for_once_in_a_while(
    client: FlaskClient, system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client, system, conn)
    asked: list[float] = []
    real = statistics.queues
    monkeypatch.setattr("agentflow.jobs.statistics.queues", lambda *of: (asked.append(time.monotonic()), real(*of))[1])

    first = samples(client.get("/metrics").data)
    for _ in range(5):
        client.get("/metrics")

    assert len(asked) == 1
    assert first["agentflow_jobs", (("queue", "default"), ("state", "due"))] == 2
    assert first["agentflow_jobs", (("queue", "default"), ("state", "parked"))] == 3
    assert first["agentflow_jobs_parked", (("queue", "default"), ("reason", "busy"))] == 1
    assert first["agentflow_oldest_due_age_seconds", (("queue", "default"),)] >= 100


def test_a_scrape_works_and_is_quick_while_the_database_is_away(environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}), "test")
    stranger = create_app(system).test_client()

    began = time.monotonic()
    answer = stranger.get("/metrics")

    assert time.monotonic() - began < 2.5
    assert answer.status_code == 200
    assert b"worker_redis_connection_status" in answer.data
    assert b"agentflow_jobs{" not in answer.data
    assert stranger.get("/metrics", headers={"Accept": "application/json"}).json["database"]["connected"] is False


def test_a_scrape_says_whether_redis_answers(system: System, environment: dict[str, str]) -> None:
    metrics.redis_connected(False)
    with_redis = samples(scraping.text(system))
    lonely = System(settings.load({**environment, "REDIS_URL": "redis://127.0.0.1:1"}), "test")
    without = samples(scraping.text(lonely))

    assert with_redis["worker_redis_connection_status", ()] == 1
    assert without["worker_redis_connection_status", ()] == 0
    lonely.close()


def test_threads_that_wait_for_a_connection_are_seen(system: System) -> None:
    name = "agentflow_database_pool_wait_seconds_total"

    def ask() -> None:
        with system.database.connection() as conn:
            conn.execute("select 1")

    with ThreadPoolExecutor(1) as threads, ExitStack() as held:
        for _ in range(system.settings.database_pool_size):
            held.enter_context(system.database.connection())
        before = value(system, name)  # of connections that had to be made
        late = threads.submit(ask)
        pool = system.database._pool
        assert pool is not None
        eventually(lambda: pool.get_stats().get("requests_waiting") == 1)
        time.sleep(0.05)
        held.close()
        late.result(10)
    assert value(system, name) > before + 0.04


def test_requests_are_counted_by_route_and_not_by_path(client: FlaskClient, system: System) -> None:
    route = "/api/jobs/<uuid:job_id>"
    before = value(system, "agentflow_http_requests_total", method="GET", route=route, status="404")
    for _ in range(3):
        client.get(f"/api/jobs/{uuid4()}")
    client.get(f"/nothing/{uuid4()}")
    client.open("/api/jobs", method="BREW")

    assert value(system, "agentflow_http_requests_total", method="GET", route=route, status="404") == before + 3
    assert value(system, "agentflow_http_requests_total", method="GET", route="none", status="404") >= 1
    assert value(system, "agentflow_http_requests_total", method="other", route="none", status="405") >= 1


def test_the_api_keeps_metrics_behind_their_token(environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "METRICS_TOKEN": "secret"}), "test")
    client = create_app(system).test_client()

    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/metrics", headers={"Authorization": "bearer secret"}).status_code == 200
    system.close()


def test_prometheus_and_browsers_get_text_and_programs_that_ask_get_json() -> None:
    assert metrics.wants_json("application/json")
    assert metrics.wants_json("application/json, */*;q=0.1")
    assert not metrics.wants_json("")
    assert not metrics.wants_json("*/*")
    assert not metrics.wants_json("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
