"""Videos that were handed in: an upload that lies in storage, or a URL that the job will download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs import files
from agentflow.jobs.files import Doomed

_COLUMNS: Final = "id, organization_id, storage_key, source_url, filename, content_type, size_bytes, created_at"
_WRITTEN: Final = "id, organization_id, storage_key, filename, content_type, size_bytes"
SUFFIX: Final = re.compile(r"\.[a-z0-9]{1,8}")


@dataclass(frozen=True, slots=True)
class Video:
    """One row of agentflow.videos: either `storage_key` or `source_url` is set."""

    id: UUID
    organization_id: int
    storage_key: str | None
    source_url: str | None
    filename: str | None
    content_type: str | None
    size_bytes: int | None
    created_at: datetime


def upload_key(organization_id: int, video_id: UUID, filename: str | None) -> str:
    """Where an upload lies. Of the caller's name only a harmless suffix is kept: the name itself stands in the row."""
    suffix = PurePosixPath(filename or "").suffix.lower()
    return f"o/{organization_id}/videos/{video_id}/source{suffix if SUFFIX.fullmatch(suffix) else ''}"


def create_upload(
    conn: Connection,
    organization_id: int,
    video_id: UUID,
    *,
    storage_key: str,
    filename: str | None,
    content_type: str | None,
    size_bytes: int,
) -> Video:
    """The row of a file that is whole in storage."""
    row = conn.execute(
        f"insert into agentflow.videos ({_WRITTEN}) values (%s, %s, %s, %s, %s, %s) returning {_COLUMNS}",  # noqa: S608
        (video_id, organization_id, storage_key, filename, content_type, size_bytes),
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    return Video(*row)


def create_url(conn: Connection, organization_id: int, url: str, *, video_id: UUID | None = None) -> Video:
    """The row of a video that is still elsewhere. With a `video_id` that exists already, that row is returned as it is."""
    wanted = video_id or new_id()
    conn.execute(
        "insert into agentflow.videos (id, organization_id, source_url) values (%s, %s, %s) on conflict (id) do nothing",
        (wanted, organization_id, url),
    )
    video = get(conn, organization_id, wanted)
    assert video is not None  # noqa: S101 - written above, or by whoever came first
    return video


def get(conn: Connection, organization_id: int | None, video_id: UUID, *, keep: bool = False) -> Video | None:
    """None where there is no such video, or it is another organization's (an organization of None sees all).

    `keep`: it is not deleted before the caller's transaction ends, which hands in a job on it.
    """
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.videos where id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)"
        + (" for share" if keep else ""),
        {"id": video_id, "organization": organization_id},
    ).fetchone()
    return Video(*row) if row else None


def delete_old(conn: Connection, *, hours: float, limit: int = 1000) -> int:
    """Forget one batch of videos older than that which no job names any more; files that lie here are doomed with them.

    Returns how many were looked at and are old; fewer than `limit`: done.
    """
    with conn.transaction():
        old = conn.execute(
            "select id, organization_id from agentflow.videos v"  # noqa: S608 - constants
            " where v.created_at < clock_timestamp() - make_interval(secs => %(hours)s * 3600)"
            f" and not exists ({_NAMED}) order by v.id limit %(limit)s for update skip locked",
            {"hours": hours, "limit": limit},
        ).fetchall()
        # A statement of its own, now that they are held: a job on one may have been handed in since that one began.
        deleted = conn.execute(
            "delete from agentflow.videos v"  # noqa: S608 - constants
            " using unnest(%(ids)s::uuid[], %(organizations)s::bigint[]) o(id, organization_id)"
            f" where v.id = o.id and v.organization_id = o.organization_id and not exists ({_NAMED})"
            " returning v.organization_id, v.storage_key",
            {"ids": [row[0] for row in old], "organizations": [row[1] for row in old]},
        ).fetchall()
        files.doom(conn, [Doomed(row[0], row[1]) for row in deleted if row[1] is not None])
    return len(old)


_NAMED: Final = (
    "select from agentflow.jobs j where j.payload ? 'video_id' and j.payload->>'video_id' = v.id::text"
    " and j.organization_id = v.organization_id"
)
