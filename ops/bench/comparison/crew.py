"""The processes of one system: its workers, and the one that hands jobs in."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from agentflow.prove.servers import family, send_all
from ops.bench.comparison.servers import cpu_s
from ops.bench.peers.catalogue import ROOT, Command

_STOP_S: Final = 30.0


class TrialFailed(Exception):
    """The text says what happened, with the end of the log."""


class Crew:
    """Processes with one environment and one log, that end together."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment = dict(environment)
        self._log = log
        self._popens: list[subprocess.Popen[bytes]] = []

    def start(self, commands: list[Command], **more: str) -> None:
        for command in commands:
            with self._log.open("ab") as log:
                self._popens.append(
                    subprocess.Popen(
                        command,
                        env={**self._environment, **more},
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    @property
    def processes(self) -> list[psutil.Process]:
        return [process for popen in self._popens for process in family(popen.pid)]

    def cpu_s(self) -> float:
        return cpu_s(self.processes)

    def pss_mb(self) -> float:
        total = 0
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 1e6

    def check(self) -> None:
        """Raises TrialFailed where one of them has ended."""
        if any(popen.poll() is not None for popen in self._popens):
            raise TrialFailed(f"a worker has ended: {self.said()}")

    def said(self) -> str:
        return " ".join(self._log.read_text(errors="replace")[-1500:].split()) if self._log.exists() else ""

    def kill(self) -> None:
        """kill -9 of all of them at once."""
        send_all(self.processes, signal.SIGKILL)
        for popen in self._popens:
            popen.wait(_STOP_S)
        self._popens = []

    def stop(self) -> None:
        """As a platform does, and kill -9 for what does not end."""
        for popen in self._popens:
            popen.terminate()
        end = time.monotonic() + _STOP_S
        while time.monotonic() < end and any(popen.poll() is None for popen in self._popens):
            time.sleep(0.05)
        self.kill()


class Producer:
    """Hands in jobs in a process of its own, as it is asked to by lines of JSON."""

    def __init__(self, command: Command, environment: Mapping[str, str], log: Path, patience_s: float) -> None:
        self._log = log
        self._patience_s = patience_s
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                command,
                env={**environment, "BENCH_ROLE": "producer"},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self.has_batches = bool(self._answer()["batches"])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises TrialFailed."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._popen.stdin.flush()
        except OSError as error:
            raise self._failed("it has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        ready, _, _ = select.select([self._popen.stdout], [], [], self._patience_s)
        line = self._popen.stdout.readline() if ready else b""
        if not line:
            raise self._failed("it has ended" if ready else f"no answer within {self._patience_s:g} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, what: str) -> TrialFailed:
        said = " ".join(self._log.read_text(errors="replace")[-1500:].split())
        return TrialFailed(f"the producer: {what}: {said}")

    def cpu_s(self) -> float:
        return cpu_s(family(self._popen.pid))

    def close(self) -> None:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(5)
        except subprocess.TimeoutExpired:
            send_all(family(self._popen.pid), signal.SIGKILL)
            self._popen.wait(_STOP_S)
        self._popen.stdout.close()
