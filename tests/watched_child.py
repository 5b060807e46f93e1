"""What a job of tests/watched_worker.py does in its child process."""

from __future__ import annotations

import logging
from collections.abc import Callable


def talk(*, report: Callable[[float, str | None], None]) -> None:
    logging.getLogger("native").info("said in the %s", "child")
