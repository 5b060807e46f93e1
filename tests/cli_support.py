"""Running commands in the process of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import actors  # noqa: F401 - makes ping known
from agentflow import settings
from agentflow.cli import commands


class Said:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Command = Callable[..., Said]


@pytest.fixture
def agentflow(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs a command in this process, on the tests' servers."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, **more: str) -> Said:
        settings.current.cache_clear()
        capfd.readouterr()
        with monkeypatch.context() as changed:
            for name, value in more.items():
                changed.setenv(name, value)
            status = commands.run(list(arguments))
        out, err = capfd.readouterr()
        return Said(status, out, err)

    yield run
    settings.current.cache_clear()
