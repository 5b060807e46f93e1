"""A load test of a system by its URL: work comes at a steady rate, whether earlier work is done or not, and is timed.

Intake is timed here, from the moment at which a request was due: one that had to wait for a free connection has waited. Picking
up and finishing are timed by the database's clock over there, from the moment at which the job was written down.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx2

import agentflow
from agentflow.prove.load import Load
from agentflow.prove.requests import MIX, Requests
from agentflow.prove.run import CannotRun, Say

_PAGE: Final = 100
_LOOK_EVERY_S: Final = 1.0
#: A thread for each request that may be under way, where one takes half a second; there is no sense in more than these.
_SENDERS: Final = (6, 64)
_TRIES: Final = 5
_ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
_SHARES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Plan:
    """`rate`: requests a second. `mix`: kinds of agentflow.prove.requests.MIX by weight. `patience_s`: how long the last jobs are
    waited for after the load."""

    rate: float
    minutes: float
    mix: Mapping[str, float]
    seed: int
    patience_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to hold: `value` of a figure such as `intake_s.p95` at the most."""

    figure: str
    most: float

    def missed(self, measured: Mapping[str, Any]) -> str | None:
        """A sentence, or None."""
        name, _, share = self.figure.partition(".")
        value = measured[name][share] if share else measured[name]
        if value is None:
            return f"{self.figure} could not be measured: nothing came so far"
        return f"{self.figure} is {value:g}, wanted at most {self.most:g}" if value > self.most else None


def measure(
    plan: Plan, url: str, key: str, objectives: Sequence[Objective], say: Say = lambda _: None
) -> dict[str, Any]:
    """The figures, in seconds. Raises CannotRun when nobody answers there, or refuses the key."""
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        try:
            answer = client.get("/api/job-types")
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise CannotRun(f"nobody answers at {url}: {error}") from error
        if answer.status_code != 200:
            raise CannotRun(f"{url} answered {answer.status_code}; is ADMIN_API_KEY a key of it?")
        began = datetime.now(UTC)
        run = f"load-{plan.seed}-{began:%Y%m%dT%H%M%S%f}"
        requests = Requests(plan.seed, None, [], run=run, batches=0, crowds=0, mix=plan.mix, correlation_id=run)
        load = _send(plan, url, key, requests, say)
        jobs = _ends(client, load, run, plan.patience_s, say)
    return _figures(plan, url, began, load, jobs, objectives)


def _send(plan: Plan, url: str, key: str, requests: Requests, say: Say) -> Load:
    seconds = max(1.0, plan.minutes * 60)
    least, most = _SENDERS
    with tempfile.TemporaryDirectory(prefix="agentflow-load-") as folder:
        load = Load(
            url,
            key,
            requests,
            jobs_per_minute=plan.rate * 60,
            seconds=seconds,
            journal=Path(folder) / "submissions.jsonl",
            senders=int(min(most, max(least, plan.rate / 2))),
        )
        load.start()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            say(
                f"{load.jobs} jobs handed in, {load.troubles.total()} times no answer; {max(0.0, left - 1):.0f} s to go"
            )
        load.finish()
    return load


def _ends(client: httpx2.Client, load: Load, run: str, patience_s: float, say: Say) -> dict[str, dict[str, Any]]:
    """The jobs by id, once all have ended, or after `patience_s`."""
    wanted = {str(promise.id) for promise in load.accepted}
    end = time.monotonic() + patience_s
    while wanted and time.monotonic() < end:
        if not any(_get(client, run, state=state, limit=1)["jobs"] for state in ("queued", "running")):
            break
        say("waiting for the last jobs to end")
        time.sleep(_LOOK_EVERY_S)
    return {each["id"]: each for each in _every(client, run)}


def _every(client: httpx2.Client, run: str) -> Iterator[dict[str, Any]]:
    cursor: dict[str, str] = {}
    while True:
        page = _get(client, run, limit=_PAGE, **cursor)
        yield from page["jobs"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


def _get(client: httpx2.Client, run: str, **query: Any) -> dict[str, Any]:
    """A page of the run's jobs, the newest first."""
    said = ""
    for _ in range(_TRIES):
        try:
            answer = client.get("/api/jobs", params={"correlation_id": run, **query})
            if answer.status_code == 200:
                return dict(answer.json())
            said = str(answer.status_code)
        except httpx2.TransportError as error:
            said = type(error).__name__
        time.sleep(1.0)
    raise CannotRun(f"/api/jobs was not answered {_TRIES} times, the last time with {said}")


# ---- figures ----


def _figures(
    plan: Plan,
    url: str,
    began: datetime,
    load: Load,
    jobs: Mapping[str, dict[str, Any]],
    objectives: Sequence[Objective],
) -> dict[str, Any]:
    promised = {str(promise.id): promise for promise in load.accepted}
    found = [jobs[id_] for id_ in promised if id_ in jobs]
    ends = Counter(each["state"] for each in found)
    # What was cancelled as asked, and what was to fail, is no error.
    wrong = sum(each["state"] in _ENDED and each["state"] not in promised[each["id"]].ends for each in found)
    unended = sum(each["state"] not in _ENDED for each in found)
    lost = len(promised) - len(found)
    sent = len(promised) + load.unanswered + load.unsent + len(load.violations)
    failed = wrong + unended + lost + load.unanswered + load.unsent + len(load.violations)
    measured: dict[str, Any] = {
        "version": agentflow.__version__,
        "url": url,
        "began": began.isoformat(timespec="seconds"),
        "minutes": plan.minutes,
        "rate": plan.rate,
        "seed": plan.seed,
        "mix": dict(plan.mix),
        "sent": sent,
        "accepted": len(promised),
        "ended": {state: ends[state] for state in sorted(_ENDED)},
        "lost": lost,
        "unended": unended,
        "ended_wrongly": wrong,
        "refused": [violation.said for violation in load.violations][:10],
        "never_answered": load.unanswered + load.unsent,
        "no_answer": dict(load.troubles),
        "errors_percent": round(100 * failed / sent, 3) if sent else None,
        "intake_s": _quantiles(load.intake_s),
        "pickup_s": _quantiles([_between(each, "started_at") for each in found if each["started_at"]]),
        "finish_s": _quantiles([_between(each, "finished_at") for each in found if each["state"] == "succeeded"]),
    }
    missed = [said for objective in objectives if (said := objective.missed(measured)) is not None]
    if lost:
        missed.append(f"{lost} jobs that were accepted are not there")
    return {**measured, "missed": missed}


def _between(job: Mapping[str, Any], moment: str) -> float:
    """Seconds since it was handed in. `run_at` will not do: it is moved by parking and by each retry."""
    return (datetime.fromisoformat(job[moment]) - datetime.fromisoformat(job["created_at"])).total_seconds()


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    order = sorted(seconds)
    if not order:
        return dict.fromkeys([*_SHARES, "max"])
    found: dict[str, float | None] = {
        name: round(order[min(len(order) - 1, int(share * len(order)))], 4) for name, share in _SHARES.items()
    }
    return {**found, "max": round(order[-1], 4)}


def read_mix(text: str) -> dict[str, float]:
    """`ping=3,fails-once=1` as weights by kind. Raises ValueError with a sentence."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        kind = name.replace("-", " ")
        if kind not in MIX:
            raise ValueError(f"{name!r} is not one of {', '.join(each.replace(' ', '-') for each in MIX)}")
        try:
            mix[kind] = float(weight or 1)
        except ValueError:
            raise ValueError(f"{weight!r} is no weight: it looks like {name}=2") from None
        if not 0 < mix[kind] < 1e6:
            raise ValueError(f"the weight of {name} must be above 0")
    return mix
