"""The whole schedule on one page. Each entry runs in one process at a time, by a try-lock in Postgres, and once per interval
however many processes there are and however often they are started anew: Postgres remembers the last tick."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from apscheduler.schedulers.background import BackgroundScheduler

from agentflow import log
from agentflow.database import Connection, Unavailable
from agentflow.jobs import retention
from agentflow.jobs.retention import Keep
from agentflow.models import answers
from agentflow.storage import StorageError
from agentflow.system import System
from agentflow.webhooks import events, order, silence

logger = log.get(__name__)

CLEAN_UP_EVERY_S: Final = 600
WEBHOOKS_EVERY_S: Final = 60
HEARTBEAT_EVERY_S: Final = 5
_PAUSE_S: Final = 0.05  # between two batches of deletions, so that vacuum and the workers keep up
_LEFTOVER_AGE_S: Final = 86_400.0


def start(system: System) -> BackgroundScheduler:
    """Start the schedule in a thread. A tick that was missed, since the process was down or busy, runs once, late."""
    scheduler = BackgroundScheduler(
        timezone="UTC", job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
    )
    scheduler.add_job(
        _guarded(system, "clean_up", clean_up, CLEAN_UP_EVERY_S),
        "interval",
        seconds=CLEAN_UP_EVERY_S,
        jitter=30,
        next_run_time=datetime.now(UTC),  # whatever was missed while nobody was there; else Postgres says no
    )
    scheduler.add_job(
        _guarded(system, "watch_webhooks", watch_webhooks, WEBHOOKS_EVERY_S), "interval", seconds=WEBHOOKS_EVERY_S
    )
    scheduler.add_job(system.heartbeat, "interval", seconds=HEARTBEAT_EVERY_S)
    scheduler.start()
    return scheduler


def clean_up(system: System) -> dict[str, int]:
    """Forget what retention says: ended jobs, idempotency keys, batches, dead workers' rows, leftovers of cut uploads."""
    settings = system.settings
    succeeded = Keep(settings.retain_succeeded_hours, settings.retain_succeeded_count)
    failed = Keep(settings.retain_failed_hours, settings.retain_failed_count)
    with system.database.connection() as conn:
        deleted = {
            "succeeded": _in_batches(lambda: retention.delete_jobs(conn, succeeded=True, keep=succeeded)),
            "failed": _in_batches(lambda: retention.delete_jobs(conn, succeeded=False, keep=failed)),
            "idempotency_keys": _in_batches(
                lambda: retention.delete_idempotency_keys(conn, hours=settings.retain_idempotency_hours)
            ),
            "unique_keys": _in_batches(lambda: retention.delete_unique_keys(conn)),
            "batches": _in_batches(lambda: retention.delete_batches(conn, hours=settings.retain_failed_hours)),
            "model_answers": _in_batches(lambda: answers.delete_old(conn, hours=settings.retain_failed_hours)),
            "webhooks": _in_batches(lambda: events.delete_old(conn, days=settings.retain_webhook_days)),
            "webhook_entities": _in_batches(lambda: order.delete_old(conn, days=settings.retain_webhook_days)),
            "workers": retention.delete_workers(conn),
        }
    try:
        deleted["leftovers"] = system.storage.sweep(_LEFTOVER_AGE_S)
    except StorageError as error:
        logger.warning("leftovers in storage were not looked for", error=str(error))
    return deleted


def watch_webhooks(system: System) -> dict[str, int]:
    """Notice endpoints that have gone silent, and those that are heard again."""
    with system.database.connection() as conn:
        return {"silent": len(silence.silent(conn))}


def _in_batches(delete: Callable[[], int]) -> int:
    total = 0
    while (deleted := delete()) > 0:
        total += deleted
        if deleted < retention.BATCH:
            break
        time.sleep(_PAUSE_S)
    return total


def _guarded(system: System, name: str, work: Callable[[System], dict[str, int]], every_s: float) -> Callable[[], None]:
    """Run by one process at a time, and not sooner than it is due; an outage of the database is one line, and the next tick
    tries again."""

    def run() -> None:
        try:
            with system.database.connection() as conn, conn.transaction():
                if not _try_lock(conn, name) or not _is_due(conn, name, every_s):
                    return
                done = work(system)
            logger.info("schedule ran", schedule=name, **done)
        except Unavailable as error:
            logger.warning("schedule could not run", schedule=name, error=str(error).strip())

    run.__name__ = name
    return run


def _try_lock(conn: Connection, name: str) -> bool:
    """Held until the transaction ends. Transaction-level, so that it works behind a transaction pooler."""
    row = conn.execute(
        "select pg_try_advisory_xact_lock(hashtextextended(%s, 7))", (f"agentflow.schedule:{name}",)
    ).fetchone()
    return bool(row and row[0])


def _is_due(conn: Connection, name: str, every_s: float) -> bool:
    """Whether the last tick, anybody's, is an interval ago; if so this one is noted, unless the transaction is rolled back."""
    return (
        conn.execute(
            "insert into agentflow.installation as i (name, value)"
            " values (%s, extract(epoch from clock_timestamp())::text) on conflict (name) do update"
            " set value = excluded.value where i.value::float8 < excluded.value::float8 - %s",
            # The jitter of two ticks, either way, must not skip one.
            (f"schedule.{name}", every_s * 0.8),
        ).rowcount
        > 0
    )
