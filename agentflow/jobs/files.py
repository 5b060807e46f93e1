"""Files whose rows are gone. They are doomed by the transaction that deletes the rows, and removed from storage after it.

What a live row still names is left alone, whoever doomed it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final
from uuid import UUID

from agentflow import log
from agentflow.backup import guard
from agentflow.database import Connection, Database
from agentflow.storage import Storage, StorageError, Stored

logger = log.get(__name__)

BATCH: Final = 100
#: Between two tries to remove a file: doubled with each, up to a day.
_AGAIN_S: Final = 60.0
#: What is shown by a document whose analysis is forgotten is looked at again after so long.
_NAMED_AGAIN: Final = timedelta(days=1)
#: A file of this age without a row was left by a process that died before it wrote the row.
_ORPHAN_AGE: Final = timedelta(days=1)
_OF_A_RENDER: Final = re.compile(r"o/(\d{1,18})/renders/([0-9a-f-]{36})/.+", re.DOTALL)
_OF_A_VIDEO: Final = re.compile(r"o/(\d{1,18})/videos/([0-9a-f-]{36})/(?:([0-9a-f-]{36})/.+|source[^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Doomed:
    """A file, or everything below a folder: then the key ends in a slash."""

    organization_id: int
    key: str


@dataclass(frozen=True, slots=True)
class Owner:
    """The row that a file in storage belongs to; `key` is what goes with it, the file or its folder."""

    table: str
    organization_id: int
    id: UUID
    key: str


def doom(conn: Connection, doomed: Sequence[Doomed]) -> None:
    """To be called in the transaction that deletes the last rows that named them."""
    if doomed:
        conn.execute(
            "insert into agentflow.doomed_files (organization_id, key) select * from unnest(%s::bigint[], %s::text[])"
            " on conflict do nothing",
            ([each.organization_id for each in doomed], [each.key for each in doomed]),
        )


def remove_batch(database: Database, storage: Storage, limit: int = BATCH) -> int:
    """Remove doomed files that are due. Returns how many entries were tried; fewer than `limit`: done.

    What the store refuses is tried again later; what a row still names, when that may have gone; nothing while a backup is made.
    Safe to repeat, and to be done by two at once.
    """
    with database.connection() as conn:
        if guard.under_way(conn):  # rows of the moment that it copies may name them
            return 0
        taken = _take(conn, limit)
        named = _named(conn, taken)
    gone = []
    for each in taken:
        if each in named:
            logger.info("a file that was to be removed is still named by a row", key=each.key)
            continue
        try:
            if each.key.endswith("/"):
                storage.delete_prefix(each.key.rstrip("/"))
            else:
                storage.delete(each.key)
        except StorageError as error:
            logger.warning("a file could not be removed; it is tried again", key=each.key, error=str(error))
            continue
        gone.append(each.key)
    with database.connection() as conn:
        conn.execute("delete from agentflow.doomed_files where key = any (%s)", (gone,))
        conn.execute(
            "update agentflow.doomed_files set tries = 0, due_at = clock_timestamp() + %s where key = any (%s)",
            (_NAMED_AGAIN, [each.key for each in named]),
        )
    return len(taken)


def named_by_rows(conn: Connection) -> list[str]:
    """The files that videos, documents and what people sent to the bot have in storage; those of results are not among them."""
    rows = conn.execute(
        "select storage_key from agentflow.videos union select storage_key from agentflow.documents"
        " union select storage_key from agentflow.telegram_pictures"
    ).fetchall()
    return [row[0] for row in rows if row[0] is not None]


def overdue(conn: Connection) -> int:
    """How many were tried and are still there, though no row names them."""
    row = conn.execute("select count(*) from agentflow.doomed_files where tries > 1").fetchone()
    return int(row[0]) if row else 0


def orphans(database: Database, storage: Storage, *, now: datetime | None = None) -> Iterator[Doomed]:
    """Files of videos, their analyses and renders that have no row, and had a day to get one. Others' files are not looked at.

    Raises StorageError.
    """
    before = (now or datetime.now(UTC)) - _ORPHAN_AGE
    old = (stored for stored in storage.list("o") if stored.modified < before)
    while batch := list(islice(old, 10 * BATCH)):
        with database.connection() as conn:
            yield from _without_rows(conn, batch)


def _take(conn: Connection, limit: int) -> list[Doomed]:
    """Theirs for the time of a try: whoever dies with them leaves them to the next one."""
    rows = conn.execute(
        "with due as materialized (select key from agentflow.doomed_files where due_at <= clock_timestamp()"
        " order by due_at limit %s for update skip locked)"
        " update agentflow.doomed_files d set tries = least(tries + 1, 1000),"
        " due_at = clock_timestamp() + make_interval(secs => least(86400, %s * 2 ^ least(tries, 20)))"
        " from due where d.key = due.key returning d.organization_id, d.key",
        (limit, _AGAIN_S),
    ).fetchall()
    return [Doomed(*row) for row in rows]


def _named(conn: Connection, doomed: Iterable[Doomed]) -> set[Doomed]:
    """Those that are, or hold, a file of a video or document that is there, or that an open job is to work on."""
    by_organization: dict[int, list[str]] = {}
    for each in doomed:
        by_organization.setdefault(each.organization_id, []).append(each.key)
    named = set()
    for organization_id, keys in by_organization.items():
        rows = conn.execute(
            "with open as materialized (select payload::text as payload from agentflow.jobs"
            " where organization_id = %(organization)s and state in ('queued', 'running')"
            " and strpos(payload::text, %(mark)s) > 0)"
            " select k from unnest(%(keys)s::text[]) k where"
            " exists (select from agentflow.videos v where v.organization_id = %(organization)s and"
            " (v.storage_key = k or right(k, 1) = '/' and starts_with(v.storage_key, k)))"
            " or exists (select from agentflow.documents d where d.organization_id = %(organization)s and (d.storage_key = k"
            " or d.video_id is not null and strpos(k, d.video_id::text) > 0 and strpos(d.facts::text, k) > 0))"
            " or exists (select from open where strpos(open.payload, k) > 0)",
            {"organization": organization_id, "mark": f"o/{organization_id}/", "keys": keys},
        ).fetchall()
        named |= {Doomed(organization_id, row[0]) for row in rows}
    return named


def _without_rows(conn: Connection, stored: Iterable[Stored]) -> list[Doomed]:
    owners = dict.fromkeys(owner for each in stored if (owner := owner_of(each.key)) is not None)
    rows = {
        table: _known(conn, table, {(owner.organization_id, owner.id) for owner in owners if owner.table == table})
        for table in ("jobs", "videos")
    }
    return [
        Doomed(owner.organization_id, owner.key)
        for owner in owners
        if (owner.organization_id, owner.id) not in rows[owner.table]
    ]


def owner_of(key: str) -> Owner | None:
    """What a file in storage belongs to, as its key says; None for a document's and for what no job of ours made."""
    if (match := _OF_A_RENDER.fullmatch(key)) and _is_id(match[2]):
        return Owner("jobs", int(match[1]), UUID(match[2]), f"o/{match[1]}/renders/{match[2]}/")
    match = _OF_A_VIDEO.fullmatch(key)
    if match is None or not _is_id(match[3] or match[2]):
        return None
    if match[3]:  # an analysis has dozens of files in one folder
        return Owner("jobs", int(match[1]), UUID(match[3]), f"o/{match[1]}/videos/{match[2]}/{match[3]}/")
    return Owner("videos", int(match[1]), UUID(match[2]), key)


def _is_id(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _known(conn: Connection, table: str, ids: Iterable[tuple[int, UUID]]) -> set[tuple[int, UUID]]:
    """Of ids with their organizations, those that have a row."""
    wanted = list(ids)
    rows = conn.execute(
        f"select t.organization_id, t.id from agentflow.{table} t"  # noqa: S608 - one of two words of ours
        " join unnest(%s::bigint[], %s::uuid[]) w(organization_id, id) using (organization_id, id)",
        ([each[0] for each in wanted], [each[1] for each in wanted]),
    ).fetchall()
    return {(row[0], row[1]) for row in rows}
