"""What the checks of `doctor` found, printed as they are done, with no secret in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import redis
from rich.console import Console
from rich.markup import escape

from agentflow import embedded
from agentflow.cli.errors import one_line
from agentflow.redaction import secrets_of
from agentflow.settings import Settings
from agentflow.storage import StorageError


class Wrong(Exception):
    """A check failed. `advice` is what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Remark:
    """A check that passed with something to think of."""

    found: str
    advice: str


class Report:
    """Prints each check as it is done."""

    def __init__(self, console: Console, read: Settings) -> None:
        self.checks = self.wrong = 0
        self._console = console
        self._name = ""
        self._secrets = sorted(secrets_of(read), key=len, reverse=True)

    def run(self, name: str, look: Callable[[], str | Remark]) -> bool:
        before = self.wrong
        with self.check(name):
            self.good(look())
        return self.wrong == before

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        self.checks += 1
        self._name = name
        try:
            yield
        except Wrong as error:
            self._bad(str(error), error.advice)
        except embedded.EmbeddedError as error:
            self._bad(str(error), "")  # it says itself what to do
        except (psycopg.Error, redis.RedisError, StorageError, OSError) as error:
            self._bad(one_line(error) or type(error).__name__, "")

    def good(self, found: str | Remark) -> None:
        if isinstance(found, Remark):
            self._line("!", "yellow", found.found, found.advice)
        else:
            self._line("✓", "green", found, "")

    def _bad(self, problem: str, advice: str) -> None:
        self.wrong += 1
        self._line("✗", "red", problem, advice)

    def _line(self, mark: str, colour: str, text: str, advice: str) -> None:
        if not self._console.encoding.lower().startswith("utf"):
            mark = {"✓": "ok", "!": "note", "✗": "WRONG"}[mark]
        self._console.print(
            f"[{colour}]{mark}[/{colour}] {self._name:<11} {escape(self._scrubbed(text))}", soft_wrap=True
        )
        if advice:
            self._console.print(f"  {'':<11} → {escape(self._scrubbed(advice))}", soft_wrap=True)

    def _scrubbed(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
