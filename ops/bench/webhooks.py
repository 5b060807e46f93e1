"""Webhooks: how long their intake takes, and whether any is lost while web and workers restart.

    .venv/bin/python ops/bench/webhooks.py [--count 100000] [--rate 200] [--seconds 30] [--part all|latency|restarts]

Starts private servers, gunicorn and a worker. Part one: `--rate` a second for `--seconds`, signed as GitHub does, sent on time
whatever the answers take; the time of each answer is counted from the moment at which it was due. Once with web and its database
on the machine, whose worker comes afterwards, and once with the worker at it on the same cores. Part two: `--count` deliveries,
a fifth of them sent twice, as fast as 8 senders go, each again until it is answered 2xx, while gunicorn (SIGTERM) and the worker
(SIGTERM and SIGKILL in turn) are restarted; then it waits for quiet and counts: each stored once, handled once, and what was
answered 2xx is there. Writes ops/bench/results/webhooks.json; exit status 1 where something was lost or doubled.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import http.client
import json
import os
import platform
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from idle import BIN, ROOT
from private import private_system

from agentflow.prove.ports import free_port
from agentflow.system import System
from agentflow.webhooks import endpoints
from agentflow.webhooks.config import Config, JobAction

SENDERS = 8
DOUBLED = 0.2


@dataclass
class Delivery:
    id: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Place:
    """Where deliveries go, and what they are signed with."""

    port: int
    path: str
    secret: str

    def delivery(self, number: int) -> Delivery:
        id_ = f"delivery-{number}"
        body = json.dumps({"number": number, "text": "x" * 400}).encode()
        signature = hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
        headers = {
            "Content-Type": "application/json",
            "X-GitHub-Delivery": id_,
            "X-GitHub-Event": "issues",
            "X-Hub-Signature-256": f"sha256={signature}",
        }
        return Delivery(id_, body, headers)


class Sender:
    """One keep-alive connection."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._connection: http.client.HTTPConnection | None = None

    def send(self, delivery: Delivery) -> tuple[int, str | None]:
        """Status (0: no answer) and the event's id."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._place.port, timeout=30)
                self._connection.connect()
                assert self._connection.sock is not None
                self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.request("POST", self._place.path, delivery.body, delivery.headers)
            answer = self._connection.getresponse()
            said = answer.read()
            return answer.status, json.loads(said)["event_id"] if answer.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError):
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return 0, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two restarts")
    parser.add_argument("--part", choices=("all", "latency", "restarts"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/webhooks.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }
    with private_system(ENCRYPTION_KEY=uuid4().hex, JOB_LEASE="10", JOB_LEASE_RENEW="3") as (system, environment):
        place = endpoint(system, free_port(), Config(action=JobAction(kind="job", type="ping", payload={})))
        fleet = Fleet(environment, place.port)
        try:
            fleet.start(worker=options.part == "restarts")
            if options.part != "restarts":
                kept = endpoint(system, place.port, Config())
                figures["latency"] = latency(kept, options.rate, options.seconds, 20_000_000)
                fleet.start()
                wait_handled(system, fleet, within_s=600)
                figures["latency_beside_the_worker"] = latency(kept, options.rate, options.seconds, 30_000_000)
                wait_handled(system, fleet, within_s=600)
            if options.part != "latency":
                figures["restarts"] = restarts(system, fleet, place, options.count, options.every)
        finally:
            fleet.stop()
    print(json.dumps(figures, indent=1))
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if figures.get("restarts", {}).get("well", True) else 1


def latency(place: Place, rate: float, seconds: float, first: int) -> dict[str, Any]:
    """With deliveries of these numbers on."""
    in_threads(lambda: warm_up(place, first), 2 * SENDERS, lambda: None)
    first += 1_000_000
    total = int(rate * seconds)
    due: queue.Queue[tuple[float, Delivery] | None] = queue.Queue()
    took: list[float] = []
    statuses: list[int] = []
    began = time.monotonic() + 0.5
    for number in range(total):
        due.put((began + number / rate, place.delivery(first + number)))

    def run() -> None:
        sender = Sender(place)
        while (item := due.get()) is not None:
            at, delivery = item
            time.sleep(max(0.0, at - time.monotonic()))
            status, _ = sender.send(delivery)
            took.append(time.monotonic() - at)
            statuses.append(status)

    in_threads(run, 2 * SENDERS, lambda: [due.put(None) for _ in range(2 * SENDERS)])
    ms = sorted(seconds * 1000 for seconds in took)
    return {
        "sent": total,
        "per_s": rate,
        "answered_200": statuses.count(200),
        "p50_ms": round(statistics.median(ms), 1),
        "p99_ms": round(ms[int(len(ms) * 0.99) - 1], 1),
        "max_ms": round(ms[-1], 1),
    }


def warm_up(place: Place, first: int) -> None:
    """Connections to the database, caches: at a sender's first requests web has been up for long."""
    sender = Sender(place)
    for number in range(10):
        sender.send(place.delivery(first + 1000 * threading.get_ident() % 900_000 + number))


@dataclass
class Told:
    """What the senders know in the end: by delivery the events that they were told of."""

    events: dict[str, set[str]] = field(default_factory=dict)
    tries: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def restarts(system: System, fleet: Fleet, place: Place, count: int, every_s: float) -> dict[str, Any]:
    chance = random.Random(7)
    numbers = [*range(count), *chance.sample(range(count), int(count * DOUBLED))]
    chance.shuffle(numbers)
    waiting: queue.Queue[int | None] = queue.Queue()
    for number in numbers:
        waiting.put(number)
    told, done = Told(), threading.Event()

    def run() -> None:
        sender = Sender(place)
        while (number := waiting.get()) is not None:
            delivery = place.delivery(number)
            while True:
                status, event_id = sender.send(delivery)
                with told.lock:
                    told.tries += 1
                    if status == 200:
                        told.events.setdefault(delivery.id, set()).add(str(event_id))
                        break
                    told.refused[status] = told.refused.get(status, 0) + 1
                time.sleep(0.2)

    disturbing = threading.Thread(target=fleet.disturb, args=(every_s, done), daemon=True)
    began = time.monotonic()
    disturbing.start()
    in_threads(run, SENDERS, lambda: [waiting.put(None) for _ in range(SENDERS)])
    took_s = time.monotonic() - began
    done.set()
    disturbing.join(120)
    fleet.start()
    wait_handled(system, fleet, within_s=600 + count / 20)
    with system.database.connection() as conn:
        rows = conn.execute(
            "select delivery_id, id::text, duplicates, outcome, action_job_id from agentflow.webhook_events"
            " where delivery_id ~ '^delivery-[0-9]{1,7}$'"
        ).fetchall()
        made = conn.execute("select count(*) from agentflow.jobs where correlation_id like 'webhook:%'").fetchone()
        known = conn.execute(
            "select count(*) from agentflow.webhook_events where outcome = 'done' and action_job_id is not null"
        ).fetchone()
    stored = {row[0]: row[1] for row in rows}
    figures: dict[str, Any] = {
        "deliveries": count,
        "sent_with_duplicates": len(numbers),
        "requests": told.tries,
        "answers_that_were_none": told.refused,
        "web_restarts": fleet.web_restarts,
        "worker_restarts": fleet.worker_restarts,
        "seconds": round(took_s, 1),
        "per_s": round(len(numbers) / took_s),
        "stored": len(rows),
        "stored_twice": len(rows) - len(stored),
        "missing": sum(1 for id_ in told.events if id_ not in stored),
        "answered_with_another_event": sum(1 for id_, events in told.events.items() if events != {stored.get(id_)}),
        "duplicates_counted": sum(row[2] for row in rows),
        "not_handled": sum(1 for row in rows if row[3] != "done" or row[4] is None),
        "jobs_made": made[0] if made else 0,
        "events_done": known[0] if known else 0,
    }
    figures["well"] = (
        figures["stored"] == count
        and not any(figures[name] for name in ("stored_twice", "missing", "answered_with_another_event", "not_handled"))
        and figures["jobs_made"] == figures["events_done"]
    )
    return figures


def wait_handled(system: System, fleet: Fleet, within_s: float) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with suppress(psycopg.OperationalError), system.database.connection() as conn:
            row = conn.execute(
                "select exists (select from agentflow.jobs where state in ('queued', 'running'))"
            ).fetchone()
            if row is not None and not row[0]:
                return
        fleet.start()
        time.sleep(1)
    raise SystemExit(f"not all webhooks were handled within {within_s:g} s")


def in_threads(run: Any, number: int, finish: Any) -> None:
    threads = [threading.Thread(target=run, daemon=True) for _ in range(number)]
    finish()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def endpoint(system: System, port: int, config: Config) -> Place:
    with system.database.transaction() as conn:
        _, token, secret = endpoints.create(conn, 1, "github", "bench", config, system.sealer)
    return Place(port, f"/webhooks/github/{token}", str(secret))


class Fleet:
    """One gunicorn and one worker, started and hurt."""

    def __init__(self, environment: dict[str, str], port: int) -> None:
        self._environment = environment
        self._port = port
        self._web: subprocess.Popen[bytes] | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self.web_restarts = 0
        self.worker_restarts = 0

    def start(self, *, worker: bool = True) -> None:
        if self._web is None or self._web.poll() is not None:
            self._web = self._started(["gunicorn", "-c", "web/gunicorn_config.py", "web.wsgi:app"], str(self._port))
        if worker and (self._worker is None or self._worker.poll() is not None):
            self._worker = self._started(["dramatiq", "actors", "--processes", "1"], str(free_port()))
        self._wait_web()

    def disturb(self, every_s: float, done: threading.Event) -> None:
        """Until `done`: every so often web or the worker goes, and is started anew."""
        kinds = [("web", signal.SIGTERM), ("worker", signal.SIGKILL), ("worker", signal.SIGTERM)]
        number = 0
        while not done.wait(every_s):
            kind, with_signal = kinds[number % len(kinds)]
            number += 1
            process = self._web if kind == "web" else self._worker
            assert process is not None
            end(process, with_signal)
            if kind == "web":
                self.web_restarts += 1
            else:
                self.worker_restarts += 1
            self.start()

    def stop(self) -> None:
        for process in (self._web, self._worker):
            if process is not None and process.poll() is None:
                end(process, signal.SIGTERM)

    def _wait_web(self) -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            time.sleep(0.1)
        raise SystemExit("web does not listen")

    def _started(self, command: list[str], port: str) -> subprocess.Popen[bytes]:
        log = Path(self._environment["AGENTFLOW_HOME"]) / f"{command[0]}.log"
        environment = {
            **os.environ,
            **self._environment,
            "PORT": port,
            "PYTHONPATH": ".",
            "WORKER_LOG_LEVEL": "WARNING",
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=environment,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


def end(process: subprocess.Popen[bytes], with_signal: signal.Signals) -> None:
    if with_signal == signal.SIGKILL:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(with_signal)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


if __name__ == "__main__":
    sys.exit(main())
