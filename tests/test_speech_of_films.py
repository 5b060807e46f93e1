"""From a film's sound to its transcript: the analysis' own chunks, heard by a recogniser that really listens."""

from __future__ import annotations

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psycopg
import pytest

from actors.analyze_video import analysis, audio
from agentflow.jobs import records
from agentflow.system import System
from tests import clips, tone_speech
from tests.openrouter_server import ModelServer
from tests.processes import eventually, worker
from tests.test_understanding import Film, film, submit_film, told, vendor, with_models  # noqa: F401 - fixtures among them
from tests.tone_speech import RATE, Spoken


def talk(seconds: float, *, pauses: bool) -> list[Spoken]:
    """Words of two and three tenths of a second, quick one after the other; with a pause now and then, or none at all."""
    rng = random.Random(11)
    words, at_s = [], 0.5
    while at_s < seconds - 1:
        length_s = rng.choice((0.2, 0.25, 0.3, 0.4))
        words.append(Spoken(f"w{rng.randrange(90):02}", round(at_s, 2), round(at_s + length_s, 2)))
        at_s += length_s + (rng.choice((0.8, 1.5)) if pauses and rng.random() < 0.08 else rng.choice((0.06, 0.1)))
    return words


def write_talking_film(path: Path, words: list[Spoken], seconds: float) -> Path:
    sound = (tone_speech.speak(words, seconds) * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = clips.WIDTH, clips.HEIGHT, "yuv420p"
        stream: Any = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=RATE, layout="mono")
        for n in range(int(seconds * 5)):
            picture = clips.moved(clips.scene(n // 25), n % 7)
            for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")):
                container.mux(packet)
            piece = sound[n * RATE // 5 : (n + 1) * RATE // 5]
            frame = av.AudioFrame.from_ndarray(piece[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, n * RATE // 5, Fraction(1, RATE)
            for packet in stream.encode(frame):
                container.mux(packet)
        for each in (video, stream):
            for packet in each.encode(None):
                container.mux(packet)
    return path


@pytest.mark.parametrize("pauses", [True, False], ids=["cut in pauses", "cut hard"])
def test_every_word_is_heard_once_at_its_time(
    film: Film,  # noqa: F811
    vendor: ModelServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    pauses: bool,
) -> None:
    monkeypatch.setattr(audio, "CHUNK_S", 20.0)
    monkeypatch.setattr(audio, "_SEARCHED_S", 8.0)
    words = talk(90.0, pauses=pauses)
    path = write_talking_film(film.folder / "film.mkv", words, 90.0)
    found = analysis.analyze(str(path), str(film.folder), report=lambda fraction, stage: None, speech=True)
    assert len(found["speech"]["chunks"]) >= 4
    assert any(chunk["overlap_s"] == 0 for chunk in found["speech"]["chunks"][1:]) == pauses

    film.understand(found)

    heard = json.loads(film.stored["transcript.json"])["words"]
    assert [text.strip(".") for _, _, text in heard] == [spoken.word for spoken in words]
    for (start_s, end_s, _), spoken in zip(heard, words, strict=True):
        assert abs(start_s - spoken.start_s) < 0.3
        assert abs(end_s - spoken.end_s) < 0.3


def test_a_job_transcribes_what_is_said(
    environment: dict[str, str],
    system: System,
    conn: psycopg.Connection,
    vendor: ModelServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    vendor.reply = told
    words = talk(12.0, pauses=True)
    job, _ = submit_film(system, write_talking_film(tmp_path / "film.mkv", words, 12.0))

    with worker(with_models(environment, vendor), tmp_path / "worker.log"):
        ended = eventually(
            lambda: now if (now := records.get(conn, None, job.id)) and now.terminal else None, within_s=90
        )

    assert ended.state == "succeeded", ended.error
    said = " ".join(segment["text"] for segment in ended.result["transcript"]["segments"]).replace(".", "")
    assert said.split() == [word.word for word in words]
    chapters = ended.result["chapters"]["items"]
    assert chapters[0]["start_s"] == 0
    assert all(one["end_s"] == two["start_s"] for one, two in itertools.pairwise(chapters))
    left = {stored.key.rpartition("/")[2] for stored in system.storage.list()}
    assert {"transcript.json", "transcript.vtt"} <= left
    assert not [name for name in left if name.endswith((".flac", ".zip")) or name == "analysis.json"]
