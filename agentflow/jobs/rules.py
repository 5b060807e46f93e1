"""What the operator allows: pauses, caps of running jobs, limits of calls. Small tables that every process reads now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from agentflow.database import Connection, Database, Unavailable
from agentflow.limits import Window

#: Organization 0 in a rule: each organization that has no rule of its own (a pause: all of them).
EVERY: Final = 0
_FRESH_S: Final = 2.0

Kind = Literal["queue", "type", "organization"]


@dataclass(frozen=True, slots=True)
class Pause:
    """`name` of a queue or type ('' for an organization)."""

    kind: Kind
    name: str
    organization_id: int
    reason: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of the installation. `shared`: several organizations are on it, so that none may have all threads."""

    pauses: Mapping[tuple[Kind, str, int], Pause] = field(default_factory=dict)
    caps: Mapping[tuple[int, str], int] = field(default_factory=dict)
    limits: Mapping[tuple[int, str], tuple[Window, ...]] = field(default_factory=dict)
    shared: bool = False

    def pause_of(self, organization_id: int, queue: str, type_: str) -> Pause | None:
        for key in (
            ("queue", queue, EVERY),
            ("organization", "", organization_id),
            ("type", type_, EVERY),
            ("type", type_, organization_id),
        ):
            if (found := self.pauses.get(key)) is not None:
                return found
        return None

    def cap_of(self, organization_id: int, type_: str) -> int | None:
        """How many jobs of the organization, and of this type ('': of any), may run at once."""
        return self.caps.get((organization_id, type_), self.caps.get((EVERY, type_)))

    def limit_of(self, organization_id: int, provider: str) -> tuple[Window, ...] | None:
        """The organization's own windows for a provider, else those for every organization."""
        return self.limits.get((organization_id, provider), self.limits.get((EVERY, provider)))


class Known:
    """The rules as this process knows them: at most 2 s old, or as old as the database has been away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._rules = Rules()
        self._read_at = float("-inf")

    def anew(self) -> Rules:
        """As they are in the database at this moment, for who is about to act on one. Raises Unavailable."""
        self._rules = self._read()
        self._read_at = time.monotonic()
        return self._rules

    def now(self) -> Rules:
        # One thread reads; the others take what there is, but for the first time.
        if time.monotonic() - self._read_at > _FRESH_S and self._lock.acquire(blocking=self._read_at < 0):
            try:
                if time.monotonic() - self._read_at > _FRESH_S:
                    self._rules = self._read()
                    self._read_at = time.monotonic()
            except Unavailable:
                self._read_at = time.monotonic()
            finally:
                self._lock.release()
        return self._rules

    def _read(self) -> Rules:
        with self._database.connection() as conn:
            return read(conn)


def read(conn: Connection) -> Rules:
    pauses = [
        Pause(*row)
        for row in conn.execute(
            "select kind, name, organization_id, reason, created_at from agentflow.pauses order by created_at"
        ).fetchall()
    ]
    caps = {
        (row[0], row[1]): row[2]
        for row in conn.execute("select organization_id, type, running from agentflow.caps order by 1, 2").fetchall()
    }
    limits: dict[tuple[int, str], tuple[Window, ...]] = {}
    for organization_id, provider, amount, per_s in conn.execute(
        "select organization_id, provider, amount, per_s from agentflow.rate_limits order by 1, 2, per_s"
    ).fetchall():
        key = (organization_id, provider)
        limits[key] = (*limits.get(key, ()), Window(amount, per_s))
    row = conn.execute("select agentflow.share_1() < 1").fetchone()
    return Rules({(p.kind, p.name, p.organization_id): p for p in pauses}, caps, limits, bool(row and row[0]))


def pause(conn: Connection, kind: Kind, name: str, organization_id: int, reason: str | None = None) -> bool:
    """Jobs that it holds wait from now on; those that run end as they would. False: it was paused already."""
    return (
        conn.execute(
            "insert into agentflow.pauses (kind, name, organization_id, reason) values (%s, %s, %s, %s)"
            " on conflict do nothing",
            (kind, name, organization_id, reason),
        ).rowcount
        > 0
    )


def resume(conn: Connection, kind: Kind, name: str, organization_id: int) -> int | None:
    """End a pause and bring forward what it held. Returns how many jobs (those of a queue wait for nothing), None: no such pause.

    Jobs that another pause holds too are parked again by the relay.
    """
    gone = conn.execute(
        "delete from agentflow.pauses where kind = %s and name = %s and organization_id = %s",
        (kind, name, organization_id),
    ).rowcount
    if not gone:
        return None
    return _let_go(conn, "paused", organization_id, name if kind == "type" else None, name if kind == "queue" else None)


def set_cap(conn: Connection, organization_id: int, type_: str, running: int | None) -> None:
    """None takes the cap away; what it held goes on at once."""
    if running is None:
        conn.execute("delete from agentflow.caps where organization_id = %s and type = %s", (organization_id, type_))
        _let_go(conn, "busy", organization_id, type_ or None, None)
    else:
        conn.execute(
            "insert into agentflow.caps (organization_id, type, running) values (%s, %s, %s)"
            " on conflict (organization_id, type) do update set running = excluded.running",
            (organization_id, type_, running),
        )


def set_limit(conn: Connection, organization_id: int, provider: str, windows: Sequence[Window]) -> None:
    """Replace the windows of a provider; none: the default counts again."""
    conn.execute(
        "delete from agentflow.rate_limits where organization_id = %s and provider = %s", (organization_id, provider)
    )
    for window in windows:
        conn.execute(
            "insert into agentflow.rate_limits (organization_id, provider, per_s, amount) values (%s, %s, %s, %s)",
            (organization_id, provider, int(window.per_s), window.amount),
        )


def running_before(conn: Connection, organization_id: int, type_: str, job_id: object) -> int:
    """How many jobs of the organization (and type, unless '') run that were claimed before this running one."""
    row = conn.execute(
        "select count(*) from agentflow.jobs o, agentflow.jobs me where me.id = %(id)s and o.state = 'running'"
        " and o.organization_id = %(organization)s and (%(type)s = '' or o.type = %(type)s)"
        " and (o.started_at, o.id) < (me.started_at, me.id)",
        {"id": job_id, "organization": organization_id, "type": type_},
    ).fetchone()
    return int(row[0]) if row else 0


def _let_go(conn: Connection, reason: str, organization_id: int, type_: str | None, queue: str | None) -> int:
    return conn.execute(
        "with locked as materialized (select id from agentflow.jobs where state = 'queued' and wait_reason = %(reason)s"
        " and concurrency_key is null and (%(organization)s = 0 or organization_id = %(organization)s)"
        " and (%(type)s::text is null or type = %(type)s) and (%(queue)s::text is null or queue = %(queue)s)"
        " order by id for update)"
        " update agentflow.jobs j set wait_reason = null, run_at = least(j.run_at, clock_timestamp()),"
        " wake_at = clock_timestamp(), sent_at = null from locked where j.id = locked.id and j.state || '' = 'queued'",
        {"reason": reason, "organization": organization_id, "type": type_, "queue": queue},
    ).rowcount
