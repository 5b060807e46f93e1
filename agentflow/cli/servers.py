"""What `up` and `worker` look at before they start anything: whether the servers can be had."""

from __future__ import annotations

import os

from agentflow.cli.errors import CANNOT_START, Failure, one_line
from agentflow.database import Unavailable
from agentflow.embedded import Embedded, join
from agentflow.settings import Settings
from agentflow.system import System


def check(read: Settings) -> Embedded | None:
    """What would keep the worker from starting ends the command with one line, instead of a process that tries for ever.

    Held by this process, too, so that the embedded servers outlive the worker process when that is replaced.
    """
    stack = join(read.agentflow_home) if read.embedded_database or read.embedded_redis else None
    system = System(read, "up")
    system.database.presence.quiet = True  # the process that it starts tells the log; a failure is the line below
    try:
        system.check_schema()
        system.admin_key()
    except Unavailable as error:
        if stack is not None:
            stack.leave()
        raise Failure(
            f"the database cannot be reached ({one_line(error)}); `agentflow doctor` says more", CANNOT_START
        ) from None
    finally:
        system.close()
    return stack


def leave(stack: Embedded | None, *, for_a_while: bool = False) -> None:
    if stack is not None:
        stack.leave()
        if os.getpid() == 1:
            stack.wait_stopped()  # our end is the end of the container: Postgres would be killed half-way
        elif for_a_while:
            stack.wait_stopped(3.0)  # so that whoever started us leaves nothing running (others may use the home, too)
