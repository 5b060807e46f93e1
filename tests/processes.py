"""Starting and killing the system's processes in tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from agentflow.prove.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def eventually(check: Callable[[], Any], *, within_s: float = 30.0, every_s: float = 0.05) -> Any:
    """The first true value of `check`; fails the test when there is none in time."""
    end = time.monotonic() + within_s
    while True:
        if value := check():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s:g} s: {getattr(check, '__name__', check)}")
        time.sleep(every_s)


class Process:
    """A process of the system with its log. Its group is its own, so that kills can be aimed."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                arguments,
                env={**keep, "PYTHONUNBUFFERED": "1", **environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, within_s: float = 30.0) -> None:
        try:
            eventually(lambda: text in self.text() or self.popen.poll() is not None, within_s=within_s)
            assert text in self.text()
        except AssertionError:
            raise AssertionError(f"{text!r} is not in the log:\n{self.text()[-4000:]}") from None

    def terminate(self, within_s: float = 40.0) -> int:
        """SIGTERM to the parent, as a platform does; its exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(within_s)

    def kill(self) -> None:
        """SIGKILL to it and all below it, at once."""
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.popen.wait(10)


@contextmanager
def started(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[Process]:
    process = Process(arguments, environment, log)
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def worker(
    environment: dict[str, str], log: Path, *, ready: bool = True, types: str = "tests.job_types"
) -> Iterator[Process]:
    """`dramatiq`, as the Procfile starts it, with the tests' job types."""
    arguments = [str(BIN / "dramatiq"), types, "--processes", "1", "--path", str(ROOT)]
    with started(arguments, {"PORT": str(free_port()), **environment}, log) as process:
        if ready:
            process.wait_for("Worker process is ready for action", within_s=90.0)
        yield process
