"""Looking at what is due, and seeing that it happens: once, whoever else looks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from agentflow import log, metrics, sentry
from agentflow.database import Connection, Unavailable
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob
from agentflow.schedules import firing, records, ticks
from agentflow.schedules.ticks import Outcome, Tick
from agentflow.schedules.when import EPOCH
from agentflow.storage import StorageError
from agentflow.system import System, Transaction

logger = log.get(__name__)

#: Entries that ask the database what is due are asked so often.
ASK_EVERY_S: Final = 5.0
#: Between two looks so many user-defined schedules are fired; the rest follows at the next.
_MOST_AT_ONCE: Final = 500

#: Says what is due at a moment, as ticks without a schedule's name. The last tick due is enough: it makes up for those before.
Due = Callable[[Connection, datetime], Iterable[Tick]]


@dataclass(frozen=True, slots=True)
class Done:
    """What a piece of work came to. `behind`: there is more to do than it got done."""

    facts: dict[str, Any] = field(default_factory=dict)
    behind: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the schedule. One of two: `submit` hands a job in, in the transaction that claims the tick; `work` is done by
    this process after it, and again at the next tick if the process dies. `watch` gives the alarms that are up, by subject.
    `asks`: `due` puts questions to the database."""

    name: str
    due: Due
    submit: Callable[[Transaction, Tick], Any] | None = None
    work: Callable[[System], Done] | None = None
    watch: Callable[[Connection], dict[str, str]] | None = None
    asks: bool = False

    @property
    def every_s(self) -> int | None:
        """Where it is due at regular times."""
        return self.due.seconds if isinstance(self.due, Every) else None


def every(seconds: int) -> Every:
    """At each multiple of so many seconds since 1970: the same for all schedulers, whenever they started."""
    return Every(seconds)


@dataclass(frozen=True, slots=True)
class Every:
    """A `Due` that says itself how often."""

    seconds: int

    def __call__(self, _conn: Connection, now: datetime) -> list[Tick]:
        return [Tick("", latest(now, self.seconds))]


def latest(now: datetime, seconds: int) -> datetime:
    """The last multiple of so many seconds."""
    return EPOCH + timedelta(seconds=(now - EPOCH).total_seconds() // seconds * seconds)


@dataclass(frozen=True, slots=True)
class _Found:
    """Ticks of entries that nobody claimed yet, and whether any user-defined schedule is due."""

    entries: list[tuple[Tick, Entry]]
    schedules: bool


class Calendar:
    """The entries, and what this process knows of their ticks. `at_once(function, *arguments)` runs it in another thread."""

    def __init__(self, system: System, entries: Sequence[Entry], at_once: Callable[..., None]) -> None:
        self._system = system
        self._entries = entries
        self._at_once = at_once
        self._claimed: dict[tuple[str, str], datetime] = {}
        self._asked_at = float("-inf")
        self._looked_at = self._turned_at = time.monotonic()
        self._lock = threading.Lock()
        self._working: set[str] = set()
        self._alarms: dict[str, str] = {}

    def look(self) -> bool:
        """Do what is due. False without a database: the next look makes up for it."""
        try:
            found, fired = self._due(), 0
            for tick, entry in found.entries:
                self._turned_at = time.monotonic()
                self._do(entry, tick)
            while found.schedules and fired < _MOST_AT_ONCE and firing.fire_due(self._system):
                self._turned_at = time.monotonic()
                fired += 1
            if fired:
                metrics.ticked(ticks.USER, "submitted", fired)
        except Unavailable as error:
            logger.debug("the calendar was not looked at: the database is away", error=str(error).strip())
            return False
        finally:
            self._turned_at = time.monotonic()
        self._looked_at = time.monotonic()
        return True

    def stuck_s(self) -> float:
        """Seconds since it came a step further, with the database or without."""
        return time.monotonic() - self._turned_at

    def silent_s(self) -> float:
        """Seconds since the last look that found the database."""
        return time.monotonic() - self._looked_at

    def alarms(self) -> list[str]:
        """What does not go well, in sentences."""
        with self._lock:
            return [self._alarms[name] for name in sorted(self._alarms)]

    def alarm(self, name: str, sentence: str | None) -> None:
        """Raise an alarm, once, or (None) end it."""
        with self._lock:
            before = self._alarms.pop(name, None)
            if sentence is not None:
                self._alarms[name] = sentence
        if sentence is not None and before is None:
            logger.error(sentence, schedule=name)
        elif sentence is None and before is not None:
            logger.info("this is over", schedule=name, alarm=before)

    def _due(self) -> _Found:
        asking = time.monotonic() - self._asked_at >= ASK_EVERY_S
        with self._system.database.connection() as conn:
            now = records.now(conn)
            found = {
                replace(tick, schedule=entry.name): entry
                for entry in self._entries
                if asking or not entry.asks
                for tick in self._due_of(entry, conn, now)
            }
            # Most looks find nothing new, and ask no more.
            new = [tick for tick in found if self._claimed.get((tick.schedule, tick.subject)) != tick.at]
            unclaimed = set(ticks.unclaimed(conn, new))
            schedules = records.any_due(conn)
        if asking:
            self._asked_at = time.monotonic()
        for tick in new:
            if tick not in unclaimed:
                self._know(tick)
        return _Found([(tick, found[tick]) for tick in new if tick in unclaimed], schedules)

    def _due_of(self, entry: Entry, conn: Connection, now: datetime) -> list[Tick]:
        self._turned_at = time.monotonic()
        try:
            found = list(entry.due(conn, now))
            up = entry.watch(conn) if entry.watch is not None else {}
        except Unavailable:
            raise
        except Exception as error:  # of one entry: the others are due all the same
            logger.exception("an entry of the schedule does not say what is due", schedule=entry.name)
            found, up = [], {"due": f"{entry.name} does not say what is due: {type(error).__name__}"}
        if entry.asks:
            for name in self._names_of_alarms(entry.name) | {f"{entry.name}.{subject}" for subject in up}:
                self.alarm(name, up.get(name.removeprefix(f"{entry.name}.")))
        return found

    def _names_of_alarms(self, entry: str) -> set[str]:
        with self._lock:
            return {name for name in self._alarms if name.startswith(f"{entry}.")}

    def _do(self, entry: Entry, tick: Tick) -> None:
        with self._lock:
            if entry.name in self._working:  # its last run is not over: this tick is made up for after it
                return
        if entry.submit is not None:
            try:
                self._submit(entry.submit, tick)
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 - of one entry: the next look tries again, and the others go on
                self.alarm(entry.name, f"{entry.name} could not be handed in: {str(error) or type(error).__name__}")
                return
            self.alarm(entry.name, None)
        elif entry.work is not None:
            with self._system.database.transaction() as conn:
                mine = ticks.claim(conn, tick)
            if mine:
                with self._lock:
                    self._working.add(entry.name)
                self._at_once(self._work, entry.work, tick, entry.every_s)
        self._know(tick)

    def _know(self, tick: Tick) -> None:
        self._claimed[tick.schedule, tick.subject] = tick.at

    def _submit(self, submit: Callable[[Transaction, Tick], Any], tick: Tick) -> None:
        with self._system.transaction() as transaction:
            if not ticks.claim(transaction.conn, tick):
                return
            outcome: Outcome = "submitted"
            try:
                job = submit(transaction, tick)
                ticks.end(transaction.conn, tick, outcome, job_id=job.id if job is not None else None)
            except (InvalidJob, UnknownType) as error:
                logger.error("what is due could not be handed in", schedule=tick.schedule, error=str(error))
                outcome = "refused"
                ticks.end(transaction.conn, tick, outcome, facts={"error": str(error)})
        metrics.ticked(tick.schedule, outcome)

    def _work(self, work: Callable[[System], Done], tick: Tick, every_s: int | None) -> None:
        try:
            with sentry.watched(tick.schedule, every_s) as wrong:
                outcome, facts = self._worked(work, tick)
                if outcome == "failed":
                    wrong.append(str(facts.get("error")))
            with self._system.database.connection() as conn:
                ticks.end(conn, tick, outcome, facts=facts)
            metrics.ticked(tick.schedule, outcome)
            if deleted := facts.get("deleted"):
                metrics.cleaned_up(tick.schedule.removeprefix("clean_up."), deleted)
        except Unavailable as error:
            logger.warning("schedule was cut off", schedule=tick.schedule, error=str(error).strip())
        finally:
            with self._lock:
                self._working.discard(tick.schedule)

    def _worked(self, work: Callable[[System], Done], tick: Tick) -> tuple[Outcome, dict[str, Any]]:
        try:
            done = work(self._system)
        except Unavailable:
            raise
        except Exception as error:  # whatever it was, it must not be forgotten with its thread
            logger.warning("schedule failed", schedule=tick.schedule, exc_info=not isinstance(error, StorageError))
            said = str(error) or type(error).__name__
            self.alarm(tick.schedule, f"{tick.schedule} failed: {said}")
            return "failed", {"error": said}
        (logger.info if done.facts else logger.debug)("schedule ran", schedule=tick.schedule, **done.facts)
        self.alarm(tick.schedule, f"{tick.schedule} cannot keep up with what there is to do" if done.behind else None)
        return ("behind" if done.behind else "done"), done.facts
