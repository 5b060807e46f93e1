"""Children of a worker: stopped at any moment, they are gone, and nobody waits for them."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psutil
import pytest

from agentflow.worker import child
from agentflow.worker.running import Running, Stopped


def test_a_stop_at_any_moment_leaves_no_child_and_no_zombie() -> None:
    chance = random.Random(2)
    for _ in range(40):
        job: Any = SimpleNamespace(id=uuid4(), fence=1)
        running = Running(job, time.monotonic() + 60)
        stopper = threading.Timer(chance.uniform(0.0, 0.06), running.stop, ["cancelled"])
        stopper.start()

        with pytest.raises(Stopped):
            running.call(partial(child.run, running, "actors.ping.native:block", {"milliseconds": 600_000}))
        stopper.join()

        assert _left() == []


def _left() -> list[str]:
    """Children of the kind that `run` starts, and what is left of one that nobody waited for."""
    children = psutil.Process().children()
    return [
        str(process)
        for process in children
        if process.status() == psutil.STATUS_ZOMBIE or "agentflow.worker.child" in process.cmdline()
    ]
