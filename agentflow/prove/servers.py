"""The servers of the private copy: Postgres and Valkey in a home of their own, as `agentflow up` has them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import psycopg
import redis

from agentflow import embedded
from agentflow.embedded.layout import Layout


def until(check: Callable[[], Any], *, within_s: float, every_s: float = 0.05) -> Any:
    """The first true value of `check`, or the last false one."""
    end = time.monotonic() + within_s
    while not (value := check()) and time.monotonic() < end:
        time.sleep(every_s)
    return value


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def send_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class Servers:
    """Postgres and Valkey. Their keeper starts them again when they die: that is part of what is proven."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._joined = embedded.join(home)
        self._layout = Layout.of(home)
        self.database_url = self._joined.database_url
        self.redis_url = self._joined.redis_url

    def connect(self) -> psycopg.Connection[Any]:
        """Raises psycopg.OperationalError."""
        return psycopg.connect(
            self.database_url, autocommit=True, application_name="agentflow prove", connect_timeout=5
        )

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, socket_timeout=5, client_name="agentflow-prove")

    def stop(self, name: Literal["postgres", "valkey"], number: signal.Signals) -> None:
        """SIGQUIT is Postgres' immediate stop: every connection is cut, and the next start recovers from its log."""
        os.kill(self._pid(name), number)

    def freeze(self, name: Literal["postgres", "valkey"]) -> None:
        send_all(family(self._pid(name)), signal.SIGSTOP)

    def thaw(self, name: Literal["postgres", "valkey"]) -> None:
        send_all(family(self._pid(name)), signal.SIGCONT)

    def postgres_answers(self) -> bool:
        with suppress(psycopg.Error), self.connect() as conn:
            return conn.execute("select 1").fetchone() == (1,)
        return False

    def redis_answers(self) -> bool:
        with suppress(redis.RedisError), self.redis() as client:
            return bool(client.ping())
        return False

    def close(self) -> None:
        names: tuple[Literal["postgres", "valkey"], ...] = ("postgres", "valkey")
        for name in names:
            with suppress(OSError, ValueError):
                self.thaw(name)
        self._joined.leave()
        self._joined.wait_stopped(30)

    def _pid(self, name: str) -> int:
        """What the holder of the lock says. For a moment after a death it is the dead one's."""
        return int(self._layout.lock(name).read_text())
