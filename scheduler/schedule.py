"""The whole schedule on one page: what happens, how often, and what does it.

Whatever is due is claimed as a row in Postgres, once, however many schedulers run, by the database's clock. Of what was missed
while none ran the last tick is made up for. An entry of another kind is one line here: a function that says what is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from agentflow import health, sentry, sessions
from agentflow.database import ANSWER_TIMEOUT_S, Connection
from agentflow.jobs import budgets, retention
from agentflow.jobs import history as job_history
from agentflow.jobs.retention import Keep
from agentflow.kommo import runs
from agentflow.models import answers
from agentflow.schedules import ticks
from agentflow.system import System
from agentflow.telegram import requests
from agentflow.videos import delete_old as delete_old_videos
from agentflow.webhooks import events, order, silence
from scheduler import canary, clean_up, history, kommo, storage
from scheduler.alerts import Watch
from scheduler.calendar import Calendar, Entry, every

HEARTBEAT_EVERY_S: Final = 5
#: User-defined schedules change and come due at any time: so late do they tick.
LOOK_EVERY_S: Final = 1
#: What has not looked for so long is stuck, or has no database.
_SILENT_S: Final = 30.0
_CHECK_IN_EVERY_S: Final = 60
_CLEAN_UP_S: Final = 600
_DAY_S: Final = 86_400
#: So late are the dashboard's charts.
_HISTORY_S: Final = 20
_USAGE_DAYS: Final = 400


def entries(system: System) -> list[Entry]:
    settings = system.settings
    succeeded = Keep(settings.retain_succeeded_hours, settings.retain_succeeded_count)
    failed = Keep(settings.retain_failed_hours, settings.retain_failed_count)
    hours = settings.retain_failed_hours
    batches = clean_up.in_batches

    return [
        *canary.entries(system.rules, settings.canary_interval),
        *kommo.entries(),
        Entry("history", every(_HISTORY_S), work=history.Rolling().work),
        Entry(
            "clean_up.succeeded",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: retention.delete_jobs(conn, succeeded=True, keep=succeeded)),
        ),
        Entry(
            "clean_up.failed",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: retention.delete_jobs(conn, succeeded=False, keep=failed)),
        ),
        Entry(
            "clean_up.idempotency_keys",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: retention.delete_idempotency_keys(conn, hours=settings.retain_idempotency_hours)),
        ),
        Entry("clean_up.unique_keys", every(_CLEAN_UP_S), work=batches(retention.delete_unique_keys)),
        Entry(
            "clean_up.batches",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: retention.delete_batches(conn, hours=hours)),
        ),
        Entry(
            "clean_up.model_answers",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: answers.delete_old(conn, hours=hours)),
        ),
        Entry(
            "clean_up.usage_days",
            every(_DAY_S),
            work=batches(lambda conn: budgets.delete_old_days(conn, days=_USAGE_DAYS)),
        ),
        Entry("clean_up.workers", every(_CLEAN_UP_S), work=clean_up.once(retention.delete_workers)),
        Entry(
            "clean_up.videos",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: delete_old_videos(conn, hours=settings.retain_upload_hours)),
        ),
        Entry("clean_up.files", every(_CLEAN_UP_S), work=storage.remove_doomed),
        Entry("clean_up.orphans", every(_DAY_S), work=storage.doom_orphans),
        Entry("clean_up.leftovers", every(_DAY_S), work=storage.sweep),
        Entry("webhooks", lambda _conn, _now: (), watch=_silent_webhooks, asks=True),
        Entry(
            "clean_up.webhooks",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: events.delete_old(conn, days=settings.retain_webhook_days)),
        ),
        Entry(
            "clean_up.webhook_entities",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: order.delete_old(conn, days=settings.retain_webhook_days)),
        ),
        Entry(
            "clean_up.telegram",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: requests.delete_old(conn, days=settings.retain_webhook_days)),
        ),
        Entry(
            "clean_up.sync_runs",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: runs.delete_old(conn, limit=retention.BATCH)),
        ),
        Entry("clean_up.dashboard_sessions", every(_CLEAN_UP_S), work=clean_up.once(sessions.delete_old)),
        Entry(
            "clean_up.history",
            every(_CLEAN_UP_S),
            work=batches(lambda conn: job_history.delete_old(conn, limit=retention.BATCH)),
        ),
        Entry(
            "clean_up.ticks",
            every(_DAY_S),
            work=batches(lambda conn: ticks.delete_old(conn, days=30)),
        ),
    ]


def _silent_webhooks(conn: Connection) -> dict[str, str]:
    return {
        str(watch.endpoint_id): f"no webhook has come to {watch.source} {watch.name} for longer than it allows"
        for watch in silence.silent(conn)
    }


class Running(BackgroundScheduler):  # type: ignore[misc]
    """APScheduler's loop around the calendar."""

    def __init__(self, system: System, listed: Sequence[Entry]) -> None:
        super().__init__(
            timezone="UTC", job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        )
        self.calendar = Calendar(system, listed, self._at_once)
        self.add_job(self.calendar.look, IntervalTrigger(seconds=LOOK_EVERY_S), next_run_time=datetime.now(UTC))
        self.add_job(system.heartbeat, IntervalTrigger(seconds=HEARTBEAT_EVERY_S))
        self.add_job(self._check_in, IntervalTrigger(seconds=_CHECK_IN_EVERY_S), next_run_time=datetime.now(UTC))
        self._watch = Watch(system)
        if interval_s := system.settings.alert_interval:
            self.add_job(self._watch.look, IntervalTrigger(seconds=interval_s))
        health.of(system).also(self.degraded)
        health.of(system).watch(self.stuck)

    def remove_job(self, job_id: str, jobstore: str | None = None) -> None:
        try:
            super().remove_job(job_id, jobstore)
        except (
            JobLookupError
        ):  # shut down in the middle of its round, it looks for what it has just begun in the wrong place
            if self.running:
                raise

    def shutdown(self, wait: bool = True) -> None:
        super().shutdown(wait=wait)
        self._watch.leave()

    def degraded(self) -> Iterable[str]:
        """Sentences on what is not well."""
        if (silent_s := self.calendar.silent_s()) > _SILENT_S:
            yield f"the calendar was not looked at for {silent_s:.0f} s"
        yield from self.calendar.alarms()

    def stuck(self) -> str | None:
        if (seconds := self.calendar.stuck_s()) > health.STUCK_ANSWERS * ANSWER_TIMEOUT_S:
            return f"the calendar has not come a step further for {seconds:.0f} s"
        return None

    def _check_in(self) -> None:
        sentry.calendar_turns(self.calendar.silent_s() < _SILENT_S, _CHECK_IN_EVERY_S)

    def _at_once(self, function: Any, *arguments: Any) -> None:
        """In a thread of the scheduler's pool."""
        self.add_job(function, args=arguments)


def start(system: System, listed: Sequence[Entry] | None = None) -> Running:
    """Start the schedule in threads; `shutdown()` ends it. What was missed while none ran is done now, once."""
    running = Running(system, entries(system) if listed is None else listed)
    running.start()
    return running
