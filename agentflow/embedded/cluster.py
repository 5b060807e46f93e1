"""Postgres' data folder: made by initdb, or what is there is checked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from agentflow.embedded.account import Account, run_as
from agentflow.embedded.errors import ELSEWHERE, EmbeddedError
from agentflow.embedded.layout import POSTGRES_MAJOR, Layout


def make_cluster(layout: Layout, postgres: Path, account: Account | None, *, held: int, timeout_s: float) -> None:
    """Make the data folder unless it is there.

    `held` is the descriptor of the lock under which only one process prepares the home. initdb inherits it: should we
    be killed, the next one waits for the initdb that we left behind.
    """
    if layout.data.exists():
        _check(layout, account)
        return
    others = sorted(
        folder.name
        for folder in layout.home.glob("pg[1-9]*")
        if folder.name not in (layout.data.name, layout.new_data.name)
    )
    if others:
        raise _wrong_major(layout.home / others[-1], others[-1].removeprefix("pg"))
    # Under another name until it is whole: a killed initdb leaves no half data folder.
    shutil.rmtree(layout.new_data, ignore_errors=True)
    layout.new_data.mkdir(mode=0o700)
    if account is not None:
        os.chown(layout.new_data, account.uid, account.gid)
    try:
        _initdb(layout, postgres, account, held, timeout_s)
    except BaseException:
        shutil.rmtree(layout.new_data, ignore_errors=True)
        raise
    layout.new_data.rename(layout.data)


def _check(layout: Layout, account: Account | None) -> None:
    try:
        major = (layout.data / "PG_VERSION").read_text().strip()
    except FileNotFoundError as err:
        raise EmbeddedError(f"{layout.data} is no data folder of Postgres: move it away, {ELSEWHERE}") from err
    if major != str(POSTGRES_MAJOR):
        raise _wrong_major(layout.data, major)
    owner = layout.data.stat().st_uid
    wanted = os.geteuid() if account is None else account.uid
    if owner != wanted:
        raise EmbeddedError(
            f"{layout.data} belongs to user id {owner}, and Postgres would run as user id {wanted}: "
            f"start as the user who made it, or `chown -R {wanted} {layout.data}` while nothing runs, {ELSEWHERE}"
        )


def _wrong_major(folder: Path, major: str) -> EmbeddedError:
    return EmbeddedError(
        f"{folder} holds data of Postgres {major}, and this version brings Postgres {POSTGRES_MAJOR}: dump it with the "
        f"version that made it (pg_dump), move the folder away, start and restore; {ELSEWHERE}"
    )


def _initdb(layout: Layout, postgres: Path, account: Account | None, held: int, timeout_s: float) -> None:
    command: list[str | Path] = [postgres.with_name("initdb"), "-D", layout.new_data, "-U", "agentflow", "-E", "UTF8"]
    # The same order of strings on each machine, whatever its C library.
    command += ["--locale-provider=builtin", "--locale=C.UTF-8"]
    # No passwords: only this user and Postgres' own account may enter the folder of the sockets.
    command += ["-A", "trust", "--no-instructions"]
    try:
        result = run_as(account, *command, pass_fds=(held,), timeout_s=timeout_s)
    except subprocess.TimeoutExpired as err:
        raise EmbeddedError(
            f"initdb made no database in {layout.new_data} within {timeout_s:.0f} s: "
            f"start again when the machine is less busy, {ELSEWHERE}"
        ) from err
    if result.returncode != 0:
        lines = [
            line for line in result.stdout.splitlines() if "error:" in line or "FATAL:" in line or "PANIC:" in line
        ]
        said = " | ".join(lines or result.stdout.splitlines()[-3:])
        raise EmbeddedError(
            f"initdb failed in {layout.new_data}{free_space_note(layout.home)}: {said or f'exit {result.returncode}'}; "
            f"once that is repaired just start again, {ELSEWHERE}"
        )


def free_space_note(home: Path) -> str:
    """` (only 3 MB are free there)` if a full disk may be the cause of what went wrong, else nothing."""
    space = os.statvfs(home)
    free_mb = space.f_bavail * space.f_frsize // 1_000_000
    return f" (only {free_mb} MB are free there)" if free_mb < 100 else ""
