"""Where the time goes: Python functions by py-spy, modules of all threads by perf, statements by the log of Postgres.

py-spy tells which of our functions a processor is busy for, native code that they call included, and sees only threads that
run Python: a decoder's own threads are perf's to tell. With `--native` it would tell both, and make a decoding process six
times as slow; it stops nobody (`--nonblocking`), or the kernel's part would be that of stopping. Each child attaches a py-spy
to itself before it imports anything.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg

from ops.bench.profiling.usage import Meter

ROOT = Path(__file__).resolve().parent.parent.parent.parent
_LOCKED = Path(__file__).resolve().parent / "requirements.txt"
_INSTALLED = ROOT / ".venv/profiling"
_RATE_HZ = 200
_PERF_HZ = 499
#: What a child of the worker runs first, by PYTHONPATH: it waits until it is watched.
_ATTACHING = """
import ctypes, os, subprocess, time
if "AGENTFLOW_CHILD" in os.environ:
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)  # PR_SET_PTRACER_ANY
    out = {folder!r} + f"/child-{{os.getpid()}}"
    # Its messages go to a file: it outlives us, and a pipe that nobody reads ends it before it has written what it saw.
    with open(out + ".log", "wb") as log:
        watching = subprocess.Popen(
            [{py_spy!r}, "record", "--pid", str(os.getpid()), "--format", "raw", "--function", "--nonblocking",
             "--rate", "{rate}", "--output", out + ".raw"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    while watching.poll() is None and b"Sampling" not in open(out + ".log", "rb").read():
        time.sleep(0.005)
"""


@dataclass
class Samples:
    """Shares of processor time. `functions` by process and function of ours, `modules` by process and library; `statements`
    of Postgres by their text: how many, and milliseconds."""

    functions: dict[str, Counter[str]] = field(default_factory=dict)
    lines: dict[str, Counter[str]] = field(default_factory=dict)
    modules: dict[str, Counter[str]] = field(default_factory=dict)
    statements: dict[str, tuple[int, float]] = field(default_factory=dict)


class Samplers:
    """Of one system. `folder` is where samples are kept meanwhile."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder = folder
        self._log = home / "logs/postgres.log"
        self._py_spy = installed()
        self.samples = Samples()

    def environment(self, tree: Path) -> dict[str, str]:
        """Of the worker, whose code is in `tree`."""
        (self._folder / "sitecustomize.py").write_text(
            _ATTACHING.format(py_spy=self._py_spy, rate=_RATE_HZ, folder=str(self._folder))
        )
        return {"PYTHONPATH": f"{self._folder}:{tree}"}

    @contextmanager
    def watching(self, meter: Meter, conn: psycopg.Connection) -> Iterator[None]:
        """Fills `samples` at its end."""
        roles = meter.pids()
        spies = [self._spy(pid, role) for pid, role in roles.items() if role in ("worker", "encoder")]
        perf = self._perf(roles)
        for line in (
            "alter system set log_min_duration_statement = 0",
            "alter system set log_parameter_max_length = 0",
        ):
            conn.execute(line.encode())
        conn.execute("select pg_reload_conf()")
        time.sleep(0.3)
        at = self._log.stat().st_size
        try:
            yield
        finally:
            conn.execute("alter system reset all")
            conn.execute("select pg_reload_conf()")
            for process in (*spies, *([perf] if perf else [])):
                process.send_signal(signal.SIGINT)
            for process in (*spies, *([perf] if perf else [])):
                process.wait(60)
            self._wait_for_children()
            self._read(roles, at, conn.info.backend_pid)
            for old in self._folder.glob("*-*.raw"):
                old.unlink()
                old.with_suffix(".log").unlink(missing_ok=True)

    def _spy(self, pid: int, role: str) -> subprocess.Popen[bytes]:
        command = [self._py_spy, "record", "--pid", str(pid), "--format", "raw", "--function", "--nonblocking"]
        command += ["--rate", str(_RATE_HZ)]
        # A worker has many threads that wait, which are told from busy ones by who holds the lock of the interpreter.
        command += ["--gil"] if role == "worker" else []
        command += ["--output", str(self._folder / f"{role}-{pid}.raw")]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _perf(self, roles: Mapping[int, str]) -> subprocess.Popen[bytes] | None:
        perf = shutil.which("perf")
        if perf is None:
            return None
        command = [perf, "record", "--quiet", "-F", str(_PERF_HZ), "-o", str(self._folder / "perf.data"), "--pid"]
        return subprocess.Popen(
            [*command, ",".join(map(str, roles))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _wait_for_children(self) -> None:
        """What watches a child writes what it saw once the child has ended; an encoder goes on, and is left by it."""
        for log in self._folder.glob("child-*.log"):
            ends = time.monotonic() + 10
            while not log.with_suffix(".raw").exists() and time.monotonic() < ends:
                for process in psutil.process_iter(["cmdline"]):
                    if str(log.with_suffix(".raw")) in (process.info["cmdline"] or ()) and time.monotonic() > ends - 8:
                        process.send_signal(signal.SIGINT)
                time.sleep(0.1)

    def _read(self, roles: Mapping[int, str], log_from: int, own: int) -> None:
        roles = {**roles, **self._read_stacks()}
        if (self._folder / "perf.data").exists():
            self._read_perf(roles)
        with self._log.open("rb") as log:
            log.seek(log_from)
            self.samples.statements = statements(log.read().decode(errors="replace"), own)

    def _read_stacks(self) -> dict[int, str]:
        """Whose stacks they are, by pid: what was a child when it began may be the encoder."""
        seen = {}
        for path in self._folder.glob("*.raw"):
            text = path.read_text(errors="replace")
            role = path.stem.partition("-")[0]
            if role == "child" and "knowledge/encoder.py" in text:
                role = "encoder"
            seen[int(path.stem.rpartition("-")[2])] = role
            functions = self.samples.functions.setdefault(role, Counter())
            lines = self.samples.lines.setdefault(role, Counter())
            for line in text.splitlines():
                stack, _, count = line.rpartition(" ")
                frames = stack.split(";")
                if role == "worker" and not any("performing.py" in frame or "running.py" in frame for frame in frames):
                    functions["(the worker's other threads)"] += int(count)
                    continue
                functions[of_ours(frames)] += int(count)
                lines[frames[-1]] += int(count)
        return seen

    def _read_perf(self, roles: Mapping[int, str]) -> None:
        command = ["perf", "script", "-i", str(self._folder / "perf.data"), "-F", "pid,comm,ip,dso"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        server = {name for name in roles.values() if name not in ("worker", "encoder", "child")}
        for line in told.splitlines():
            found = re.match(r"\s*(.+?)\s+(\d+)\s+[0-9a-f]+ \((.*)\)$", line)
            if found is None or found[1].startswith("py-spy"):
                continue
            thread, pid, module = found[1], int(found[2]), found[3]
            role = roles.get(pid) or next((name for name in server if name in thread), "child")
            self.samples.modules.setdefault(role, Counter())[module_name(module, thread)] += 1


def of_ours(frames: list[str]) -> str:
    """The innermost function of the product in a stack, as py-spy writes it; where there is none, the innermost."""
    for frame in reversed(frames):
        if re.search(r"\((?:.*/)?(?:actors|agentflow)/", frame):
            return frame
    return "(imports)" if any("importlib" in frame for frame in frames) else frames[-1]


def module_name(path: str, thread: str) -> str:
    """A library without its version and folder; FFmpeg's threads for video apart, by their names."""
    name = Path(path).name
    if path.startswith("[kernel") or path == "[unknown]":
        name = path.strip("[]").split(".")[0]
    name = re.sub(r"(-[0-9a-f]{8})?(\.cpython-\w+|\.abi3)?(-[\w-]+)?\.so[.\d]*$", "", name)
    return f"{name} ({thread.split(':')[1]} threads)" if thread.startswith("av:") else name


def statements(log: str, own: int) -> dict[str, tuple[int, float]]:
    """Of the log of Postgres at log_min_duration_statement = 0: how often each statement was run, and milliseconds in all;
    without those of the server process `own`, which are ours."""
    found: dict[str, tuple[int, float]] = {}
    # An entry of several lines goes on with a tab; of the steps of the extended protocol only the last has run it.
    for entry in re.split(r"\n(?!\t)", log):
        taken = re.search(r"duration: ([\d.]+) ms  (parse|bind|execute|statement)[^:]*: (.*)", entry, re.DOTALL)
        if taken is None or f"[{own}]" in entry.partition(" LOG:")[0]:
            continue
        text = " ".join(taken[3].split())
        count, ms = found.get(text, (0, 0.0))
        found[text] = (count + (taken[2] in ("execute", "statement")), ms + float(taken[1]))
    return found


def installed() -> str:
    """py-spy, from its wheel, put into a folder of its own beside the environment once."""
    binary = _INSTALLED / "bin/py-spy"
    if not binary.exists():
        arguments = ["--quiet", "--require-hashes", "--target", str(_INSTALLED), "-r", str(_LOCKED)]
        uv = shutil.which("uv")
        own = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
        subprocess.run([*own, *arguments], check=True)
    return str(binary)


def shares(counts: Mapping[str, int], most: int) -> dict[str, float]:
    """Percent of all, the largest first."""
    total = sum(counts.values()) or 1
    return {name: round(100 * n / total, 1) for name, n in Counter(counts).most_common(most)}


def as_json(samples: Samples, most: int = 14) -> dict[str, Any]:
    return {
        "functions": {role: shares(counts, most) for role, counts in samples.functions.items()},
        "innermost": {role: shares(counts, most) for role, counts in samples.lines.items()},
        "modules": {role: shares(counts, most) for role, counts in samples.modules.items()},
        "statements_run": sum(count for count, _ in samples.statements.values()),
        "statements": {
            text[:160]: {"count": count, "ms": round(ms, 1)}
            for text, (count, ms) in sorted(samples.statements.items(), key=lambda item: -item[1][1])[:most]
        },
    }
