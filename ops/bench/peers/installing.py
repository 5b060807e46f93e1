"""An environment of the peers' own, made once for each lock file: nothing of it comes near AgentFlow's."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ops.bench.peers.catalogue import FOLDER, THEIRS

_LOCKED = FOLDER / "requirements.txt"
_BULLMQ = FOLDER / "bullmq"


def install_python() -> None:
    """With uv where it is on PATH."""
    if _is_done(THEIRS.parent / ".installed", _LOCKED):
        return
    print("installing the peers …", flush=True)
    arguments = ["--require-hashes", "-r", str(_LOCKED)]
    if shutil.which("uv"):
        _run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(THEIRS.parent)])
        _run(["uv", "pip", "install", "--quiet", "--python", str(THEIRS / "python"), *arguments])
    else:
        _run([sys.executable, "-m", "venv", "--clear", str(THEIRS.parent)])
        _run([str(THEIRS / "python"), "-m", "pip", "install", "--quiet", *arguments])
    _done(THEIRS.parent / ".installed", _LOCKED)


def install_node() -> str | None:
    """Why BullMQ cannot run here; None: it can."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "Node.js and npm are not installed"
    locked = _BULLMQ / "package-lock.json"
    if not _is_done(_BULLMQ / "node_modules/.installed", locked):
        print("installing BullMQ …", flush=True)
        _run(["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts"], _BULLMQ)
        _done(_BULLMQ / "node_modules/.installed", locked)
    return None


def versions() -> dict[str, str]:
    """Of what is compared, and of what runs it."""
    names = (
        "celery",
        "rq",
        "procrastinate",
        "taskiq",
        "taskiq-aio-pika",
        "huey",
        "dramatiq",
        "pika",
        "psycopg",
        "redis",
    )
    asking = f"from importlib.metadata import version\nprint(*(version(n) for n in {names!r}))"
    told = subprocess.run([str(THEIRS / "python"), "-c", asking], check=True, capture_output=True, text=True).stdout
    found = dict(zip(names, told.split(), strict=True))
    found |= {
        f"agentflow's {name}": version(name) for name in ("dramatiq", "pika", "psycopg", "redis", "flask", "gunicorn")
    }
    if shutil.which("node"):
        found["node"] = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip()
        package = _BULLMQ / "node_modules/bullmq/package.json"
        if package.exists():
            asking = f"console.log(require({str(package)!r}).version)"
            said = subprocess.run(["node", "-e", asking], check=True, capture_output=True, text=True)
            found["bullmq"] = said.stdout.strip()
    return found


def _is_done(stamp: Path, locked: Path) -> bool:
    return stamp.exists() and stamp.read_text() == _digest(locked)


def _done(stamp: Path, locked: Path) -> None:
    stamp.write_text(_digest(locked))


def _digest(locked: Path) -> str:
    return hashlib.sha256(locked.read_bytes() + sys.version.encode()).hexdigest()


def _run(command: list[str], folder: Path = FOLDER) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed: {' '.join((done.stdout + done.stderr).split())[-800:]}")
