"""Puts a film together from frames and transitions: shots, the best picture of each, how bright and how lively they are.

A transition is told some seconds after it was seen. Until then the best frame of each half second is held, so that each
shot finds one that lies within it; that is all that is held of full frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from av.video.frame import VideoFrame

from actors.analyze_video.frames import Picture, Small
from actors.analyze_video.pictures import Keyframe, KeyframeMaker
from actors.analyze_video.transitions import LAGS, Transition, TransitionFinder

# A "shot" below a fifth of a second is a flash, not a shot: fewer than 5 frames at 25 per second. In seconds, so that it
# means the same at 10 and at 120 frames.
MIN_SHOT_S: Final = 0.2
# Luma of 16 is black and 235 is white. Below this mean a picture counts as black: 5 % of the way, fades included.
BLACK_LUMA: Final = 28.0
# Below this standard deviation of luma there is nothing to see but one colour.
UNIFORM_CONTRAST: Final = 5.0
# One frame is held for each so many seconds; of frames larger than this many bytes, fewer.
_HELD_EVERY_S: Final = 0.5
_HELD_BYTES: Final = 3_200_000
_MOST_HELD: Final = 32


@dataclass(slots=True)
class Look:
    """What one frame is like: `luma`, `contrast` and `sharpness` of its small gray picture, `motion` since the last one.

    Luma is the mean (16 black, 235 white), contrast its standard deviation, sharpness the variance of the Laplacian,
    motion the mean difference to the frame before in gray levels.
    """

    number: int
    time_s: float
    luma: float
    contrast: float
    sharpness: float
    motion: float


@dataclass(slots=True)
class Candidate:
    """A frame that may become the keyframe: the frame itself, or already the picture that is made of it."""

    look: Look
    rank: tuple[int, float]
    frame: VideoFrame | None
    gray: Picture
    made: Keyframe | None = None


@dataclass(slots=True)
class Shot:
    """Frames `start_frame` to `end_frame` (exclusive), with the best of them, and how it began."""

    index: int
    start_frame: int
    start_s: float
    transition: dict[str, Any] | None
    end_frame: int = 0
    end_s: float = 0.0
    best: Candidate | None = None
    brightness: float = 0.0
    motion: float = 0.0


class Observer:
    """Looks at each small picture, once."""

    def __init__(self) -> None:
        self._last: Picture | None = None

    def look(self, small: Small, number: int, time_s: float) -> Look:
        mean, deviation = cv2.meanStdDev(small.y)
        edges = cv2.meanStdDev(cv2.Laplacian(small.y, cv2.CV_16S))[1]
        motion = 0.0 if self._last is None else cv2.norm(small.y, self._last, cv2.NORM_L1) / small.y.size
        self._last = small.y
        return Look(number, time_s, float(mean[0, 0]), float(deviation[0, 0]), float(edges[0, 0]) ** 2, motion)

    def state(self) -> dict[str, Any]:
        return {"last": self._last}

    def restore(self, state: dict[str, Any]) -> None:
        self._last = state["last"]


class ShotFinder:
    """Takes frames in order and gives each shot some seconds after it is over."""

    def __init__(self, *, rate: float, frame_bytes: int, maker: KeyframeMaker, max_shots: int) -> None:
        self._finder = TransitionFinder(rate=rate)
        # No transition is told that begins a shot further back than this many frames.
        self._horizon = self._finder.latency + (2 * LAGS[-1] + 16) * self._finder.stride
        self._held_every_s = _HELD_EVERY_S * max(1.0, frame_bytes / _HELD_BYTES)
        self._maker = maker
        self._max_shots = max_shots
        self._candidates: list[Candidate] = []
        self._opened_s = 0.0  # when the last candidate's stretch began
        self._shot = Shot(0, 0, 0.0, None)
        # Of late: number, time, and sums of luma and motion before this frame.
        self._past: deque[tuple[int, float, float, float]] = deque()
        self._sums = (0.0, 0.0)
        self._shot_sums = (0.0, 0.0)
        self.cuts_dropped = 0

    def add(self, look: Look, small: Small, frame: VideoFrame) -> list[Shot]:
        """The next frame; answers the shots that are known to be over by now."""
        self._past.append((look.number, look.time_s, *self._sums))
        self._sums = (self._sums[0] + look.luma, self._sums[1] + look.motion)
        if len(self._past) > self._horizon:
            self._past.popleft()
        transitions = self._finder.add(small, look.sharpness, look.contrast)
        ended = [shot for transition in transitions for shot in self._begin(transition)]
        self._hold(look, small, frame)
        return ended

    def finish(self, *, frames: int, end_s: float) -> list[Shot]:
        """The last shots. None only when there was no frame at all."""
        ended = [shot for transition in self._finder.finish() for shot in self._begin(transition)]
        if frames:
            self._close(frames, end_s, self._sums, margin=0)
            ended.append(self._shot)
        return ended

    def _hold(self, look: Look, small: Small, frame: VideoFrame) -> None:
        rank = _rank(look, is_corrupt=frame.is_corrupt)
        candidates = self._candidates
        begins = not candidates or look.time_s - self._opened_s >= self._held_every_s or self._finder.may_cut
        if begins:
            self._opened_s = look.time_s
            self._settle(look.number - self._horizon)
            candidates.append(Candidate(look, rank, frame, small.y))
            if len(candidates) > _MOST_HELD:
                del candidates[min(range(1, len(candidates) - 1), key=lambda i: candidates[i].rank)]
        elif rank > candidates[-1].rank:
            candidates[-1] = Candidate(look, rank, frame, small.y)

    def _settle(self, before: int) -> None:
        """Of the frames that lie in the open shot for certain, the best is enough."""
        old = [c for c in self._candidates if c.look.number < before]
        if len(old) > 1:
            best = max(old, key=lambda c: c.rank)
            self._candidates = [best] + [c for c in self._candidates if c.look.number >= before]

    def _begin(self, transition: Transition) -> list[Shot]:
        """A shot ends where this transition has its middle, unless it were too short or had no picture."""
        place = next((p for p in self._past if p[0] == transition.at), None)
        # The epsilon is for time stamps in whole milliseconds.
        if place is None or place[1] - self._shot.start_s < MIN_SHOT_S - 0.002:
            return []
        if not any(c.look.number < transition.at for c in self._candidates):
            return []
        if self._shot.index + 1 >= self._max_shots:
            self.cuts_dropped += 1
            return []
        number, time_s, *sums = place
        ended = self._shot
        self._close(number, time_s, (sums[0], sums[1]), margin=transition.at - transition.start)
        times = {p[0]: p[1] for p in self._past}
        facts = {
            "kind": transition.kind,
            "start_frame": transition.start,
            "end_frame": transition.end,
            "start_s": times.get(transition.start, time_s),
            "end_s": times.get(transition.end, time_s),
        }
        self._shot = Shot(ended.index + 1, number, time_s, facts)
        self._shot_sums = (sums[0], sums[1])
        self._candidates = [c for c in self._candidates if c.look.number >= number]
        return [ended]

    def _close(self, number: int, time_s: float, sums: tuple[float, float], *, margin: int) -> None:
        shot = self._shot
        shot.end_frame, shot.end_s = number, time_s
        own = [c for c in self._candidates if c.look.number < number]
        # Rather none in which the next shot, or the last one, is seen as well.
        begin = shot.transition["end_frame"] if shot.transition else 0
        clean = [c for c in own if begin <= c.look.number < number - margin]
        shot.best = max(clean or own, key=lambda c: c.rank)
        frames = max(1, number - shot.start_frame)
        shot.brightness = (sums[0] - self._shot_sums[0]) / frames
        shot.motion = (sums[1] - self._shot_sums[1]) / frames

    def make(self, candidate: Candidate) -> Keyframe:
        """The picture of a candidate, made once."""
        if candidate.made is None:
            assert candidate.frame is not None  # noqa: S101 - one of the two is there
            candidate.made, candidate.frame = self._maker.make(candidate.frame), None
        return candidate.made

    def state(self) -> dict[str, Any]:
        for candidate in self._candidates:
            self.make(candidate)
        shot = self._shot
        return {
            "finder": self._finder.state(),
            "candidates": [
                {
                    "look": _listed(c.look),
                    "rank": list(c.rank),
                    "gray": c.gray,
                    "made": [c.made.data, c.made.width, c.made.height] if c.made else [],
                }
                for c in self._candidates
            ],
            "opened_s": self._opened_s,
            "shot": [shot.index, shot.start_frame, shot.start_s, shot.transition],
            "past": [list(p) for p in self._past],
            "sums": list(self._sums),
            "shot_sums": list(self._shot_sums),
            "cuts_dropped": self.cuts_dropped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._finder.restore(state["finder"])
        self._candidates = [
            Candidate(Look(*c["look"]), (c["rank"][0], c["rank"][1]), None, c["gray"], Keyframe(*c["made"]))
            for c in state["candidates"]
        ]
        self._opened_s = state["opened_s"]
        self._shot = Shot(*state["shot"])
        self._past = deque((p[0], p[1], p[2], p[3]) for p in state["past"])
        self._sums = (state["sums"][0], state["sums"][1])
        self._shot_sums = (state["shot_sums"][0], state["shot_sums"][1])
        self.cuts_dropped = state["cuts_dropped"]


def _listed(look: Look) -> list[float]:
    return [look.number, look.time_s, look.luma, look.contrast, look.sharpness, look.motion]


def _rank(look: Look, *, is_corrupt: bool) -> tuple[int, float]:
    """First a clean, well lit, varied picture, then the sharpest."""
    if is_corrupt:
        worth = 0
    elif look.luma < BLACK_LUMA:
        worth = 1
    elif look.contrast < UNIFORM_CONTRAST:
        worth = 2
    else:
        worth = 3
    return worth, look.sharpness


# ---- alike ----

# Of 64 bits; two unrelated pictures differ in about 32.
_ALIKE_BITS: Final = 9


def perceptual_hash(gray: Picture) -> int:
    """64 bits of the coarse structure of a picture (pHash): the signs of its lowest frequencies about their median."""
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


def originals(hashes: list[int | None]) -> list[int | None]:
    """For each picture, the index of the first one that looks the same, or None. A hash of None is like no other."""
    found: list[int | None] = []
    firsts: list[tuple[int, int]] = []
    for index, value in enumerate(hashes):
        same = None
        if value is not None:
            same = next((n for n, other in firsts if (value ^ other).bit_count() <= _ALIKE_BITS), None)
            if same is None:
                firsts.append((index, value))
        found.append(same)
    return found
