"""The processes of a production system as a platform starts them: web, scheduler and workers, each with its log."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from agentflow.prove.ports import free_port
from tests.processes import BIN, ROOT, Process, eventually


@dataclass
class Member:
    """One instance: what the platform starts, and the process below it that does the work (itself, where there is none)."""

    name: str
    process: Process
    port: int
    address: str = "127.0.0.1"
    _working: psutil.Process | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def working(self) -> psutil.Process:
        if self._working is None:
            family = self.process.family()
            self._working = family[1] if len(family) > 1 else family[0]
        return self._working

    def get(self, path: str, timeout_s: float = 10.0) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=timeout_s)

    def wait_ready(self, within_s: float = 120.0) -> None:
        def is_ready() -> bool:
            assert self.process.popen.poll() is None, self.process.text()[-4000:]
            try:
                return self.get("/health/ready").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(is_ready, within_s=within_s)
        eventually(lambda: len(self.process.family()) > 1 or self.name == "scheduler")
        assert self.working.is_running()


class Fleet:
    """Starts members; the end of the `with` block kills what is left of them."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self.environment = dict(environment)
        self.logs = logs
        self.members: dict[str, Member] = {}

    def web(self, **options: Any) -> Member:
        return self.add("web", [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"], **options)

    def scheduler(self, **options: Any) -> Member:
        return self.add("scheduler", [sys.executable, "-m", "scheduler"], **options)

    def worker(self, name: str = "worker", actors: str = "tests.job_types", **options: Any) -> Member:
        command = [str(BIN / "dramatiq"), actors, "--processes", "1", "--path", str(ROOT)]
        return self.add(name, command, **options)

    def add(
        self,
        name: str,
        command: Sequence[str],
        *,
        inside: Sequence[str] = (),
        address: str = "127.0.0.1",
        **environment: str,
    ) -> Member:
        """`inside` is put before the command: a network namespace, a limit."""
        port = free_port()
        process = Process(
            [*inside, *command],
            {**self.environment, "PORT": str(port), "PYTHONPATH": str(ROOT), **environment},
            self.logs / f"{name}.log",
        )
        self.members[name] = Member(name, process, port, address)
        return self.members[name]

    def text(self) -> str:
        return "\n".join(f"==== {name}\n{member.process.text()[-3000:]}" for name, member in self.members.items())


@contextmanager
def fleet(environment: Mapping[str, str], logs: Path) -> Iterator[Fleet]:
    made = Fleet(environment, logs)
    with ExitStack() as stack:
        stack.callback(lambda: [member.process.kill() for member in made.members.values()])
        yield made
