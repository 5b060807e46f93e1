"""What `agentflow worker` answers on PORT for its worker processes: one health, and their metrics side by side."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, generate_latest

from agentflow import metrics, scraping
from agentflow.siblings import side_by_side
from agentflow.system import System

if TYPE_CHECKING:
    from agentflow.cli.workers import Child

#: Above what a process takes for its own answer (health.PATIENCE_S).
_ANSWER_S: Final = 4.0
_SERVERS: Final = ("redis", "rabbitmq", "database")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process said. `status` is None where it said nothing."""

    child: Child
    status: int | None = None
    body: bytes = b""

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.body) if self.status is not None else {}
        return found if isinstance(found, dict) else {}

    @property
    def state(self) -> str:
        """The process's own word for it, or one of `down` (it died and will be started again), `starting`, `silent`."""
        if self.child.process is None:
            return "down"
        if not self.child.ready:
            return "starting"
        if self.status is None:
            return "draining" if self.child.draining else "silent"
        return str(self.document.get("status", "silent"))


class WorkerHealth:
    """Answers for all children. Asks each of them at every request."""

    def __init__(self, system: System, children: Sequence[Child]) -> None:
        self._system = system
        self._children = children
        self._started = time.monotonic()

    def health(self, path: str) -> tuple[int, dict[str, Any]] | None:
        """`live` is 503 while a process is stuck or silent; `ready` while none of them is."""
        if path not in ("/health", "/health/live", "/health/ready"):
            return None
        answers = self._ask("/health/live" if path == "/health/live" else "/health")
        states = [answer.state for answer in answers]
        if path == "/health/live":
            hung = [a.child.number for a in answers if a.state in ("stuck", "silent")]
            if hung:
                return 503, {"status": "stuck", "reason": f"worker process {', '.join(map(str, hung))} does not answer"}
            return 200, {"status": "live"}
        ready = any(
            state in ("ok", "degraded") and _reaches_database(a) for a, state in zip(answers, states, strict=True)
        )
        document = {
            "status": _worst(states),
            "service": "worker",
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "uptime": round(time.monotonic() - self._started, 1),
            **self._servers(answers),
            "jobs": self._jobs(answers),
            "degraded": list(dict.fromkeys(said for a in answers for said in a.document.get("degraded", ()))),
            "processes": [self._process(answer) for answer in answers],
        }
        if path == "/health/ready":
            return (200 if ready else 503), {"ready": ready, **document}
        return 200, document

    def permitted(self, authorization: str | None) -> bool:
        return metrics.permitted(self._system, authorization)

    def metrics_document(self, authorization: str | None) -> dict[str, Any]:
        answers = self._ask("/metrics", {"Accept": "application/json", **_bearer(authorization)})
        return {
            **self._servers(answers),
            "jobs": self._jobs(answers),
            "processes": [
                {"number": answer.child.number, "jobs": answer.document.get("jobs")}
                for answer in answers
                if answer.body
            ],
        }

    def metrics_text(self, authorization: str | None, only: str) -> bytes:
        """As if each process had been scraped by itself, told apart by the label `process`; and what is the same from all, as
        one of them has it."""
        found = b""
        answers = self._ask("/metrics?own", _bearer(authorization))
        if only != "shared":
            told = [(str(a.child.number), a.body.decode()) for a in answers if a.status == 200]
            found = side_by_side(told).encode() + self._restarts()
        if only != "own" and (child := next((a.child for a in answers if a.status == 200), None)) is not None:
            found += _ask_one(child, "/metrics?shared", _bearer(authorization)).body
        return found

    def _restarts(self) -> bytes:
        registry = CollectorRegistry()
        restarts = Counter(
            metrics.PROCESS_RESTARTS,
            "Worker processes that died and were started again",
            ["process"],
            registry=registry,
        )
        for child in self._children:
            restarts.labels(str(child.number)).inc(max(0, child.starts - 1))
        return generate_latest(registry)

    def _ask(self, path: str, headers: dict[str, str] | None = None) -> list[Answer]:
        with ThreadPoolExecutor(len(self._children)) as callers:
            return list(callers.map(lambda child: _ask_one(child, path, headers or {}), self._children))

    @staticmethod
    def _servers(answers: Sequence[Answer]) -> dict[str, Any]:
        """As a process that reaches them sees them: the others are listed."""
        found: dict[str, Any] = {}
        for name in _SERVERS:
            views = [a.document[name] for a in answers if name in a.document]
            best = next((view for view in views if view["connected"]), views[0] if views else None)
            found[name] = best or {"connected": False, "lastError": "no worker process answers"}
        return found

    @staticmethod
    def _jobs(answers: Sequence[Answer]) -> dict[str, int]:
        return scraping.sum_jobs(a.document.get("jobs", {}) for a in answers)

    @staticmethod
    def _process(answer: Answer) -> dict[str, Any]:
        process = answer.child.process
        return {
            "number": answer.child.number,
            "pid": process.pid if process is not None else None,
            "status": answer.state,
            "restarts": max(0, answer.child.starts - 1),
            **{name: answer.document[name] for name in ("uptime", "jobs", *_SERVERS) if name in answer.document},
        }


def _ask_one(child: Child, path: str, headers: dict[str, str]) -> Answer:
    if child.process is None or not child.ready:
        return Answer(child)
    request = urllib.request.Request(f"http://127.0.0.1:{child.port}{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_S) as response:
            return Answer(child, response.status, response.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return Answer(child, refused.code, refused.read())
    except OSError:
        return Answer(child)


def _bearer(authorization: str | None) -> dict[str, str]:
    return {"Authorization": authorization} if authorization else {}


def _reaches_database(answer: Answer) -> bool:
    return bool(answer.document.get("database", {}).get("connected"))


def _worst(states: Sequence[str]) -> str:
    """`ok` where all are."""
    if any(state in ("stuck", "silent") for state in states):
        return "stuck"
    if all(state == "draining" for state in states):
        return "draining"
    return "ok" if all(state == "ok" for state in states) else "degraded"
