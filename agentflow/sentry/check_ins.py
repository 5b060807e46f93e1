"""Check-ins: Sentry raises the alarm when one does not come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from agentflow.sentry.process import started

Status = Literal["in_progress", "ok", "error"]


@contextmanager
def watched(name: str, every_s: int | None) -> Iterator[list[str]]:
    """A run of an entry of the calendar. Whoever runs it puts into the list what went wrong; nothing: it went well."""
    wrong: list[str] = []
    reporting = started()
    if every_s is None or reporting is None or reporting.monitors != "all":
        yield wrong
        return
    began, id_ = time.monotonic(), _check_in(name, every_s, "in_progress")
    try:
        yield wrong
    except BaseException:
        wrong.append("it was cut off")
        raise
    finally:
        _check_in(name, every_s, "error" if wrong else "ok", id_, time.monotonic() - began)


def calendar_turns(well: bool, every_s: int) -> None:
    """The one check-in that says that a scheduler is there."""
    reporting = started()
    if reporting is not None and reporting.monitors != "none":
        _check_in("scheduler", every_s, "ok" if well else "error")


def _check_in(
    name: str, every_s: int, status: Status, id_: str | None = None, duration_s: float | None = None
) -> str | None:
    from sentry_sdk.crons import capture_checkin

    minutes = max(1, round(every_s / 60))
    return capture_checkin(
        monitor_slug=f"agentflow-{name.replace('.', '-').replace('_', '-')}",
        check_in_id=id_,
        status=status,
        duration=duration_s,
        monitor_config={
            "schedule": {"type": "interval", "value": minutes, "unit": "minute"},
            "checkin_margin": max(5, minutes // 10),  # minutes, as all of these
            "max_runtime": 30,
            "failure_issue_threshold": 1 if minutes >= 60 else 2,
            "recovery_threshold": 1,
        },
    )
