"""What is in a video: its streams, its shots and a picture of each, found in one pass that holds few frames at a time.

Runs in a child process that may be killed at any moment, and knows nothing of jobs: a file in, a folder of pictures
and a dict out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2

from actors.analyze_video import probe
from actors.analyze_video.pictures import ContactSheet, KeyframeWriter, sheet_tiles, time_code
from actors.analyze_video.reading import Reading
from actors.analyze_video.shots import Shot, ShotFinder, SmallPictures, judge
from agentflow.errors import Permanent

# 8K (8192 × 4320). A decoder may hold some twenty frames of one and a half bytes per pixel.
MAX_PIXELS = 8192 * 4320
MAX_DURATION_S = 6 * 3600.0
# A picture is written for each: a film of two hours has some 1,500.
MAX_SHOTS = 5000

# How much of the whole each stage takes. Pictures of shots are written on the way; the last stage is the sheet alone.
_SHOTS_FROM, _PICTURES_FROM = 0.01, 0.98
_REPORT_EVERY_S = 0.1


def analyze(
    source: str,
    out_dir: str,
    *,
    report: Callable[[float, str], None],
    max_pixels: int = MAX_PIXELS,
    max_duration_s: float = MAX_DURATION_S,
    max_shots: int = MAX_SHOTS,
) -> dict[str, Any]:
    """Analyses a local file; writes `contact-sheet.png` and `keyframes/shot-0001.jpg` … into `out_dir`.

    Times are seconds from the first picture, frames are counted from 0, in the order shown; shots tile the video.
    `report(fraction, stage)` is called with rising fractions of 0..1 and the stages probe, shots, pictures: at the
    opening of each, at the end, and between at most ten times a second.

    Raises `Permanent` with the code `not_a_video`, `no_video_stream`, `unsupported_codec`, `too_many_pixels`,
    `too_long` or `no_frames`. A damaged or truncated file is no error: `partial` is true, and `warnings` say what is
    missing.
    """
    cv2.setNumThreads(1)  # the pictures are small: threads would only wait for each other, and for the decoder's
    progress = Progress(report)
    progress.enter("probe", 0.0)
    with probe.open_media(source, max_pixels=max_pixels) as container:
        stream = probe.pick_video_stream(container, source)
        declared_s, is_stated = probe.declared_duration(container, stream)
        if declared_s and is_stated and declared_s > max_duration_s:
            _refuse_duration(declared_s, max_duration_s)
        result: dict[str, Any] = {
            "container": probe.container_facts(container),
            "streams": probe.stream_facts(container),
        }
        progress.enter("shots", _SHOTS_FROM)
        reading = Reading(container, stream, max_pixels=max_pixels)
        shots = ShotFinder(max_shots=max_shots)
        found = _find_shots(reading, shots, Path(out_dir), progress, declared_s, max_duration_s)
        if not found:
            raise reading.nothing_read()
        if container.format.name == "gif" and reading.frames == 1:
            raise Permanent("this is not a video: found a GIF of one picture", code="not_a_video")
        result["video"] = reading.facts()
        for facts in result["streams"]:
            if facts["index"] == stream.index:
                facts |= {"rotation": reading.upright.rotation, "mirrored": reading.upright.mirrored}
        result["shots"] = found
        warnings = reading.warnings(declared_s if is_stated else None)
        result["partial"] = bool(warnings)
        if shots.cuts_dropped:
            warnings.append(f"more than {max_shots} shots: the last one holds {shots.cuts_dropped} further cuts")
        result["warnings"] = warnings
    progress.enter("pictures", _PICTURES_FROM)
    result["contact_sheet"] = _draw_sheet(result, Path(out_dir), progress)
    progress.finish()
    return result


def _find_shots(
    reading: Reading,
    finder: ShotFinder,
    out_dir: Path,
    progress: Progress,
    declared_s: float | None,
    max_duration_s: float,
) -> list[dict[str, Any]]:
    """Reads the video to its end; the JSON of its shots."""
    found: list[dict[str, Any]] = []
    small_pictures: SmallPictures | None = None
    keyframes: KeyframeWriter | None = None
    for frame in reading.pictures(lambda: progress.tick(_share_read(reading, declared_s))):
        if small_pictures is None or keyframes is None:
            small_pictures = SmallPictures(frame.width, frame.height)
            keyframes = KeyframeWriter(out_dir / "keyframes", reading.upright)
        if reading.time_s > max_duration_s:
            _refuse_duration(reading.time_s, max_duration_s)
        small = small_pictures.of(frame)
        candidate = judge(frame, small, number=reading.frames - 1, time_s=reading.time_s)
        if ended := finder.add(candidate, small):
            found.append(_keep(ended, keyframes))
    if keyframes and (last := finder.finish(frames=reading.frames, end_s=reading.end_s)):
        found.append(_keep(last, keyframes))
    return found


def _refuse_duration(seconds: float, max_duration_s: float) -> None:
    message = f"the video lasts {probe.time_words(seconds)}; at most {probe.time_words(max_duration_s)} are taken"
    raise Permanent(message, code="too_long")


def _share_read(reading: Reading, declared_s: float | None) -> float:
    share = reading.end_s / declared_s if declared_s else reading.bytes_share
    return _SHOTS_FROM + min(1.0, share) * (_PICTURES_FROM - _SHOTS_FROM)


def _keep(shot: Shot, keyframes: KeyframeWriter) -> dict[str, Any]:
    best = shot.best
    picture = keyframes.write(best.frame, shot.index)
    return {
        "index": shot.index,
        "start_frame": shot.start_frame,
        "end_frame": shot.end_frame,
        "start_s": round(shot.start_s, 6),
        "end_s": round(shot.end_s, 6),
        "duration_s": round(shot.end_s - shot.start_s, 6),
        "keyframe": {
            "frame": best.number,
            "time_s": round(best.time_s, 6),
            **picture,
            "sharpness": round(best.sharpness, 2),
            "luma": round(best.luma, 2),
        },
    }


def _draw_sheet(result: dict[str, Any], out_dir: Path, progress: Progress) -> dict[str, Any]:
    shown = [result["shots"][i] for i in sheet_tiles(len(result["shots"]))]
    sheet = ContactSheet(len(shown), result["video"]["width"], result["video"]["height"])
    for i, shot in enumerate(shown):
        keyframe = shot["keyframe"]
        sheet.add(
            out_dir / keyframe["file"], keyframe["width"], time_code(keyframe["time_s"]), f"shot {shot['index'] + 1}"
        )
        progress.tick(_PICTURES_FROM + (1 - _PICTURES_FROM) * i / len(shown))
    sheet.write(out_dir / "contact-sheet.png")
    facts = {"file": "contact-sheet.png", "width": sheet.width, "height": sheet.height}
    return facts | {"columns": sheet.columns, "rows": sheet.rows}


class Progress:
    """Passes progress on: never backwards, at most ten times a second but for the opening of a stage and the end."""

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self._report = report
        self._fraction = 0.0
        self._stage = ""
        self._told_at = 0.0

    def enter(self, stage: str, fraction: float) -> None:
        self._stage = stage
        self._tell(fraction)

    def tick(self, fraction: float) -> None:
        if time.monotonic() - self._told_at >= _REPORT_EVERY_S:
            self._tell(fraction)

    def finish(self) -> None:
        self._tell(1.0)

    def _tell(self, fraction: float) -> None:
        self._fraction = min(1.0, max(self._fraction, fraction))
        self._told_at = time.monotonic()
        self._report(self._fraction, self._stage)
