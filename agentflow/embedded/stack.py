"""Joining and leaving the servers of a home."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psycopg

from agentflow.embedded import keeper
from agentflow.embedded.account import postgres_account
from agentflow.embedded.binaries import find_valkey, postgres_for
from agentflow.embedded.cluster import free_space_note, make_cluster
from agentflow.embedded.errors import ELSEWHERE, EmbeddedError
from agentflow.embedded.home import make_home, make_run_folder
from agentflow.embedded.layout import POSTGRES_SOCKET, VALKEY_SOCKET, Layout, database_url, redis_url

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.03


def join(home: Path, *, timeout_s: float = 60.0) -> Embedded:
    """Use the servers of `home`: make it if it is new, start them if they do not run, wait until both answer.

    Each process joins for itself; forked children belong to the user they come from. Raises EmbeddedError.
    """
    deadline = time.monotonic() + timeout_s
    layout = Layout.of(home)
    with _explained(layout):
        account = postgres_account()
        make_home(layout, account)
        # From here on the servers stay. First we wait for a keeper that is just stopping them.
        users = _lock(layout, "users", fcntl.LOCK_SH, deadline)
        try:
            prepared = _lock(layout, "prepare", fcntl.LOCK_EX, deadline)
            try:
                run = make_run_folder(layout, account)
                postgres = postgres_for(account, layout)
                make_cluster(layout, postgres, account, held=prepared, timeout_s=_left(deadline))
            finally:
                os.close(prepared)
            uid, gid = (account.uid, account.gid) if account else (-1, -1)
            stack = Embedded(layout, users, (layout.home, run, postgres, find_valkey(), str(uid), str(gid)))
            _start(stack, layout, deadline)
        except BaseException:
            os.close(users)
            raise
    return stack


class Embedded:
    """One process' use of a home's servers. Ends with `leave`, with the `with` block, or with the process, however."""

    def __init__(self, layout: Layout, users: int, keeper_arguments: tuple[str | Path, ...]) -> None:
        self.home = layout.home
        self.database_url = database_url(layout.home)
        self.redis_url = redis_url(layout.home)
        self._layout = layout
        self._users: int | None = users
        self._keeper_arguments = keeper_arguments

    def ensure(self) -> None:
        """Start a new keeper if it has died. Two system calls if not, so it may be called on every heartbeat.

        Raises nothing: a failure is logged, and the next call tries again.
        """
        if self._users is None:
            return
        try:
            held = keeper.lock(str(self._layout.lock("keeper")), fcntl.LOCK_SH | fcntl.LOCK_NB)
            if held is not None:  # nobody had it
                os.close(held)
                start_keeper(self._layout, self._keeper_arguments)
        except (OSError, subprocess.SubprocessError, EmbeddedError) as err:
            log.warning("the keeper of the embedded servers could not be started: %s", err)

    def leave(self) -> None:
        """Stop using the servers. The keeper stops them once nobody does, forked children of this process included."""
        self.ensure()  # without a keeper nobody would stop them
        if self._users is not None:
            # Closed, not unlocked: unlocking would take the lock away from forked children, too.
            os.close(self._users)
            self._users = None

    def wait_stopped(self, timeout_s: float = 70.0) -> bool:
        """After `leave`: wait until the servers are gone; False if they are not within `timeout_s`.

        For the first process of a container, whose end is the end of all: without it Postgres is killed half-way.
        """
        deadline = time.monotonic() + timeout_s
        for name in ("postgres", "valkey"):
            held = keeper.lock_within(str(self._layout.lock(name)), seconds=max(0.0, deadline - time.monotonic()))
            if held is None:
                return False
            os.close(held)
        return True

    def __enter__(self) -> Embedded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()


def start_keeper(layout: Layout, arguments: tuple[str | Path, ...]) -> None:
    """Start a keeper, which goes to the background at once; if there is one already the new one leaves."""
    # A Python built with a shared library may need this one to start at all (GitHub's setup-python).
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with layout.log("keeper").open("ab") as output:
        result = subprocess.run(
            # -I -S: no site-packages and no user's settings; half the memory.
            [sys.executable, "-I", "-S", Path(__file__).with_name("keeper.py"), *arguments],
            cwd="/",
            env=keeper.SERVER_ENVIRONMENT | libraries,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            timeout=30,
            check=False,
        )
    if result.returncode != 0:
        raise EmbeddedError(f"the keeper of {layout.home} did not start: {_end_of(layout.log('keeper'))}; {ELSEWHERE}")


@contextlib.contextmanager
def _explained(layout: Layout) -> Iterator[None]:
    try:
        yield
    except (OSError, shutil.Error, subprocess.SubprocessError) as err:
        raise EmbeddedError(
            f"the home {layout.home} cannot be used{_space(layout)}: {err}; "
            f"set AGENTFLOW_HOME to a folder of your own on a local disk, {ELSEWHERE}"
        ) from err


def _lock(layout: Layout, name: str, how: int, deadline: float) -> int:
    held = keeper.lock_within(str(layout.lock(name)), seconds=_left(deadline), how=how)
    if held is None:
        raise EmbeddedError(
            f"another process has been starting or stopping the servers of {layout.home} all the while: "
            f"wait for it or end it (see {layout.log('postgres')}), {ELSEWHERE}"
        )
    return held


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _start(stack: Embedded, layout: Layout, deadline: float) -> None:
    start_keeper(layout, stack._keeper_arguments)
    next_ensure = time.monotonic() + 1.0
    while (silent := _silent(stack, layout)) is not None:
        now = time.monotonic()
        if now >= deadline:
            raise EmbeddedError(
                f"{silent.capitalize()} of {layout.home} did not answer in time{_space(layout)}; its log "
                f"{layout.log(silent)} ends: {_end_of(layout.log(silent))}; repair that, {ELSEWHERE}"
            )
        if now >= next_ensure:
            stack.ensure()
            next_ensure = now + 1.0
        time.sleep(ASK_EVERY_S)


def _silent(stack: Embedded, layout: Layout) -> str | None:
    """Which of the servers does not answer yet; None if both do."""
    if not _valkey_answers(layout.run / VALKEY_SOCKET):
        return "valkey"
    if not (layout.run / POSTGRES_SOCKET).exists() or not _postgres_answers(stack.database_url):
        return "postgres"
    return None


def _valkey_answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(os.fsencode(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
    except OSError:
        return False


def _postgres_answers(url: str) -> bool:
    """Whether a query is answered: the connection alone says little, Postgres takes those while it recovers, too."""
    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=2) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(-min(2000, path.stat().st_size), os.SEEK_END)
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as err:
        return f"({err})"
    return " | ".join(line.strip() for line in lines[-4:]) or "(nothing)"


def _space(layout: Layout) -> str:
    try:
        return free_space_note(layout.home)
    except OSError:
        return ""
