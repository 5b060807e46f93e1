"""The commands of the platforms' files where nothing of this machine helps them: in an empty Debian, as a user who is not
root, each the first process of a PID namespace of its own, as in a container. It gets no signal that it does not handle."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from packaging.markers import Marker

from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.core_support import read
from tests.pgbouncer import pooler
from tests.processes import ROOT, Process, eventually
from tests.test_platform_files import environments, platform_commands
from tests.test_tiers import Valkey, submitting

#: Most of it is for the root, which takes five minutes where the packages come slowly.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

#: Where the systemd units want the checkout; the other files' commands do not care.
HOME = "/srv/agentflow"
#: Debian's nobody, as the owner of what AgentFlow keeps.
USER = "65534:65534"
#: What the tests' own servers and a store of one machine stand for.
OURS = {"DATABASE_URL", "REDIS_URL", "SUPABASE_URL", "SUPABASE_SECRET_KEY", "STORAGE_URL", "STORAGE_SHARED"}
GRACE_S = 3.0

COMMANDS = [(file, name, command) for file, name, command in platform_commands() if name != "release"]


class Debian:
    """A root file system with Python, AgentFlow as the pages install it, and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, **environment: str) -> str:
        """As root, in it. Returns what it printed."""
        return checked(
            "chroot", str(self.root), "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *named(environment), *command
        )

    @contextmanager
    def started(self, command: str, environment: dict[str, str], log: Path) -> Iterator[First]:
        """The command as a platform starts it that has no shell, in namespaces for processes and mounts."""
        inside = [
            f"PATH={HOME}/.venv/bin:/usr/bin:/bin",
            "PYTHONUNBUFFERED=1",
            *named(environment),
            *shlex.split(command),
        ]
        mounts = f"mount -t proc proc {self.root}/proc && mount -t tmpfs -o mode=1777 tmpfs {self.root}/dev/shm"
        # Each of these becomes the next one; the last one is the command, still with the number 1.
        enter = shlex.join(["chroot", f"--userspec={USER}", str(self.root), "env", "-i", f"--chdir={HOME}", *inside])
        process = First(["unshare", "--pid", "--fork", "--mount", "sh", "-c", f"{mounts} && exec {enter}"], {}, log)
        try:
            yield process
        finally:
            process.kill()


class First(Process):
    """A process that is number 1 of its namespace; `popen` is what waits for it out here."""

    @property
    def first(self) -> psutil.Process:
        (child,) = eventually(lambda: psutil.Process(self.pid).children())
        found: psutil.Process = child
        return found

    def stop(self) -> int:
        """SIGTERM to it alone; its exit status."""
        self.first.terminate()
        return self.popen.wait(60)


def named(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


def checked(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def debian() -> Iterator[Debian]:
    assert os.geteuid() == 0, "namespaces and roots are made by root"
    assert shutil.which("mmdebstrap"), "mmdebstrap is missing: apt-get install mmdebstrap"
    folder = Path(tempfile.mkdtemp(prefix="agentflow-root-"))
    folder.chmod(0o755)
    try:
        made = Debian(folder / "root")
        checked(
            *("mmdebstrap", "--variant=minbase", "--mode=root", "--include=python3,python3-venv", "--quiet"),
            *(release(), str(made.root), *sources()),
        )
        install(made, folder / "fetched")
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release() -> str:
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    assert found, "this is no Debian"
    return found.group(1)


def sources() -> list[str]:
    """Where this machine has its packages from."""
    places = [Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources")]
    return [str(path) for path in places if path.exists() and path.read_text().strip()]


def install(debian: Debian, fetched: Path) -> None:
    """As ops/deploy/systemd.md does it. The wheels are fetched out here, where an index can be reached."""
    debian.run("python3", "-m", "venv", f"{HOME}/.venv")
    checked(sys.executable, "-m", "venv", str(fetched))
    download = (str(fetched / "bin/pip"), "download", "--quiet", "--dest", str(debian.root / "wheels"))
    (fetched / "locked.txt").write_text(locked_for(debian))
    checked(*download, "--no-deps", "--require-hashes", "-r", str(fetched / "locked.txt"))
    checked(*download, "setuptools>=80", "wheel")
    home = debian.root / HOME.removeprefix("/")
    for name in checked("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if not name.startswith(("tests/", "ops/bench/", "ops/evidence/")) and (ROOT / name).exists():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)
    pip = (f"{HOME}/.venv/bin/pip", "install", "--quiet", "--no-index", "--find-links", "/wheels")
    debian.run(*pip, "setuptools", "wheel")
    debian.run(*pip, "--require-hashes", "-r", f"{HOME}/requirements.txt")
    debian.run(*pip, "--no-deps", "--no-build-isolation", "--editable", HOME)
    shutil.rmtree(debian.root / "wheels")
    debian.run("install", "-d", "-o", "65534", "-g", "65534", "-m", "700", "/var/lib/agentflow")


def locked_for(debian: Debian) -> str:
    """The lock file as the Python in there reads it: without what is for others."""
    ask = "import json; from pip._vendor.packaging.markers import default_environment as d; print(json.dumps(d()))"
    there = json.loads(debian.run(f"{HOME}/.venv/bin/python", "-c", ask))
    blocks = re.split(r"^(?=\w)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    kept = []
    for block in blocks:
        name, _, marker = block.partition("\n")[0].rstrip(" \\").partition(" ; ")
        if not marker or Marker(marker).evaluate(there):
            kept.append(block.replace(f" ; {marker}", "", 1) if marker else block)
        assert not block.strip() or "==" in name
    return "".join(kept)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    made = Valkey(tmp_path_factory.mktemp("roots") / "valkey")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def reachable(environment: dict[str, str], valkey: Valkey, database_url: str) -> Iterator[dict[str, str]]:
    """The tests' Postgres by a transaction pooler and a Valkey, both at addresses that a root of its own can reach."""
    with pooler(database_url, size=10) as front:
        yield {
            "AGENTFLOW_HOME": "/var/lib/agentflow",
            "DATABASE_URL": front.url_of(database_url),
            "REDIS_URL": valkey.url,
            "STORAGE_URL": "file:///var/lib/agentflow/storage",
            "STORAGE_SHARED": "true",
            "ADMIN_API_KEY": ADMIN_KEY,
            "ENCRYPTION_KEY": "k" * 32,
            "JOB_QUEUE_NAME": environment["JOB_QUEUE_NAME"],
            "CANARY_INTERVAL": "0",
            "SHUTDOWN_GRACE": str(GRACE_S),
            "PORT": str(free_port()),
        }


@pytest.fixture
def system(reachable: dict[str, str], tmp_path: Path) -> Iterator[System]:
    """Who hands work in, out here."""
    with submitting(reachable | {"AGENTFLOW_HOME": str(tmp_path / "home")}) as system:
        yield system


def variables(file: str, name: str) -> dict[str, str]:
    """What a file itself says; systemd's are in agentflow.env."""
    known = environments()
    file = {"systemd": "agentflow.env"}.get(file, file)
    found = known.get(file) or known[f"{file} {name}"]
    return {key: value for key, value in found.items() if value is not None and key not in OURS}


def health(port: str) -> dict[str, Any] | None:
    try:
        answer = httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5)
    except httpx2.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


@pytest.mark.parametrize(("file", "name", "command"), COMMANDS, ids=[f"{file}-{name}" for file, name, _ in COMMANDS])
def test_a_command_answers_and_stops_with_no_attempt_lost(
    file: str, name: str, command: str, debian: Debian, reachable: dict[str, str], system: System, tmp_path: Path
) -> None:
    environment = variables(file, name) | reachable
    if file == "systemd":
        command = verbatim(name)

    with debian.started(command, environment, tmp_path / "log") as process:

        def answers() -> dict[str, Any] | None:
            assert process.popen.poll() is None, process.text()[-4000:]
            return health(environment["PORT"])

        found = eventually(answers, within_s=120)
        inner = process.first
        if name == "worker":
            job = system.submit(1, NewJob("ping", {"sleep_ms": 3_600_000}, max_attempts=1)).job
            eventually(lambda: now(system, job).state == "running", within_s=60)
        status = process.stop()

    assert found["status"] == "ok" and found["database"]["connected"], found
    assert status == 0, process.text()[-4000:]
    assert not inner.is_running()
    if name == "worker":
        left = now(system, job)
        assert (left.state, left.attempt, left.crashes) == ("queued", 0, 0)


def verbatim(name: str) -> str:
    """What stands in the unit, with the one thing undone that systemd undoes."""
    unit = {"web": "web", "worker": "worker@", "scheduler": "scheduler"}[name]
    text = (ROOT / f"ops/deploy/systemd/agentflow-{unit}.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    return str(command).replace("$$", "$")


def now(system: System, job: Job) -> Job:
    with system.database.connection() as conn:
        return read(conn, job)


def test_the_release_makes_the_schema_and_finds_it_made(
    debian: Debian, reachable: dict[str, str], tmp_path: Path
) -> None:
    for number in range(2):
        with debian.started("python -m migrations", reachable, tmp_path / f"log{number}") as process:
            assert process.popen.wait(60) == 0, process.text()


def test_the_image_alone_has_servers_of_its_own_and_passes_its_own_check(debian: Debian, tmp_path: Path) -> None:
    """`agentflow up` and the HEALTHCHECK, as the Dockerfile has them."""
    lines = (ROOT / "ops/Dockerfile").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^CMD (\[.*\])$", lines, re.MULTILINE)
    (check,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", lines, re.MULTILINE)
    environment = {"AGENTFLOW_HOME": "/var/lib/agentflow/data", "AGENTFLOW_ENV": "production", "PORT": str(free_port())}

    with debian.started(shlex.join(json.loads(command)), environment, tmp_path / "log") as process:

        def well() -> bool:
            assert process.popen.poll() is None, process.text()[-4000:]
            path = f"PATH={HOME}/.venv/bin:/usr/bin"
            asked = ["chroot", f"--userspec={USER}", str(debian.root), "env", "-i", path, f"PORT={environment['PORT']}"]
            return (
                subprocess.run(
                    [*asked, f"PATH={HOME}/.venv/bin:/usr/bin", *json.loads(check)], capture_output=True
                ).returncode
                == 0
            )

        eventually(well, within_s=120, every_s=0.5)
        found = health(environment["PORT"])
        status = process.stop()

    assert found and found["status"] == "ok", found
    assert status == 0, process.text()[-4000:]
    assert "killed" not in process.text()


def test_a_shell_in_between_would_lose_the_signal(debian: Debian, reachable: dict[str, str], tmp_path: Path) -> None:
    """Why the files say `exec`: as the first process, a shell without a handler does not even get it."""
    with debian.started("sh -c 'python -m scheduler; true'", reachable, tmp_path / "log") as process:
        eventually(lambda: health(reachable["PORT"]), within_s=120)
        process.first.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(GRACE_S + 5)
