"""Native and heavy work in a process that can be killed.

A Python thread in the middle of a C call cannot be stopped, and a crash there takes the whole worker along. So such work runs as
`python -m agentflow.worker.child module:function FD`: arguments come as JSON on standard input, progress, notes, what is logged
and the result go back as JSON lines on FD. It has no secrets in its environment, and dies with its parent.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from agentflow import container
from agentflow.errors import JobError, Permanent, Transient, Wait

if TYPE_CHECKING:
    import resource

    from agentflow.worker.running import Running
    from agentflow.worker.work import Work

_ENVIRONMENT: Final = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
)
_NICE: Final = 5  # the worker's own threads renew leases: they come first
_PR_SET_PDEATHSIG: Final = 1
_STDERR_TAIL: Final = 4000
_LOGGED_CHARACTERS: Final = 4000
#: In thousandths of the container's memory on top of what it has.
_DIES_FIRST: Final = "800"


OnNote = Callable[[Any], None]


def run(running: Running, target: str, arguments: dict[str, Any], on_note: OnNote | None = None) -> Any:
    """Run `target` for this job and return its result. Raises what it raised, Transient when it died, Stopped when killed.

    With `on_note` the function gets an argument `note`: what it calls that with (JSON) is passed to `on_note`, here.
    """
    # An interruption between two of these lines would leave a child running, or a zombie.
    with running.shielded():
        return _run(running, target, arguments, on_note)


def _run(running: Running, target: str, arguments: dict[str, Any], on_note: OnNote | None) -> Any:
    work = running.work
    kills = work.memory.kills() if work is not None else None
    read_fd, write_fd = os.pipe()
    with tempfile.TemporaryFile() as stderr, os.fdopen(read_fd, encoding="utf-8") as messages:
        process = _Process(_spawn(target, write_fd, stderr, notes=on_note is not None))
        answer, killed = None, None
        try:
            with running.killer(process.kill):
                if work is not None:
                    work.memory.began(running, process.pid)
                _send(process.popen, arguments)
                answer = _listen(running, messages, on_note)
                process.wait()
        finally:
            process.kill()
            process.wait()
            if work is not None:
                if answer is None and process.was_killed_for_memory(work, kills):
                    work.killed = killed = work.memory.killed(process.peak_bytes(None))
                work.had(process.peak_bytes(answer))
                work.memory.ended(running, process.pid)
        running.check()
        if killed is not None:
            raise killed
        if answer is None:
            raise Transient(_how_it_died(process.status, stderr), code="child_died")
        if "error" in answer:
            raise _error(answer["error"])
        return answer["result"]


def _spawn(target: str, write_fd: int, stderr: IO[bytes], *, notes: bool) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "agentflow.worker.child",
                target,
                str(write_fd),
                *(["notes"] if notes else []),
            ],
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[write_fd],
            start_new_session=True,
            env=environment(),
        )
    finally:
        os.close(write_fd)


def environment() -> dict[str, str]:
    """Of a child: where its code is and whose it is, no secrets."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    root = str(Path(__file__).resolve().parent.parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    kept["AGENTFLOW_CHILD"] = str(os.getpid())  # the parent: see actors/__init__.py and die_with_parent
    return kept


def _send(process: subprocess.Popen[bytes], arguments: dict[str, Any]) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    try:
        # Left open: its end tells the child that the parent is gone.
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died already; its messages and its status say how


def _listen(running: Running, messages: IO[str], on_note: OnNote | None) -> dict[str, Any] | None:
    """Follow the child until it has answered or is gone. Ends when it is killed, since that closes the pipe."""
    answer: dict[str, Any] | None = None
    for line in messages:
        try:
            message = json.loads(line)
        except ValueError:
            continue  # cut off by its death
        if "progress" in message:
            running.report(*message["progress"])
        elif "log" in message:
            level, name, text = message[
                "log"
            ]  # as if this thread had said it: with the job's id, and kept with the job
            logging.getLogger(name).log(level, "%s", text)
        elif "note" in message:
            if on_note is not None and running.stop_reason is None:
                on_note(message["note"])
        else:
            answer = message
    return answer


class _Process:
    """A child that is killed and waited for by us alone, so that what it used is told with its end."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.was_killed = False
        self._lock = threading.Lock()
        self._used: resource.struct_rusage | None = None
        self._own_peak = container.peak_bytes() or 0

    def kill(self) -> None:
        with self._lock:
            if not self._is_over(os.WNOHANG):
                self.was_killed = True
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self._is_over(0)
        with self._lock:
            return  # whoever killed it may have heard of its end first

    def _is_over(self, options: int) -> bool:
        if self._used is not None:
            return True
        try:
            pid, status, used = os.wait4(self.pid, options)
        except ChildProcessError:  # heard of in the other thread
            return True
        if pid:
            self._used, self.popen.returncode = used, os.waitstatus_to_exitcode(status)
        return bool(pid)

    @property
    def status(self) -> int:
        return int(self.popen.returncode)

    def was_killed_for_memory(self, work: Work, kills_before: int | None) -> bool:
        """Whether it was the kernel that did it: the container's counter has risen meanwhile."""
        if self.was_killed or self.status != -signal.SIGKILL or kills_before is None:
            return False
        return (work.memory.kills() or 0) > kills_before

    def peak_bytes(self, answer: dict[str, Any] | None) -> int:
        """What it said at its end. Of one that could not, the kernel's figure, which is no less than what we had at its start."""
        if answer is not None:
            return int(answer.get("peak_bytes") or 0)
        peak = self._used.ru_maxrss * 1024 if self._used is not None else 0
        return peak if peak > self._own_peak else 0


def _how_it_died(status: int, stderr: IO[bytes]) -> str:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _STDERR_TAIL))
    said = stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    if status == -signal.SIGKILL:
        how += " (out of memory, or by hand)"
    return f"the child process {how}" + (f": {said}" if said else "")


def _error(error: dict[str, Any]) -> Exception:
    """What the child's function raised, as this process's own error."""
    message, code = error["message"], error.get("code")
    if error["kind"] == "permanent":
        return Permanent(message, code=code)
    if error["kind"] == "wait":
        return Wait(error["seconds"], code or "asked", message=message)
    failed = Transient(message, code=code or "child_error", retry_after_s=error.get("seconds"))
    if error.get("traceback"):
        failed.add_note(error["traceback"])
    return failed


# ---- the child's side ----


def main() -> None:
    target, fd = sys.argv[1], int(sys.argv[2])
    die_with_parent()
    die_first()
    os.nice(_NICE)
    out = os.fdopen(fd, "w", encoding="utf-8", buffering=1)
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_at_end_of_input, daemon=True).start()

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ToParent(out)])

    def report(fraction: float, stage: str | None = None) -> None:
        out.write(json.dumps({"progress": [fraction, stage]}) + "\n")

    def note(what: Any) -> None:
        out.write(json.dumps({"note": what}) + "\n")

    if sys.argv[3:] == ["notes"]:
        arguments["note"] = note
    try:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        answer = {"result": function(report=report, **arguments)}
    except Exception as error:  # noqa: BLE001 - everything goes back to the parent, which decides
        answer = {"error": _described(error)}
    out.write(json.dumps({**answer, "peak_bytes": container.peak_bytes()}) + "\n")
    out.flush()
    os._exit(0)  # no waiting for native threads


class _ToParent(logging.Handler):
    """What is logged here belongs to the job, which the parent knows."""

    def __init__(self, out: IO[str]) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)[:_LOGGED_CHARACTERS]
            self._out.write(json.dumps({"log": [record.levelno, record.name, text]}) + "\n")
        except Exception:  # noqa: BLE001 - as logging wants it: whoever logs must not fail by it
            self.handleError(record)


def _described(error: Exception) -> dict[str, Any]:
    kind = "permanent" if isinstance(error, Permanent) else "wait" if isinstance(error, Wait) else "transient"
    described: dict[str, Any] = {"kind": kind, "message": str(error) or type(error).__name__}
    if isinstance(error, JobError):
        described["code"] = error.code
        described["seconds"] = getattr(error, "seconds", None) or getattr(error, "retry_after_s", None)
    else:
        described["message"] = f"{type(error).__name__}: {error}"
        described["traceback"] = traceback.format_exc(limit=-20)
    return described


def die_with_parent() -> None:
    """Linux kills us when the parent dies; elsewhere the end of standard input does."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["AGENTFLOW_CHILD"]):
        os._exit(1)  # it died before we asked for that


def die_first() -> None:
    """Where memory runs out, the kernel kills this process rather than the worker with all its jobs."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text(_DIES_FIRST)


def _die_at_end_of_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
