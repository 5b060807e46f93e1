"""What the one pass finds beside the shots' places: their kinds, sound, subtitles, the sprite, and stretches of nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from actors.analyze_video import analysis, audio, frames, probe, subtitles
from actors.analyze_video.shots import originals, perceptual_hash
from actors.analyze_video.transitions import TransitionFinder
from agentflow.analysis import Analysis
from agentflow.errors import Permanent
from tests import clips
from tests.clips import RATE, mixed, moved, plain, scene, write_film


def analyze(path: Path, **options: Any) -> dict[str, Any]:
    """As the API's description says, and no more."""
    result = analysis.analyze(str(path), str(path.parent / "out"), report=lambda fraction, stage: None, **options)
    described = Analysis.model_validate(result)
    assert set(result) == set(Analysis.model_fields), described
    return result


def transitions(result: dict[str, Any]) -> list[tuple[str, int]]:
    return [(shot["transition"]["kind"], shot["start_frame"]) for shot in result["shots"][1:]]


# Kinds of transitions


def still(n: int, length: int) -> Iterator[clips.Picture]:
    yield from (moved(scene(n), i // 2) for i in range(length))


def test_a_dissolve_and_a_fade_through_black_are_told_from_cuts(tmp_path: Path) -> None:
    pictures = [*still(0, 50)]
    pictures += [mixed(moved(scene(0), 25 + i // 2), scene(1), (i + 1) / 21) for i in range(20)]
    pictures += [*still(1, 50)]
    pictures += [mixed(moved(scene(1), 25), plain(0), (i + 1) / 13) for i in range(12)]
    pictures += [plain(0)] * 6
    pictures += [mixed(plain(0), scene(2), (i + 1) / 13) for i in range(12)]
    pictures += [*still(2, 50), *still(3, 40)]

    result = analyze(write_film(tmp_path / "film.mp4", pictures))

    (one, dissolve), (two, fade), (three, cut) = transitions(result)
    assert (one, two, three) == ("dissolve", "fade", "cut")
    assert 55 <= dissolve <= 65
    assert 130 <= fade <= 138
    assert cut == 200
    span = result["shots"][1]["transition"]
    assert 44 <= span["start_frame"] <= 56 and 64 <= span["end_frame"] <= 76
    # No keyframe shows two shots at once, or black.
    for shot in result["shots"]:
        inside = shot["transition"]
        assert inside is None or not inside["start_frame"] < shot["keyframe"]["frame"] < inside["end_frame"]


def test_flashes_pans_and_changes_of_light_are_no_transitions(tmp_path: Path) -> None:
    wide = cv2.resize(scene(5), (960, 540), interpolation=cv2.INTER_CUBIC)
    pictures = [wide[100:280, 6 * i : 6 * i + 320] for i in range(60)]
    pictures[20] = mixed(pictures[20], plain(255), 0.7)
    pictures[21] = mixed(pictures[21], plain(255), 0.7)
    light = [np.clip(pictures[-1] * (1 - i / 60), 0, 255).astype(np.uint8) for i in range(25)]

    result = analyze(write_film(tmp_path / "film.mp4", [*pictures, *light, *[light[-1]] * 20]))

    assert transitions(result) == []


def test_at_sixty_frames_a_second_cuts_are_still_found_to_the_frame() -> None:
    finder = TransitionFinder(rate=60)
    assert finder.stride == 2
    found = []
    for n, length in enumerate((61, 40, 75)):
        for i in range(length):
            gray = cv2.cvtColor(moved(scene(n), i // 4), cv2.COLOR_BGR2GRAY)
            small = frames.Small(gray, np.full((18, 32), 100 + 9 * n, np.uint8), np.full((18, 32), 128, np.uint8))
            found += finder.add(small, 500.0, float(gray.std()))
    found += finder.finish()

    assert [(t.kind, t.at) for t in found] == [("cut", 61), ("cut", 101)]


# Small pictures


@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [
        ("libx264", "yuv420p"),
        ("libx264", "yuvj420p"),
        ("libx264", "nv12"),
        ("libx264", "yuv422p10le"),
        ("libx264", "yuv444p"),
        ("libx264rgb", "bgr24"),
        ("ffv1", "yuv420p12le"),
    ],
)
def test_every_kind_of_pixels_makes_the_same_small_picture(tmp_path: Path, codec: str, pixel_format: str) -> None:
    path = write_film(tmp_path / "film.mkv", [scene(1, 640, 360)] * 2, codec=codec, pixel_format=pixel_format)
    expected = av.VideoFrame.from_ndarray(scene(1, 640, 360), "bgr24").reformat(240, 135, "gray", interpolation="AREA")
    limited = expected.to_ndarray().astype(float)
    if expected.color_range == 2:  # full range
        limited = 16 + limited * (219 / 255)

    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        small = frames.SmallPictures(frame.width, frame.height).of(frame)

    assert small.y.shape == (135, 240)
    assert small.u.shape == small.v.shape == (18, 32)
    assert np.abs(small.y.astype(float) - limited).mean() < 6
    assert np.abs(small.u.mean() - 128) > 2  # there is colour in it


# Alike


def test_a_shot_that_comes_again_is_named(tmp_path: Path) -> None:
    pictures = [*still(0, 30), *still(1, 30), *still(0, 30), *still(2, 30)]

    result = analyze(write_film(tmp_path / "film.mp4", pictures))

    assert [shot["duplicate_of"] for shot in result["shots"]] == [None, None, 0, None]


def test_hashes_of_pictures_that_differ_in_light_are_alike() -> None:
    gray = cv2.cvtColor(scene(3), cv2.COLOR_BGR2GRAY)
    other = cv2.cvtColor(scene(4), cv2.COLOR_BGR2GRAY)

    hashes = [perceptual_hash(p) for p in (gray, np.clip(gray * 0.7 + 20, 0, 255).astype(np.uint8), other)]

    assert originals(list(hashes)) == [None, 0, None]
    assert originals([None, None]) == [None, None]


# Nothing to see


def test_black_and_frozen_stretches_are_listed(tmp_path: Path) -> None:
    pictures = [*still(0, 50), *[plain(0)] * 25, *still(1, 50), *[moved(scene(1), 24)] * 75]

    result = analyze(write_film(tmp_path / "film.mp4", pictures))

    (black,) = result["black"]
    assert (black["start_s"], black["end_s"]) == (2.0, 3.0)
    (frozen,) = result["frozen"]
    assert frozen["start_s"] == pytest.approx(5, abs=0.09)
    assert frozen["end_s"] == 8.0
    assert result["shots"][0]["motion"] > 0
    assert 0.2 < result["shots"][0]["brightness"] < 0.8


# Sound


def with_sound(path: Path, samples: Any, rate: int = 48_000) -> Path:
    """A film of a second with this sound: (channels, samples) of floats."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound: Any = container.add_stream("flac", rate=rate)
        sound.layout, sound.format = "stereo", "s16"
        for n in range(RATE):
            shown = av.VideoFrame.from_ndarray(scene(1, 64, 64), "bgr24")
            shown.pts, shown.time_base = n, Fraction(1, RATE)
            container.mux(video.encode(shown))
        container.mux(video.encode())
        packed = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
        for start in range(0, samples.shape[1], 4096):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(packed[:, 2 * start : 2 * (start + 4096)]), "s16", "stereo"
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def tone(level_db: float, seconds: float, rate: int = 48_000) -> Any:
    wave = np.sin(2 * np.pi * 997 / rate * np.arange(round(seconds * rate))) * 10 ** (level_db / 20)
    return np.stack([wave, wave])


@pytest.mark.parametrize("rate", [48_000, 44_100])
def test_loudness_is_that_of_ebu_tech_3341(tmp_path: Path, rate: int) -> None:
    # Its cases 1 and 3: a stereo sine of -23 dBFS has -23 LUFS, and what is 13 LU below it is gated away.
    samples = np.concatenate([tone(-36, 4, rate), tone(-23, 20, rate), tone(-36, 4, rate)], axis=1)

    heard = analyze(with_sound(tmp_path / "film.mkv", samples, rate))["audio"]

    assert heard["loudness"]["integrated_lufs"] == pytest.approx(-23, abs=0.15)
    assert heard["loudness"]["true_peak_dbtp"] == pytest.approx(-23, abs=0.2)


def test_the_loudness_range_is_that_of_ebu_tech_3342(tmp_path: Path) -> None:
    samples = np.concatenate([tone(-20, 20), tone(-30, 20)], axis=1)  # its case 1: 10 LU

    heard = analyze(with_sound(tmp_path / "film.mkv", samples))["audio"]

    assert heard["loudness"]["range_lu"] == pytest.approx(10, abs=1)


def test_silences_are_found_to_ten_milliseconds(tmp_path: Path) -> None:
    silence = np.zeros((2, 48_000))
    samples = np.concatenate(
        [tone(-20, 1.5), silence, tone(-20, 1), silence[:, :14_400], tone(-20, 0.5), silence], axis=1
    )

    heard = analyze(with_sound(tmp_path / "film.mkv", samples))["audio"]

    assert np.ravel([(s["start_s"], s["end_s"]) for s in heard["silences"]]) == pytest.approx(
        [1.5, 2.5, 4.3, 5.3], abs=0.015
    )


def test_a_film_without_sound_has_none(tmp_path: Path) -> None:
    result = analyze(write_film(tmp_path / "film.mp4", still(0, 10)), speech=True)

    assert result["audio"] is None
    assert result["speech"] is None


def test_speech_is_cut_in_pauses_and_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(audio, "CHUNK_S", 4.0)
    monkeypatch.setattr(audio, "_SEARCHED_S", 2.0)
    rng = np.random.default_rng(0)
    samples = np.repeat(rng.normal(0, 0.1, (1, 48_000 * 10)), 2, axis=0)
    samples[:, round(48_000 * 3.0) : round(48_000 * 3.4)] = 0  # the only pause
    samples = np.clip(samples, -1, 1)

    spoken = analyze(with_sound(tmp_path / "film.mkv", samples), speech=True)["speech"]

    chunks = spoken["chunks"]
    assert (spoken["sample_rate"], spoken["channels"]) == (16_000, 1)
    assert [c["index"] for c in chunks] == [0, 1, 2]
    assert chunks[0]["end_s"] == pytest.approx(3.2, abs=0.1)
    assert chunks[1]["start_s"] == chunks[0]["end_s"] and chunks[1]["overlap_s"] == 0
    # No pause: cut hard, with a second that both have.
    assert chunks[1]["end_s"] - chunks[1]["start_s"] == pytest.approx(4, abs=0.11)
    assert chunks[2]["start_s"] == pytest.approx(chunks[1]["end_s"] - 1, abs=1e-3)
    assert chunks[2]["overlap_s"] == 1
    assert chunks[2]["end_s"] == pytest.approx(10, abs=0.01)
    for chunk in chunks:
        with av.open(str(tmp_path / "out" / chunk["file"])) as container:
            length = sum(frame.samples for frame in container.decode(audio=0))
        assert length == round((chunk["end_s"] - chunk["start_s"]) * 16_000)


# Subtitles


SRT = "1\n00:00:00,200 --> 00:00:00,700\n<i>Hello</i> you\n& me\n\n2\n00:00:00,800 --> 00:00:01,000\nÄ {y}\n"


def with_subtitles(path: Path) -> Path:
    srt = path.with_suffix(".srt")
    srt.write_text(SRT)
    with av.open(str(srt)) as source, av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        track = container.add_stream_from_template(source.streams.subtitles[0])
        track.metadata["language"] = "deu"
        for n in range(RATE):
            shown = av.VideoFrame.from_ndarray(scene(1, 64, 64), "bgr24")
            shown.pts, shown.time_base = n, Fraction(1, RATE)
            container.mux(video.encode(shown))
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = track
                container.mux(packet)
        container.mux(video.encode())
    return path


def test_embedded_subtitles_are_text(tmp_path: Path) -> None:
    (track,) = analyze(with_subtitles(tmp_path / "film.mkv"))["subtitles"]

    assert (track["language"], track["is_text"], track["cue_count"]) == ("deu", True, 2)
    assert track["cues"] == [
        {"start_s": 0.2, "end_s": 0.7, "text": "Hello you\n& me"},
        {"start_s": 0.8, "end_s": 1.0, "text": "Ä {y}"},
    ]
    written = (tmp_path / "out" / track["file"]).read_text()
    assert written.startswith("WEBVTT\n\n00:00:00.200 --> 00:00:00.700\nHello you\n&amp; me\n\n")


def test_cues_beyond_the_limit_are_in_the_file_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(subtitles, "CUES_LISTED", 1)

    (track,) = analyze(with_subtitles(tmp_path / "film.mkv"))["subtitles"]

    assert (track["cue_count"], len(track["cues"])) == (2, 1)
    assert "Ä" in (tmp_path / "out" / track["file"]).read_text()


# Sprite


def test_the_sprite_has_a_picture_for_each_stretch_of_time(tmp_path: Path) -> None:
    result = analyze(write_film(tmp_path / "film.mp4", [p for n in range(12) for p in [scene(n)] * RATE], rotation=-90))

    sprite = result["sprite"]
    picture = cv2.imread(str(tmp_path / "out" / sprite["file"]))
    assert picture is not None and picture.shape[:2] == (sprite["height"], sprite["width"])
    assert (sprite["tiles"], sprite["every_s"], sprite["tile_width"], sprite["tile_height"]) == (12, 1.0, 90, 160)
    cues = re.findall(
        r"(\S+) --> (\S+)\nsprite\.jpg#xywh=(\d+),(\d+),(\d+),(\d+)", (tmp_path / "out" / "sprite.vtt").read_text()
    )
    assert len(cues) == 12
    assert (cues[0][:2], cues[-1][:2]) == (("00:00:00.000", "00:00:01.000"), ("00:00:11.000", "00:00:12.000"))
    for number, (_, _, *box) in enumerate(cues):
        x, y, width, height = map(int, box)
        expected = cv2.resize(cv2.rotate(scene(number), cv2.ROTATE_90_CLOCKWISE), (width, height))
        assert np.abs(picture[y : y + height, x : x + width].astype(int) - expected).mean() < 12


# Hostile files


def test_thousands_of_streams_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for _ in range(probe.MAX_STREAMS + 5):
            container.add_stream("pcm_s16le", rate=8000)
        shown = av.VideoFrame.from_ndarray(scene(1, 64, 64), "bgr24")
        container.mux(video.encode(shown))
        container.mux(video.encode())

    with pytest.raises(Permanent) as caught:
        analyze(path)

    assert caught.value.code == "too_many_streams"
