"""Videos that were handed in: an upload that lies in storage, or a URL that the job will download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Final
from uuid import UUID

from uuid6 import uuid7

from agentflow.database import Connection

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


def new_id() -> UUID:
    return UUID(int=uuid7().int)  # a plain UUID: psycopg does not know the subclass


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


def get(conn: Connection, organization_id: int | None, video_id: UUID) -> Video | None:
    """None where there is no such video, or it is another organization's (an organization of None sees all)."""
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.videos where id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)",
        {"id": video_id, "organization": organization_id},
    ).fetchone()
    return Video(*row) if row else None
