"""What is wrong now, in words, each with the paragraph of the runbook that says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from agentflow.health import NOT_CONFIGURED
from web.dashboard import outside, runbook, shown
from web.dashboard.frame import Visit
from web.dashboard.words import plural, say

Weight = Literal["bad", "warn"]

#: Due for so long and not begun: somebody should look.
_LATE_S: Final = 60.0
#: The scheduler writes the history three times a minute.
_BEHIND_S: Final = 180.0
#: Ticks of the calendar that come every few seconds or minutes and did not for so long.
_SILENT_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """`paragraph`: how the heading in ops/runbook.md begins."""

    weight: Weight
    said: str
    paragraph: str | None = None

    @property
    def anchor(self) -> str | None:
        return runbook.anchor_of(self.paragraph) if self.paragraph else None


#: How the headings in the runbook begin, by what is wrong.
RUNBOOK: Final = {
    "database": "Postgres is down",
    "redis": "Redis or Valkey is down",
    "rabbitmq": "RabbitMQ is down",
    "queue": "Jobs wait (",
    "canary": "A canary does not come back",
    "calendar": "Nothing is due any more",
    "clean_up": "Clean-up is behind",
    "budget": "Jobs wait for a limit or a budget",
    "models": "Models refuse",
    "crm": "A CRM account stopped",
    "telegram": "The bot does not answer",
    "renders": "Renders wait, or fail",
    "addresses": "Jobs fail (",
    "webhooks": "no webhook has come for longer",
}
_NAMES: Final = {"database": "Postgres", "redis": "Redis", "rabbitmq": "RabbitMQ"}


def of(visit: Visit, found: Mapping[str, Any]) -> list[Trouble]:
    """The worst first."""
    every = [
        *_connections(found),
        *_queues(found),
        *_canaries(found),
        *_scheduler(found),
        *_outside(found),
        *_pauses(visit),
    ]
    return sorted(every, key=lambda each: each.weight != "bad")


def _connections(found: Mapping[str, Any]) -> Iterator[Trouble]:
    for name, each in found["connections"].items():
        if not each.connected and each.last_error != NOT_CONFIGURED:
            said = say(
                "{name} does not answer: {error}", name=_NAMES[name], error=shown.hide_in_text(each.last_error or "")
            )
            yield Trouble("bad", said, RUNBOOK[name])


def _queues(found: Mapping[str, Any]) -> Iterator[Trouble]:
    for queue in found["queues"]:
        if queue.due and not queue.workers:
            jobs = plural(queue.due, "{n} job is", "{n} jobs are")
            yield Trouble(
                "bad",
                say("{jobs} due in {queue}, and no worker serves it.", jobs=jobs, queue=queue.name),
                RUNBOOK["queue"],
            )
        elif queue.due and (queue.oldest_due_age_s or 0) > _LATE_S:
            age = shown.lasting(queue.oldest_due_age_s)
            yield Trouble(
                "warn",
                say("The oldest due job in {queue} has waited for {time}.", queue=queue.name, time=age),
                RUNBOOK["queue"],
            )


def _canaries(found: Mapping[str, Any]) -> Iterator[Trouble]:
    for canary in found["canaries"]:
        if canary.state == "failed":
            yield Trouble("bad", say("The canary of {queue} failed.", queue=canary.queue), RUNBOOK["canary"])
        elif canary.state == "waiting" and canary.age_s > _LATE_S * 2:
            age = shown.lasting(canary.age_s)
            yield Trouble(
                "bad",
                say("The canary of {queue} has not come back for {time}.", queue=canary.queue, time=age),
                RUNBOOK["canary"],
            )


def _scheduler(found: Mapping[str, Any]) -> Iterator[Trouble]:
    behind_s = found["history_behind_s"]
    if behind_s is None:
        yield Trouble(
            "warn",
            say("No scheduler has run yet: charts stay empty, and nothing is cleaned up."),
            "Nothing is due any more",
        )
    elif behind_s > _BEHIND_S:
        said = say(
            "No scheduler has run for {time}: charts end there, and nothing is cleaned up.",
            time=shown.lasting(behind_s),
        )
        yield Trouble("bad", said, RUNBOOK["calendar"])
    for entry in found["calendar"]:
        if entry.outcome == "failed":
            yield Trouble("warn", say("{name} failed the last time.", name=entry.schedule), RUNBOOK["calendar"])
        elif entry.behind_s > _SILENT_S:
            said = say(
                "{name} has not got to its end for {time}.", name=entry.schedule, time=shown.lasting(entry.behind_s)
            )
            yield Trouble("warn", said, RUNBOOK["clean_up"])


def _outside(found: Mapping[str, Any]) -> Iterator[Trouble]:
    for service in found["outside"]:
        name = outside.named(service.name)
        if service.stopped:
            yield Trouble("bad", say("{name}: {what}.", name=name, what=service.stopped), RUNBOOK[service.name])
        if service.failed:
            jobs = plural(service.failed, "{n} job has failed", "{n} jobs have failed")
            said = say("{name}: {jobs} of it within an hour.", name=name, jobs=jobs)
            yield Trouble("warn", said, RUNBOOK[service.name])


def _pauses(visit: Visit) -> Iterator[Trouble]:
    rules = visit.system.rules.now()
    for pause in rules.pauses.values():
        if pause.organization_id and visit.sees not in (None, pause.organization_id):
            continue
        since = shown.lasting((shown.now() - pause.created_at).total_seconds())
        what = {
            "queue": say("The queue {name} is paused", name=pause.name),
            "type": say("Jobs of type {name} are paused", name=pause.name),
            "organization": say("An organization is paused"),
        }[pause.kind]
        reason = f" ({pause.reason})" if pause.reason else ""
        yield Trouble("warn", say("{what} for {time}{reason}.", what=what, time=since, reason=reason))
    for organization_id in rules.over_budget:
        if visit.sees in (None, organization_id):
            yield Trouble(
                "warn", say("A day's budget is used up: jobs wait until midnight UTC."), "Jobs wait for a limit"
            )
