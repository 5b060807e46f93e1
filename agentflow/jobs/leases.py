"""Leases: renewed by one statement per worker process, taken away by the rescue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.jobs.model import Settled
from agentflow.jobs.settlement import settled_from_rows

Answer = Literal["ok", "cancel", "lost", "skipped", "orphan"]


@dataclass(frozen=True, slots=True)
class Held:
    """A job that a worker runs, and what is new of its progress (None: nothing)."""

    job_id: UUID
    fence: int
    progress: float | None = None
    stage: str | None = None


def renew(conn: Connection, worker: UUID, held: Sequence[Held], lease_s: float) -> dict[tuple[UUID, int], Answer]:
    """Renew the leases; see agentflow.heartbeat_1 for the answers. A statement that hangs ends after 5 s."""
    with conn.transaction():
        conn.execute("set local statement_timeout = '5s'")
        rows = conn.execute(
            "select * from agentflow.heartbeat_1(%s, %s::uuid[], %s::integer[], %s::real[], %s::text[],"
            " make_interval(secs => %s))",
            (
                worker,
                [h.job_id for h in held],
                [h.fence for h in held],
                [h.progress for h in held],
                [h.stage for h in held],
                lease_s,
            ),
        ).fetchall()
    return {(row[0], row[1]): row[2] for row in rows}


def rescue(conn: Connection, worker: UUID, *, limit: int, lease_s: float, max_crashes: int) -> Settled:
    """Take jobs whose leases ran out: back to queued, or failed after too many crashes.

    Nothing is taken while another process is at it, or unless this worker's own heartbeats came through for half a lease.
    """
    rows = conn.execute(
        "select * from agentflow.rescue_2(%s, %s, make_interval(secs => %s), %s)", (worker, limit, lease_s, max_crashes)
    ).fetchall()
    return settled_from_rows(rows)


def announce_worker(conn: Connection, worker: UUID, facts: dict[str, Any], *, lease_s: float) -> None:
    """Write or refresh the worker's row: kind, host, pid, version, queues, threads, demand, memory_bytes, busy.

    A gap of more than half a lease since the last time starts `well_since` anew.
    """
    conn.execute(
        "insert into agentflow.workers as w (id, kind, host, pid, version, queues, threads, demand, memory_bytes, busy)"
        " values (%(id)s, %(kind)s, %(host)s, %(pid)s, %(version)s, %(queues)s, %(threads)s, %(demand)s, %(memory_bytes)s,"
        " %(busy)s) on conflict (id) do update set demand = excluded.demand, memory_bytes = excluded.memory_bytes,"
        " busy = excluded.busy, seen_at = clock_timestamp(), well_since = case"
        " when w.seen_at < clock_timestamp() - make_interval(secs => %(lease)s / 2) then clock_timestamp()"
        " else w.well_since end",
        {**facts, "id": worker, "lease": lease_s, "demand": Jsonb(facts["demand"])},
    )


def killed_for_memory(conn: Connection, workers: Sequence[UUID]) -> None:
    """Say of these workers that the kernel killed them, for who rescues their jobs."""
    conn.execute("update agentflow.workers set out_of_memory = true where id = any (%s)", (list(workers),))


def retire_worker(conn: Connection, worker: UUID) -> None:
    conn.execute("update agentflow.workers set stopped_at = clock_timestamp(), busy = 0 where id = %s", (worker,))
