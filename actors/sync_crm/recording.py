"""What a run does with what it has read: into the mirror with the position, in one transaction; or, as a plan, compared only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agentflow import log
from agentflow.database import Connection
from agentflow.errors import Permanent
from agentflow.kommo import cursors, entities, mirror, runs, touched
from agentflow.kommo.accounts import Account
from agentflow.kommo.client import Client
from agentflow.kommo.cursors import Sweep
from agentflow.kommo.entities import Event, Stream, Thing
from agentflow.system import System

logger = log.get(__name__)

#: So few are deleted in any case: a share of a small account is nothing.
_DELETED_ALWAYS: Final = 10
_UNMET_AT_ONCE: Final = 1000

Moved = Callable[[Connection], None]


def _stays(_: Connection) -> None: ...


class Recording(ABC):
    """`held`: of each kind, what is gone and was not deleted, since it is more than the account's share."""

    def __init__(self, system: System, account: Account, client: Client, run_id: UUID) -> None:
        self.system = system
        self.account = account
        self.client = client
        self._run_id = run_id
        self._calls_counted = 0
        self.sweep: Sweep | None = None
        self.held: Counter[str] = Counter()
        self._living: dict[str, int] | None = None
        self._deleted: Counter[str] = Counter()

    @property
    def _ids(self) -> tuple[int, UUID]:
        return self.account.organization_id, self.account.id

    def clock(self) -> datetime:
        with self.system.database.connection() as conn:
            return mirror.clock(conn)

    def record(self, stream: Stream, documents: Sequence[Any], read_at: datetime, moved: Moved = _stays) -> None:
        """A page; `moved` writes the position along."""
        if stream.how == "log":
            self._events([entities.event(each) for each in documents], moved)
            return
        things = [entities.thing(each) for each in documents]
        self._things(stream, things, read_at, [], moved)

    def record_by_ids(
        self, stream: Stream, asked: Sequence[int], documents: Sequence[Any], read_at: datetime, moved: Moved = _stays
    ) -> None:
        """The answer to a question for ids: what is not in it is gone."""
        things = [entities.thing(each) for each in documents]
        there = {each.id for each in things if not each.gone}
        gone = self._gone(stream, [each for each in asked if each not in there], read_at)
        self._things(stream, [each for each in things if not each.gone], read_at, gone, moved)

    def record_whole(self, stream: Stream, documents: Sequence[Any], read_at: datetime) -> None:
        """A list that was read as a whole: what is not in it is gone."""
        things = [entities.thing(each) for each in documents]
        everything = self._unmet(stream, Sweep(read_at, 0), after=-1, limit=100_000)
        gone = self._gone(stream, sorted(set(everything) - {each.id for each in things}), read_at)
        self._things(stream, things, read_at, gone, lambda conn: cursors.whole_read(conn, *self._ids, stream.name))

    def count(self, conn: Connection, counts: runs.Counts) -> None:
        """Add to the run's counts, and the calls since the last time."""
        calls = self.client.calls
        runs.add(conn, self.account.organization_id, self._run_id, counts, calls - self._calls_counted)
        self._calls_counted = calls

    def delete(self, stream: Stream, ids: Sequence[int], read_at: datetime) -> None:
        """Of these it is known that they are gone."""
        if gone := self._gone(stream, ids, read_at):
            self._things(stream, [], read_at, gone, _stays)

    def unmet(self, stream: Stream, after: int) -> list[int]:
        """The next ids that the sweep has not met; the last of them is the next `after`."""
        assert self.sweep is not None  # noqa: S101 - asked at the end of a sweep
        return self._unmet(stream, self.sweep, after=after, limit=_UNMET_AT_ONCE)

    def _gone(self, stream: Stream, ids: Sequence[int], read_at: datetime) -> list[int]:
        """Which of these are to be deleted: those that live, while they are not too many."""
        if not ids:
            return []
        with self.system.database.connection() as conn:
            if self._living is None:
                self._living = mirror.count_living(conn, *self._ids)
            gone = self._still_living(conn, stream, ids, read_at)
        most = max(_DELETED_ALWAYS, int(self._living.get(stream.name, 0) * self.account.delete_share))
        confirmed = self.account.deletions_confirmed or 0
        if self._deleted[stream.name] + len(gone) > max(most, confirmed):
            self.held[stream.name] += len(gone)
            return []
        self._deleted[stream.name] += len(gone)
        return gone

    def _unmet(self, stream: Stream, sweep: Sweep, *, after: int, limit: int) -> list[int]:
        with self.system.database.connection() as conn:
            return mirror.unmet(conn, *self._ids, stream.name, sweep, after=after, limit=limit)

    def _still_living(self, conn: Connection, stream: Stream, ids: Sequence[int], read_at: datetime) -> list[int]:
        return mirror.living(conn, *self._ids, stream.name, ids, read_at)

    @abstractmethod
    def waiting(self, limit: int) -> dict[str, dict[int, datetime]]:
        """What is to be read again by its id."""

    @abstractmethod
    def _things(
        self, stream: Stream, things: Sequence[Thing], read_at: datetime, gone: Sequence[int], moved: Moved
    ) -> None: ...

    @abstractmethod
    def _events(self, events: Sequence[Event], moved: Moved) -> None: ...


class Writing(Recording):
    """A run: everything is written, counts and calls as well, page by page."""

    def waiting(self, limit: int) -> dict[str, dict[int, datetime]]:
        with self.system.database.connection() as conn:
            return touched.waiting(conn, *self._ids, limit=limit)

    def _things(
        self, stream: Stream, things: Sequence[Thing], read_at: datetime, gone: Sequence[int], moved: Moved
    ) -> None:
        with self.system.database.transaction() as conn:
            version = self._begin(conn)
            counts: Counter[str] = Counter()
            living = [each for each in things if not each.gone]
            buried = [*gone, *(each.id for each in things if each.gone)]
            if living:
                counts += mirror.write(
                    conn,
                    *self._ids,
                    stream.name,
                    living,
                    read_at=read_at,
                    version=version,
                    sweeping=self.sweep is not None,
                )
            if buried:
                counts["deleted"] = mirror.bury(conn, *self._ids, stream.name, buried, read_at=read_at, version=version)
            unexpected = mirror.note_drift(conn, *self._ids, stream.name, entities.drift(stream, things))
            moved(conn)
            self.count(conn, {stream.name: +counts})
        for field, kind in unexpected:
            logger.warning(
                "a CRM sends a field that is not expected",
                account_id=str(self.account.id),
                entity_type=stream.name,
                field=field,
                kind=kind,
            )

    def _events(self, events: Sequence[Event], moved: Moved) -> None:
        with self.system.database.transaction() as conn:
            version = self._begin(conn)
            new = mirror.write_events(conn, *self._ids, events, version=version) if events else 0
            if new and self.sweep is None:  # a sweep meets what is there, and events of long ago say nothing about it
                touched.note(conn, *self._ids, [each.touched for each in events if each.touched is not None])
            moved(conn)
            counts = +Counter(created=new, unchanged=len(events) - new)
            self.count(conn, {"events": counts})

    def _begin(self, conn: Connection) -> int:
        version = mirror.begin(conn, *self._ids)
        if version is None:
            raise Permanent("the account was removed", code="crm_account_removed")
        return version


class Planning(Recording):
    """A dry run: the same reads, compared with the mirror as it is; what was met is remembered here."""

    def __init__(self, system: System, account: Account, client: Client, run_id: UUID) -> None:
        super().__init__(system, account, client, run_id)
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._met: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
        self._gone_already: defaultdict[str, set[int]] = defaultdict(set)
        self._events_met: set[str] = set()
        self._touched: dict[str, dict[int, datetime]] | None = None

    def waiting(self, limit: int) -> dict[str, dict[int, datetime]]:
        if self._touched is None:
            with self.system.database.connection() as conn:
                self._touched = touched.waiting(conn, *self._ids, limit=1_000_000)
        found, self._touched = self._touched, {}
        return found

    def _unmet(self, stream: Stream, sweep: Sweep, *, after: int, limit: int) -> list[int]:
        found = super()._unmet(stream, sweep, after=after, limit=10_000_000)
        if self.sweep is None:
            return found
        met = self._met[stream.name]
        return [each for each in found if each not in met][:limit]

    def _still_living(self, conn: Connection, stream: Stream, ids: Sequence[int], read_at: datetime) -> list[int]:
        living = set(super()._still_living(conn, stream, ids, read_at))
        met = {each for each in ids if each in self._met[stream.name]}
        return sorted((living | met) - self._gone_already[stream.name])

    def _things(
        self, stream: Stream, things: Sequence[Thing], read_at: datetime, gone: Sequence[int], moved: Moved
    ) -> None:
        met, counts = self._met[stream.name], self.counts[stream.name]
        with self.system.database.connection() as conn:
            living = [each for each in things if not each.gone]
            verdicts = mirror.compare(conn, *self._ids, stream.name, living, read_at=read_at)
            trashed = self._still_living(conn, stream, [each.id for each in things if each.gone], read_at)
        for each in {each.id: each for each in living}.values():
            if each.id in met:
                counts["unchanged" if met[each.id] == each.hash else "updated"] += 1
            else:
                counts[verdicts[each.id]] += 1
            met[each.id] = each.hash
        for id_ in (*gone, *trashed):
            counts["deleted"] += 1
            self._gone_already[stream.name].add(id_)

    def _events(self, events: Sequence[Event], moved: Moved) -> None:
        with self.system.database.connection() as conn:
            known = mirror.known_events(conn, *self._ids, [each.id for each in events])
        new = {each.id for each in events} - known - self._events_met
        self._events_met |= new
        self.counts["events"] += +Counter(created=len(new), unchanged=len(events) - len(new))
        if new and self.sweep is None:
            self._touched = self.waiting(0)
            for name, id_ in [each.touched for each in events if each.touched is not None]:
                self._touched.setdefault(name, {})[id_] = datetime.min
