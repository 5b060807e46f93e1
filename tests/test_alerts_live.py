"""Real processes, a real Prometheus and a real Alertmanager: what goes wrong is heard of, and so is its end."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import psycopg
import pytest

from agentflow import settings
from agentflow.alerts import prometheus, table
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.memory_group import MemoryGroup, memory_group
from tests.processes import BIN, ROOT, Process, eventually, started
from tests.prometheus import Monitoring, monitoring
from tests.servers import Redis
from tests.test_worker import submit

pytestmark = pytest.mark.timeout(280)

#: All times of the rules are so many times shorter: five minutes are five seconds.
PACE = 60
FIRST_TEN = [alert.name for alert in table.ALERTS[:10]]
#: What cannot be so many times faster has another threshold: how long a job takes, how often Redis is tried within five
#: seconds, and how many of five threads are taken.
THRESHOLDS = {"HighJobProcessingTime": 1.0, "HighRedisReconnectAttempts": 3.0, "HighJobProcessingQueue": 0.5}
DASHBOARDS = sorted((ROOT / "ops" / "monitoring" / "grafana" / "dashboards").glob("*.json"))


@dataclass
class Fleet:
    """Two workers (three threads for the default queue, two for gpu), web and scheduler; what can be broken about them."""

    environment: dict[str, str]
    folder: Path
    ports: dict[str, int]
    cgroup: MemoryGroup
    stack: ExitStack

    def start_worker(self, queue: str, threads: int) -> Process:
        command = [str(BIN / "dramatiq"), "tests.job_types", "--processes", "1", "--path", str(ROOT)]
        command += ["--threads", str(threads), "--queues", queue]
        if queue == "default":
            command = self.cgroup.inside(command)
        log = self.folder / f"worker-{queue}.log"
        environment = {**self.environment, "PORT": str(self.ports[queue])}
        before = log.read_text().count("worker ready") if log.exists() else 0
        process = self.stack.enter_context(started(command, environment, log))
        eventually(lambda: process.text().count("worker ready") > before, within_s=90)
        return process

    def running(self, queue: str) -> int:
        told = {"Accept": "application/json"}
        document = httpx2.get(f"http://127.0.0.1:{self.ports[queue]}/metrics", headers=told, timeout=30).json()
        return int(document["jobs"]["processing"])

    def sample(self, queue: str, name: str) -> float | None:
        text = httpx2.get(f"http://127.0.0.1:{self.ports[queue]}/metrics", timeout=30).text
        found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else None


@pytest.fixture
def redis_of_its_own(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path / "redis")
    server.start()
    yield server
    server.close()


@contextmanager
def fleet(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[Fleet, dict[str, Process]]]:
    ports = {name: free_port() for name in ("default", "gpu", "web", "scheduler")}
    with memory_group(8192) as cgroup, ExitStack() as stack:
        made = Fleet(environment, tmp_path, ports, cgroup, stack)
        web = [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"]
        for name, command in (("web", web), ("scheduler", [sys.executable, "-m", "scheduler"])):
            told = {**environment, "PORT": str(ports[name]), "WEB_CONCURRENCY": "2", "CANARY_INTERVAL": "2"}
            stack.enter_context(started(command, told, tmp_path / f"{name}.log"))
        workers = {"default": made.start_worker("default", 3), "gpu": made.start_worker("gpu", 2)}
        yield made, workers


def test_the_first_ten_alerts_come_when_they_should_and_end(
    environment: dict[str, str], redis_of_its_own: Redis, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment |= {"REDIS_URL": redis_of_its_own.url, "SHUTDOWN_GRACE": "2", "ALERT_INTERVAL": "2"}
    environment["MEMORY_ADMISSION"] = "false"  # it would not let a job fill the memory
    rules = prometheus.rules(table.with_thresholds(THRESHOLDS), pace=PACE)
    with fleet(environment, tmp_path) as (made, workers):
        _have_something_of_everything(conn)
        jobs = {"agentflow-worker": made.ports["default"], "agentflow-web": made.ports["web"]}
        jobs |= {"agentflow-scheduler": made.ports["scheduler"], "agentflow-gpu-worker": made.ports["gpu"]}
        with monitoring(tmp_path, rules, jobs) as watched:
            _break_and_mend(made, workers, watched, redis_of_its_own, environment, tmp_path)
            without_data = [found for found in _queries() if not watched.query(found[1], seconds=200)]
            assert without_data == [], "panels that show nothing"
            exported = set(watched.http.get("/api/v1/label/__name__/values").json()["data"])
            assert {name for _, query in _queries() for name in _metrics_of(query)} - exported == set()


def _break_and_mend(
    made: Fleet,
    workers: dict[str, Process],
    watched: Monitoring,
    redis: Redis,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    system = System.start(settings.load(environment), "test")
    try:
        used = made.sample("default", "agentflow_memory_used_bytes") or 0.0
        made.cgroup.limit(int(used / 0.5))
        # All three threads of the default queue are held, one of them with memory, and a dozen jobs wait behind them; those of
        # the gpu queue take a while and fail.
        submit(system, "test_heavy", {"file": str(gate), "megabytes": int(used / 0.5 * 0.37) >> 20})
        for _ in range(2):
            submit(system, "test_gate", {"file": str(gate)})
        eventually(lambda: made.running("default") == 3)
        for _ in range(12):
            submit(system, "ping")
        submit(system, "ping", run_at=datetime.now(UTC) + timedelta(days=1))
        failing = [submit(system, "test_fails_slowly", {"sleep_ms": 1500}) for _ in range(60)]

        first = ["HighJobFailureRate", "HighJobProcessingTime", "HighJobProcessingQueue", "LowWorkerThroughput"]
        first += ["QueueTooLong", "MemoryHigh"]
        _hear(watched, first)
        gate.touch()
        for job in failing:
            system.cancel(job.organization_id, job.id)
        redis.stop()
        _hear(watched, ["RedisDisconnected", "HighRedisReconnectAttempts"])
        redis.start()
        for process in workers.values():
            assert process.terminate() == 0
        _hear(watched, ["WorkerDown", "WorkersSilent"])
        made.start_worker("default", 3)
        made.start_worker("gpu", 2)
        _until(watched, lambda: watched.receiver.said(FIRST_TEN, "resolved"))
    finally:
        system.close()
    told = [alert for body in watched.receiver.bodies for alert in body["alerts"]]
    assert all(alert["annotations"]["runbook_url"].startswith("ops/runbook.md#") for alert in told)


def _hear(watched: Monitoring, names: list[str]) -> None:
    _until(watched, lambda: watched.receiver.heard(names))


def _until(watched: Monitoring, check: Callable[[], bool]) -> None:
    try:
        eventually(check, within_s=90)
    except AssertionError:
        raise AssertionError(f"heard so far: {json.dumps(watched.receiver.statuses)}") from None


# ---- the dashboards ----


def _have_something_of_everything(conn: psycopg.Connection) -> None:
    """A budget, a CRM account, an endpoint that is watched and a key that ends: what panels show."""
    conn.execute("insert into agentflow.budgets (organization_id, measure, per_day) values (1, 'usd', 10)")
    conn.execute(
        "insert into agentflow.usage_days (day, organization_id, measure, amount)"
        " values ((now() at time zone 'UTC')::date, 1, 'usd', 4)"
    )
    conn.execute(
        "insert into agentflow.crm_accounts (id, organization_id, name, base_url, auth, state, access_sealed, access_expires_at)"
        " values (gen_random_uuid(), 1, 'a', 'https://a.kommo.com', 'token', 'blocked', 'x', now() + interval '9 days')"
    )
    conn.execute(
        "insert into agentflow.webhook_endpoints (id, organization_id, source, name, silence_after_s)"
        " values (gen_random_uuid(), 1, 'stripe', 'a', 86400)"
    )


def _queries() -> list[tuple[str, str]]:
    """(dashboard and panel, query) of all, as Grafana would send them with everything chosen."""
    found = []
    for file in DASHBOARDS:
        document = json.loads(file.read_text())
        names = [variable["name"] for variable in document["templating"]["list"]]
        for panel in document["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "5s")
                for name in names:
                    query = query.replace(f"${name}", ".*")
                found.append((f"{file.stem}: {panel['title']}", query))
    return found


def _metrics_of(query: str) -> set[str]:
    return set(re.findall(r"\b(?:worker|agentflow|process)_[a-z_]+\b", re.sub(r'"[^"]*"', "", query)))
