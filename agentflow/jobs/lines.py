"""What the code of jobs logs, kept with them: the newest lines of each, up to a cap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import Job

Level = Literal["info", "warning", "error", "critical"]

#: Of one job, over all its attempts.
MOST_LINES: Final = 200
MOST_BYTES: Final = 64 << 10
LEVELS: Final[dict[Level, int]] = {"info": 20, "warning": 30, "error": 40, "critical": 50}
_NAMES: Final = {number: name for name, number in LEVELS.items()}


class Place(NamedTuple):
    """Where a line stands: in which claim, and its number there."""

    fence: int
    n: int


@dataclass(frozen=True, slots=True)
class Line:
    """`at` is an aware datetime by the worker's clock; `bytes`, what it counts for."""

    place: Place
    attempt: int
    at: datetime
    level: int
    logger: str
    message: str
    fields: dict[str, Any]
    bytes: int

    @property
    def level_name(self) -> Level:
        return _NAMES[self.level]


def write(conn: Connection, lines: Sequence[tuple[UUID, Line]]) -> None:
    """Lines of jobs that are still there, whoever runs them now. Doing it twice does no harm."""
    ordered = sorted(lines, key=lambda each: (each[0], each[1].place))  # as all lock jobs: in the order of their ids
    conn.execute(
        "insert into agentflow.job_logs (job_id, organization_id, fence, n, attempt, at, level, logger, message, fields, bytes)"
        " select j.id, j.organization_id, i.fence, i.n, i.attempt, i.at, i.level, i.logger, i.message, i.fields, i.bytes"
        " from unnest(%s::uuid[], %s::integer[], %s::integer[], %s::smallint[], %s::timestamptz[], %s::smallint[], %s::text[],"
        " %s::text[], %s::jsonb[], %s::integer[])"
        " with ordinality as i(id, fence, n, attempt, at, level, logger, message, fields, bytes, place)"
        " join agentflow.jobs j on j.id = i.id order by i.place on conflict do nothing",
        (
            [id_ for id_, _ in ordered],
            [line.place.fence for _, line in ordered],
            [line.place.n for _, line in ordered],
            [line.attempt for _, line in ordered],
            [line.at for _, line in ordered],
            [line.level for _, line in ordered],
            [line.logger for _, line in ordered],
            [line.message for _, line in ordered],
            [json.dumps(line.fields) if line.fields else None for _, line in ordered],
            [line.bytes for _, line in ordered],
        ),
    )


def trim(conn: Connection, job_ids: Sequence[UUID]) -> int:
    """Delete what is over the cap, the oldest first. Returns how many lines that were."""
    return conn.execute(
        "with placed as (select job_id, fence, n, row_number() over newest as place, sum(bytes) over newest as bytes"
        " from agentflow.job_logs where job_id = any (%s) window newest as (partition by job_id order by fence desc, n desc))"
        " delete from agentflow.job_logs l using placed p where l.job_id = p.job_id and l.fence = p.fence and l.n = p.n"
        " and (p.place > %s or p.bytes > %s)",
        (list(job_ids), MOST_LINES, MOST_BYTES),
    ).rowcount


def of(
    conn: Connection, job: Job, *, least: Level = "info", after: Place | None = None, limit: int = MOST_LINES
) -> list[Line]:
    """The lines of a job, the oldest first, from a level on; `after` is the place of the last one of the page before."""
    rows = conn.execute(
        "select fence, n, attempt, at, level, logger, message, coalesce(fields, '{}'), bytes from agentflow.job_logs"
        " where job_id = %s and organization_id = %s and level >= %s and (fence, n) > (%s, %s) order by fence, n limit %s",
        (job.id, job.organization_id, LEVELS[least], *(after or Place(-1, 0)), limit),
    ).fetchall()
    return [Line(Place(fence, n), *columns) for fence, n, *columns in rows]
