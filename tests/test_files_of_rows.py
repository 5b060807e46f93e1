"""Files go with the rows that named them, whatever the store says at first; never one that a row still names."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from agentflow import videos
from agentflow.ids import new_id
from agentflow.jobs import files, retention
from agentflow.jobs.files import Doomed
from agentflow.jobs.requests import NewJob
from agentflow.jobs.retention import Keep
from agentflow.knowledge import documents
from agentflow.knowledge.documents import Source
from agentflow.storage import StorageError
from agentflow.system import System
from scheduler import storage
from tests.calendar_support import cleaned_up
from tests.one_database import database_url, original
from tests.web_support import run

__all__ = ["database_url", "original"]

Connection = psycopg.Connection
NOTHING = Keep(hours=0, count=0)


def upload(system: System, conn: Connection, organization_id: int = 1, *, row: bool = True) -> videos.Video:
    """A video whose file lies in storage."""
    video_id = new_id()
    key = videos.upload_key(organization_id, video_id, "film.mp4")
    system.storage.put_bytes(key, b"frames")
    more: dict[str, Any] = {"filename": "film.mp4", "content_type": None, "size_bytes": 6}
    if row:
        return videos.create_upload(conn, organization_id, video_id, storage_key=key, **more)
    return videos.Video(video_id, organization_id, key, None, created_at=datetime.now(UTC), **more)


def analysed(system: System, conn: Connection, video: videos.Video) -> tuple[UUID, str]:
    """A job that ended, and the folder where it left a picture."""
    new = NewJob("analyze_video", {"video_id": str(video.id)})
    job = system.submit(video.organization_id, new).job
    run(system, conn, job.id)
    folder = f"o/{video.organization_id}/videos/{video.id}/{job.id}"
    system.storage.put_bytes(f"{folder}/keyframes/1.png", b"picture")
    system.storage.put_bytes(f"{folder}/sheet.png", b"picture")
    return job.id, folder


def stored(system: System) -> set[str]:
    return {each.key for each in system.storage.list("o")}


def doomed(conn: Connection) -> list[str]:
    return [row[0] for row in conn.execute("select key from agentflow.doomed_files order by key").fetchall()]


def make_videos_older(conn: Connection, hours: float) -> None:
    conn.execute("update agentflow.videos set created_at = created_at - make_interval(secs => %s * 3600)", (hours,))


def make_files_older(system: System, days: float) -> None:
    for key in stored(system):
        path = system.storage.local_path(key)
        assert path is not None
        at = path.stat().st_mtime - days * 86_400
        os.utime(path, (at, at))


def test_the_files_of_a_job_that_is_forgotten_go_and_its_video_stays(system: System, conn: Connection) -> None:
    video = upload(system, conn)
    _, old = analysed(system, conn, video)
    with conn.transaction():
        assert retention.delete_jobs(conn, succeeded=True, keep=NOTHING) == 1
    kept_id, kept = analysed(system, conn, video)

    assert doomed(conn) == [f"{old}/"]
    assert storage.remove_doomed(system).facts == {"deleted": 1, "stuck": 0}

    assert stored(system) == {video.storage_key, f"{kept}/sheet.png", f"{kept}/keyframes/1.png"}
    assert doomed(conn) == []
    assert conn.execute("select id from agentflow.jobs").fetchall() == [(kept_id,)]


def test_a_deletion_that_is_rolled_back_dooms_nothing(system: System, conn: Connection) -> None:
    analysed(system, conn, upload(system, conn))

    with conn.transaction(force_rollback=True):
        assert retention.delete_jobs(conn, succeeded=True, keep=NOTHING) == 1

    assert doomed(conn) == []


def test_what_the_store_refuses_is_tried_again_and_counts_as_behind(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = analysed(system, conn, upload(system, conn))
    retention.delete_jobs(conn, succeeded=True, keep=NOTHING)

    def refuse(_prefix: str) -> int:
        raise StorageError("the bucket is away")

    with monkeypatch.context() as away:
        away.setattr(system.storage, "delete_prefix", refuse)
        assert storage.remove_doomed(system).behind is False  # a first time says little
        assert files.remove_batch(system.database, system.storage) == 0  # not at once again
        conn.execute("update agentflow.doomed_files set due_at = clock_timestamp()")
        done = storage.remove_doomed(system)
    assert (done.behind, done.facts["stuck"], doomed(conn)) == (True, 1, [f"{folder}/"])

    conn.execute("update agentflow.doomed_files set due_at = clock_timestamp()")
    assert storage.remove_doomed(system).behind is False
    assert f"{folder}/sheet.png" not in stored(system) and doomed(conn) == []


def test_a_process_that_dies_while_it_removes_leaves_the_rest_to_the_next(
    system: System, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        analysed(system, conn, upload(system, conn))
    retention.delete_jobs(conn, succeeded=True, keep=NOTHING)
    really, calls = system.storage.delete_prefix, [0]

    def dies(prefix: str) -> int:
        calls[0] += 1
        if calls[0] == 2:
            raise SystemExit
        return really(prefix)

    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(system.storage, "delete_prefix", dies)
        files.remove_batch(system.database, system.storage)
    assert len(doomed(conn)) == 3

    conn.execute("update agentflow.doomed_files set due_at = clock_timestamp()")
    assert files.remove_batch(system.database, system.storage) == 3
    assert doomed(conn) == [] and len(stored(system)) == 3


@pytest.mark.parametrize("namer", ["a video", "an open job"])
def test_a_file_that_a_row_still_names_is_left_alone(system: System, conn: Connection, namer: str) -> None:
    video = upload(system, conn, row=namer == "a video")
    assert video.storage_key is not None
    if namer == "an open job":
        job = system.submit(1, NewJob("ping", {})).job
        conn.execute(
            "update agentflow.jobs set payload = jsonb_build_object('key', %s::text) where id = %s",
            (video.storage_key, job.id),
        )
    files.doom(conn, [Doomed(1, video.storage_key)])

    files.remove_batch(system.database, system.storage)

    assert stored(system) == {video.storage_key}
    assert doomed(conn) == [video.storage_key]


def test_the_pictures_that_a_document_shows_outlive_their_analysis_without_an_alarm_and_go_after_the_document(
    system: System, conn: Connection
) -> None:
    video = upload(system, conn)
    _, shown = analysed(system, conn, video)
    _, other = analysed(system, conn, video)
    source = Source(video_id=video.id)
    document, _ = documents.hand_in(conn, 1, "film", source, title=None)
    facts = {"keyframes": [{"time_s": 1.0, "key": f"{shown}/keyframes/1.png"}]}
    conn.execute("update agentflow.documents set facts = %s where id = %s", (Jsonb(facts), document.id))
    retention.delete_jobs(conn, succeeded=True, keep=NOTHING)
    assert doomed(conn) == sorted([f"{shown}/", f"{other}/"])

    for _ in range(3):
        done = storage.remove_doomed(system)
        assert (done.behind, done.facts["stuck"]) == (False, 0)
        conn.execute("update agentflow.doomed_files set due_at = clock_timestamp()")

    assert stored(system) == {video.storage_key, f"{shown}/sheet.png", f"{shown}/keyframes/1.png"}
    assert documents.delete(conn, 1, document.id)
    storage.remove_doomed(system)
    assert stored(system) == {video.storage_key} and doomed(conn) == []


def test_a_video_goes_with_its_file_when_no_job_names_it_any_more(system: System, conn: Connection) -> None:
    used, unused, young, theirs = (upload(system, conn, organization) for organization in (1, 1, 1, 2))
    linked = videos.create_url(conn, 1, "http://8.8.8.8/film.mp4")
    analysed(system, conn, used)
    conn.execute("update agentflow.videos set created_at = created_at - interval '200 h' where id <> %s", (young.id,))

    assert videos.delete_old(conn, hours=168) == 3
    assert {row[0] for row in conn.execute("select id from agentflow.videos").fetchall()} == {used.id, young.id}
    assert doomed(conn) == sorted([str(unused.storage_key), str(theirs.storage_key)])
    assert linked.storage_key is None

    retention.delete_jobs(conn, succeeded=True, keep=NOTHING)
    assert videos.delete_old(conn, hours=168) == 1


def test_a_video_that_a_job_is_just_being_handed_in_for_stays(
    system: System, conn: Connection, connect: Callable[[], Connection]
) -> None:
    video = upload(system, conn)
    make_videos_older(conn, 200)
    other = connect()

    with conn.transaction():
        assert videos.get(conn, 1, video.id, keep=True) is not None
        assert videos.delete_old(other, hours=168) == 0
        conn.execute("select 1")
    assert videos.get(conn, 1, video.id) is not None
    assert videos.delete_old(other, hours=168) == 1


def test_files_that_never_got_a_row_go_after_a_day(system: System, conn: Connection) -> None:
    orphan, video = upload(system, conn, row=False), upload(system, conn)
    _, folder = analysed(system, conn, video)
    gone = f"o/1/videos/{video.id}/{uuid4()}"
    for name in ("a.png", "b/c.png"):
        system.storage.put_bytes(f"{gone}/{name}", b"x")
    for foreign in ("o/1/documents/x/source.pdf", "o/1/videos/no-id/source.mp4", "notes.txt"):
        system.storage.put_bytes(foreign, b"x")
    make_files_older(system, 2)
    fresh = upload(system, conn, row=False)

    assert storage.doom_orphans(system).facts == {"doomed": 0}  # the first time it leaves its mark
    assert storage.doom_orphans(system).facts == {"doomed": 2}
    storage.remove_doomed(system)

    assert orphan.storage_key not in stored(system)
    assert stored(system) == {
        *(video.storage_key, fresh.storage_key, f"{folder}/sheet.png", f"{folder}/keyframes/1.png"),
        *("o/1/documents/x/source.pdf", "o/1/videos/no-id/source.mp4"),
    }


def test_in_a_storage_that_others_use_too_nobody_looks_for_orphans(system: System, conn: Connection) -> None:
    upload(system, conn, row=False)
    make_files_older(system, 2)
    storage.doom_orphans(system)
    system.storage.put_bytes("installations/another", b"")

    assert storage.doom_orphans(system).facts == {"doomed": 0}
    assert doomed(conn) == []


def test_orphans_are_found_by_their_own_age(system: System, conn: Connection) -> None:
    upload(system, conn, row=False)

    assert list(files.orphans(system.database, system.storage)) == []
    tomorrow = datetime.now(UTC) + timedelta(days=2)
    assert len(list(files.orphans(system.database, system.storage, now=tomorrow))) == 1


def test_clean_up_as_a_whole_leaves_no_file_of_what_it_forgot(system: System, conn: Connection) -> None:
    video = upload(system, conn)
    analysed(system, conn, video)
    conn.execute("update agentflow.jobs set finished_at = finished_at - interval '300 h'")
    make_videos_older(conn, 300)
    settings = system.settings.model_copy(update={"retain_succeeded_count": 0})
    system.settings = settings

    cleaned_up(system)

    assert stored(system) == set()
    assert [conn.execute(f"select from agentflow.{t}".encode()).fetchall() for t in ("jobs", "videos")] == [[], []]
