"""Debian's Prometheus and Alertmanager, on ports of their own, with a receiver that remembers what it was told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml

from agentflow.prove.ports import free_port
from tests.http_server import Reply, Request, serve
from tests.processes import eventually, started

PROMETHEUS = Path("/usr/bin/prometheus")
ALERTMANAGER = Path("/usr/bin/prometheus-alertmanager")
PROMTOOL = Path("/usr/bin/promtool")
AMTOOL = Path("/usr/bin/amtool")


@dataclass
class Receiver:
    """What Alertmanager's webhook said: of each alert its statuses, in order."""

    statuses: dict[str, list[str]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: Request) -> Reply:
        body = json.loads(request.body)
        with self._lock:
            self.bodies.append(body)
            for alert in body["alerts"]:
                self.statuses.setdefault(alert["labels"]["alertname"], []).append(alert["status"])
        return Reply()

    def said(self, names: Sequence[str], status: str) -> bool:
        """Whether this was the last word on each of them."""
        with self._lock:
            return all(self.statuses.get(name, [""])[-1] == status for name in names)

    def heard(self, names: Sequence[str]) -> bool:
        with self._lock:
            return all("firing" in self.statuses.get(name, []) for name in names)

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if "firing" not in self.statuses.get(name, [])]


@dataclass(frozen=True)
class Monitoring:
    http: httpx2.Client
    receiver: Receiver

    def query(self, expression: str, *, seconds: float | None = None) -> list[dict[str, Any]]:
        """The series of a query: now, or over the last so many seconds. An expression that is wrong fails."""
        answer = self.http.post("/api/v1/query", data={"query": expression})
        if seconds is not None:
            now = float(self.http.post("/api/v1/query", data={"query": "time()"}).json()["data"]["result"][0])
            told = {"query": expression, "start": now - seconds, "end": now, "step": "1"}
            answer = self.http.post("/api/v1/query_range", data=told)
        document = answer.json()
        assert document["status"] == "success", (expression, document)
        found: list[dict[str, Any]] = document["data"]["result"]
        return found


@contextmanager
def monitoring(folder: Path, rules: str, targets: Mapping[str, int]) -> Iterator[Monitoring]:
    """Scrapes the ports of this machine by their jobs' names and judges by these rules, each every second."""
    for program, package in ((PROMETHEUS, "prometheus"), (ALERTMANAGER, "prometheus-alertmanager")):
        assert program.exists(), f"the tests need {program}: apt-get install {package}"
    port, manager_port = free_port(), free_port()
    receiver = Receiver()
    with ExitStack() as stack:
        server = stack.enter_context(serve())
        server.on("/alerts", receiver.take)
        _write(
            folder / "alertmanager.yml",
            {
                "route": {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"},
                "receivers": [{"name": "test", "webhook_configs": [{"url": server.url("/alerts")}]}],
            },
        )
        (folder / "alerts.yml").write_text(rules)
        _write(
            folder / "prometheus.yml",
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": ["alerts.yml"],
                "alerting": {
                    "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{manager_port}"]}]}],
                },
                "scrape_configs": [
                    {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{number}"]}]}
                    for job, number in targets.items()
                ],
            },
        )
        manager = [ALERTMANAGER, f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/alertmanager"]
        manager += [f"--web.listen-address=127.0.0.1:{manager_port}", "--cluster.listen-address="]
        prometheus = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus"]
        prometheus += [f"--web.listen-address=127.0.0.1:{port}", "--rules.alert.resend-delay=5s"]
        log = folder / "monitoring.log"
        for command in (manager, prometheus):
            stack.enter_context(started([str(word) for word in command], {}, log))
        http = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30))
        for address in (f"http://127.0.0.1:{port}/-/ready", f"http://127.0.0.1:{manager_port}/-/ready"):
            eventually(lambda address=address: _answers(address), within_s=60)
        yield Monitoring(http, receiver)


def _answers(address: str) -> bool:
    try:
        return httpx2.get(address).status_code == 200
    except httpx2.TransportError:
        return False


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content))
