"""What attempts have used up: tokens, money, seconds of a GPU, calls of somebody's API. The row is the total of one attempt; the
day's totals of each organization, which budgets are held against, are kept beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection


@dataclass(frozen=True, slots=True)
class Usage:
    """`measures` are totals by name; the name ends in the unit where it is no count (`usd`, `tokens_in`, `audio_s`, `gpu_s`,
    `video_min`, `crm_calls`)."""

    job_id: UUID
    fence: int
    measures: Mapping[str, float]


def record(conn: Connection, usages: Sequence[Usage]) -> frozenset[int]:
    """Write totals; writing them again changes nothing. A job that is gone is passed over.

    Returns the organizations that have used up a budget by it.
    """
    rows = conn.execute(
        "select agentflow.record_usage_2(%s::uuid[], %s::integer[], %s::jsonb[])",
        (
            [usage.job_id for usage in usages],
            [usage.fence for usage in usages],
            [Jsonb(dict(usage.measures)) for usage in usages],
        ),
    ).fetchall()
    return frozenset(row[0] for row in rows)
