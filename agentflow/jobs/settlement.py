"""The end of an attempt: the one way out of running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import TERMINAL, Ring, Settled, Verdict


def settle(
    conn: Connection, verdicts: Sequence[Verdict], worker: UUID, *, lease_s: float, max_crashes: int = 3
) -> Settled:
    """Write verdicts of this worker. One that came too late (the lease was lost) is missing from the answer's `states`."""
    rows = conn.execute(
        "select * from agentflow.settle_1(%s::uuid[], %s::integer[], %s::text[], %s::float8[], %s::text[], %s::jsonb[],"
        " %s::jsonb[], %s, make_interval(secs => %s), %s)",
        (
            [v.job_id for v in verdicts],
            [v.fence for v in verdicts],
            [v.outcome for v in verdicts],
            [v.delay_s for v in verdicts],
            [v.reason for v in verdicts],
            [v.result for v in verdicts],
            [v.error for v in verdicts],
            worker,
            lease_s,
            max_crashes,
        ),
    ).fetchall()
    return settled_from_rows(rows)


def settled_from_rows(rows: Sequence[tuple[Any, ...]]) -> Settled:
    settled = Settled(states={})
    for kind, job_id, fence, state, queue, type_, priority in rows:
        if kind == "ring":
            settled.rings.append(Ring(job_id, queue, type_, priority))
            continue
        settled.states[job_id, fence] = state
        if state in TERMINAL:
            settled.finished.append((job_id, queue, type_, state))
    return settled


def already_written(conn: Connection, verdicts: Sequence[Verdict], worker: UUID) -> set[tuple[UUID, int]]:
    """Which of these verdicts were written by this worker before: the answer to a settle whose COMMIT was lost."""
    rows = conn.execute(
        "select a.job_id, a.fence from agentflow.job_attempts a"
        " join unnest(%s::uuid[], %s::integer[]) v(id, fence) on v.id = a.job_id and v.fence = a.fence where a.worker = %s",
        ([v.job_id for v in verdicts], [v.fence for v in verdicts], worker),
    ).fetchall()
    return {(row[0], row[1]) for row in rows}
