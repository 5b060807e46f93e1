"""Whom the programs of Postgres run as: it refuses root, so root lends it the account `nobody`."""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agentflow.embedded.errors import ELSEWHERE, EmbeddedError
from agentflow.embedded.keeper import SERVER_ENVIRONMENT


@dataclass(frozen=True)
class Account:
    name: str
    uid: int
    gid: int


def postgres_account() -> Account | None:
    """`nobody`, who exists everywhere, for root; None for everybody else, as whom Postgres runs itself."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError as err:
        raise EmbeddedError(
            f"Postgres refuses to run as root and there is no user `nobody` here: run as another user, {ELSEWHERE}"
        ) from err
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def run_as(
    account: Account | None, *argv: str | Path, pass_fds: tuple[int, ...] = (), timeout_s: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run a command as `account`, or as ourselves if None. Its output and its errors come back as one text."""
    return subprocess.run(
        argv,
        cwd="/",
        env=SERVER_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=pass_fds,
        timeout=timeout_s,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
        check=False,
    )
