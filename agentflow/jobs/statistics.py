"""How much waits, runs and was done lately. Reads partial indexes and ranges of ids only, never all the finished rows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import QUEUES

#: Of each queue so many reasons of waiting are told apart; the rest is `other` (a reason may be an error's code).
MOST_REASONS: Final = 12
LATELY_S: Final = 300
_WORKER_SILENT_S: Final = 60


@dataclass(frozen=True, slots=True)
class Queue:
    """`due` could run now, `parked` waits for a time or a slot, by reason. Ages in seconds by the database's clock."""

    name: str
    due: int = 0
    parked: dict[str, int] = field(default_factory=dict)
    running: int = 0
    oldest_due_age_s: float | None = None
    window: int = 0
    workers: int = 0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    id: UUID
    kind: str
    host: str
    pid: int
    version: str
    queues: list[str]
    threads: int
    busy: int
    memory_bytes: int | None
    started_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Lately:
    """Of the last `seconds`: jobs created, and ended by state. Counts only ends of jobs made within three times as long."""

    seconds: int
    created: int
    ended: dict[str, int]


def queues(conn: Connection, organization_id: int | None = None) -> list[Queue]:
    """Every known queue and every other one that holds something; jobs of one organization, or (None) of all."""
    waiting: dict[str, dict[str | None, tuple[int, float]]] = defaultdict(dict)
    for name, reason, number, age_s in conn.execute(
        "select queue, case when run_at <= statement_timestamp() and wait_reason is distinct from 'busy' then null"
        " else coalesce(wait_reason, 'scheduled') end, count(*),"
        " extract(epoch from statement_timestamp() - min(run_at))::float8"
        " from agentflow.jobs where state = 'queued'"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s) group by 1, 2",
        {"organization": organization_id},
    ).fetchall():
        waiting[name][reason] = (number, age_s)
    running = dict(
        conn.execute(
            "select queue, count(*) from agentflow.jobs where state = 'running'"
            " and (%(organization)s::bigint is null or organization_id = %(organization)s) group by 1",
            {"organization": organization_id},
        ).fetchall()
    )
    names = list(dict.fromkeys([*QUEUES, *sorted(waiting), *sorted(running)]))
    windows = dict(conn.execute("select q, agentflow.window_1(q) from unnest(%s::text[]) q", (names,)).fetchall())
    staff: dict[str, tuple[int, int]] = {
        row[0]: (row[1], row[2])
        for row in conn.execute(
            "select q, count(*), sum(threads) from agentflow.workers w cross join lateral unnest(w.queues) q"
            " where w.stopped_at is null and w.seen_at > statement_timestamp() - make_interval(secs => %s) group by 1",
            (_WORKER_SILENT_S,),
        ).fetchall()
    }
    found = []
    for name in names:
        due, age_s = waiting[name].get(None, (0, None))
        workers, threads = staff.get(name, (0, 0))
        parked = {reason: number for reason, (number, _) in waiting[name].items() if reason is not None}
        found.append(
            Queue(name, due, _few(parked), running.get(name, 0), age_s, windows.get(name, 0), workers, threads)
        )
    return found


def running_by_type(conn: Connection, organization_id: int) -> dict[str, int]:
    """How many jobs of an organization run now."""
    return dict(
        conn.execute(
            "select type, count(*) from agentflow.jobs where state = 'running' and organization_id = %s group by 1 order by 1",
            (organization_id,),
        ).fetchall()
    )


def running_by_organization(conn: Connection, organization_ids: Sequence[int]) -> dict[int, int]:
    """The same of several, by their ids; those of which none runs are missing."""
    return dict(
        conn.execute(
            "select organization_id, count(*) from agentflow.jobs where state = 'running' and organization_id = any (%s)"
            " group by 1",
            (list(organization_ids),),
        ).fetchall()
    )


def failed_by_code(conn: Connection, organization_id: int | None, seconds: int, *, most: int = 5000) -> dict[str, int]:
    """What jobs failed of lately, so far as they are kept: the newest `most` by the codes of their errors."""
    return dict(
        conn.execute(
            "select coalesce(f.error ->> 'code', ''), count(*) from (select j.error from agentflow.jobs j"
            " where j.state = 'failed' and j.finished_at > statement_timestamp() - make_interval(secs => %(seconds)s)"
            " and (%(organization)s::bigint is null or j.organization_id = %(organization)s)"
            " order by j.finished_at desc limit %(most)s) f group by 1",
            {"organization": organization_id, "seconds": seconds, "most": most},
        ).fetchall()
    )


def _few(parked: dict[str, int]) -> dict[str, int]:
    by_number = sorted(parked.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(by_number[:MOST_REASONS])
    rest = sum(number for _, number in by_number[MOST_REASONS:])
    return {**kept, "other": kept.get("other", 0) + rest} if rest else kept


def workers(conn: Connection) -> list[Worker]:
    """The worker processes that were heard of in the last minute."""
    rows = conn.execute(
        "select id, kind, host, pid, version, queues, threads, busy, memory_bytes, started_at, seen_at"
        " from agentflow.workers where stopped_at is null and seen_at > statement_timestamp() - make_interval(secs => %s)"
        " order by started_at",
        (_WORKER_SILENT_S,),
    ).fetchall()
    return [Worker(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Connections:
    """To this Postgres. `of_processes`: by the name that our processes give to theirs (System.application_name)."""

    used: int
    most: int
    of_processes: dict[str, int]


def connections(conn: Connection) -> Connections:
    """`most` is what an ordinary user may have. Behind a pooler these are the pooler's."""
    rows = conn.execute(
        "select application_name, count(*) from pg_stat_activity where backend_type = 'client backend' group by 1"
    ).fetchall()
    row = conn.execute(
        "select current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer"
    ).fetchone()
    assert row is not None  # noqa: S101 - a select of one row
    ours = {name: number for name, number in rows if name and name.startswith("agentflow ")}
    return Connections(sum(number for _, number in rows), row[0], ours)


def lately(conn: Connection, seconds: int = LATELY_S) -> Lately:
    """Found by the ids, whose first bits are the time they were made at: no index on a time has to be kept for it."""
    row = conn.execute(
        "select count(*) filter (where id >= %(since)s),"
        " count(*) filter (where state = 'succeeded' and finished_at > statement_timestamp() - make_interval(secs => %(s)s)),"
        " count(*) filter (where state = 'failed' and finished_at > statement_timestamp() - make_interval(secs => %(s)s)),"
        " count(*) filter (where state = 'cancelled' and finished_at > statement_timestamp() - make_interval(secs => %(s)s))"
        " from agentflow.jobs where id >= %(early)s and id < %(late)s",
        {
            "s": seconds,
            "since": id_floor(time.time() - seconds),
            "early": id_floor(time.time() - 3 * seconds),
            "late": id_floor(time.time() + 60),  # made by clocks that may be ahead
        },
    ).fetchone()
    assert row is not None  # noqa: S101 - an aggregate is one row
    return Lately(seconds, row[0], {"succeeded": row[1], "failed": row[2], "cancelled": row[3]})


def id_floor(unix_s: float) -> UUID:
    """The least UUIDv7 of that moment (RFC 9562, 5.7: the first 48 bits are milliseconds)."""
    return UUID(int=int(unix_s * 1000) << 80)


def versions(conn: Connection) -> dict[str, Any]:
    row = conn.execute("select current_setting('server_version'), max(name) from agentflow.migrations").fetchone()
    return {"postgres": str(row[0]).split(" ")[0], "schema": row[1]} if row else {}
