"""The steps of a run: what was named, what has changed, the short lists, and the walk over everything with what is gone."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from functools import partial
from typing import Final
from uuid import UUID

from actors.sync_crm.recording import Moved, Recording
from agentflow.database import Connection
from agentflow.errors import Wait
from agentflow.kommo import cursors, touched
from agentflow.kommo.client import IDS_AT_ONCE, Forbidden
from agentflow.kommo.cursors import Cursor, Sweep
from agentflow.kommo.entities import BY_NAME, STREAMS, TOUCHABLE, Stream
from agentflow.kommo.walking import walk, whole
from agentflow.worker.running import JobContext

#: Changes are asked for from so long before the last ones: what was committed late there is found as well.
OVERLAP_S: Final = 120
#: Pipelines, users and fields change seldom: they are read at most so often, and with every walk over everything.
WHOLE_EVERY_S: Final = 3600.0
#: How far back the account's own log is taken in.
EVENTS_BACK_S: Final = 30 * 86_400
#: A walk over everything lets the account's other jobs go first after so long; changes do, too, should they never end.
SLICE_S: Final = 20.0
_CHANGES_S: Final = 300.0
_BETWEEN_SLICES_S: Final = 0.5
_TOUCHED_AT_ONCE: Final = 1000
_MOST_ROUNDS: Final = 100


class Run:
    """One attempt at a job."""

    def __init__(self, context: JobContext, recording: Recording) -> None:
        self._context = context
        self._recording = recording
        self._client = recording.client
        self._system = recording.system
        self._account = recording.account
        self._ends = time.monotonic() + _CHANGES_S
        self._plan = context.job.payload.get("plan") is True

    def drain_touched(self) -> None:
        """Read again what webhooks and events have named."""
        for _ in range(_MOST_ROUNDS):
            named = self._recording.waiting(_TOUCHED_AT_ONCE)
            if not named:
                return
            for entity_type, each in named.items():
                stream = BY_NAME.get(TOUCHABLE.get(entity_type, ""))
                ids = list(each)
                for first in range(0, len(ids), IDS_AT_ONCE):
                    part = {id_: each[id_] for id_ in ids[first : first + IDS_AT_ONCE]}
                    forget = partial(self._forget, entity_type=entity_type, read=part)
                    if stream is not None:
                        self._by_ids(stream, list(part), forget)
                    elif not self._plan:  # of a kind that is not mirrored
                        with self._system.database.connection() as conn:
                            forget(conn)
                self._pause()

    def short_lists(self) -> None:
        """Those that are not read by the time of a change: in a walk over everything once, else now and then."""
        sweep = self._recording.sweep
        since = sweep.started_at if sweep else self._recording.clock() - timedelta(seconds=WHOLE_EVERY_S)
        cursors_ = self._cursors()
        for stream in STREAMS:
            read_at = cursors_[stream.name].read_at
            if stream.how == "whole" and (read_at is None or read_at < since):
                try:
                    documents, read_at = whole(self._client, stream, self._recording.clock)
                except Forbidden:  # users are shown to administrators alone
                    continue
                self._recording.record_whole(stream, documents, read_at)

    def changes(self) -> None:
        until = self._client.now_s()
        cursors_ = self._cursors()
        for number, stream in enumerate(STREAMS):
            if stream.how == "whole":
                continue
            self._context.progress(number / len(STREAMS), stream.name)
            since = max(0, cursors_[stream.name].position - OVERLAP_S)
            for batch in walk(self._client, stream, since, until, self._recording.clock):
                moved = partial(self._advance, stream=stream, position=batch.position)
                self._recording.record(stream, batch.documents, batch.read_at, moved)
                self._pause()

    def sweep(self) -> None:
        """A part of the walk over everything; raises Wait until it is through."""
        self._ends = time.monotonic() + SLICE_S
        sweep = self._recording.sweep = self._begin_sweep()
        self.short_lists()
        cursors_ = self._cursors()
        for number, stream in enumerate(STREAMS):
            since = self._swept_to(cursors_[stream.name], sweep)
            if stream.how == "whole" or since is None:
                continue
            self._context.progress(number / len(STREAMS), stream.name)
            for batch in walk(self._client, stream, since, sweep.until, self._recording.clock):
                position = batch.position if batch.position <= sweep.until else None
                moved = partial(self._advance_sweep, stream=stream, sweep=sweep, position=position)
                self._recording.record(stream, batch.documents, batch.read_at, moved)
                self._pause()

    def end_sweep(self, *, deleting: bool) -> None:
        """What the walk has not met is asked for by its id: it was changed since, or it is gone."""
        sweep = self._recording.sweep
        assert sweep is not None  # noqa: S101 - set by `sweep`
        for stream in STREAMS if deleting else ():
            if stream.how != "changes":
                continue
            missing: list[int] = []
            after, read_at = -1, self._recording.clock()
            while ids := self._recording.unmet(stream, after):
                after = ids[-1]
                for first in range(0, len(ids), IDS_AT_ONCE):
                    part = ids[first : first + IDS_AT_ONCE]
                    asked_at = self._recording.clock()
                    documents = self._client.by_ids(stream, part)
                    there = {each.get("id") for each in documents if isinstance(each, dict)}
                    self._recording.record(stream, documents, asked_at)
                    missing += [each for each in part if each not in there]
            self._recording.delete(stream, missing, read_at)
        if not self._plan:
            with self._system.database.transaction() as conn:
                cursors.end_sweep(conn, *self._ids, sweep)

    # ---- parts of steps ----

    @property
    def _ids(self) -> tuple[int, UUID]:
        return self._account.organization_id, self._account.id

    def _cursors(self) -> dict[str, Cursor]:
        with self._system.database.connection() as conn:
            return cursors.read(conn, *self._ids)

    def _by_ids(self, stream: Stream, ids: list[int], forget: Moved) -> None:
        read_at = self._recording.clock()
        documents = self._client.by_ids(stream, ids)
        self._recording.record_by_ids(stream, ids, documents, read_at, forget)

    def _forget(self, conn: Connection, *, entity_type: str, read: dict[int, datetime]) -> None:
        touched.forget(conn, *self._ids, entity_type, read)

    def _advance(self, conn: Connection, *, stream: Stream, position: int) -> None:
        cursors.advance(conn, *self._ids, stream.name, position)

    def _advance_sweep(self, conn: Connection, *, stream: Stream, sweep: Sweep, position: int | None) -> None:
        cursors.advance_sweep(conn, *self._ids, stream.name, sweep, position)

    def _begin_sweep(self) -> Sweep:
        until = self._client.now_s()
        if self._plan:
            return Sweep(self._recording.clock(), until)
        with self._system.database.transaction() as conn:
            return cursors.begin_sweep(conn, *self._ids, until=until, events_from=until - EVENTS_BACK_S)

    def _swept_to(self, cursor: Cursor, sweep: Sweep) -> int | None:
        """Where the walk goes on; None: it is through with this stream."""
        if not self._plan:
            return cursor.sweep_position
        return sweep.until - EVENTS_BACK_S if BY_NAME[cursor.stream].how == "log" else 0

    def _pause(self) -> None:
        """Between two pages: other jobs of the account wait while this one holds its slot. A plan holds none."""
        self._context.check()
        if not self._plan and time.monotonic() > self._ends:
            raise Wait(
                _BETWEEN_SLICES_S, "slice", message="the next part follows when the account's other jobs are done"
            )
