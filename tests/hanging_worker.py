"""`dramatiq tests.hanging_worker`: a worker whose heart waits for its embedded servers' keeper while a file is there, and whose
patience is short."""

from __future__ import annotations

import os
import time
from pathlib import Path

from agentflow import health
from agentflow.system import System
from tests import job_types  # noqa: F401 - starts the worker's declarations


def wait(_system: System) -> None:
    while Path(os.environ["HANG_WHEN"]).exists():
        time.sleep(0.1)


System.heartbeat = wait  # type: ignore[method-assign]
health.STUCK_ANSWERS = 0.5  # type: ignore[misc]
