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
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from actors.analyze_video import checkpoint, probe
from actors.analyze_video.audio import Listener, Speech
from actors.analyze_video.frames import SmallPictures
from actors.analyze_video.pictures import ContactSheet, KeyframeMaker, Sprite, Thumbnails, time_code
from actors.analyze_video.reading import Reading
from actors.analyze_video.shots import (
    UNIFORM_CONTRAST,
    Observer,
    Shot,
    ShotFinder,
    originals,
    perceptual_hash,
)
from actors.analyze_video.stretches import Stretches
from actors.analyze_video.subtitles import Subtitles
from agentflow.errors import Permanent

# 8K (8192 × 4320). A decoder may hold some twenty frames of one and a half bytes per pixel.
MAX_PIXELS = 8192 * 4320
MAX_DURATION_S = 6 * 3600.0
# A picture is written for each: a film of two hours has some 1,500.
MAX_SHOTS = 5000

#: After a kill at most so many seconds of film are decoded a second time, where key pictures come every 10 s.
AGAIN_S = 30.0
# A state is written at a key picture if the next one might come too late for that; decoding waits for a state that is
# still on its way to storage when this much has been decoded since the last one that is there.
_SAVE_WITHIN_S = 24.0
_AHEAD_S = AGAIN_S - 1.0

# How much of the whole each stage takes. Pictures of shots are written on the way; the last stage is the sheet alone.
_SHOTS_FROM, _PICTURES_FROM = 0.01, 0.98
_REPORT_EVERY_S = 0.1

#: Told of new files, by their names in the folder; the last one is the state. It is to be removed once it is stored.
Note = Callable[[list[str]], None]


def analyze(
    source: str,
    out_dir: str,
    *,
    report: Callable[[float, str], None],
    max_pixels: int = MAX_PIXELS,
    max_duration_s: float = MAX_DURATION_S,
    max_shots: int = MAX_SHOTS,
    speech: bool = False,
    note: Note | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Analyses a local file in one pass; `ops/bench` and README say what it costs.

    Writes `contact-sheet.png`, `sprite.jpg`, `sprite.vtt`, `keyframes/shot-0001.jpg` …, `subtitles/track-02.vtt` … and,
    with `speech`, `speech/chunk-0001.flac` … into `out_dir`. The result's shape is `agentflow.analysis.Analysis`.

    Times are seconds from the first picture, frames are counted from 0, in the order shown; shots tile the video.
    `report(fraction, stage)` is called with rising fractions of 0..1 and the stages probe, shots, pictures: at the
    opening of each, at the end, and between at most ten times a second.

    With `note`, the analysis writes down what it knows every 24 s of film at the latest (where key pictures allow it)
    as `state-000001.zip` …, and `resume` takes the path of the last one: the result is the same as without a break.

    Raises `Permanent` with the code `not_a_video`, `no_video_stream`, `unsupported_codec`, `too_many_pixels`,
    `too_many_streams`, `too_long` or `no_frames`. A damaged or truncated file is no error: `partial` is true, and
    `warnings` say what is missing.
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
        one_pass = Pass(
            container,
            stream,
            probe.pick_audio_stream(container),
            Path(out_dir),
            declared_s=declared_s,
            max_pixels=max_pixels,
            max_duration_s=max_duration_s,
            max_shots=max_shots,
            speech=speech,
        )
        if note is not None:
            identity = checkpoint.identity(Path(source), max_shots=max_shots, speech=speech)
            one_pass.save_to(note, identity)
            if resume is not None and (state := checkpoint.load(Path(resume), identity)) is not None:
                one_pass.restore(state)
        one_pass.run(progress)
        reading = one_pass.reading
        if not one_pass.found:
            raise reading.nothing_read()
        if container.format.name == "gif" and reading.frames == 1:
            raise Permanent("this is not a video: found a GIF of one picture", code="not_a_video")
        result["video"] = reading.facts()
        for facts in result["streams"]:
            if facts["index"] == stream.index:
                facts |= {"rotation": reading.upright.rotation, "mirrored": reading.upright.mirrored}
        warnings = reading.warnings(declared_s if is_stated else None)
        result["partial"] = bool(warnings)
        result |= one_pass.facts()
        result["warnings"] = warnings + one_pass.remarks()
    progress.enter("pictures", _PICTURES_FROM)
    result["contact_sheet"] = one_pass.draw_sheet(result["video"], progress)
    progress.finish()
    return result


class Pass:
    """Everything that is learnt while the packets go by once."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        audio: AudioStream | None,
        out_dir: Path,
        *,
        declared_s: float | None,
        max_pixels: int,
        max_duration_s: float,
        max_shots: int,
        speech: bool,
    ) -> None:
        self.reading = Reading(container, stream, max_pixels=max_pixels)
        self.found: list[dict[str, Any]] = []
        self._out_dir = out_dir
        self._declared_s, self._max_duration_s, self._max_shots = declared_s, max_duration_s, max_shots
        self._audio = audio
        self._listener = Listener(Speech(out_dir / "speech") if speech and audio is not None else None)
        self._subtitles = Subtitles(container)
        self._observer = Observer()
        self._stretches = Stretches()
        self._thumbnails = Thumbnails()
        self._hashes: list[int | None] = []
        self._small_pictures: SmallPictures | None = None
        self._finder: ShotFinder | None = None
        self._sprite: Sprite | None = None
        self._note: Note | None = None
        self._identity: dict[str, Any] = {}
        self._state_number = 0
        self._saved_s = 0.0  # film time of the last state
        self._stored_s = 0.0  # … of the last one that is in storage
        self._on_its_way: Path | None = None
        self._longest_gap_s = 0.0  # between key pictures
        self._last_key_s = 0.0
        self._told_files: set[str] = set()
        (out_dir / "keyframes").mkdir(parents=True, exist_ok=True)
        if audio is not None:
            self.reading.audio, self.reading.hear = audio, self._listener.add
        self.reading.subtitles = self._subtitles.add

    def run(self, progress: Progress) -> None:
        """Reads the file to its end."""
        reading = self.reading
        for frame in reading.pictures(lambda: progress.tick(self._share())):
            if self._finder is None:
                self._begin(frame.width, frame.height)
            self._look(frame)
        if self._finder is not None:
            for shot in self._finder.finish(frames=reading.frames, end_s=reading.end_s):
                self._keep(shot)

    def _begin(self, width: int, height: int) -> None:
        maker = KeyframeMaker(self.reading.upright)
        self._small_pictures = SmallPictures(width, height)
        self._sprite = Sprite(maker, self._declared_s)
        rate = float(self.reading.stream.average_rate or 25)
        self._finder = ShotFinder(
            rate=rate, frame_bytes=width * height * 3 // 2, maker=maker, max_shots=self._max_shots
        )
        self._first_size = (width, height)

    def _look(self, frame: VideoFrame) -> None:
        reading = self.reading
        assert self._small_pictures and self._finder and self._sprite  # noqa: S101 - made for the first frame
        if reading.time_s > self._max_duration_s:
            _refuse_duration(reading.time_s, self._max_duration_s)
        small = self._small_pictures.of(frame)
        look = self._observer.look(small, reading.frames - 1, reading.time_s)
        self._stretches.add(look, small.y)
        self._sprite.add(frame, reading.time_s)
        for shot in self._finder.add(look, small, frame):
            self._keep(shot)
        self._wait_for_storage()

    def _share(self) -> float:
        reading = self.reading
        share = reading.end_s / self._declared_s if self._declared_s else reading.bytes_share
        return _SHOTS_FROM + min(1.0, share) * (_PICTURES_FROM - _SHOTS_FROM)

    def _keep(self, shot: Shot) -> None:
        best = shot.best
        assert best is not None and self._finder is not None  # noqa: S101 - a shot that ended has one
        made = best.made or self._finder.make(best)
        name = f"keyframes/shot-{shot.index + 1:04d}.jpg"
        (self._out_dir / name).write_bytes(made.data)
        self._thumbnails.add(shot.index, made, best.look.time_s)
        hashed = perceptual_hash(best.gray)
        is_plain = best.look.contrast < UNIFORM_CONTRAST
        self._hashes.append(None if is_plain else hashed)
        transition = shot.transition
        self.found.append(
            {
                "index": shot.index,
                "start_frame": shot.start_frame,
                "end_frame": shot.end_frame,
                "start_s": round(shot.start_s, 6),
                "end_s": round(shot.end_s, 6),
                "duration_s": round(shot.end_s - shot.start_s, 6),
                "transition": transition
                and {key: round(v, 6) if isinstance(v, float) else v for key, v in transition.items()},
                "brightness": round(min(1.0, max(0.0, (shot.brightness - 16) / 219)), 4),
                "motion": round(shot.motion / 255, 5),
                "duplicate_of": None,
                "keyframe": {
                    "frame": best.look.number,
                    "time_s": round(best.look.time_s, 6),
                    "file": name,
                    "width": made.width,
                    "height": made.height,
                    "sharpness": round(best.look.sharpness, 2),
                    "luma": round(best.look.luma, 2),
                    "phash": f"{hashed:016x}",
                },
            }
        )

    # ---- the end ----

    def facts(self) -> dict[str, Any]:
        reading = self.reading
        assert self._sprite is not None  # noqa: S101 - made for the first frame
        for shot, original in zip(self.found, originals(self._hashes), strict=True):
            shot["duplicate_of"] = original
        heard = self._listener.finish(reading.first_s) if self._audio is not None else None
        spoken = self._listener.speech
        return {
            "shots": self.found,
            **self._stretches.facts(reading.end_s),
            "audio": heard and {"stream": self._audio.index if self._audio else None, **heard},
            "speech": spoken.facts(reading.first_s) if spoken is not None else None,
            "subtitles": self._subtitles.write(self._out_dir, reading.first_s),
            "sprite": self._sprite.write(self._out_dir, reading.end_s),
        }

    def remarks(self) -> list[str]:
        """What is worth knowing and takes nothing from the result."""
        remarks = self._subtitles.warnings
        if self._finder is not None and self._finder.cuts_dropped:
            remarks.append(
                f"more than {self._max_shots} shots: the last one holds {self._finder.cuts_dropped} further cuts"
            )
        if self.reading.audio_damage:
            places = "1 place" if self.reading.audio_damage == 1 else f"{self.reading.audio_damage} places"
            remarks.append(f"the sound cannot be decoded in {places}")
        return remarks

    def draw_sheet(self, video: dict[str, Any], progress: Progress) -> dict[str, Any]:
        shown = self._thumbnails.shown()
        sheet = ContactSheet(len(shown), video["width"], video["height"])
        for i, (index, thumbnail, time_s) in enumerate(shown):
            sheet.add(thumbnail, time_code(time_s), f"shot {index + 1}")
            progress.tick(_PICTURES_FROM + (1 - _PICTURES_FROM) * i / len(shown))
        sheet.write(self._out_dir / "contact-sheet.png")
        facts = {"file": "contact-sheet.png", "width": sheet.width, "height": sheet.height}
        return facts | {"columns": sheet.columns, "rows": sheet.rows}

    # ---- to be taken up again ----

    def save_to(self, note: Note, identity: dict[str, Any]) -> None:
        self._note, self._identity = note, identity
        self.reading.at_key = self._at_key

    def restore(self, state: dict[str, Any]) -> None:
        """Before `run`."""
        self.reading.resume(state["place"], state["reading"])
        self._begin(*state["first_size"])
        assert self._finder and self._sprite  # noqa: S101 - made the line before
        self._finder.restore(state["finder"])
        self._sprite.restore(state["sprite"])
        self._observer.restore(state["observer"])
        self._stretches.restore(state["stretches"])
        self._thumbnails.restore(state["thumbnails"])
        self._subtitles.restore(state["subtitles"])
        if state["heard"] is not None:
            self._listener.restore(state["heard"])
        self.found = state["found"]
        self._hashes = state["hashes"]
        self._state_number = state["number"]
        self._told_files = set(state["told_files"])
        self._longest_gap_s, self._last_key_s = state["keys"]
        self._saved_s = self._stored_s = self.reading.end_s

    def _at_key(self, place: dict[str, Any]) -> None:
        now_s = self.reading.end_s
        self._longest_gap_s = max(self._longest_gap_s, min(now_s - self._last_key_s, 10.0))
        self._last_key_s = now_s
        if self._finder is None or now_s - self._saved_s + self._longest_gap_s < _SAVE_WITHIN_S:
            return
        self._confirm(wait=True)
        self._save(place)

    def _save(self, place: dict[str, Any]) -> None:
        assert self._note and self._finder and self._sprite  # noqa: S101 - by the callers
        self._state_number += 1
        new = [s["keyframe"]["file"] for s in self.found]
        if self._listener.speech is not None:
            new += self._listener.speech.files
        new = [name for name in new if name not in self._told_files]
        self._told_files.update(new)
        state = {
            "identity": self._identity,
            "number": self._state_number,
            "place": place,
            "reading": self.reading.state(),
            "first_size": list(self._first_size),
            "finder": self._finder.state(),
            "sprite": self._sprite.state(),
            "observer": self._observer.state(),
            "stretches": self._stretches.state(),
            "thumbnails": self._thumbnails.state(),
            "subtitles": self._subtitles.state(),
            "heard": self._listener.state() if self._listener.heard_to_s is not None else None,
            "found": self.found,
            "hashes": self._hashes,
            "told_files": sorted(self._told_files),
            "keys": [self._longest_gap_s, self._last_key_s],
        }
        path = self._out_dir / f"state-{self._state_number:06d}.zip"
        checkpoint.save(path, state)
        self._saved_s, self._on_its_way = self.reading.end_s, path
        self._note([*new, path.name])

    def _wait_for_storage(self) -> None:
        if self._on_its_way is not None:
            self._confirm(wait=self.reading.end_s - self._stored_s > _AHEAD_S)

    def _confirm(self, *, wait: bool) -> None:
        """Whoever was told of a state removes its file once it is stored."""
        while self._on_its_way is not None:
            if not self._on_its_way.exists():
                self._stored_s, self._on_its_way = self._saved_s, None
            elif wait:
                time.sleep(0.005)
            else:
                return


def _refuse_duration(seconds: float, max_duration_s: float) -> None:
    message = f"the video lasts {probe.time_words(seconds)}; at most {probe.time_words(max_duration_s)} are taken"
    raise Permanent(message, code="too_long")


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
