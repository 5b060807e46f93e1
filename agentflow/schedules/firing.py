"""Firing a user-defined schedule: its tick, its job and its next time, in one transaction."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from agentflow import log
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob, NewJob, Prepared
from agentflow.schedules import records, ticks
from agentflow.schedules.records import Schedule, Wanted
from agentflow.schedules.ticks import USER, Tick
from agentflow.schedules.when import InvalidWhen
from agentflow.system import System, Transaction

logger = log.get(__name__)


def check(system: System, organization_id: int, wanted: Wanted, now: datetime, *, times: bool = True) -> None:
    """Raises InvalidWhen, InvalidJob, UnknownType for what cannot be a schedule. Without `times` those are left as they are."""
    if times:
        wanted.when.check(now, min_interval_s=system.settings.schedule_min_interval)
    if wanted.when.every_s is not None and wanted.jitter_s >= wanted.when.every_s:
        raise InvalidWhen("jitter_s", "must be less than every_s")
    system.prepare(organization_id, NewJob(wanted.type, wanted.payload))


def fire_due(system: System) -> bool:
    """Fire one schedule that is due, late or not: ticks that were missed meanwhile are made up for by this one.

    False: none is due.
    """
    with system.transaction() as transaction:
        held = records.hold_due(transaction.conn)
        if held is None:
            return False
        schedule, moment = held
        assert schedule.next_at is not None  # noqa: S101 - what is due has a next tick
        following, tick = None, _tick(schedule, schedule.next_at)
        try:
            following = schedule.when.after(moment)
            tick = replace(tick, missed=schedule.when.missed(schedule.next_at, moment))
        except InvalidWhen as error:  # this machine knows less of time zones than the one that took it
            logger.error("a schedule has no next tick", schedule_id=str(schedule.id), error=str(error))
        _fire(transaction, schedule, tick)
        records.move_on(transaction.conn, schedule, following)
    return True


def fire_now(transaction: Transaction, schedule: Schedule) -> UUID:
    """A tick by hand, beside the calendar; returns its job. Raises InvalidJob, UnknownType where the type changed meanwhile."""
    prepared = _prepared(transaction.system, schedule)
    tick = replace(_tick(schedule, records.now(transaction.conn)), by_hand=True)
    while not ticks.claim(transaction.conn, tick):
        tick = replace(tick, at=tick.at + timedelta(microseconds=1))
    return _submit(transaction, tick, prepared)


def _tick(schedule: Schedule, at: datetime) -> Tick:
    return Tick(USER, at, str(schedule.id), schedule.organization_id)


def _fire(transaction: Transaction, schedule: Schedule, tick: Tick) -> None:
    if not ticks.claim(transaction.conn, tick):
        return
    try:
        _submit(transaction, tick, _prepared(transaction.system, schedule))
    except (InvalidJob, UnknownType) as error:
        # Its type changed since it was made. The next version may know it again, so that the schedule goes on.
        logger.warning("a schedule's job was refused", schedule_id=str(schedule.id), error=str(error))
        ticks.end(transaction.conn, tick, "refused", facts={"error": str(error)})


def _prepared(system: System, schedule: Schedule) -> Prepared:
    new = NewJob(schedule.type, schedule.payload, correlation_id=f"schedule:{schedule.id}")
    return system.prepare(schedule.organization_id, new)


def _submit(transaction: Transaction, tick: Tick, prepared: Prepared) -> UUID:
    job = transaction.submit_prepared(tick.organization_id, prepared).job
    ticks.end(transaction.conn, tick, "submitted", job_id=job.id)
    return job.id
