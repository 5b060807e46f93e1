"""What models say about a video: every part by itself, every answer paid once, whatever the vendor does in between."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from actors.analyze_video import understanding
from actors.analyze_video.understanding import story
from actors.analyze_video.understanding.transcript import Heard, grouped, stitch, timed_words, webvtt
from agentflow import settings, videos
from agentflow.errors import Transient, Wait
from agentflow.ids import new_id
from agentflow.jobs import claims, records
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.models import Word
from agentflow.system import System
from agentflow.worker.running import JobContext, Running
from tests import clips, tone_speech
from tests import openrouter_server as faults
from tests.openrouter_server import KEY, Asked, ModelServer, model_server
from tests.processes import eventually, worker
from tests.tone_speech import Spoken

ORGANIZATION = 1
NOT_CONFIGURED = {"status": "not_configured", "reason": "not configured: set OPENROUTER_API_KEY or LLM_BASE_URL"}


def says(asked: Asked) -> Any:
    """A vendor that has seen each picture: they hold their own caption."""
    match asked.schema:
        case "seen":
            number = asked.images[0].decode(errors="replace")[-1]
            return {"caption": f"caption {number}", "text": [f"EXIT {number}"] if number in "02468" else []}
        case "chapters":
            chapters = [{"start_s": s, "title": f"from {s}", "summary": "…"} for s in (31.0, 2.0, 500.0)]
            return {"chapters": chapters}
        case "summary":
            return {"short": "Short.", "long": "Long."}
        case "tags":
            return {"tags": ["#Cats", "cats", " Two  words "]}
    raise AssertionError(asked.schema)


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server() as server:
        server.reply = says
        server.transcribe = lambda asked: tone_speech.recognise(asked.sound)
        yield server


class Film:
    """An analysis whose keyframes and chunks of sound lie in a folder, and a job to understand it in."""

    def __init__(self, system: System, conn: psycopg.Connection, folder: Path, vendor: ModelServer | None) -> None:
        named = {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url, "LLM_TIMEOUT": "6"} if vendor else {}
        models = settings.load(named)
        self.settings = system.settings.model_copy(
            update={name.lower(): getattr(models, name.lower()) for name in named}
        )
        self.system = System(self.settings, "test")
        self.conn = conn
        self.folder = folder
        self.stored: dict[str, bytes] = {}
        self.progress: list[float] = []
        self.attempt = 1
        self.job = system.submit(ORGANIZATION, NewJob("analyze_video", {"video_id": str(uuid4())})).job
        (self.job,), _ = claims.claim(conn, [self.job.id], uuid4(), 600.0)

    def pictures(self, count: int, shot_s: float = 10.0) -> list[dict[str, Any]]:
        shots = []
        for n in range(count):
            (self.folder / f"{n}.jpg").write_bytes(b"\xff\xd8 picture " + str(n).encode())
            keyframe = {"file": f"{n}.jpg", "time_s": n * shot_s + 1}
            shots.append({"index": n, "start_s": n * shot_s, "end_s": (n + 1) * shot_s, "keyframe": keyframe})
        return shots

    def sound(self, words: list[Spoken], duration_s: float, chunks: list[tuple[float, float, float]]) -> dict[str, Any]:
        samples = tone_speech.speak(words, duration_s)
        made = []
        for n, (start_s, end_s, overlap_s) in enumerate(chunks):
            cut = samples[round(start_s * tone_speech.RATE) : round(end_s * tone_speech.RATE)]
            (self.folder / f"chunk-{n}.wav").write_bytes(tone_speech.wav_of(cut))
            chunk = {"index": n, "start_s": start_s, "end_s": end_s, "overlap_s": overlap_s, "file": f"chunk-{n}.wav"}
            made.append(chunk)
        return {"sample_rate": 16000, "channels": 1, "chunks": made}

    def understand(self, analysis: dict[str, Any]) -> dict[str, Any]:
        """One attempt."""

        def store(name: str, data: bytes, content_type: str) -> str:
            self.stored[name] = data
            return f"o/1/{name}"

        running = Running(dataclasses.replace(self.job, attempt=self.attempt), time.monotonic() + 600)
        context = JobContext(running, self.system)
        fetch: Callable[[dict[str, Any], Path], Path] = lambda file, folder: self.folder / file["file"]  # noqa: E731
        fields = understanding.understand(context, analysis, fetch, store, share_done=0.6)
        json.dumps(fields)
        return fields

    def work(self, analysis: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """As a worker does it: again after a wait and after what may pass. Returns the fields, and what came before."""
        before = []
        while True:
            try:
                return self.understand(analysis), before
            except Wait as error:
                before.append(error.reason)
                time.sleep(error.seconds)
            except Transient as error:
                before.append(str(error.code))
                self.attempt += 1


@pytest.fixture
def film(system: System, conn: psycopg.Connection, tmp_path: Path, vendor: ModelServer) -> Iterator[Film]:
    film = Film(system, conn, tmp_path, vendor)
    yield film
    film.system.close()


# ---- the whole ----


def test_every_part_is_there(film: Film, vendor: ModelServer) -> None:
    shots = film.pictures(4)
    words = [Spoken(f"w{n:02}", 1 + n * 0.5, 1.3 + n * 0.5) for n in range(60)]
    speech = film.sound(words, 40.0, [(0.0, 20.4, 0.0), (20.4, 40.0, 0.0)])

    fields = film.understand({"shots": shots, "speech": speech})

    assert fields["captions"] == {
        "status": "done",
        "items": [{"shot": n, "status": "done", "caption": f"caption {n}"} for n in range(4)],
    }
    assert fields["screen_text"] == {
        "status": "done",
        "items": [{"shot": n, "time_s": n * 10.0 + 1, "text": [f"EXIT {n}"]} for n in (0, 2)],
    }
    assert fields["chapters"]["items"] == [
        {"start_s": 0.0, "end_s": 30.0, "title": "from 2.0", "summary": "…"},
        {"start_s": 30.0, "end_s": 40.0, "title": "from 31.0", "summary": "…"},
    ]
    assert fields["summary"] == {"status": "done", "short": "Short.", "long": "Long."}
    assert fields["tags"] == {"status": "done", "items": ["cats", "two words"]}
    heard = fields["transcript"]
    assert (heard["status"], heard["language"]) == ("done", "en")
    assert " ".join(s["text"] for s in heard["segments"]).replace(".", "") == " ".join(w.word for w in words)
    assert heard["words"] == {"file": "transcript.json", "key": "o/1/transcript.json"}
    assert [w[2].strip(".") for w in json.loads(film.stored["transcript.json"])["words"]] == [w.word for w in words]
    assert film.stored["transcript.vtt"].startswith(b"WEBVTT\n\n00:00:01.000 --> ")


def test_faults_of_single_answers_leave_the_rest_intact_and_nothing_is_paid_twice(
    film: Film, vendor: ModelServer
) -> None:
    def shows(n: int) -> Callable[[Asked], bool]:
        return lambda asked: bool(asked.images) and asked.images[0].endswith(str(n).encode())

    vendor.fault(faults.refused("violence"), when=shows(0), times=100)
    vendor.fault(faults.limited(reset_in_s=1.5), when=shows(1))
    vendor.fault(faults.no_credit(), when=shows(2), times=100)
    vendor.fault(faults.broken_json(), when=shows(3), times=2)
    vendor.fault(faults.broken_json(), when=shows(4))
    vendor.fault(faults.slow(60), when=shows(5))
    vendor.fault(faults.cut(), when=shows(6))
    vendor.fault(faults.refused("violence"), when=lambda asked: asked.schema == "tags", times=100)
    words = [Spoken(f"w{n:02}", 1 + n * 0.5, 1.3 + n * 0.5) for n in range(50)]
    speech = film.sound(words, 30.0, [(0.0, 10.4, 0.0), (10.4, 20.4, 0.0), (20.4, 30.0, 0.0)])
    vendor.fault(faults.error_in_200(502), when=lambda asked: bool(asked.sound))

    fields, before = film.work({"shots": film.pictures(9), "speech": speech})

    items = fields["captions"]["items"]
    assert [item["shot"] for item in items] == list(range(9))
    assert [item.get("caption") for item in items] == [None, "caption 1", None, *(f"caption {n}" for n in range(3, 9))]
    assert fields["captions"]["status"] == "partial"
    assert items[0]["reason"] == "the model's moderation refused this: violence"
    assert items[2]["code"] == "model_no_credit"
    assert fields["transcript"]["status"] == "done"
    heard = " ".join(segment["text"] for segment in fields["transcript"]["segments"])
    assert heard.replace(".", "").split() == [word.word for word in words]
    assert fields["tags"]["status"] == "failed"
    assert (fields["chapters"]["status"], fields["summary"]["status"]) == ("done", "done")
    assert {"limit", "model_limit"} & set(before)  # whoever said so first: our own count, or the vendor's answer
    paid = [asked.images[0] for asked in vendor.answered if asked.images]
    assert len(paid) == len(set(paid)) == 7
    assert len([asked for asked in vendor.answered if asked.sound]) == 3


def test_what_a_second_run_needs_is_not_asked_again(film: Film, vendor: ModelServer) -> None:
    analysis = {"shots": film.pictures(3), "speech": None}
    first = film.understand(analysis)
    asked = len(vendor.asked)

    film.attempt = 2
    second = film.understand(analysis)

    assert second == first
    assert len(vendor.asked) == asked


def test_pictures_that_are_alike_are_one_question(film: Film, vendor: ModelServer) -> None:
    shots = film.pictures(4)
    for n in range(4):
        (film.folder / f"{n}.jpg").write_bytes(b"black 0")

    fields = film.understand({"shots": shots, "speech": None})

    assert [item["caption"] for item in fields["captions"]["items"]] == ["caption 0"] * 4
    assert len([asked for asked in vendor.asked if asked.images]) == 1


def test_the_last_attempt_ends_with_what_there_is(film: Film, vendor: ModelServer) -> None:
    vendor.fault(faults.status(502), when=lambda asked: bool(asked.images), times=100)
    vendor.fault(faults.status(502), when=lambda asked: asked.schema == "summary", times=100)
    words = [Spoken("w01", 1.0, 1.4)]
    analysis = {"shots": film.pictures(2), "speech": film.sound(words, 3.0, [(0.0, 3.0, 0.0)])}
    with pytest.raises(
        Transient, match="2 questions to models failed; the first: the model server failed with status 502"
    ):
        film.understand(analysis)

    film.attempt = film.job.max_attempts
    fields = film.understand(analysis)

    assert fields["captions"]["status"] == "failed"
    assert fields["captions"]["reason"].startswith("the model server failed with status 502")
    assert fields["transcript"]["status"] == "done"
    assert fields["summary"]["status"] == "failed"
    assert fields["tags"]["status"] == "done"


def test_an_account_that_is_refused_is_not_asked_a_hundred_times(film: Film, vendor: ModelServer) -> None:
    vendor.fault(faults.no_credit(), times=1000)

    fields = film.understand({"shots": film.pictures(9), "speech": None})

    assert {item["code"] for item in fields["captions"]["items"]} == {"model_no_credit"}
    assert fields["chapters"] == {"status": "failed", "reason": "there is neither speech nor a caption to go by"}
    assert len(vendor.asked) < 9


def test_without_a_model_every_part_says_what_to_set(system: System, conn: psycopg.Connection, tmp_path: Path) -> None:
    film = Film(system, conn, tmp_path, None)

    fields = film.understand({"shots": film.pictures(2), "speech": None})

    parts = ("captions", "screen_text", "transcript", "chapters", "summary", "tags")
    assert fields == dict.fromkeys(parts, NOT_CONFIGURED)


def test_a_long_video_is_condensed_before_it_istold(film: Film, vendor: ModelServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(story, "_MOST_CHARS", 800)
    monkeypatch.setattr(story, "_WINDOW_CHARS", 300)
    told = vendor.reply
    vendor.reply = lambda asked: {"notes": "[1.0] so it goes"} if asked.schema == "notes" else told(asked)
    vendor.fault(faults.refused(), when=lambda asked: asked.schema == "notes")

    fields = film.understand({"shots": film.pictures(9) * 3, "speech": None})

    assert fields["summary"]["status"] == "done"
    (question,) = [asked.text for asked in vendor.asked if asked.schema == "summary"]
    assert question.count("so it goes") > 1
    assert "PICTURE: caption" in question  # the window whose notes were refused


# ---- in a worker ----


def submit_film(system: System, path: Path) -> tuple[Job, str]:
    """A job to analyse an uploaded film, and where the film lies."""
    video_id = new_id()
    key = videos.upload_key(ORGANIZATION, video_id, path.name)
    size = system.storage.put_file(key, path)
    with system.database.connection() as conn:
        videos.create_upload(
            conn,
            ORGANIZATION,
            video_id,
            storage_key=key,
            filename=path.name,
            content_type="video/mp4",
            size_bytes=size,
        )
    job = system.submit(ORGANIZATION, NewJob("analyze_video", {"video_id": str(video_id)})).job
    return job, key


def short_film(folder: Path) -> Path:
    return clips.write_film(folder / "film.mp4", clips.film([30, 30, 30]))


def with_models(environment: dict[str, str], vendor: ModelServer, **more: str) -> dict[str, str]:
    return {**environment, "OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url, **more}


def told(asked: Asked) -> Any:
    return {"caption": "a scene", "text": []} if asked.schema == "seen" else says(asked)


def test_a_limit_parks_the_job_and_what_was_done_before_is_not_done_again(
    environment: dict[str, str], system: System, conn: psycopg.Connection, vendor: ModelServer, tmp_path: Path
) -> None:
    vendor.reply = told
    job, key = submit_film(system, short_film(tmp_path))

    def limited(asked: Asked) -> Any:
        system.storage.delete(key)  # a second look at the file would be its end
        return faults.limited(reset_in_s=1.0)(asked)

    vendor.fault(limited, when=lambda asked: asked.schema == "chapters")

    with worker(with_models(environment, vendor), tmp_path / "worker.log"):
        ended = eventually(
            lambda: now if (now := records.get(conn, None, job.id)) and now.terminal else None, within_s=90
        )

    assert ended.state == "succeeded", ended.error
    assert ended.attempt == 1
    assert [item["caption"] for item in ended.result["captions"]["items"]] == ["a scene"] * len(ended.result["shots"])
    parked, done = records.attempts(conn, job.id)
    assert (parked.outcome, done.outcome) == ("wait", "succeeded")
    pictures = [asked for asked in vendor.asked if asked.images]
    assert len(pictures) == len(ended.result["shots"])
    assert parked.usage is not None
    assert done.usage is not None
    assert parked.usage["model_calls"] + done.usage["model_calls"] == len(vendor.answered)
    assert parked.usage["usd"] + done.usage["usd"] == pytest.approx(len(vendor.answered) * vendor.usd_per_call)
    assert not [stored.key for stored in system.storage.list() if stored.key.endswith("analysis.json")]


def test_a_killed_worker_has_not_paid_in_vain(
    environment: dict[str, str], system: System, conn: psycopg.Connection, vendor: ModelServer, tmp_path: Path
) -> None:
    vendor.reply = told
    job, _ = submit_film(system, short_film(tmp_path))
    vendor.fault(faults.slow(600), when=lambda asked: asked.schema == "chapters")
    environment = with_models(environment, vendor, JOB_LEASE="3", JOB_LEASE_RENEW="1")

    with worker(environment, tmp_path / "first.log") as first:
        kept = "select count(*) from agentflow.model_answers"
        eventually(lambda: conn.execute(kept).fetchone()[0] >= 4, within_s=90)  # type: ignore[index]
        first.kill()
    with worker(environment, tmp_path / "second.log"):
        ended = eventually(
            lambda: now if (now := records.get(conn, None, job.id)) and now.terminal else None, within_s=120
        )

    assert ended.state == "succeeded", ended.error
    asked = [asked.schema for asked in vendor.asked]
    assert asked.count("seen") == len(ended.result["shots"])
    crashed = records.attempts(conn, job.id)[0]
    assert crashed.outcome == "crashed"
    assert crashed.usage is not None
    assert crashed.usage["model_calls"] >= asked.count("seen")


# ---- the transcript ----


@pytest.mark.parametrize("late_s", [-0.2, 0.0, 0.2])
def test_speech_is_heard_once_across_hard_cuts_and_pauses(film: Film, vendor: ModelServer, late_s: float) -> None:
    rng = random.Random(7)
    words, at_s = [], 0.7
    while at_s < 112:
        length_s = rng.uniform(0.2, 0.4)
        words.append(Spoken(f"w{rng.randrange(100):02}", round(at_s, 2), round(at_s + length_s, 2)))
        at_s += length_s + rng.choice((0.06, 0.1, 0.1, 0.15))
        at_s = 61.2 if 60.0 < at_s < 61.2 else at_s  # a pause
    edges = [0.0, 19.3, 38.05, 60.5, 80.37, 99.9, 114.0]
    chunks = [
        (start - (overlap := 0.0 if start in (0.0, 60.5) else 1.0), end, overlap)
        for start, end in itertools.pairwise(edges)
    ]
    # Every other chunk is heard late, so that the two sides of each seam disagree.
    number = {(film.folder / f"chunk-{n}.wav"): n for n in range(len(chunks))}
    speech = film.sound(words, 114.0, chunks)
    late = {path.read_bytes(): late_s * (n % 2) for path, n in number.items()}
    vendor.transcribe = lambda asked: tone_speech.recognise(asked.sound, late_s=late[asked.sound])

    film.understand({"shots": film.pictures(1), "speech": speech})

    heard = json.loads(film.stored["transcript.json"])["words"]
    assert [word.strip(".") for _, _, word in heard] == [spoken.word for spoken in words]
    for (start_s, end_s, _), spoken in zip(heard, words, strict=True):
        assert abs(start_s - spoken.start_s) < 0.3
        assert abs(end_s - spoken.end_s) < 0.3


def _said(*texts: str, from_s: float = 0.0, each_s: float = 0.4) -> tuple[Word, ...]:
    return tuple(Word(text, from_s + n * each_s, from_s + n * each_s + 0.3) for n, text in enumerate(texts))


def test_a_word_that_is_said_three_times_is_neither_lost_nor_doubled() -> None:
    before = Heard(0.0, 10.0, 0.0, _said("yes", "no", "no", "no", from_s=8.4))
    after = Heard(9.0, 20.0, 1.0, _said("no", "no", "maybe", from_s=9.25))

    assert [word.text for word in stitch([before, after])] == ["yes", "no", "no", "no", "maybe"]


def test_two_hearings_without_a_common_word_meet_in_the_middle() -> None:
    before = Heard(0.0, 10.0, 0.0, _said("one", "two", "tree", from_s=8.7))
    after = Heard(9.0, 20.0, 1.0, _said("too", "three", "four", from_s=9.1))

    assert [word.text for word in stitch([before, after])] == ["one", "two", "three", "four"]


@given(data=st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_no_seam_loses_or_doubles_a_word(data: st.DataObject) -> None:
    count = data.draw(st.integers(5, 40))
    texts = data.draw(st.lists(st.sampled_from("abcdefg"), min_size=count, max_size=count))
    words, at_s = [], 0.0
    for text in texts:
        length_s = data.draw(st.sampled_from((0.15, 0.25, 0.4)))
        words.append(Word(text, at_s, at_s + length_s))
        at_s += length_s + data.draw(st.sampled_from((0.05, 0.1, 0.3)))
    cut_s = data.draw(st.floats(1.5, max(1.6, at_s - 1.5)))
    late_s = data.draw(st.floats(-0.08, 0.08))

    def heard(start_s: float, end_s: float, overlap_s: float, late_s: float) -> Heard:
        whole = [w for w in words if w.start_s >= start_s and w.end_s <= end_s]
        return Heard(
            start_s, end_s, overlap_s, tuple(Word(w.text, w.start_s + late_s, w.end_s + late_s) for w in whole)
        )

    stitched = stitch([heard(0.0, cut_s, 0.0, 0.0), heard(cut_s - 1.0, at_s, 1.0, late_s)])

    assert [word.text for word in stitched] == texts


def test_words_get_their_punctuation_from_the_text_and_lost_times_from_their_neighbours() -> None:
    words = _said("hello", "there", "twenty", "two", "end")

    timed = timed_words("Hello there, 22 … end!", [], words, 3.0)

    assert [w.text for w in timed] == ["Hello", "there,", "22", "…", "end!"]
    assert [w.start_s for w in timed] == sorted(w.start_s for w in timed)
    assert (timed[0].start_s, timed[-1].end_s) == (0.0, pytest.approx(1.9))


def test_a_recogniser_that_knows_segments_only_or_nothing() -> None:
    by_segment = timed_words("ab abcd. x", [Word("ab abcd.", 1.0, 2.4), Word("x", 3.0, 3.5)], [], 4.0)
    by_nothing = timed_words("ab ab", [], [], 4.0)

    assert [(w.text, round(w.start_s, 2), round(w.end_s, 2)) for w in by_segment] == [
        ("ab", 1.0, 1.4),
        ("abcd.", 1.4, 2.4),
        ("x", 3.0, 3.5),
    ]
    assert [(w.start_s, w.end_s) for w in by_nothing] == [(0.0, 2.0), (2.0, 4.0)]
    assert timed_words("", [], [], 4.0) == []


def test_segments_end_with_sentences_and_in_pauses() -> None:
    words = [*_said("One", "two.", "Three"), *_said("four", from_s=5.0), *_said(*["on"] * 40, from_s=5.4)]

    groups = [" ".join(word.text for word in group) for group in grouped(words)]

    assert groups[:2] == ["One two.", "Three"]
    assert groups[2].startswith("four on on")
    assert len(groups) == 5


def test_subtitles_are_escaped_and_never_empty_in_time() -> None:
    segments = [{"start_s": 3661.5, "end_s": 3661.5, "text": "a < b & c"}]

    assert webvtt(segments) == "WEBVTT\n\n01:01:01.500 --> 01:01:01.501\na &lt; b &amp; c\n"


# ---- chapters ----


@given(
    starts=st.lists(st.floats(-100, 4000), min_size=1, max_size=20),
    cuts=st.lists(st.floats(0, 3600), max_size=20),
    duration_s=st.floats(0.1, 3600),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_chapters_tile_the_video(starts: list[float], cuts: list[float], duration_s: float) -> None:
    named = [{"start_s": start, "title": str(n), "summary": ""} for n, start in enumerate(starts)]
    cuts = [0.0, *(cut for cut in cuts if cut < duration_s)]

    chapters = story.tiled(named, duration_s, cuts)

    assert chapters[0]["start_s"] == 0
    assert chapters[-1]["end_s"] == round(duration_s, 3)
    for one, next_one in itertools.pairwise(chapters):
        assert one["end_s"] == next_one["start_s"]
    assert all(chapter["end_s"] > chapter["start_s"] for chapter in chapters)
