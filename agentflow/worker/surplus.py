"""Worker processes that a bare `dramatiq actors` starts and that this instance has no use for.

Dramatiq starts one process per CPU of the host, which on a small instance is a share of a large machine: eight processes of
25 threads in 512 MB. One process with JOB_CONCURRENCY threads is what an instance gets unless `--processes` says otherwise; the
others stay as light as Dramatiq lets them be (it takes a child's end for a crash, and stops them all).
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Sequence

import dramatiq
from dramatiq.brokers.stub import StubBroker

from agentflow import signals


def is_surplus(
    arguments: Sequence[str] | None = None, name: str | None = None, *, is_child: bool | None = None
) -> bool:
    """Whether this process is a second or later child of a `dramatiq` command that was not told how many to start."""
    arguments = sys.argv if arguments is None else arguments
    name = multiprocessing.current_process().name if name is None else name
    is_child = multiprocessing.parent_process() is not None if is_child is None else is_child
    if not is_child or "dramatiq" not in arguments[0]:
        return False
    told = any(re.match(r"--pr|-p(?!-)", argument) for argument in arguments[1:])
    number = re.fullmatch(r"Process-(\d+)", name)
    return not told and number is not None and int(number.group(1)) > 1


def take_nothing() -> None:
    """A broker without queues: this process waits for its end, which is one as well where its signals are doubled."""
    dramatiq.set_broker(StubBroker(middleware=[]))
    parent = multiprocessing.parent_process()
    signals.Signals(stop=_nothing, hurry=_nothing, parent=parent.pid if parent else None)


def _nothing() -> None:
    return
