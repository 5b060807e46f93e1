"""`python -m scheduler`: the calendar as a process of its own."""

from __future__ import annotations

import signal
import sys

from agentflow import log, probe, sentry, settings
from agentflow.database import Unavailable
from agentflow.embedded import EmbeddedError
from agentflow.schema import SchemaError
from agentflow.signals import Inbox
from agentflow.system import System
from scheduler import schedule

logger = log.get(__name__)
#: At the end, for sending what Sentry was not sent yet.
_REPORT_S = 2.0


def main() -> int:
    try:
        read = settings.current()
        settings.check_files(read)
    except settings.SettingsError as error:
        print(f"agentflow: {error}", file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    log.configure(read, "scheduler")
    sentry.start(read, "scheduler")
    import actors  # noqa: F401 - makes their job types known; with wrong settings it would end the process in its own words

    told = Inbox()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, told.put)
    try:
        system = System.start(read, "scheduler")
    except (SchemaError, EmbeddedError, OSError, *Unavailable) as error:
        logger.critical(" ".join(str(error).split()))
        return 3
    served = probe.serve(system, "scheduler", read.port)
    running = schedule.start(system)
    logger.info("scheduler ready")
    told.get()
    logger.info("stopping")
    running.shutdown(wait=False)
    if served is not None:
        served.close()
    sentry.stop(_REPORT_S)
    system.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
