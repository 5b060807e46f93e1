"""`agentflow doctor --url`: a system that runs elsewhere, looked at by its API alone, as after a deploy.

Work really goes through it: a ping, a short film, and the scheduler's own pings through every queue that is served. Nothing of
others is changed; of a Kommo account it is read what a sync would change.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import agentflow
from agentflow.cli import output
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.cli.client import Client
from agentflow.cli.errors import Failure

_ENDED: Final = ("succeeded", "failed", "cancelled")
_PING_S: Final = 30.0
_FILM_S: Final = 180.0
_CRM_S: Final = 300.0
#: Canaries are sent every CANARY_INTERVAL, a minute where nobody said otherwise.
_CANARIES_S: Final = 150.0
_LOOK_EVERY_S: Final = 1.0
_WATCH_EVERY_S: Final = 5.0
_NEVER_TICKED_S: Final = 300.0
_SHOWN: Final = 3
#: The names that the alerts and dashboards are made of.
_METRICS: Final = (
    "worker_jobs_total",
    "worker_jobs_completed_total",
    "worker_jobs_failed_total",
    "worker_jobs_processing",
    "worker_redis_connection_status",
    "agentflow_jobs",
    "agentflow_worker_threads",
    "agentflow_workers_wanted",
)
_SAMPLE: Final = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Deployed:
    """Each check is a method that returns what was found, and raises Wrong."""

    def __init__(self, client: Client, metrics_token: str | None) -> None:
        self._client = client
        self._metrics_token = metrics_token
        self._began: datetime | None = None  # by their clock
        self._stats: dict[str, Any] = {}

    def answers(self) -> str | Remark:
        """First of all: without it nothing else can be looked at."""
        with _said_by("is the URL right, and does the service run? its log says why not"):
            health = self._client.get("/health")
        if "status" not in health or "database" not in health:
            raise Wrong(f"{self._client.base} answers, but not as an AgentFlow does", "is the URL right?")
        self._began = _moment(health["timestamp"])
        if not health["database"]["connected"]:
            raise Wrong(
                f"Postgres is away: {health['database']['lastError']}", "look at DATABASE_URL there, and at the server"
            )
        if health["status"] != "ok":
            return Remark(
                f"{health['status']}: {'; '.join(health['degraded']) or 'it says no more'}",
                "each sentence has its paragraph in ops/runbook.md",
            )
        return f"ok, up for {output.duration(health['uptime'])}"

    def key(self) -> str | Remark:
        with _said_by("take the key of that system, not of this machine's"):
            self._stats = self._client.get("/api/system/stats")
        versions = self._stats["versions"]
        found = f"version {versions['agentflow']}, schema {versions['schema']}, Postgres {versions['postgres']}"
        if versions["agentflow"] != agentflow.__version__:
            return Remark(f"{found}; this program is {agentflow.__version__}", "was the deploy that you mean done?")
        return found

    def metrics(self) -> str:
        with _said_by("set METRICS_TOKEN here to what it is there"):
            text = self._client.text("/metrics", self._metrics_token)
        samples = {(name, labels or "") for name, labels, _ in _SAMPLE.findall(text)}
        names = {name for name, _ in samples}
        if missing := [name for name in _METRICS if name not in names]:
            raise Wrong(f"no {', '.join(missing)} in /metrics", "is that path served by AgentFlow's web process?")
        queues = {queue["name"] for queue in self._stats["queues"]}
        shown = set(
            re.findall(r'queue="([^"]+)"', " ".join(labels for name, labels in samples if name == "agentflow_jobs"))
        )
        if shown != queues:
            raise Wrong(
                f"the queues in /metrics are {', '.join(sorted(shown))}; those of the API {', '.join(sorted(queues))}",
                "is /metrics of another system, or kept by a cache on the way?",
            )
        return f"{len(names)} names, of the same queues as the API's"

    def workers(self) -> str | Remark:
        alive = self._stats["workers"]
        if not alive:
            raise Wrong(
                "none is alive", "look at the log of the workers' service: does it reach the same DATABASE_URL?"
            )
        found = f"{len(alive)} alive, {sum(each['threads'] for each in alive)} threads"
        versions = {each["version"] for each in alive}
        if versions != {self._stats["versions"]["agentflow"]}:
            return Remark(f"{found}, of versions {', '.join(sorted(versions))}", "are old ones still draining?")
        if unserved := [each["name"] for each in self._stats["queues"] if not each["threads"]]:
            return Remark(f"{found}; none serves {', '.join(unserved)}", "start one without -Q, which serves all")
        return found

    def scheduler(self) -> str:
        ages = [each["age_s"] for each in self._stats["calendar"]]
        advice = "is its process running? syncs, clean-up and schedules stand still without it"
        if not ages:
            raise Wrong("has never ticked", advice)
        if min(ages) > _NEVER_TICKED_S:
            raise Wrong(f"ticked {output.duration(min(ages))} ago for the last time", advice)
        return f"ticked {output.duration(min(ages))} ago"

    def ping(self) -> str:
        began = time.monotonic()
        job = self._submit("/api/jobs", {"type": "ping", "priority": "critical"})
        self._ended(job["id"], _PING_S, "is a worker alive, and does it reach the same servers as web?")
        return f"answered after {output.duration(time.monotonic() - began)}"

    def queues(self) -> str | Remark:
        """By the scheduler's pings, sent since we began: nobody else may choose a queue. One is under way in each at a time, so
        where a second one was sent the first has come back."""
        served = {each["name"] for each in self._stats["queues"] if each["threads"]}
        sent: dict[str, datetime] = {}
        back: set[str] = set()
        end = time.monotonic() + _CANARIES_S
        while time.monotonic() < end:
            with _said_by(""):
                self._stats = self._client.get("/api/system/stats")
            if "canary" not in {each["schedule"] for each in self._stats["calendar"]}:
                return Remark("the scheduler sends no pings", "set CANARY_INTERVAL there to see each queue")
            for each in self._stats["canaries"]:
                queue, at = each["queue"], _moment(each["at"])
                if self._began is not None and at < self._began:
                    continue
                if each["state"] == "failed":
                    raise Wrong(f"the ping through {queue} failed", "the log of its workers says why")
                if each["state"] == "well" or at > sent.setdefault(queue, at):
                    back.add(queue)
            if served <= back:
                slowest = max((each["round_trip_s"] or 0.0 for each in self._stats["canaries"]), default=0.0)
                return f"a ping came back through {', '.join(sorted(served))}, within {output.duration(slowest)}"
            time.sleep(_LOOK_EVERY_S)
        raise Wrong(
            f"no ping came back through {', '.join(sorted(served - back))} within {output.duration(_CANARIES_S)}",
            "are its workers busy (`agentflow queues`), and do they reach the broker?",
        )

    def video(self) -> str:
        """A film of three shots, made here: through storage, the heavy queue and a child process."""
        from agentflow.prove import clip

        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="agentflow-doctor-") as folder:
            film = clip.write_clip(Path(folder) / "doctor.mp4", seed=1)
            with _said_by("look at STORAGE_URL or SUPABASE_URL there: web stores what workers read"):
                task = self._client.analyze({"video_id": self._client.upload(film, lambda _: None)})
        job = self._ended(task, _FILM_S, "does a worker serve the queue heavy, and has it 300 MB left?")
        with _said_by(""):
            shots = len(self._client.status(job)["result"]["shots"])
        if shots != clip.SHOTS:
            raise Wrong(f"{shots} shots were found in a film of {clip.SHOTS}", "is it the same version everywhere?")
        return f"its {shots} shots were found after {output.duration(time.monotonic() - began)}"

    def crm(self) -> str | Remark:
        """What a sync of one connected account would change: only reads."""
        with _said_by(""):
            accounts = self._client.get("/api/crm/accounts?limit=100")["accounts"]
        connected = [each for each in accounts if each["state"] == "connected"]
        if not connected:
            if accounts:
                states = ", ".join(sorted({each["state"] for each in accounts}))
                return Remark(f"no account is connected ({states})", "`agentflow crm accounts` says what is wrong")
            return "no account to read"
        account = connected[0]
        job = self._submit(f"/api/crm/accounts/{quote(account['id'])}/plan", {"mode": "incremental"})
        self._ended(job["id"], _CRM_S, "`agentflow crm runs` says what Kommo answered")
        return f"{account['name']} was read"

    def watch(self, minutes: float, say: Callable[[str], None]) -> str:
        """Whether jobs fail, requests are not answered, or health goes bad, from now on."""
        with _said_by(""):
            began = _moment(self._client.get("/health")["timestamp"])
        end = time.monotonic() + minutes * 60
        troubles: dict[str, int] = {}
        while (left := end - time.monotonic()) > 0:
            say(f"watching for errors: {output.duration(left)} to go")
            time.sleep(min(_WATCH_EVERY_S, left))
            try:
                health = self._client.get("/health")
                for sentence in health["degraded"]:
                    troubles[sentence] = troubles.get(sentence, 0) + 1
            except Failure as error:
                troubles[str(error)] = troubles.get(str(error), 0) + 1
        for job in self._failed(since=began):
            sentence = f"{job['type']} failed: {(job['error'] or {}).get('message', '')}"
            troubles[sentence] = troubles.get(sentence, 0) + 1
        if troubles:
            worst = sorted(troubles.items(), key=lambda each: -each[1])
            said = "; ".join(f"{sentence} ({count} times)" for sentence, count in worst[:_SHOWN])
            more = f"; and {len(worst) - _SHOWN} more" if len(worst) > _SHOWN else ""
            raise Wrong(said + more, "see `agentflow jobs list --state failed`; ops/deploy says how to go back")
        return f"no error in {output.duration(minutes * 60)}"

    def _failed(self, since: datetime) -> list[dict[str, Any]]:
        """Of the newest hundred."""
        with _said_by(""):
            found: list[dict[str, Any]] = self._client.get("/api/jobs?state=failed&limit=100")["jobs"]
        return [job for job in found if job["finished_at"] is not None and _moment(job["finished_at"]) >= since]

    def _submit(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        with _said_by(""):
            return self._client.post(path, document)

    def _ended(self, job_id: str, within_s: float, advice: str) -> str:
        """Returns the id again once the job has succeeded; one that does not in time is cancelled."""
        end = time.monotonic() + within_s
        while True:
            with _said_by(advice):
                job = self._client.get(
                    f"/api/jobs/{quote(job_id)}?wait={min(10.0, max(0.0, end - time.monotonic())):.1f}"
                )
            if job["state"] == "succeeded":
                return job_id
            if job["state"] in _ENDED:
                raise Wrong(
                    f"{job['type']} {job['state']}: {(job['error'] or {}).get('message', 'it says no more')}", advice
                )
            if time.monotonic() > end:
                with _said_by(advice):
                    self._client.cancel(job_id)
                waits = f" ({job['wait_reason']})" if job["wait_reason"] else ""
                raise Wrong(f"{job['type']} was still {job['state']}{waits} after {output.duration(within_s)}", advice)


@contextmanager
def _said_by(advice: str) -> Iterator[None]:
    """What the client says about an answer becomes a check that failed."""
    try:
        yield
    except Failure as error:
        raise Wrong(str(error), advice) from error


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
