"""Which conditions of the table are true, by the gauges that a process has itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import Metric

from agentflow.alerts.standing import Found
from agentflow.alerts.table import Alert, Condition


def judge(alerts: Iterable[Alert], families: Iterable[Metric]) -> list[Found]:
    """Of alerts with conditions; one for each subject."""
    known = {family.name: family for family in families}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], Found] = {}
    for alert in alerts:
        for condition in alert.conditions:
            if (family := known.get(condition.metric)) is not None:
                for each in _true_of(alert, condition, family):
                    found.setdefault((alert.name, tuple(sorted(each.subject.items()))), each)
    return list(found.values())


def _true_of(alert: Alert, condition: Condition, family: Metric) -> Iterator[Found]:
    limit = alert.threshold if condition.limit is None else condition.limit
    for sample in family.samples:
        if any(sample.labels.get(label) != value for label, value in condition.where.items()):
            continue
        if sample.value < limit if condition.below else sample.value > limit:
            subject = {label: sample.labels[label] for label in condition.by if label in sample.labels}
            yield Found(alert.name, subject, sample.value)
