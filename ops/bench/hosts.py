"""Four hosts that are cut off and come back: is anything lost, or recorded twice?

    .venv/bin/python ops/bench/hosts.py [--pings 20000]        as root

Web, the scheduler and two workers, each in a network namespace of its own; Postgres, Valkey and RabbitMQ on the machine that
they are all connected to. Callers hand in mixed pings (plain, sleeping, parked, failing once, native, with a `then` job), singly
and in batches, each with an Idempotency-Key, again and again until it is accepted, and some once more after that. All the while
the hosts are cut off, one or several, silently or with their link down, for less and for more than a lease. Jobs with an effect
outside run for so long that a cut meets them: each run that comes to its end leaves a file.

Prints a summary and writes ops/bench/results/hosts.json. Ends with status 1 when something was lost or recorded twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx2
import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from agentflow import settings  # noqa: E402 - found by the path above
from agentflow.jobs.requests import NewJob  # noqa: E402
from agentflow.system import System  # noqa: E402
from tests import job_types  # noqa: E402, F401 - registers test_effect
from tests.fleet import Fleet, fleet  # noqa: E402
from tests.hosts import How, Network, network  # noqa: E402
from tests.processes import eventually  # noqa: E402
from tests.servers import Servers, production  # noqa: E402

KEY = "four-hosts-operator-key"
LEASE_S = 6.0
BATCH = 20
CALLERS = 6
#: Handing in is spread over so long at least, or all of it would be over before the second cut.
SPREAD_S = 120.0
#: Who is cut off, how, and for how many leases; in turn, with a pause of a lease between, until all pings are accepted.
CUTS: list[tuple[tuple[str, ...], How, float]] = [
    (("worker1",), "silent", 0.5),
    (("worker1",), "silent", 2.5),
    (("web",), "silent", 1.0),
    (("worker2",), "link down", 2.0),
    (("scheduler",), "silent", 1.5),
    (("worker1", "worker2"), "silent", 2.0),
    (("web",), "link down", 1.0),
    (("worker1", "web"), "link down", 1.5),
    (("worker2", "scheduler"), "silent", 4.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pings", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/hosts.json")
    options = parser.parse_args()
    figures = run(options.pings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:44} {value}")
    return 1 if figures["faults"] else 0


def run(pings: int) -> dict[str, Any]:
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="agentflow-hosts-") as folder,
        network("web", "scheduler", "worker1", "worker2") as net,
        production(net.address) as servers,
    ):
        environment = {
            **servers.environment,
            "AGENTFLOW_ENV": "production",
            "AGENTFLOW_HOME": f"{folder}/home",
            "STORAGE_URL": Path(folder, "storage").as_uri(),
            "STORAGE_SHARED": "true",
            "ADMIN_API_KEY": KEY,
            "JOB_LEASE": f"{LEASE_S:g}",
            "JOB_LEASE_RENEW": "2",
            "JOB_MAX_CRASHES": "20",  # the cuts meet the same long job more often than three times
        }
        with fleet(environment, Path(folder)) as members:
            start(members, net)
            pids = pids_of(members)
            callers = Callers(members.members["web"].url, pings)
            effects = Effects(environment, Path(folder, "effects"))
            for part in (callers, effects):
                part.start()
            cuts = cut_and_join(net, callers)
            accepted_after_s = time.monotonic() - began
            callers.join()
            effects.stop()
            wait_ended(servers)
            faults, counts = audit(servers, callers, effects, pings)
            if pids_of(members) != pids:
                faults.append("a process died or was started anew")
            logs = "".join(member.process.text() for member in members.members.values())
            return {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                "pings": pings,
                "faults": faults,
                "cuts": cuts,
                "seconds until the last was accepted": round(accepted_after_s, 1),
                "seconds in all": round(time.monotonic() - began, 1),
                **counts,
                "outcomes refused by their fence": logs.count("its outcome here does not count"),
                "leases noticed as lost": logs.count("lease lost"),
                "tracebacks in the logs": tracebacks(logs),
            }


def tracebacks(logs: str) -> list[str]:
    """The text around each, for somebody to read: nothing that a cut causes should be unforeseen."""
    return [logs[max(0, found.start() - 300) : found.start() + 3000] for found in re.finditer("Traceback", logs)][:20]


def start(members: Fleet, net: Network) -> None:
    hosts = net.hosts
    members.web(inside=hosts["web"].inside, address=hosts["web"].address)
    members.scheduler(inside=hosts["scheduler"].inside, address=hosts["scheduler"].address)
    for name in ("worker1", "worker2"):
        members.worker(name, inside=hosts[name].inside, address=hosts[name].address)
    for member in members.members.values():
        member.wait_ready()


def pids_of(members: Fleet) -> dict[str, tuple[int, int]]:
    """The parent and the one that works; natives' children come and go."""
    return {
        name: (m.process.pid, m.process.family()[1:2][0].pid if len(m.process.family()) > 1 else 0)
        for name, m in members.members.items()
    }


# ---- who hands in ----


class Callers:
    """Threads that hand in what `letters` makes, each letter again until it is accepted."""

    def __init__(self, url: str, pings: int) -> None:
        self.accepted: dict[int, str] = {}  # the ping's number -> its job's id
        self.answers: Counter[str] = Counter()
        self.changed: list[str] = []  # resubmitted and answered with another id
        self._url = url
        self._letters: SimpleQueue[list[int]] = SimpleQueue()
        all_letters = list(letters(pings))
        for letter in all_letters:
            self._letters.put(letter)
        self._pause_s = SPREAD_S * CALLERS / len(all_letters)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CALLERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(600)
        assert not self.busy

    def _run(self) -> None:
        with httpx2.Client(base_url=self._url, headers={"Authorization": f"Bearer {KEY}"}, timeout=5) as http:
            while True:
                try:
                    numbers = self._letters.get_nowait()
                except Empty:
                    return
                time.sleep(self._pause_s)
                ids = self._until_accepted(http, numbers)
                self.accepted.update(zip(numbers, ids, strict=True))
                if numbers[0] % 11 == 0 and (again := self._until_accepted(http, numbers)) != ids:
                    self.changed.append(f"{numbers}: {ids} and {again}")

    def _until_accepted(self, http: httpx2.Client, numbers: list[int]) -> list[str]:
        jobs = [job_of(number) for number in numbers]
        single = len(jobs) == 1
        while True:
            try:
                answer = http.post(
                    "/api/jobs" if single else "/api/jobs/batch",
                    json=jobs[0] if single else {"jobs": jobs},
                    headers={"Idempotency-Key": f"letter-{numbers[0]}"},
                )
            except httpx2.TransportError as error:
                self.answers[type(error).__name__] += 1
                time.sleep(0.2)
                continue
            self.answers[str(answer.status_code)] += 1
            if answer.status_code == 202:
                return [answer.json()["id"]] if single else list(answer.json()["ids"])
            assert answer.status_code == 503, (answer.status_code, answer.text)
            time.sleep(0.5)


def letters(pings: int) -> Iterator[list[int]]:
    """Numbers of pings: ones and batches in turn."""
    number = 0
    while number < pings:
        size = 1 if number % (BATCH + 5) < 5 else min(BATCH, pings - number)
        yield list(range(number, number + size))
        number += size


def job_of(number: int) -> dict[str, Any]:
    payloads: list[dict[str, Any]] = [
        {},
        {"sleep_ms": 50},
        {"wait_ms": 1000},
        {},
        {"sleep_ms": 300},
        {"fail_attempts": 1},
        {},
    ]
    payload = payloads[number % len(payloads)]
    if number % 400 == 399:
        payload = {"native_ms": 200}
    job: dict[str, Any] = {"type": "ping", "payload": payload, "correlation_id": f"ping-{number}"}
    if number % 50 == 0:
        job["then"] = [{"type": "ping"}]
    return job


class Effects:
    """Hands in a job that works for seconds, and again, from the servers' machine."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.ids: list[Any] = []
        self._environment = environment
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        system = System.start(settings.load(self._environment), "effects")
        while not self._stop.wait(0.5):
            seconds = (3, 7, 12)[len(self.ids) % 3]
            payload = {"folder": str(self.folder), "sleep_ms": seconds * 1000}
            self.ids.append(system.submit(1, NewJob("test_effect", payload, correlation_id="effect")).job.id)
        system.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)


# ---- what happens to the hosts ----


def cut_and_join(net: Network, callers: Callers) -> list[dict[str, Any]]:
    """All kinds of cuts at least once, and on until everything is accepted."""
    cuts: list[dict[str, Any]] = []
    while callers.busy or len(cuts) < len(CUTS):
        names, how, leases = CUTS[len(cuts) % len(CUTS)]
        time.sleep(LEASE_S)
        for name in names:
            net.hosts[name].cut(how)
        time.sleep(leases * LEASE_S)
        for name in names:
            net.hosts[name].join()
        cuts.append(
            {"hosts": " ".join(names), "how": how, "seconds": leases * LEASE_S, "accepted": len(callers.accepted)}
        )
        print(cuts[-1], flush=True)
    return cuts


def wait_ended(servers: Servers) -> None:
    with psycopg.connect(servers.postgres.url, autocommit=True) as conn:
        eventually(
            lambda: (
                conn.execute("select 1 from agentflow.jobs where state in ('queued', 'running') limit 1").fetchone()
                is None
            ),
            within_s=600,
            every_s=1.0,
        )


# ---- what became of it ----


def audit(servers: Servers, callers: Callers, effects: Effects, pings: int) -> tuple[list[str], dict[str, Any]]:
    """Every fault in a sentence; and figures."""
    with psycopg.connect(servers.postgres.url, autocommit=True) as conn:
        jobs = conn.execute(
            "select id, parent_id, type, correlation_id, state, attempt, fence, (payload->>'fail_attempts')::int, result"
            " from agentflow.jobs"
        ).fetchall()
        attempts: dict[Any, list[tuple[int, str]]] = {}
        for job_id, fence, outcome in conn.execute(
            "select job_id, fence, outcome from agentflow.job_attempts order by job_id, fence"
        ).fetchall():
            attempts.setdefault(job_id, []).append((fence, outcome))
    faults = list(callers.changed)
    ours = [row for row in jobs if row[2] == "ping" and row[1] is None]
    rows = {row[3]: str(row[0]) for row in ours}
    if len(ours) != pings or len(rows) != pings:
        faults.append(f"{pings} pings were handed in, and {len(ours)} rows of {len(rows)} pings are there")
    lost = [number for number, job_id in callers.accepted.items() if rows.get(f"ping-{number}") != job_id]
    if lost or len(callers.accepted) != pings:
        faults.append(f"accepted and not there under their ids: {lost[:10]}; accepted {len(callers.accepted)}")
    for job_id, _, _, name, state, attempt, fence, fails, _ in jobs:
        outcomes = [outcome for _, outcome in attempts.get(job_id, [])]
        if state != "succeeded":
            faults.append(f"{name} is {state}: {outcomes}")
        elif outcomes.count("succeeded") != 1 or outcomes[-1] != "succeeded":
            faults.append(f"{name} was not recorded once: {outcomes}")
        if [f for f, _ in attempts.get(job_id, [])] != list(range(1, fence + 1)):
            faults.append(f"{name}: not each of its {fence} claims has one end: {attempts.get(job_id)}")
        if attempt != 1 + (fails or 0):
            faults.append(f"{name} spent {attempt} attempts: {outcomes}")
    children = Counter(str(row[1]) for row in jobs if row[1] is not None)
    wanted = {rows[f"ping-{number}"] for number in range(0, pings, 50)}
    if children != Counter(wanted):
        faults.append(f"`then` jobs: {len(wanted)} wanted, {sum(children.values())} are there")
    faults += audit_effects(effects, jobs)
    ends = Counter(outcome for each in attempts.values() for _, outcome in each)
    return faults, {
        "answers to callers": dict(callers.answers),
        "jobs": len(jobs),
        "outcomes of attempts": dict(ends),
        "effect jobs": len(effects.ids),
        "their runs that came to the end": len(list(effects.folder.iterdir())),
    }


def audit_effects(effects: Effects, jobs: list[Any]) -> list[str]:
    """Whatever ran, one run is recorded: the one whose claim was the last."""
    faults = []
    recorded = {row[0]: (row[6], row[8]) for row in jobs if row[2] == "test_effect"}
    if set(recorded) != set(effects.ids):
        faults.append(f"effects: {len(effects.ids)} handed in, {len(recorded)} there")
    for job_id, (fence, result) in recorded.items():
        ran = {int(path.suffix[1:]) for path in effects.folder.glob(f"{job_id}.*")}
        if fence not in ran or result != {"fence": fence}:
            faults.append(f"effect {job_id}: recorded {result} of claim {fence}, ran to the end in {sorted(ran)}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
