"""One run: a private copy is made, loaded and hurt, waited for, and its history is checked."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2
import psycopg

from agentflow import schema, settings
from agentflow.prove import checker, history, rabbitmq, report
from agentflow.prove.checker import Evidence
from agentflow.prove.clip import write_clip
from agentflow.prove.crew import Crew, Member
from agentflow.prove.faults import Disk, Faults
from agentflow.prove.load import Load
from agentflow.prove.page import page
from agentflow.prove.plan import Options
from agentflow.prove.ports import free_port
from agentflow.prove.receiver import Receiver
from agentflow.prove.requests import Requests
from agentflow.prove.servers import Servers, until
from agentflow.system import System

_WARM_S: Final = 120.0
_LOOK_EVERY_S: Final = 0.5


class CannotRun(Exception):
    """The private copy did not start; the text says which part, and why."""


Say = Callable[[str], None]


@dataclass
class Copy:
    """A private copy of the system that runs and is ready for work."""

    folder: Path
    environment: dict[str, str]
    admin_key: str
    url: str
    servers: Servers
    crew: Crew
    rabbit: rabbitmq.Rabbit | None
    disk: Disk
    system: System
    receiver: Receiver

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.admin_key}"}, timeout=30)


@contextmanager
def private_copy(options: Options, say: Say) -> Iterator[Copy]:
    """Raises CannotRun, EmbeddedError. Whatever it made is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="agentflow-prove-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        say("starting Postgres and Valkey")
        servers = Servers(folder / "home")
        stack.callback(servers.close)
        with servers.connect() as conn:
            schema.migrate(conn)
            history.install(conn)
            if callable(options.prepared):
                options.prepared(conn)
        rabbit = None
        if options.rabbitmq and rabbitmq.installed():
            nodes = 3 if options.cluster else 1
            say(f"starting RabbitMQ ({nodes} nodes)" if nodes > 1 else "starting RabbitMQ")
            rabbit = rabbitmq.Rabbit(folder / "rabbitmq", nodes=nodes)
            stack.callback(rabbit.close)
            rabbit.start()
        disk = Disk(folder / "storage")
        stack.callback(disk.close)
        receiver = Receiver(options.seed, options.out / "deliveries.jsonl")
        stack.callback(receiver.close)
        key = f"prove_{secrets.token_urlsafe(24)}"
        environment = _environment(options, folder, servers, rabbit, receiver, key)
        system = System(settings.load(environment), "prove")
        stack.callback(system.close)
        crew = Crew()
        stack.callback(crew.close)
        say("starting web, scheduler and workers")
        copy = Copy(folder, environment, key, "", servers, crew, rabbit, disk, system, receiver)
        copy.url = _start_members(options, crew, environment)
        _wait_warm(copy, options)
        crew.watch()
        yield copy


def _environment(
    options: Options,
    folder: Path,
    servers: Servers,
    rabbit: rabbitmq.Rabbit | None,
    receiver: Receiver,
    key: str,
) -> dict[str, str]:
    found = {
        "AGENTFLOW_ENV": "test",
        "AGENTFLOW_HOME": str(servers.home),
        "STORAGE_URL": (folder / "storage").as_uri(),
        "STORAGE_SHARED": "true",
        "ADMIN_API_KEY": key,
        "JOB_QUEUE_NAME": "prove",
        "CANARY_INTERVAL": "0",  # the checker asks of every job who handed it in
        "JOB_CONCURRENCY": str(options.threads),
        "JOB_LEASE": str(options.lease_s),
        "JOB_LEASE_RENEW": str(options.lease_s / 4),
        "JOB_MAX_CRASHES": "100",  # kills are many here, and no job is to blame
        "SHUTDOWN_GRACE": "8",
        "FETCH_ALLOW": f"127.0.0.1:{receiver.port}",
        # No module of the caller's current folder, whatever its name, is one of ours.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    if rabbit is not None:
        found["RABBITMQ_URL"] = rabbit.url
        if len(rabbit.nodes) > 1:
            found["RABBITMQ_QUORUM"] = "true"
    return found


def _start_members(options: Options, crew: Crew, environment: dict[str, str]) -> str:
    python = [sys.executable, "-m"]
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for left in logs.glob(
        "*.log"
    ):  # what an earlier run into this folder said is nothing that this one can be blamed for
        left.unlink()
    port = free_port()
    web = [*python, "gunicorn", "-c", "python:web.gunicorn_config", "--bind", f"127.0.0.1:{port}", f"{options.web}:app"]
    crew.add(Member("web", web, environment, logs / "web.log", port))
    crew.add(Member("scheduler", [*python, "scheduler"], environment, logs / "scheduler.log"))
    dramatiq = [*python, "dramatiq", options.worker, "--processes", "1", "--threads", str(options.threads)]
    for n in range(1, options.workers + 1):
        crew.add(Member(f"worker-{n}", dramatiq, environment, logs / f"worker-{n}.log"))
    return f"http://127.0.0.1:{port}"


def _wait_warm(copy: Copy, options: Options) -> None:
    for name, member in copy.crew.members.items():
        if not until(partial(_is_decided, member), within_s=_WARM_S) or not member.alive():
            raise CannotRun(f"{name} did not start: {_last_line(member.log)}")


def _is_decided(member: Member) -> bool:
    return member.ready() or not member.alive()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"


def prove(options: Options, say: Say = lambda _: None) -> dict[str, Any]:
    """Run it, and return the report (see agentflow.prove.report)."""
    options.out.mkdir(parents=True, exist_ok=True)
    with private_copy(options, say) as copy:
        videos = _upload(copy, options)
        load = Load(
            copy.url,
            copy.admin_key,
            Requests(options.seed, copy.receiver.port, videos, crowds=options.crowds),
            jobs_per_minute=options.jobs_per_minute,
            seconds=options.seconds,
            journal=options.out / "submissions.jsonl",
        )
        hurt: list[str] = []
        faults = Faults(
            kinds=options.faults,
            seed=options.seed,
            seconds=options.seconds,
            lease_s=options.lease_s,
            servers=copy.servers,
            crew=copy.crew,
            rabbit=copy.rabbit,
            disk=copy.disk,
            system=copy.system,
            say=hurt.append,
        )
        began = datetime.now(UTC)
        load.start()
        faults.start()
        with _progress(say, load, hurt, options):
            load_ended = time.monotonic() + options.seconds
            while time.monotonic() < load_ended:
                time.sleep(_LOOK_EVERY_S)
            say("the load ends; every part is mended")
            faults.stop()
            load.finish()
        ended = datetime.now(UTC)
        quiet_s = _wait_quiet(copy, options, say)
        say("checking the history")
        copy.crew.close()
        with copy.servers.connect() as conn:
            evidence = Evidence(
                rows=history.rows(conn),
                batches=history.batches(conn),
                limits=history.limits(conn),
                accepted=load.accepted,
                deliveries=copy.receiver.deliveries,
                seen=load.violations,
            )
            found = checker.check(evidence, history.by_job(conn), history.by_key(conn))
            made = report.make(
                options,
                conn,
                began=began,
                ended=ended,
                quiet_s=quiet_s,
                evidence=evidence,
                violations=found,
                faults=faults,
                tier="RabbitMQ" if copy.rabbit is not None else "Redis",
                unanswered=load.unanswered,
                unsent=load.unsent,
                protocol_errors=[e for node in copy.rabbit.nodes for e in node.protocol_errors()]
                if copy.rabbit
                else [],
            )
    (options.out / "report.json").write_text(json.dumps(made, indent=2) + "\n")
    (options.out / "report.html").write_text(page(made))
    return made


def _upload(copy: Copy, options: Options) -> list[str]:
    """Two films of a few seconds, to be analysed again and again. Asked of the API, like everything."""
    ids = []
    with copy.client() as client:
        for n in range(2):
            clip = write_clip(copy.folder / f"clip-{n}.mp4", options.seed * 10 + n)
            answer = client.post("/api/videos", content=clip.read_bytes(), headers={"Content-Type": "video/mp4"})
            if answer.status_code != 201:
                raise CannotRun(f"a video was not taken: {answer.status_code} {answer.text[:200]}")
            ids.append(answer.json()["video_id"])
    return ids


@contextmanager
def _progress(say: Say, load: Load, hurt: list[str], options: Options) -> Iterator[None]:
    """A line now and then: time, jobs, faults."""
    stop = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not stop.wait(5.0):
            elapsed = time.monotonic() - began
            last = f", the last: {hurt[-1]}" if hurt else ""
            say(f"{elapsed:.0f} of {options.seconds:.0f} s: {load.jobs} jobs accepted, {len(hurt)} faults{last}")

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(1)


def _wait_quiet(copy: Copy, options: Options, say: Say) -> float:
    """Until nothing is queued or running. Returns the seconds; it ends, too, when for `quiet_s` no job has come to its end."""
    began = last_change = said = time.monotonic()
    least: int | None = None
    while True:
        with suppress(psycopg.Error), copy.servers.connect() as conn:
            now_open = history.open_jobs(conn)
            if now_open == 0:
                return time.monotonic() - began
            if least is None or now_open < least:
                least, last_change = now_open, time.monotonic()
        if time.monotonic() - last_change > options.quiet_s:
            return time.monotonic() - began
        if time.monotonic() - said > 5:
            said = time.monotonic()
            say(f"waiting for quiet: {least} jobs are open")
        time.sleep(_LOOK_EVERY_S)
