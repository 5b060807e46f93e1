"""The home folder itself: made with the right owner and rights, and with a place where sockets work."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from agentflow.embedded.account import Account, run_as
from agentflow.embedded.errors import ELSEWHERE, EmbeddedError
from agentflow.embedded.layout import Layout

# A socket cannot be made just now, which says nothing about the file system.
PASSING_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def make_home(layout: Layout, account: Account | None) -> None:
    """Make the home and its folders, for our eyes only. Postgres' account may walk through the home, not list it."""
    home = layout.home
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account is not None:
        # Only if the home is ours alone: somebody may have named a folder that holds other things, such as /root.
        if _private(home) and (layout.lock("users").exists() or not any(home.iterdir())):
            os.chown(home, -1, account.gid)
            home.chmod(0o710)
        _check_reachable(home, account)
    for folder in (layout.lock("users").parent, layout.log("postgres").parent, layout.valkey):
        folder.mkdir(mode=0o700, exist_ok=True)


def make_run_folder(layout: Layout, account: Account | None) -> Path:
    """The folder of the sockets, open to ourselves and Postgres alone: its connections need no password."""
    inside = layout.home / "run"
    if layout.run == inside:
        try:
            _make_private(inside, account)
            _try_socket(inside)
        except OSError as err:
            if err.errno in PASSING_ERRORS:
                raise
            layout.run_elsewhere.touch(mode=0o600)  # seen: Docker Desktop's bind mounts and NFS have no sockets
        else:
            return inside
    _make_private(layout.run, account)
    _try_socket(layout.run)
    return layout.run


def _private(folder: Path) -> bool:
    info = folder.stat()
    return info.st_uid == os.geteuid() and not info.st_mode & 0o077


def _check_reachable(home: Path, account: Account) -> None:
    closed = None
    for folder in (home, *home.parents):
        if run_as(account, "/bin/sh", "-c", 'cd "$1"', "sh", folder).returncode == 0:
            break
        closed = folder
    if closed is not None:
        raise EmbeddedError(
            f"Postgres runs as {account.name} when root starts it, and {account.name} may not enter {closed}: "
            f"`chmod o+x {closed}`, set AGENTFLOW_HOME to a folder elsewhere, such as /var/lib/agentflow, {ELSEWHERE}"
        )


def _make_private(folder: Path, account: Account | None) -> None:
    """Make the folder, or take it if it is ours: in /tmp anybody could have made one, or a link, by that name."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    owners = {os.geteuid()} if account is None else {os.geteuid(), account.uid}
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder: remove it", str(folder))
    if info.st_uid not in owners:
        raise PermissionError(errno.EPERM, f"belongs to user id {info.st_uid}: remove it", str(folder))
    if info.st_mode & 0o077 or not info.st_mode & 0o700:
        folder.chmod(0o700)
    if account is not None and info.st_uid != account.uid:
        os.chown(folder, account.uid, account.gid)


def _try_socket(folder: Path) -> None:
    path = folder / f".try-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(os.fsencode(path))
        path.unlink()
