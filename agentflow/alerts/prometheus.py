"""The table as rules for Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from agentflow.alerts.table import Alert, Condition

RUNBOOK = "ops/runbook.md"
_HEAD = (
    "# Written by `agentflow alerts rules` from agentflow/alerts/table.py:"
    " change that, or ALERT_THRESHOLDS, and write it anew.\n"
)
_RANGE = re.compile(r"\$(\d+)m")


def rules(alerts: Iterable[Alert], *, pace: float = 1.0) -> str:
    """The file of rules. `pace`: all times in it (ranges, and how long something must be so) are so many times shorter: a test
    cannot wait for minutes."""
    lines = [_HEAD, "groups:\n", "  - name: agentflow\n", "    rules:\n"]
    for alert in alerts:
        lines += [
            f"      - alert: {alert.name}\n",
            f"        expr: {json.dumps(expression(alert, pace=pace))}\n",
            *([f"        for: {_duration(alert.for_s / pace)}\n"] if alert.for_s else []),
            f"        labels: {{severity: {alert.severity}}}\n",
            "        annotations:\n",
            f"          summary: {json.dumps(_summary(alert))}\n",
            f"          threshold: {json.dumps(f'{alert.threshold:g} ({alert.meaning})', ensure_ascii=False)}\n",
            f"          runbook_url: {json.dumps(f'{RUNBOOK}#{alert.name.lower()}')}\n",
        ]
    return "".join(lines)


def expression(alert: Alert, *, pace: float = 1.0) -> str:
    """When it fires, as PromQL."""
    if alert.expr is None:
        return " or ".join(_comparison(condition, alert.threshold) for condition in alert.conditions)
    ranges = _RANGE.sub(lambda found: _duration(int(found[1]) * 60 / pace), alert.expr)
    return ranges.replace("$threshold", f"{alert.threshold:.15g}")


def _comparison(condition: Condition, threshold: float) -> str:
    """Several processes give the same gauge: the one counts that is worst."""
    selected = ", ".join(f'{label}="{value}"' for label, value in condition.where.items())
    metric = condition.metric + (f"{{{selected}}}" if selected else "")
    by = f" by ({', '.join(condition.by)}) " if condition.by else ""
    limit = threshold if condition.limit is None else condition.limit
    return f"{'min' if condition.below else 'max'}{by}({metric}) {'<' if condition.below else '>'} {limit:.15g}"


def _summary(alert: Alert) -> str:
    text = alert.summary.replace("{value}", "{{ $value | humanize }}")
    return re.sub(r"(?<!\{)\{(\w+)\}(?!\})", r"{{ $labels.\1 }}", text)


def _duration(seconds: float) -> str:
    milliseconds = max(1, round(seconds * 1000))
    for unit, length in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds % length == 0:
            return f"{milliseconds // length}{unit}"
    return f"{milliseconds}ms"
