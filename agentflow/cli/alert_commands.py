"""`agentflow alerts …`."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from agentflow import settings
from agentflow.alerts import prometheus, standing, telling
from agentflow.alerts.standing import Standing
from agentflow.alerts.table import with_thresholds
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.system import System


def print_rules() -> None:
    thresholds = dict(settings.current().alert_thresholds)
    print(prometheus.rules(with_thresholds(thresholds)), end="")


def show(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = standing.every(conn)
    rows = [
        (each.name, each.status, telling.severity(each.name), telling.summary(each), f"{each.since:%Y-%m-%d %H:%M:%S}",
         ", ".join(sorted(each.told)))
        for each in found
    ]  # fmt: skip
    columns = ("alert", "status", "severity", "summary", "since", "told")
    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False))
    elif rows:
        output.console().print(output.table(columns, rows))
    else:
        print("nothing is wrong, so far as the scheduler sees it by itself")


def tell_a_test() -> None:
    receivers = [each for each in telling.receivers(System(settings.current(), "cli")) if each.name != telling.Log.name]
    if not receivers:
        raise Failure("nobody is told: set ALERT_TELEGRAM_CHAT or ALERT_WEBHOOK_URL", USAGE)
    now, failed = datetime.now(UTC), []
    for receiver in receivers:
        try:
            receiver.tell([Standing("Test", {}, 0.0, now, now, None, frozenset())])
            print(f"{receiver.name} was told")
        except telling.NotTold as error:
            failed.append(str(error))
    if failed:
        raise Failure("; ".join(failed))
