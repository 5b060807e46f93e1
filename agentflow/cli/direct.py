"""The system of a command that works on the database itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from agentflow import settings
from agentflow.system import System


@contextmanager
def connected() -> Iterator[System]:
    # The commands speak for themselves; libraries' warnings (a server that is still starting) would only confuse.
    logging.basicConfig(level=logging.ERROR, format="agentflow: %(message)s")
    system = System.start(settings.current(), "cli")
    try:
        yield system
    finally:
        system.close()


@contextmanager
def unprepared() -> Iterator[System]:
    """The same, whatever its database holds, or does not hold yet."""
    logging.basicConfig(level=logging.ERROR, format="agentflow: %(message)s")
    system = System(settings.current(), "cli")
    try:
        system.join_embedded()
        yield system
    finally:
        system.close()
