"""What the code of a job logged."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import Field

from agentflow.jobs import lines
from agentflow.jobs.lines import Level, Place
from web import jobs
from web.api import Call, Query, Routes, View
from web.problems import invalid

routes = Routes("logs")


class LogQuery(Query):
    level: Level = Field("info", description="This level and those above it")
    limit: Annotated[int, Field(ge=1, le=lines.MOST_LINES)] = 100
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class LineView(View):
    at: datetime = Field(description="By the worker's clock")
    attempt: int
    level: Level
    logger: str = Field(description="The part of the program that said it")
    message: str
    fields: dict[str, Any] = Field(description="What the line is about, and `exception`: the traceback")


class LineList(View):
    lines: list[LineView] = Field(description="The oldest first")
    next_cursor: str | None


@routes.get("/api/jobs/<uuid:job_id>/logs", {200: LineList}, query=LogQuery, problems=(404,))
def logs(call: Call, job_id: UUID, query: LogQuery) -> LineList:
    """What the job's code logged.

    The newest 200 lines of a job are kept, and 64 KB of them, over all its attempts; secrets are taken out. They come about a
    second after they were logged. Lines of a worker that was killed in that second are lost.
    """
    job = jobs.find(call, job_id)
    after = _place(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = lines.of(conn, job, least=query.level, after=after, limit=query.limit + 1)
    page = found[: query.limit]
    return LineList(
        lines=[
            LineView(
                at=line.at,
                attempt=line.attempt,
                level=line.level_name,
                logger=line.logger,
                message=line.message,
                fields=line.fields,
            )
            for line in page
        ],
        next_cursor="{}.{}".format(*page[-1].place) if len(found) > query.limit else None,
    )


def _place(cursor: str) -> Place:
    if match := re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", cursor, re.ASCII):
        return Place(int(match[1]), int(match[2]))
    raise invalid("cursor", "is not a next_cursor of ours", "query")
