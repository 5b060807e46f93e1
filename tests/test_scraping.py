"""What is scraped, of processes that share a port: each is there, and what is the same from all is there once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from agentflow import gauges, metrics, scraping, siblings
from agentflow.prove.ports import free_port
from agentflow.siblings import Siblings
from agentflow.system import System
from tests.processes import BIN, ROOT, Process, eventually, started
from tests.prometheus import PROMTOOL
from tests.test_worker import submit

pytestmark = pytest.mark.timeout(200)

WEB = [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"]
WORKER = [str(BIN / "dramatiq"), "tests.job_types", "--processes", "2", "--threads", "2", "--path", str(ROOT)]
SCHEDULER = [sys.executable, "-m", "scheduler"]


@contextmanager
def serving(
    command: list[str], environment: dict[str, str], log: Path, ready: str, times: int
) -> Iterator[tuple[Process, str]]:
    port = free_port()
    with started(command, {**environment, "PORT": str(port)}, log) as process:
        eventually(lambda: process.text().count(ready) >= times, within_s=90)
        yield process, f"http://127.0.0.1:{port}"


def scraped(url: str) -> str:
    answer = httpx2.get(f"{url}/metrics", timeout=30)
    assert answer.status_code == 200
    return answer.text


def samples(text: str, name: str, **labels: str) -> dict[str, float]:
    """By `process`, summed up over the other labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                process = sample.labels.get("process", "")
                found[process] = found.get(process, 0.0) + sample.value
    return found


def accepted_by_promtool(text: str) -> None:
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    # These two are names of the product's contract, older than the convention.
    allowed = ("worker_rabbitmq_reconnects", "worker_redis_connection_status")
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith(allowed)]
    assert complaints == []
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "a family is there twice"


def test_all_of_gunicorns_processes_are_scraped_at_one_port(environment: dict[str, str], tmp_path: Path) -> None:
    route = {"route": "/api/jobs", "method": "GET"}
    asked = {"Authorization": f"Bearer {environment['ADMIN_API_KEY']}"}
    environment["WEB_CONCURRENCY"] = "2"
    with serving(WEB, environment, tmp_path / "log", "web is ready", 2) as (process, url):

        def ask(times: int) -> None:
            for _ in range(times):
                assert httpx2.get(f"{url}/api/jobs", headers=asked, timeout=30).status_code == 200

        ask(10)
        text = scraped(url)
        counted = samples(text, "agentflow_http_requests_total", **route)
        assert sum(counted.values()) == 10
        assert set(samples(text, "process_resident_memory_bytes")) == {"1", "2"}
        assert set(samples(text, "agentflow_workers")) == {""}, "of the installation, and so of no process"
        assert 'agentflow_processes{state="answering"} 2.0' in text
        accepted_by_promtool(text)
        document = httpx2.get(f"{url}/metrics", headers={"Accept": "application/json"}, timeout=30).json()
        assert document["jobs"] == {"total": 0, "completed": 0, "failed": 0, "processing": 0}

        killed = process.family()[1]
        killed.send_signal(signal.SIGKILL)
        eventually(lambda: process.text().count("web is ready") == 3, within_s=90)
        text = eventually(lambda: t if 'state="answering"} 2.0' in (t := scraped(url)) else None)
        assert set(samples(text, "process_resident_memory_bytes")) == {"1", "2"}, "its successor has its number"
        assert sum(samples(text, "agentflow_http_requests_total", **route).values()) <= 10
        ask(10)
        assert sum(samples(scraped(url), "agentflow_http_requests_total", **route).values()) >= 10

        frozen = process.family()[1]
        frozen.suspend()  # the kernel still takes connections for it
        try:
            text = eventually(lambda: _asked_of_the_other(url), within_s=60)
            assert 'agentflow_processes{state="silent"} 1.0' in text
        finally:
            frozen.resume()
        assert process.terminate() == 0
    assert not list(_folders_of(process.pid)), "nothing is left"


def _asked_of_the_other(url: str) -> str | None:
    try:
        text = httpx2.get(f"{url}/metrics", timeout=8).text
    except httpx2.TransportError:  # the frozen one was asked
        return None
    return text if "agentflow_processes" in text else None


def _folders_of(parent: int) -> Iterator[Path]:
    import tempfile

    for folder in Path(tempfile.gettempdir()).glob(f"af-{os.getuid()}-{parent}-*"):
        yield from (path for path in folder.iterdir() if path.name != "lock")


def test_all_of_dramatiqs_processes_are_scraped_at_one_port(
    environment: dict[str, str], system: System, tmp_path: Path
) -> None:
    with serving(WORKER, environment, tmp_path / "log", "worker ready", 2) as (process, url):
        jobs = [submit(system, "ping", {"sleep_ms": 300}) for _ in range(16)]
        eventually(lambda: sum(samples(scraped(url), "worker_jobs_completed_total").values()) == len(jobs), within_s=60)

        text = scraped(url)

        assert all(number > 0 for number in samples(text, "worker_jobs_completed_total").values())
        assert set(samples(text, "worker_jobs_processing")) == {"1", "2"}
        assert set(samples(text, "process_cpu_seconds_total")) == {"1", "2"}
        assert samples(text, "agentflow_threads") == {"": 4.0}
        accepted_by_promtool(text)
        assert process.terminate() == 0


def test_the_schedulers_metrics_are_well_formed(environment: dict[str, str], tmp_path: Path) -> None:
    with serving(SCHEDULER, environment, tmp_path / "log", "scheduler ready", 1) as (_, url):
        text = scraped(url)

    accepted_by_promtool(text)
    assert samples(text, "agentflow_database_connection_status") == {"": 1.0}
    assert samples(text, "worker_redis_connection_status") == {"": 1.0}
    assert samples(text, "worker_rabbitmq_connection_status") == {}, "there is none, which is no alarm"


# ---- parts ----


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(siblings.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_siblings_take_the_first_free_number_and_hear_of_each_other(own_folder: Path) -> None:
    first, second, third = (Siblings(lambda name=name: {"name": name}) for name in "abc")
    first.join()
    second.join()

    assert (first.number, second.number) == ("1", "2")
    assert first.ask().reports == second.ask().reports == {"1": {"name": "a"}, "2": {"name": "b"}}
    first.leave()
    third.join()
    assert third.number == "1" and second.ask().reports == {"1": {"name": "c"}, "2": {"name": "b"}}


def test_what_killed_parents_left_is_removed(own_folder: Path) -> None:
    left = own_folder / f"af-{os.getuid()}-{_dead_pid()}-77"
    (left / "1").mkdir(parents=True)
    other = own_folder / f"af-{os.getuid()}-{os.getpid()}-{siblings._identity(os.getpid()).partition('-')[2]}"
    other.mkdir()

    Siblings(dict).join()

    assert not left.exists() and other.exists()


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_folder_that_cannot_be_used_costs_the_siblings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    alone = Siblings(dict)

    alone.join()

    assert alone.ask() == siblings.Told()


def test_families_stand_together_and_labels_stay() -> None:
    one = '# HELP a_total A {b} "c"\n# TYPE a_total counter\na_total{x="y z"} 1.0\n# HELP b B\n# TYPE b gauge\nb 2.0\n'
    two = '# HELP a_total A {b} "c"\n# TYPE a_total counter\na_total{x="{ }"} 3.0\n'

    assert siblings.side_by_side([("1", one), ("2", two)]) == (
        '# HELP a_total A {b} "c"\n# TYPE a_total counter\na_total{process="1",x="y z"} 1.0\na_total{process="2",x="{ }"} 3.0\n'
        '# HELP b B\n# TYPE b gauge\nb{process="1"} 2.0\n'
    )


def test_a_scrape_does_not_wait_for_a_slow_database(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    go, asked = threading.Event(), threading.Event()
    real = gauges.read

    def slow(*arguments: Any) -> list[Metric]:
        asked.set()
        assert go.wait(60)
        return list(real(*arguments))

    first = scraping.text(system).decode()
    monkeypatch.setattr(gauges, "read", slow)
    gauges._of_systems[system]._fresh_until = 0.0

    second = scraping.text(system).decode()

    assert asked.wait(60) and samples(second, "agentflow_jobs") == samples(first, "agentflow_jobs") != {}
    go.set()


def test_gauges_that_cannot_be_read_are_asked_for_again(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(gauges, "read", lambda *_: 1 / 0)
        assert "agentflow_jobs" not in scraping.text(system).decode()
    gauges._of_systems[system]._fresh_until = 0.0

    assert samples(scraping.text(system).decode(), "agentflow_jobs") != {}


def test_organizations_with_few_jobs_are_counted_together(
    system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "MOST_ORGANIZATIONS", 2)
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at)"
        " select gen_random_uuid(), o, 'ping', 'default', 1, 60, clock_timestamp() from generate_series(1, 4) o,"
        " generate_series(1, 5 - o)"
    )

    text = scraping.text(system).decode()

    due = {line.split('"')[1]: float(line.split()[-1]) for line in text.splitlines()
           if line.startswith("agentflow_organization_jobs{") and 'state="due"' in line}  # fmt: skip
    assert due == {"1": 4.0, "2": 3.0, "other": 3.0}


def test_the_share_of_a_limit_is_shown_while_somebody_calls(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentflow.calls import Service
    from agentflow.limits import Window

    service = Service("shown", "c", (Window(10, 60.0), Window(1000, 3600.0)))
    monkeypatch.setattr(metrics._limit_shares, "_LOOK_EVERY_S", 0.0)
    for number in range(7):
        system.calls.permit(service, 7, f"h{number}")

    found = samples(metrics.own_text(system).decode(), "agentflow_limit_used_ratio", provider="shown", organization="7")
    monkeypatch.setattr(metrics._limit_shares, "_FRESH_S", 0.0)
    later = samples(metrics.own_text(system).decode(), "agentflow_limit_used_ratio", provider="shown")

    assert found == {"": 0.7}
    assert later == {}


def test_json_of_several_processes_is_summed() -> None:
    assert scraping.sum_jobs(json.loads('[{"total": 2, "failed": 1}, {"total": 3, "processing": 1}]')) == {
        "total": 5,
        "completed": 0,
        "failed": 1,
        "processing": 1,
    }
