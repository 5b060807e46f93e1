"""Documents from the hand-in to their chunks: what is stored, what a second version changes, and whatever comes in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from actors.analyze_video import job as analyze_video
from agentflow import settings, videos
from agentflow.database import BoundedConnection
from agentflow.errors import Permanent, Wait
from agentflow.jobs import records
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import documents
from agentflow.knowledge.documents import Source
from agentflow.system import System
from agentflow.worker.running import JobContext, Running, Stopped
from tests import documents_support as support
from tests import http_server, web_support
from tests.documents_support import (
    ANALYSIS,
    FILES,
    ORGANIZATION,
    again,
    finish,
    hand_in,
    perform,
    quick_child,
    rows,
    text_of,
    whole,
)
from tests.http_server import Reply
from tests.processes import eventually, worker

__all__ = ["quick_child"]

PAGES = [f"# Page {number}\n\n" + f"What is said on page {number} is said nowhere else. " * 12 for number in range(60)]


def book(pages: list[str]) -> bytes:
    return "\n\n".join(pages).encode()


def test_a_document_is_stored_with_its_chunks(system: System, conn: psycopg.Connection) -> None:
    data = (FILES / "handbook.docx").read_bytes()
    document, job = hand_in(system, "handbook", data, filename="handbook.docx")

    said = finish(system, conn, job)

    stored = documents.get(conn, ORGANIZATION, document.id)
    assert stored is not None and stored.read_at is not None
    assert (stored.kind, stored.title, stored.version) == ("docx", "Handbook of the Northern Ferry", 1)
    assert (stored.size_bytes, stored.job_id, stored.error) == (len(data), job.id, None)
    assert stored.facts["author"] == "Anna Petrova"
    found, text = rows(conn, document.id), text_of(conn, document.id)
    assert said["outcome"] == "stored" and said["chunks"] == said["added"] == len(found) == stored.chunk_count == 5
    for position, key, chunk, start, end, tokens, _, _ in found:
        assert text[start:end] == chunk and len(key) == 32 and tokens > 0, position
    places = {tuple(row[-1].get("heading", ())): row[6] for row in found}
    assert places[("Handbook of the Northern Ferry",)] is None or places[("Tickets",)] == "en"
    assert places[("Расписание", "Зимой")] == "ru"
    refunds = next(row for row in found if row[-1]["heading"][-1] == "Refunds")
    assert refunds[-1]["row_end"] == 3 and refunds[2].endswith("Cabin | 48 | four bags")


def test_the_same_content_again_is_no_work(
    system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, job = hand_in(system, "same", book(PAGES[:5]))
    finish(system, conn, job)
    before = (whole(conn, document.id), conn.execute("select ctid, xmin from agentflow.chunks").fetchall())
    monkeypatch.setattr("agentflow.worker.child.run", lambda *_: pytest.fail("it is read again"))

    document_again, second = hand_in(system, "same", book(PAGES[:5]))
    said = finish(system, conn, second)

    assert document_again.id == document.id
    assert (said["outcome"], said["version"]) == ("unchanged", 1)
    assert (whole(conn, document.id), conn.execute("select ctid, xmin from agentflow.chunks").fetchall()) == before


@pytest.mark.usefixtures("quick_child")
def test_another_version_changes_only_what_changed(system: System, conn: psycopg.Connection) -> None:
    document, job = hand_in(system, "book", book(PAGES))
    finish(system, conn, job)
    before = {
        row[0]: row[1:] for row in conn.execute("select position, key, xmin::text from agentflow.chunks").fetchall()
    }

    pages = [*PAGES]
    pages[30] = pages[30].replace("nowhere else", "somewhere else")  # two characters longer
    _, second = hand_in(system, "book", book(pages))
    said = finish(system, conn, second)

    after = {
        row[0]: row[1:] for row in conn.execute("select position, key, xmin::text from agentflow.chunks").fetchall()
    }
    changed = [position for position in after if before[position][0] != after[position][0]]
    assert (said["version"], said["added"], said["removed"]) == (2, len(changed), len(changed))
    assert changed and {row[-1]["heading"][0] for row in rows(conn, document.id) if row[0] in changed} == {"Page 30"}
    # What stands before it was not even touched; what stands after it has other offsets.
    assert all(before[position] == after[position] for position in range(changed[0]))
    assert said["kept"] == changed[0] and said["kept"] + said["moved"] + said["added"] == len(after)


@pytest.mark.usefixtures("quick_child")
def test_chunks_that_trade_places_keep_their_keys(system: System, conn: psycopg.Connection) -> None:
    document, job = hand_in(system, "turned", book(PAGES[:20]))
    finish(system, conn, job)

    _, second = hand_in(system, "turned", book([*PAGES[:20][::-1], PAGES[3]]))
    said = finish(system, conn, second)

    fresh, third = hand_in(system, "fresh", book([*PAGES[:20][::-1], PAGES[3]]))
    finish(system, conn, third)
    assert said["removed"] == 0 and said["added"] > 0  # the page that is there twice
    assert rows(conn, document.id) == rows(conn, fresh.id)


@pytest.mark.usefixtures("quick_child")
def test_an_older_version_that_is_late_writes_nothing(system: System, conn: psycopg.Connection) -> None:
    document, old = hand_in(system, "raced", book(PAGES[:3]))
    taken = web_support.claim(conn, old.id)
    newer: list[Any] = []

    def handed_in_meanwhile(running: Running) -> None:
        report = running.report

        def reported(fraction: float, stage: str | None) -> None:
            report(fraction, stage)
            if stage == "store" and not newer:
                newer.append(hand_in(system, "raced", book(PAGES[10:12]))[1])

        running.report = reported  # type: ignore[method-assign]

    said = support.attempt(system, taken, watch=handed_in_meanwhile)

    assert said["outcome"] == "superseded"
    assert rows(conn, document.id) == []
    web_support.finish(system, conn, taken, result=said)
    finish(system, conn, newer[0])
    assert "Page 10" in text_of(conn, document.id)
    stored = documents.get(conn, ORGANIZATION, document.id)
    assert stored is not None and stored.job_id == newer[0].id


@pytest.mark.usefixtures("quick_child")
def test_two_versions_do_not_run_together_and_the_file_of_the_older_may_be_gone(
    system: System, conn: psycopg.Connection
) -> None:
    document, old = hand_in(system, "queued", book(PAGES[:3]))
    taken = web_support.claim(conn, old.id)
    _, newer = hand_in(system, "queued", book(PAGES[5:7]))

    assert old.concurrency_key == newer.concurrency_key
    with pytest.raises(Wait):  # the newer one has not ended
        support.attempt(system, taken)
    conn.execute("update agentflow.documents set job_id = %s where id = %s", (old.id, document.id))
    row = documents.get(conn, ORGANIZATION, document.id)
    assert row is not None and row.storage_key is not None
    system.storage.delete(row.storage_key)
    with pytest.raises(Permanent) as caught:
        support.attempt(system, taken)
    assert caught.value.code == "file_gone"


@pytest.mark.usefixtures("quick_child")
def test_a_job_for_a_document_that_another_one_reads_waits_and_then_finds_nothing_to_do(
    system: System, conn: psycopg.Connection
) -> None:
    document, first = hand_in(system, "asked twice", book(PAGES[:2]))
    second = again(system, document)

    with pytest.raises(Wait):
        perform(system, conn, second)
    conn.execute("update agentflow.jobs set state = 'queued', worker = null, lease_until = null, wake_at = now() where id = %s",
                 (second.id,))  # fmt: skip
    finish(system, conn, first)

    assert finish(system, conn, second)["outcome"] == "unchanged"
    stored = documents.get(conn, ORGANIZATION, document.id)
    assert stored is not None and (stored.job_id, stored.chain_id) == (second.id, second.id)


def test_a_document_that_is_deleted_meanwhile_is_an_ordinary_ending(system: System, conn: psycopg.Connection) -> None:
    document, job = hand_in(system, "gone", book(PAGES[:2]))
    assert documents.delete(conn, ORGANIZATION, document.id)

    assert finish(system, conn, job)["outcome"] == "gone"
    assert not documents.delete(conn, ORGANIZATION, document.id)


def test_what_cannot_be_read_says_why_and_leaves_what_was_read_before(system: System, conn: psycopg.Connection) -> None:
    document, job = hand_in(system, "rules", (FILES / "rules.pdf").read_bytes(), filename="rules.pdf")
    finish(system, conn, job)
    before = rows(conn, document.id)

    _, second = hand_in(system, "rules", (FILES / "locked.pdf").read_bytes(), filename="rules.pdf")
    error = finish(system, conn, second)

    assert isinstance(error, Permanent) and error.code == "encrypted"
    stored = documents.get(conn, ORGANIZATION, document.id)
    assert stored is not None and stored.error is not None and stored.error["code"] == "encrypted"
    assert rows(conn, document.id) == before != []
    _, third = hand_in(system, "rules", (FILES / "rules.pdf").read_bytes(), filename="rules.pdf")
    assert finish(system, conn, third)["outcome"] == "unchanged"
    stored = documents.get(conn, ORGANIZATION, document.id)
    assert stored is not None and stored.error is None


@pytest.mark.usefixtures("quick_child")
def test_a_document_at_a_url_is_downloaded_and_its_type_believed_for_texts(
    environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with http_server.serve() as server:
        system = System.start(
            settings.load({**environment, "FETCH_ALLOW": server.netloc, "DOCUMENT_MAX_BYTES": "2000"}), "test"
        )
        server.on("/few", Reply(body=b"a,b\n1,2\n", headers={"Content-Type": "text/csv"}))
        server.on("/large", Reply(body=b"x" * 3000))
        ends = {}
        for path in ("/few", "/large", "/none"):
            with system.transaction() as transaction:
                source = Source(source_url=server.url(path))
                document, _ = documents.hand_in(transaction.conn, ORGANIZATION, path, source, title=None)
                job = transaction.submit(ORGANIZATION, documents.reading(document.id, graph=False)).job
                documents.ask(transaction.conn, document, chain_id=job.id, job_id=job.id)
            ends[path] = finish(system, conn, job)
            if path == "/few":
                stored = documents.get(conn, ORGANIZATION, document.id)
                assert stored is not None and (stored.kind, stored.title) == ("csv", "few")
        system.close()

    assert ends["/few"]["outcome"] == "stored"
    assert (ends["/large"].code, ends["/none"].code) == ("too_large", "url_not_found")


# ---- videos ----


@pytest.mark.usefixtures("quick_child")
def test_an_analysed_video_becomes_passages_with_their_times(system: System, conn: psycopg.Connection) -> None:
    video = videos.create_url(conn, ORGANIZATION, "https://example.com/film.mp4")
    analysis = system.submit(ORGANIZATION, NewJob("analyze_video", {"video_id": str(video.id)})).job
    with system.transaction() as transaction:
        source = Source(video_id=video.id)
        document, _ = documents.hand_in(transaction.conn, ORGANIZATION, "film", source, title=None)
        job = transaction.submit(ORGANIZATION, documents.reading(document.id, graph=False)).job
        documents.ask(transaction.conn, document, chain_id=job.id, job_id=job.id)
    too_soon = finish(system, conn, job)
    web_support.run(system, conn, analysis.id, result=ANALYSIS)

    said = finish(system, conn, again(system, document))

    assert too_soon.code == "not_analysed"
    assert said["outcome"] == "stored"
    places = {row[2]: row[-1] for row in rows(conn, document.id)}
    shot_0 = {"shot": 0, "thumbnail": "o/1/shot-0.jpg"}
    shot_1 = {"shot": 1, "thumbnail": "o/1/shot-1.jpg"}
    assert places == {
        "A film about a ferry in the ice.": {"part": "summary"},
        "Паром выходит из порта рано утром.\nНа борту девять человек.": {
            **{"part": "transcript", "heading": ["Начало"], "start_s": 1.0, "end_s": 9.0},
            **shot_0,
        },
        "The ice is a metre thick.": {
            **{"part": "transcript", "heading": ["Ice"], "start_s": 31.0, "end_s": 35.0},
            **shot_1,
        },
        "A red ship breaks the ice.": {"part": "captions", "start_s": 20.0, "end_s": 60.0, **shot_1},
        "ПОРТ; Выход 3": {"part": "screen_text", "start_s": 0.0, "end_s": 20.0, **shot_0},
        "The ferry leaves port.": {
            **{"part": "subtitles 2", "heading": ["Начало"], "start_s": 1.0, "end_s": 4.0},
            **shot_0,
        },
    }


def test_an_analysis_that_was_asked_to_index_asks_once_for_the_document_and_it_waits_for_the_end(
    system: System, conn: psycopg.Connection, quick_child: None
) -> None:
    video = videos.create_url(conn, ORGANIZATION, "https://example.com/film.mp4")
    payload = {"video_id": str(video.id), "index": True}
    analysis = web_support.claim(conn, system.submit(ORGANIZATION, NewJob("analyze_video", payload)).job.id)
    context = JobContext(Running(analysis, time.monotonic() + 600), system)

    for _ in range(2):  # a second run of the same job
        analyze_video._index(context, video)

    (reading,) = records.search(conn, ORGANIZATION, records.Filter(type="generate_embeddings"))
    taken = web_support.claim(conn, reading.id)
    with pytest.raises(Wait):
        support.attempt(system, taken)
    web_support.finish(system, conn, analysis, result=ANALYSIS)
    assert support.attempt(system, taken)["outcome"] == "stored"
    (document,) = documents.search(conn, ORGANIZATION)
    assert (document.source_id, document.chain_id) == (f"video:{video.id}", reading.id)


# ---- killed at any moment ----


class Killed(BaseException):
    """What a SIGKILL leaves of a run: nothing after it."""


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Ends the run before its n-th statement, or right after it; counts them."""
    original = BoundedConnection.execute
    seen: list[int] = [0]
    limit: list[int] = [1 << 30]

    def execute(self: BoundedConnection, query: Any, params: Any = None, **more: Any) -> Any:
        seen[0] += 1
        if seen[0] * 2 == limit[0]:
            raise Killed
        result = original(self, query, params, **more)
        if seen[0] * 2 + 1 == limit[0]:
            raise Killed
        return result

    def kill_at(moment: int) -> list[int]:
        seen[0], limit[0] = 0, moment
        return seen

    monkeypatch.setattr(BoundedConnection, "execute", execute)
    yield kill_at
    limit[0] = 1 << 30


@pytest.mark.usefixtures("quick_child")
def test_a_run_that_is_killed_at_any_of_ten_points_ends_in_the_same_rows(
    system: System, conn: psycopg.Connection, killer: Callable[[int], list[int]]
) -> None:
    first, second = book(PAGES[:12]), book([*PAGES[:5], *PAGES[6:12], PAGES[20]])
    for name in ("whole", "again"):  # the second one finds the vectors of its texts, as all that follow do
        document, job = hand_in(system, name, first)
        finish(system, conn, job)
        _, job = hand_in(system, name, second)
        seen = killer(1 << 30)
        perform(system, conn, job)
    statements = seen[0]
    expected = whole(conn, document.id)
    chance = random.Random(11)
    moments = sorted(chance.sample(range(2, statements * 2 + 2), 10))

    for moment in moments:
        name = f"killed at {moment}"
        killed, job = hand_in(system, name, first)
        finish(system, conn, job)
        _, job = hand_in(system, name, second)
        taken = web_support.claim(conn, job.id)
        killer(moment)
        with pytest.raises((Killed, Stopped)):
            support.attempt(system, taken)
        killer(1 << 30)
        support.attempt(system, replace(taken, fence=2))

        assert whole(conn, killed.id)[1:] == expected[1:], name  # all but the title


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.flaky(reruns=0)
def test_workers_that_are_killed_ten_times_leave_the_same_rows(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    one, reference = hand_in(system, "whole", book(PAGES))
    finish(system, conn, reference)
    expected = whole(conn, one.id)
    made = [hand_in(system, f"copy {number}", book(PAGES)) for number in range(10)]
    chance = random.Random(5)
    leases = {**environment, "JOB_LEASE": "4", "JOB_LEASE_RENEW": "1", "JOB_MAX_CRASHES": "50", "JOB_CONCURRENCY": "2"}

    def count(state: str) -> int:
        row = conn.execute("select count(*) from agentflow.jobs where state = %s", (state,)).fetchone()
        assert row is not None
        return int(row[0])

    for number in range(10):
        with worker(leases, tmp_path / f"worker-{number}.log") as process:
            eventually(lambda: count("running") > 0 or count("succeeded") == 11, within_s=60)
            time.sleep(chance.uniform(0.0, 1.5))  # the moment is what is drawn
            process.kill()
    with worker(leases, tmp_path / "worker.log"):
        eventually(lambda: count("succeeded") == 11, within_s=300)

    for document, _ in made:
        assert whole(conn, document.id)[1:] == expected[1:]


@pytest.mark.usefixtures("quick_child")
def test_settings_of_chunks_have_bounds(environment: dict[str, str], system: System, conn: psycopg.Connection) -> None:
    for name, value in (("CHUNK_TOKENS", "8"), ("CHUNK_OVERLAP_TOKENS", "129"), ("DOCUMENT_MEMORY_MB", "1")):
        with pytest.raises(settings.SettingsError) as caught:
            settings.load({**environment, name: value})
        assert caught.value.variable == name
    document, job = hand_in(system, "cut anew", book(PAGES[:4]))
    finish(system, conn, job)
    coarse = rows(conn, document.id)

    finer = System.start(settings.load({**environment, "CHUNK_TOKENS": "64", "CHUNK_OVERLAP_TOKENS": "0"}), "test")
    said = finish(finer, conn, again(finer, document))
    finer.close()

    assert said["outcome"] == "stored" and len(rows(conn, document.id)) > len(coarse)


def test_a_file_that_is_larger_than_allowed_is_not_read(
    environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    system = System.start(settings.load({**environment, "DOCUMENT_MAX_BYTES": "100"}), "test")
    _, job = hand_in(system, str(uuid4()), book(PAGES[:2]))

    error = finish(system, conn, job)
    system.close()

    assert error.code == "too_large"
