"""What the operator allows: pauses, caps of running jobs, limits of calls, budgets. Small tables that every process reads now
and then.

An organization may set rules for itself (`own`). They never allow more than the operator's, and never replace one of those."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Literal, LiteralString

from agentflow.database import Connection, Database, Unavailable
from agentflow.jobs import budgets
from agentflow.limits import Window

#: Organization 0 in a rule: each organization that has no rule of its own (a pause: all of them).
EVERY: Final = 0
_FRESH_S: Final = 2.0
#: Those that wait for places of an old limit come back between so many seconds after a new one: not before every process
#: knows it, or they would take their old places and wait on.
_NEW_PLACES_S: Final = (_FRESH_S + 1.0, 10.0)

Kind = Literal["queue", "type", "organization"]


@dataclass(frozen=True, slots=True)
class Pause:
    """`name` of a queue or type ('' for an organization)."""

    kind: Kind
    name: str
    organization_id: int
    reason: str | None
    created_at: datetime
    own: bool = False


class OperatorsRule(Exception):
    """The operator has set this, and the organization cannot change it. The text says what it could do."""


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of the installation. `own` are the caps and limits that organizations have set for themselves; `over_budget` are
    the organizations that have used up a day's budget; `shared`: several are on it, so that none may have all threads."""

    pauses: Mapping[tuple[Kind, str, int], Pause] = field(default_factory=dict)
    caps: Mapping[tuple[int, str], int] = field(default_factory=dict)
    limits: Mapping[tuple[int, str], tuple[Window, ...]] = field(default_factory=dict)
    own: frozenset[tuple[Literal["cap", "limit"], int, str]] = frozenset()
    over_budget: frozenset[int] = frozenset()
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
        mine, everybodys = self.caps.get((organization_id, type_)), self.caps.get((EVERY, type_))
        if mine is not None and everybodys is not None and ("cap", organization_id, type_) in self.own:
            return min(mine, everybodys)
        return everybodys if mine is None else mine

    def limit_of(self, organization_id: int, provider: str, default: tuple[Window, ...] = ()) -> tuple[Window, ...]:
        """The windows of a provider for an organization: the operator's for it, else those for every organization, else the
        default; and with them those that the organization has set for itself."""
        mine, everybodys = self.limits.get((organization_id, provider)), self.limits.get((EVERY, provider), default)
        if mine is not None and ("limit", organization_id, provider) in self.own:
            return (*everybodys, *mine)
        return everybodys if mine is None else mine


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

    def budget_reached(self, organization_ids: frozenset[int]) -> None:
        """Said by who has just counted: no need to wait for the next look."""
        if not organization_ids <= self._rules.over_budget:
            self._rules = replace(self._rules, over_budget=self._rules.over_budget | organization_ids)

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
            "select kind, name, organization_id, reason, created_at, own from agentflow.pauses order by created_at"
        ).fetchall()
    ]
    own: set[tuple[Literal["cap", "limit"], int, str]] = set()
    caps: dict[tuple[int, str], int] = {}
    for organization_id, type_, running, is_own in conn.execute(
        "select organization_id, type, running, own from agentflow.caps order by 1, 2"
    ).fetchall():
        caps[organization_id, type_] = running
        own |= {("cap", organization_id, type_)} if is_own else set()
    limits: dict[tuple[int, str], tuple[Window, ...]] = {}
    for organization_id, provider, amount, per_s, is_own in conn.execute(
        "select organization_id, provider, amount, per_s, own from agentflow.rate_limits order by 1, 2, per_s"
    ).fetchall():
        key = (organization_id, provider)
        limits[key] = (*limits.get(key, ()), Window(amount, per_s))
        own |= {("limit", organization_id, provider)} if is_own else set()
    row = conn.execute("select exists (select from agentflow.budgets), agentflow.share_1() < 1").fetchone()
    budgeted, shared = row or (False, False)
    return Rules(
        {(p.kind, p.name, p.organization_id): p for p in pauses},
        caps,
        limits,
        frozenset(own),
        budgets.over(conn) if budgeted else frozenset(),
        shared,
    )


def pause(
    conn: Connection, kind: Kind, name: str, organization_id: int, reason: str | None = None, *, own: bool = False
) -> bool:
    """Jobs that it holds wait from now on; those that run end as they would. False: it was paused already.

    The operator's pause takes the place of one that the organization has set.
    """
    if not own:
        conn.execute(
            "update agentflow.pauses set own = false, reason = coalesce(%s, reason)"
            " where kind = %s and name = %s and organization_id = %s and own",
            (reason, kind, name, organization_id),
        )
    return (
        conn.execute(
            "insert into agentflow.pauses (kind, name, organization_id, reason, own) values (%s, %s, %s, %s, %s)"
            " on conflict do nothing",
            (kind, name, organization_id, reason, own),
        ).rowcount
        > 0
    )


def paused(conn: Connection, kind: Kind, name: str, organization_id: int) -> Pause:
    """The pause, which is there."""
    row = conn.execute(
        "select kind, name, organization_id, reason, created_at, own from agentflow.pauses"
        " where organization_id = %s and kind = %s and name = %s",
        (organization_id, kind, name),
    ).fetchone()
    assert row is not None  # noqa: S101 - said above
    return Pause(*row)


def resume(conn: Connection, kind: Kind, name: str, organization_id: int, *, own: bool = False) -> int | None:
    """End a pause and bring forward what it held. Returns how many jobs (those of a queue wait for nothing), None: no such pause.

    Jobs that another pause holds too are parked again by the relay. Raises OperatorsRule.
    """
    if own:
        _check_own(
            conn,
            "select own from agentflow.pauses where organization_id = %s and kind = %s and name = %s",
            (organization_id, kind, name),
        )
    gone = conn.execute(
        "delete from agentflow.pauses where kind = %s and name = %s and organization_id = %s",
        (kind, name, organization_id),
    ).rowcount
    if not gone:
        return None
    return _let_go(conn, "paused", organization_id, name if kind == "type" else None, name if kind == "queue" else None)


def set_cap(
    conn: Connection, organization_id: int, type_: str, running: int | None, *, own: bool = False
) -> int | None:
    """None takes the cap away; what it held goes on at once. Returns the cap: an own one is at most that of each organization.

    Raises OperatorsRule.
    """
    if own:
        _check_own(
            conn,
            "select own from agentflow.caps where organization_id = %s and type = %s",
            (organization_id, type_),
        )
    if running is None:
        conn.execute("delete from agentflow.caps where organization_id = %s and type = %s", (organization_id, type_))
        _let_go(conn, "busy", organization_id, type_ or None, None)
        return None
    row = conn.execute(
        "insert into agentflow.caps (organization_id, type, running, own) values (%(organization)s, %(type)s,"
        # The relay looks at the organization's cap alone: it is never above the one that everybody has.
        " least(%(running)s, (select e.running from agentflow.caps e"
        " where %(own)s and e.organization_id = 0 and e.type = %(type)s)), %(own)s)"
        " on conflict (organization_id, type) do update set running = excluded.running, own = excluded.own returning running",
        {"organization": organization_id, "type": type_, "running": running, "own": own},
    ).fetchone()
    if organization_id == EVERY:
        conn.execute("update agentflow.caps set running = least(running, %s) where own and type = %s", (running, type_))
    return int(row[0]) if row else None


def set_budget(
    conn: Connection, organization_id: int, measure: str, per_day: float | None, *, own: bool = False
) -> None:
    """What may be used up in a day of UTC; None: as much as is asked for. What waited for it goes on at once.

    Raises OperatorsRule.
    """
    if own:
        _check_own(
            conn,
            "select own from agentflow.budgets where organization_id = %s and measure = %s",
            (organization_id, measure),
        )
    if per_day is None:
        conn.execute(
            "delete from agentflow.budgets where organization_id = %s and measure = %s", (organization_id, measure)
        )
    else:
        conn.execute(
            "insert into agentflow.budgets (organization_id, measure, per_day, own) values (%s, %s, %s, %s)"
            " on conflict (organization_id, measure) do update set per_day = excluded.per_day, own = excluded.own",
            (organization_id, measure, per_day, own),
        )
    _let_go(conn, "budget", organization_id, None, None)


def set_limit(
    conn: Connection, organization_id: int, provider: str, windows: Sequence[Window], *, own: bool = False
) -> None:
    """Replace the windows of a provider; none: the default counts again. Those that wait get new places. Raises OperatorsRule."""
    if own:
        _check_own(
            conn,
            "select own from agentflow.rate_limits where organization_id = %s and provider = %s limit 1",
            (organization_id, provider),
        )
    conn.execute(
        "delete from agentflow.rate_limits where organization_id = %s and provider = %s", (organization_id, provider)
    )
    for window in windows:
        conn.execute(
            "insert into agentflow.rate_limits (organization_id, provider, per_s, amount, own) values (%s, %s, %s, %s, %s)",
            (organization_id, provider, int(window.per_s), window.amount, own),
        )
    type_ = provider.removeprefix("type:") if provider.startswith("type:") else None
    _let_go(conn, "limit", organization_id, type_, None, between_s=_NEW_PLACES_S)


def _check_own(conn: Connection, query: LiteralString, values: Sequence[Any]) -> None:
    row = conn.execute(query, values).fetchone()
    if row is not None and not row[0]:
        raise OperatorsRule("the operator has set this for the organization: only the operator's key can change it")


def running_before(conn: Connection, organization_id: int, type_: str, job_id: object) -> int:
    """How many jobs of the organization (and type, unless '') run that were claimed before this running one."""
    row = conn.execute(
        "select count(*) from agentflow.jobs o, agentflow.jobs me where me.id = %(id)s and o.state = 'running'"
        " and o.organization_id = %(organization)s and (%(type)s = '' or o.type = %(type)s)"
        " and (o.started_at, o.id) < (me.started_at, me.id)",
        {"id": job_id, "organization": organization_id, "type": type_},
    ).fetchone()
    return int(row[0]) if row else 0


def _let_go(
    conn: Connection,
    reason: str,
    organization_id: int,
    type_: str | None,
    queue: str | None,
    between_s: tuple[float, float] = (0.0, 0.0),
) -> int:
    soonest, latest = between_s
    return conn.execute(
        "with locked as materialized (select id,"
        " clock_timestamp() + make_interval(secs => %(soonest)s + random() * %(spread)s) as moment"
        " from agentflow.jobs where state = 'queued' and wait_reason = %(reason)s"
        " and concurrency_key is null and (%(organization)s = 0 or organization_id = %(organization)s)"
        " and (%(type)s::text is null or type = %(type)s) and (%(queue)s::text is null or queue = %(queue)s)"
        " order by id for update)"
        " update agentflow.jobs j set wait_reason = null, run_at = least(j.run_at, locked.moment),"
        " wake_at = least(j.wake_at, locked.moment), sent_at = null"
        " from locked where j.id = locked.id and j.state || '' = 'queued'",
        {
            "reason": reason,
            "organization": organization_id,
            "type": type_,
            "queue": queue,
            "soonest": soonest,
            "spread": latest - soonest,
        },
    ).rowcount
