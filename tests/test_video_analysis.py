"""The analysis of a video, on films made to the frame and on a few real ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest

from actors.analyze_video import analysis, shots
from actors.analyze_video.pictures import SHEET_WIDTH, ContactSheet, sheet_tiles, time_code
from actors.analyze_video.reading import Reading
from agentflow.errors import Permanent
from tests import clips
from tests.clips import RATE, blurred, film, moved, plain, scene, write_film

real_clips = clips.real_clips  # the fixture


def analyze(path: Path, **options: Any) -> dict[str, Any]:
    options.setdefault("report", lambda fraction, stage: None)
    result = analysis.analyze(str(path), str(path.parent / "out"), **options)
    json.dumps(result, allow_nan=False)
    assert_tiled(result)
    return result


def assert_tiled(result: dict[str, Any]) -> None:
    found = result["shots"]
    assert found[0]["start_frame"] == 0
    assert found[-1]["end_frame"] == result["video"]["frames"]
    assert found[-1]["end_s"] == result["video"]["duration_s"]
    for number, shot in enumerate(found):
        assert shot["index"] == number
        assert shot["start_frame"] <= shot["keyframe"]["frame"] < shot["end_frame"]
        assert shot["start_s"] <= shot["keyframe"]["time_s"] < shot["end_s"]
        assert shot["duration_s"] == pytest.approx(shot["end_s"] - shot["start_s"], abs=2e-6)
    for one, next_one in pairwise(found):
        assert (one["end_frame"], one["end_s"]) == (next_one["start_frame"], next_one["start_s"])


def starts(result: dict[str, Any]) -> list[int]:
    return [shot["start_frame"] for shot in result["shots"]]


def keyframe(path: Path, result: dict[str, Any], shot: int = 0) -> clips.Picture:
    facts = result["shots"][shot]["keyframe"]
    picture = cv2.imread(str(path.parent / "out" / facts["file"]))
    assert picture is not None
    assert picture.shape[:2] == (facts["height"], facts["width"])
    return picture


def difference(one: clips.Picture, other: clips.Picture) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def refused(path: Path, **options: Any) -> Permanent:
    with pytest.raises(Permanent) as caught:
        analyze(path, **options)
    assert not (path.parent / "out" / "contact-sheet.png").exists()
    return caught.value


# Shots


def test_cuts_are_found_to_the_frame(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([30, 41, 12, 60, 25]))

    result = analyze(path)

    assert starts(result) == [0, 30, 71, 83, 143]
    assert [s["start_s"] for s in result["shots"]] == [n / RATE for n in starts(result)]
    assert result["video"]["frames"] == 168
    assert result["video"]["duration_s"] == 168 / RATE
    assert result["video"]["fps"] == RATE
    assert result["video"]["variable_frame_rate"] is False
    assert result["partial"] is False
    assert result["warnings"] == []
    for number in range(5):
        picture = scene(number)
        shown = result["shots"][number]["keyframe"]["frame"] - starts(result)[number]
        assert difference(keyframe(path, result, number), moved(picture, shown // 2)) < 8


def test_shots_of_a_fifth_of_a_second_are_found_and_shorter_flashes_make_none(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([30, 6, 6, 30, 3, 30]))

    result = analyze(path)

    assert starts(result) == [0, 30, 36, 42, 75]


def test_a_slow_pan_and_a_still_are_one_shot(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", (moved(scene(1), 3 * i if i < 50 else 150) for i in range(100)))

    assert starts(analyze(path)) == [0]


def test_real_clips_have_the_shots_that_people_see_in_them(real_clips: Path, tmp_path: Path) -> None:
    expected = {"bikes.mp4": [0, 30, 76, 137, 187, 242], "bigbuckbunny.mp4": [0], "carphone_pristine.mp4": [0]}

    for name, cuts in expected.items():
        (tmp_path / name).symlink_to(real_clips / name)
        result = analyze(tmp_path / name)

        assert starts(result) == cuts
        assert result["partial"] is False, result["warnings"]


def test_more_shots_than_allowed_stay_in_the_last_one(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([20, 20, 20, 20]))

    result = analyze(path, max_shots=2)

    assert starts(result) == [0, 20]
    assert result["partial"] is False
    assert "more than 2 shots" in result["warnings"][0]


# Time


def test_times_are_those_of_the_file_when_the_frame_rate_varies(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(20, 120, 90)).tolist()
    path = write_film(tmp_path / "film.mkv", film([30, 20, 40]), times_ms=times)

    result = analyze(path)

    assert starts(result) == [0, 30, 50]
    assert [s["start_s"] for s in result["shots"]] == [(times[n] - times[0]) / 1000 for n in (0, 30, 50)]
    assert result["video"]["variable_frame_rate"] is True
    assert result["video"]["start_s"] == times[0] / 1000
    assert result["video"]["fps"] == pytest.approx(90 / result["video"]["duration_s"], abs=0.001)
    assert result["partial"] is False


def test_times_in_whole_milliseconds_do_not_make_a_rate_variable(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", film([60]), rate=30)

    result = analyze(path)

    assert result["video"]["variable_frame_rate"] is False
    assert result["video"]["fps"] == 30


def test_a_stream_without_time_stamps_gets_those_of_its_rate(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.h264", film([30, 20]), format="h264")

    result = analyze(path)

    assert [(s["start_s"], s["end_s"]) for s in result["shots"]] == [(0, 1.2), (1.2, 2)]
    assert result["container"]["duration_s"] is None


def test_time_goes_on_where_time_stamps_start_again(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.ts", film([30, 20]))
    path.write_bytes(path.read_bytes() * 2)

    result = analyze(path)

    assert starts(result) == [0, 30, 50, 80]
    assert [s["start_s"] for s in result["shots"]] == pytest.approx([0, 1.2, 2, 3.2])


# Keyframes


def test_the_keyframe_is_the_sharpest_frame(tmp_path: Path) -> None:
    sharpness = [4.0 - i / 10 if i < 33 else 0.7 + (i - 33) / 10 for i in range(60)]
    path = write_film(tmp_path / "film.mp4", (blurred(scene(3), s) for s in sharpness))

    result = analyze(path)

    assert abs(result["shots"][0]["keyframe"]["frame"] - 33) <= 1
    assert difference(keyframe(path, result), blurred(scene(3), 0.7)) < 6


def stars() -> clips.Picture:
    """Nearly black, and by the Laplacian sharper than any photograph."""
    picture = plain(0)
    picture[::9, ::9] = 255
    return picture


def grain() -> clips.Picture:
    """One gray, with noise that the Laplacian takes for detail."""
    noise = np.random.default_rng(4).normal(120, 5, (180, 320, 1))
    return np.repeat(noise.astype(np.uint8), 3, axis=2)


def cross_fade(one: clips.Picture, other: clips.Picture, length: int) -> Iterable[clips.Picture]:
    return (cv2.addWeighted(one, 1 - i / length, other, i / length, 0) for i in range(length))


@pytest.mark.parametrize("bad", [stars(), grain(), plain(0), plain(255)], ids=["stars", "grain", "black", "white"])
def test_black_and_plain_frames_are_not_keyframes_when_there_is_another(
    tmp_path: Path, monkeypatch: Any, bad: clips.Picture
) -> None:
    monkeypatch.setattr(shots.TransitionFinder, "_judge", lambda *_, **__: [])  # one shot, come what may
    good = blurred(scene(2), 6)
    pictures = [bad] * 10 + [*cross_fade(bad, good, 50)] + [good] * 20

    path = write_film(tmp_path / "film.mp4", pictures)
    result = analyze(path)

    assert len(result["shots"]) == 1
    best = result["shots"][0]["keyframe"]
    assert best["luma"] > shots.BLACK_LUMA
    assert best["frame"] > 12
    assert keyframe(path, result).std() > 5


def test_a_black_film_has_a_black_keyframe(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [plain(0)] * 10)

    result = analyze(path)

    assert result["shots"][0]["keyframe"]["luma"] < shots.BLACK_LUMA
    assert keyframe(path, result).mean() < 3


@pytest.mark.parametrize(
    ("degrees", "mirrored", "shown"),
    [
        (0, False, lambda p: p),
        (-90, False, lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE)),
        (90, False, lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE)),
        (180, False, lambda p: cv2.rotate(p, cv2.ROTATE_180)),
        (0, True, lambda p: p[:, ::-1]),
        (90, True, lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE)[:, ::-1]),
    ],
)
def test_pictures_stand_upright(tmp_path: Path, degrees: int, mirrored: bool, shown: Any) -> None:
    path = write_film(tmp_path / "film.mp4", [scene(1)] * 8, rotation=degrees, mirrored=mirrored)

    result = analyze(path)

    expected = shown(scene(1))
    assert (result["video"]["height"], result["video"]["width"]) == expected.shape[:2]
    assert difference(keyframe(path, result), expected) < 6
    facts = result["streams"][0]
    assert (facts["width"], facts["height"]) == (320, 180)  # as stored
    assert facts["mirrored"] is mirrored
    turned = np.rot90(scene(1)[:, ::-1] if mirrored else scene(1), -facts["rotation"] // 90)
    assert np.array_equal(turned, expected)


def test_pixels_that_are_not_square_are_stretched_before_turning(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [scene(1)] * 5, sample_aspect=Fraction(2), rotation=-90)

    result = analyze(path)

    assert (result["video"]["width"], result["video"]["height"]) == (180, 640)
    expected = cv2.rotate(cv2.resize(scene(1), (640, 180)), cv2.ROTATE_90_CLOCKWISE)
    assert difference(keyframe(path, result), expected) < 6
    assert result["streams"][0]["sample_aspect_ratio"] == "2:1"


def test_keyframes_are_at_most_1280_wide(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [scene(1, 1920, 1080)] * 4)

    result = analyze(path)

    assert keyframe(path, result).shape == (720, 1280, 3)
    assert difference(keyframe(path, result), cv2.resize(scene(1, 1920, 1080), (1280, 720))) < 6


def test_reds_of_an_hd_film_that_names_no_colour_matrix_stay_red(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        planes = np.full((1080, 1280), 63, np.uint8)  # red in BT.709
        planes[720:900], planes[900:] = 102, 240
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode())

    red = keyframe(path, analyze(path))[360, 640].astype(int)

    assert np.abs(red - (0, 0, 255)).max() < 12


# Contact sheet


def test_the_contact_sheet_shows_each_keyframe_above_its_time_code(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([15] * 7))

    result = analyze(path)

    facts = result["contact_sheet"]
    sheet = cv2.imread(str(tmp_path / "out" / facts["file"]))
    assert sheet is not None
    assert sheet.shape == (facts["height"], facts["width"], 3)
    assert facts["width"] <= SHEET_WIDTH
    assert facts["columns"] * facts["rows"] >= 7 > facts["columns"] * (facts["rows"] - 1)
    background = sheet[0, 0].astype(int)
    assert (sheet[:4].astype(int) == background).all()
    step_x, step_y = (facts["width"] - 16) // facts["columns"], (facts["height"] - 16) // facts["rows"]
    for number in range(7):
        row, column = divmod(number, facts["columns"])
        tile = sheet[16 + row * step_y :, 16 + column * step_x :][: step_y - 16, : step_x - 16]
        shown = cv2.resize(keyframe(path, result, number), (step_x - 16, step_y - 16 - 34))
        assert difference(tile[:-34], shown) < 6
        assert tile[-34:].max() > 230  # the time code


def test_a_long_film_is_sampled_evenly_on_the_contact_sheet() -> None:
    tiles = sheet_tiles(1000)

    assert (len(tiles), tiles[0], tiles[-1]) == (60, 0, 999)
    assert {b - a for a, b in pairwise(tiles)} <= {16, 17}
    assert sheet_tiles(60) == list(range(60))


@pytest.mark.parametrize("size", [(1920, 1080), (1080, 1920), (640, 480), (8000, 100), (100, 8000), (16, 16)])
@pytest.mark.parametrize("tiles", [1, 2, 7, 60])
def test_a_contact_sheet_stays_of_a_sane_size(tiles: int, size: tuple[int, int]) -> None:
    sheet = ContactSheet(tiles, *size)

    assert sheet.width <= SHEET_WIDTH
    assert sheet.height <= 2600
    assert sheet.columns * sheet.rows >= tiles


def test_time_codes() -> None:
    assert [time_code(s) for s in (0, 1.92, 59.9999, 3599.5, 3600)] == [
        "00:00.000",
        "00:01.920",
        "01:00.000",
        "59:59.500",
        "1:00:00.000",
    ]


# Facts


def test_streams_are_described(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([50]), sound_s=2.5)

    result = analyze(path)

    assert result["container"]["format"] == "mov,mp4,m4a,3gp,3g2,mj2"
    assert result["container"]["size_bytes"] == path.stat().st_size
    video, sound = result["streams"]
    assert (video["kind"], video["codec"], video["fps"], video["pixel_format"]) == ("video", "h264", 25, "yuv420p")
    assert (sound["kind"], sound["codec"], sound["channels"], sound["sample_rate"]) == ("audio", "aac", 2, 48_000)
    assert result["partial"] is False  # the sound goes on for longer than the pictures


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([25, 25]), cover=True)

    result = analyze(path)

    assert [s["attached_picture"] for s in result["streams"]] == [False, True]
    assert result["video"]["frames"] == 50


def test_a_second_run_into_the_same_folder_gives_the_same(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([20, 20]))

    assert analyze(path) == analyze(path)


@pytest.mark.parametrize("name", ["http:a.mp4", "concat:a|b.mp4", "a%03d.mp4", "ä ö\u00a0?#.mp4"])
def test_a_name_is_only_a_name(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    write_film(tmp_path / "made.mp4", film([10])).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)

    assert analyze(Path(name))["video"]["frames"] == 10


@pytest.mark.parametrize(("name", "codec"), [("film.gif", "gif"), ("film.webm", "libvpx-vp9"), ("film.avi", "mpeg4")])
def test_other_containers(tmp_path: Path, name: str, codec: str) -> None:
    pixel_format = "rgb8" if codec == "gif" else "yuv420p"
    path = write_film(tmp_path / name, film([15, 15]), codec=codec, pixel_format=pixel_format)

    result = analyze(path)

    assert starts(result) == [0, 15]
    assert result["partial"] is False


# Progress


def test_progress_rises_through_the_stages_with_the_time_of_the_frames(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(analysis, "_REPORT_EVERY_S", 0.0)
    path = write_film(tmp_path / "film.mp4", film([50] * 4))
    told: list[tuple[float, str]] = []

    analyze(path, report=lambda fraction, stage: told.append((fraction, stage)))

    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert (told[0], told[-1]) == ((0.0, "probe"), (1.0, "pictures"))
    assert list(dict.fromkeys(stage for _, stage in told)) == ["probe", "shots", "pictures"]
    in_shots = [fraction for fraction, stage in told if stage == "shots"]
    assert len(in_shots) > 150
    for number, fraction in enumerate(in_shots):
        # A decoder with threads runs behind by some frames.
        assert abs(fraction - number / len(in_shots)) < 0.08


def test_progress_without_a_duration_goes_by_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(analysis, "_REPORT_EVERY_S", 0.0)
    path = write_film(tmp_path / "film.h264", film([50] * 4), format="h264")
    told: list[float] = []

    analyze(path, report=lambda fraction, stage: told.append(fraction))

    assert len([f for f in told if 0.2 < f < 0.8]) > 20


def test_progress_never_goes_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(analysis, "_REPORT_EVERY_S", 0.0)
    told: list[float] = []
    progress = analysis.Progress(lambda fraction, stage: told.append(fraction))

    for fraction in (0.2, 0.5, 0.3, 1.7, 0.9):
        progress.tick(fraction)

    assert told == [0.2, 0.5, 0.5, 1.0, 1.0]


def test_progress_is_told_often_enough_and_not_too_often(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_film(tmp_path / "film.mp4", film([25] * 4))
    look = shots.Observer.look
    monkeypatch.setattr(shots.Observer, "look", lambda *a: (time.sleep(0.012), look(*a))[1])
    told: list[float] = []

    analyze(path, report=lambda fraction, stage: told.append(time.monotonic()) if stage == "shots" else None)

    gaps = np.diff(told)
    assert len(told) >= 8
    assert gaps.min() > 0.095
    assert np.median(gaps) < 0.2


# Not a video


def a_picture(path: Path) -> Path:
    cv2.imwrite(str(path), scene(1))
    return path


NOT_VIDEOS: dict[str, tuple[Any, str]] = {
    "text.mp4": (lambda p: p.write_text("Dear sir,\nthis is a letter.\n" * 200), "text file"),
    "short.mp4": (lambda p: p.write_text("hello"), "text file"),
    "latin.mp4": (lambda p: p.write_bytes("ab\u2026".encode() * 3000), "text file"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "an empty file"),
    "page.mp4": (lambda p: p.write_text("<!doctype html><title>404</title>"), "web page"),
    "paper.mp4": (lambda p: p.write_bytes(b"%PDF-1.7\n%\xe2\xe3" + b"\0" * 900), "PDF"),
    "random.mp4": (lambda p: p.write_bytes(np.random.default_rng(5).bytes(60_000)), "no known kind"),
    "one.png": (a_picture, "PNG picture"),
    "one.jpg": (a_picture, "JPEG picture"),
    "one.bmp": (a_picture, "BMP picture"),
    "one.webp": (a_picture, "WebP picture"),
    "one.mp4": (lambda p: a_picture(p.with_suffix(".jpg")).rename(p), "JPEG picture"),
    "one.gif": (lambda p: write_film(p, film([1]), codec="gif", pixel_format="rgb8"), "GIF of one picture"),
    "subtitles.mp4": (lambda p: p.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n"), "text file"),
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
def test_what_is_no_video_is_refused_and_named(tmp_path: Path, name: str) -> None:
    make, what = NOT_VIDEOS[name]
    make(tmp_path / name)

    error = refused(tmp_path / name)

    assert error.code == "not_a_video"
    assert what in str(error)


@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".ffconcat"])
@pytest.mark.parametrize("kind", ["hls", "ffconcat"])
def test_a_list_that_names_another_file_opens_nothing(tmp_path: Path, kind: str, suffix: str) -> None:
    other = write_film(tmp_path / "other.ts", film([30]))
    path = tmp_path / f"list{suffix}"
    if kind == "hls":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n")
    else:
        path.write_text(f"ffconcat version 1.0\nfile {other}\n")
    options = {"safe": "0"} if kind == "ffconcat" else {}
    if (kind, suffix) in (("hls", ".m3u8"), ("ffconcat", ".ffconcat")):  # the lists are good ones
        with av.open(str(path), options=options) as container:
            assert len(list(container.decode(video=0))) == 30

    assert refused(path).code == "not_a_video"


def test_ffmpeg_may_use_no_protocol_but_that_of_files(tmp_path: Path, monkeypatch: Any) -> None:
    # The second fence: no format that is let in opens other files or addresses, so that nothing of it can be seen.
    options: dict[str, str] = {}
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: (options.update(k["options"]), av_open(*a, **k))[1])
    path = tmp_path / "film.mp4"
    path.write_text("text")

    refused(path)

    assert options["protocol_whitelist"] == "file"


def test_a_list_that_names_an_address_calls_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for name, text in (
            ("a.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n"),
            ("b.ffconcat", f"ffconcat version 1.0\nfile {url}\n"),
            ("c.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"),
        ):
            (tmp_path / name).write_text(text)
            assert refused(tmp_path / name).code == "not_a_video"
        with pytest.raises(FileNotFoundError):
            analysis.analyze(url, str(tmp_path), report=lambda fraction, stage: None)

        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("name", ["sound.m4a", "sound.mp4", "sound.mka", "cover.m4a"])
def test_sound_alone_has_no_video_stream(tmp_path: Path, name: str) -> None:
    clips.write_sound(tmp_path / name, cover=name == "cover.m4a")

    error = refused(tmp_path / name)

    assert error.code == "no_video_stream"
    assert "audio" in str(error)
    assert ("cover art" in str(error)) == (name == "cover.m4a")


def test_an_unknown_codec_is_said_to_be_one(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([10]))
    data = path.read_bytes()
    at = data.index(b"avc1", data.index(b"stsd"))
    path.write_bytes(data[:at] + b"zzzz" + data[at + 4 :])

    assert refused(path).code == "unsupported_codec"


# Too much


CLAIMS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "film.mp4": ({}, clips.claim_in_mp4, 65_535),
    "h264.mkv": ({}, clips.claim_in_matroska, 100_000),
    "ffv1.mkv": ({"codec": "ffv1"}, clips.claim_in_matroska, 100_000),
    "mjpeg.mkv": ({"codec": "mjpeg", "pixel_format": "yuvj420p"}, clips.claim_in_matroska, 100_000),
    "mpeg4.avi": ({"codec": "mpeg4"}, clips.claim_in_avi, 100_000),
    "film.gif": ({"codec": "gif", "pixel_format": "rgb8"}, clips.claim_in_gif, 65_535),
    "film.h264": ({"format": "h264"}, clips.claim_in_h264, 100_000),
    "film.y4m": ({"format": "h264"}, clips.claim_in_yuv4mpeg, 100_000),
}


@pytest.mark.parametrize("side", ["absurd", 8000], ids=str)
@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_of_too_many_pixels_is_refused_unread(
    tmp_path: Path, monkeypatch: Any, name: str, side: int | str
) -> None:
    options, claim, absurd = CLAIMS[name]
    path = write_film(tmp_path / name, film([10]), **options)
    width = absurd if side == "absurd" else int(side)
    claim(path, width, width)
    monkeypatch.setattr(Reading, "pictures", lambda *_: pytest.fail("it began to decode"))

    refused(path)
    error = refused(path)  # FFmpeg's log is where some of it is found, and it tells nothing twice unless asked to

    assert error.code == "too_many_pixels"
    if name != "film.h264":  # whose sizes come in blocks of 16
        assert f"{width} × {width}" in str(error)


def test_the_limit_of_pixels_is_exact(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([5]))

    assert analyze(path, max_pixels=320 * 192)["video"]["frames"] == 5  # H.264 stores whole blocks of 16
    (tmp_path / "out" / "contact-sheet.png").unlink()
    assert refused(path, max_pixels=320 * 180 - 1).code == "too_many_pixels"


def test_a_film_that_grows_on_the_way_is_not_decoded_beyond_the_limit(tmp_path: Path) -> None:
    small = write_film(tmp_path / "small.h264", film([20]), format="h264")
    large = write_film(tmp_path / "large.h264", [scene(1, 1280, 720)] * 20, format="h264")
    path = tmp_path / "film.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())

    with_limit = analyze(path, max_pixels=640 * 360)

    assert with_limit["partial"] is True
    assert with_limit["video"]["frames"] <= 20
    assert analyze(path)["video"]["frames"] == 40


def test_too_long_by_the_header_is_refused_unread(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_film(tmp_path / "film.mp4", film([50]))
    monkeypatch.setattr(Reading, "pictures", lambda *_: pytest.fail("it began to decode"))

    error = refused(path, max_duration_s=1.9)

    assert error.code == "too_long"
    assert "2.00 s" in str(error)


def test_too_long_without_a_header_is_found_on_the_way(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.h264", film([50]), format="h264")

    assert refused(path, max_duration_s=1.0).code == "too_long"


# Cut short and damaged


CONTAINERS: dict[str, dict[str, Any]] = {
    "faststart.mp4": {"options": {"movflags": "faststart"}},
    "fragments.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "film.mkv": {},
    "film.flv": {},
    "film.ts": {},
    "film.avi": {"codec": "mpeg4"},
    "film.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "film.h264": {"format": "h264"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_cut_short_gives_what_is_left(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, film([25] * 4), **CONTAINERS[name])
    whole = analyze(path)

    part = analyze(clips.cut_short(path, 0.6))

    assert (whole["partial"], whole["warnings"]) == (False, [])
    assert part["partial"] is True
    assert 30 <= part["video"]["frames"] < 90
    assert starts(part)[:2] == [0, 25]
    assert len(part["warnings"]) == 1
    assert f"the file ends early: read up to {part['video']['duration_s']:.2f} s" in part["warnings"][0]


def test_an_mp4_cut_before_its_index_says_so(tmp_path: Path) -> None:
    path = clips.cut_short(write_film(tmp_path / "film.mp4", film([50])), 0.6)

    error = refused(path)

    assert error.code == "no_frames"
    assert "cut short" in str(error)


def test_a_file_with_a_hole_is_partial(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([50] * 3), sound_s=1)

    result = analyze(clips.damage(path, 0.4, 3000))

    assert result["partial"] is True
    assert "damaged place" in result["warnings"][0]
    assert result["video"]["duration_s"] == pytest.approx(6, abs=0.5)


def test_a_video_stream_of_rubbish_has_no_frames(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", film([30]), options={"movflags": "faststart"})
    data = path.read_bytes()
    at = data.index(b"mdat") + 4
    path.write_bytes(data[:at] + b"\xff" * (len(data) - at))

    assert refused(path).code == "no_frames"


@pytest.mark.parametrize("name", ["film.ts", "film.h264"])
def test_a_recording_that_starts_in_the_middle_is_whole(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, film([60] * 2), **CONTAINERS[name])
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 5 :])

    result = analyze(path)

    assert result["partial"] is False, result["warnings"]
    assert 60 < result["video"]["frames"] < 110


def test_a_last_picture_that_stands_for_long_is_no_missing_end(tmp_path: Path) -> None:
    times = [*range(0, 2000, 40), 2500, 5000, 9000]
    path = write_film(tmp_path / "film.mkv", film([53]), times_ms=times)

    assert analyze(clips.state_duration_in_matroska(path, 14))["partial"] is False
    assert analyze(clips.state_duration_in_matroska(path, 20))["partial"] is True


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4", "film.flv"])
def test_sound_that_outlasts_the_pictures_is_no_missing_end(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, film([50]), sound_s=5)

    assert analyze(path)["partial"] is False


def test_sound_that_is_whole_does_not_hide_pictures_that_are_missing() -> None:
    container: Any = SimpleNamespace(start_time=0, format=SimpleNamespace(name="mov"))
    stream: Any = SimpleNamespace(index=0, duration=100, time_base=Fraction(1, RATE))
    reading = Reading(container, stream, max_pixels=1, frames=50, end_s=2.0)
    reading._packets_end = {0: (50, Fraction(1, RATE)), 1: (4, Fraction(1))}

    assert reading.warnings(4.0) == ["the file ends early: read up to 2.00 s of 4.00 s"]
    stream.duration = None  # then the container's own is all there is, and the sound reaches it
    assert reading.warnings(4.0) == []


def test_an_error_of_the_container_ends_the_film_there(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_film(tmp_path / "film.mkv", film([25] * 4))

    class Breaking:
        def __init__(self, container: Any) -> None:
            self._container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def demux(self) -> Any:
            for number, packet in enumerate(self._container.demux()):
                if number == 60:
                    raise av.error.OSError(5, "Input/output error")
                yield packet

    reading = analysis.Reading
    monkeypatch.setattr(analysis, "Reading", lambda container, *a, **k: reading(Breaking(container), *a, **k))

    result = analyze(path)

    assert result["partial"] is True
    assert result["video"]["frames"] == 60
    assert result["warnings"] == ["the file cannot be read to its end (Input/output error): read up to 2.40 s"]


# Cost


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from actors.analyze_video.analysis import analyze\n"
        "analyze(sys.argv[1], sys.argv[2], report=lambda fraction, stage: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for seconds in (10, 60):
        pictures = [scene(n, 640, 360) for n in range(2)]
        path = write_film(tmp_path / f"{seconds}.mp4", (pictures[i // 50 % 2] for i in range(seconds * RATE)))
        arguments = [sys.executable, "-c", program, str(path), str(tmp_path / "out")]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True, env={**os.environ})
        peaks.append(int(done.stdout))

    assert peaks[1] < 1.2 * peaks[0]
