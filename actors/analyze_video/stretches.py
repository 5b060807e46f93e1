"""Stretches of a film in which nothing is to be seen, or nothing moves."""

from __future__ import annotations

from typing import Any, Final

import cv2

from actors.analyze_video.frames import Picture
from actors.analyze_video.shots import Look

MAX_STRETCHES: Final = 1000
# As FFmpeg's blackdetect: nearly all pixels below a tenth of the way from black to white.
BLACK_S: Final = 0.5
_BLACK_LUMA: Final = 16 + 0.1 * 219
_BLACK_SHARE: Final = 0.98
# As its freezedetect: a mean difference of -60 dB. From the frame that it froze at, so that slow drift is none.
FROZEN_S: Final = 2.0
_FROZEN_DIFFERENCE: Final = 0.3


class Stretches:
    """`facts` has the lists `black` and `frozen` of stretches of at least `BLACK_S` and `FROZEN_S`."""

    def __init__(self) -> None:
        self._black: list[tuple[float, float]] = []
        self._frozen: list[tuple[float, float]] = []
        self._black_since: float | None = None
        self._still_since = 0.0
        self._still: Picture | None = None

    def add(self, look: Look, gray: Picture) -> None:
        if _is_black(look, gray):
            if self._black_since is None:
                self._black_since = look.time_s
        else:
            self._end_black(look.time_s)
        if self._still is None or cv2.norm(gray, self._still, cv2.NORM_L1) > _FROZEN_DIFFERENCE * gray.size:
            self._end_frozen(look.time_s)
            self._still, self._still_since = gray, look.time_s

    def facts(self, end_s: float) -> dict[str, Any]:
        self._end_black(end_s)
        self._end_frozen(end_s)
        return {"black": _listed(self._black), "frozen": _listed(self._frozen)}

    def _end_black(self, at_s: float) -> None:
        if self._black_since is not None and at_s - self._black_since >= BLACK_S - 0.002:
            _append(self._black, self._black_since, at_s)
        self._black_since = None

    def _end_frozen(self, at_s: float) -> None:
        if self._still is not None and at_s - self._still_since >= FROZEN_S - 0.002:
            _append(self._frozen, self._still_since, at_s)

    def state(self) -> dict[str, Any]:
        return {
            "black": self._black,
            "frozen": self._frozen,
            "black_since": self._black_since,
            "still_since": self._still_since,
            "still": self._still,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._black = [(a, b) for a, b in state["black"]]
        self._frozen = [(a, b) for a, b in state["frozen"]]
        self._black_since, self._still_since = state["black_since"], state["still_since"]
        self._still = state["still"]


def _is_black(look: Look, gray: Picture) -> bool:
    if look.luma > _BLACK_LUMA + (1 - _BLACK_SHARE) * 255:
        return False
    light = cv2.countNonZero(cv2.threshold(gray, _BLACK_LUMA, 1, cv2.THRESH_BINARY)[1])
    return light <= (1 - _BLACK_SHARE) * gray.size


def _append(stretches: list[tuple[float, float]], start_s: float, end_s: float) -> None:
    if len(stretches) < MAX_STRETCHES:
        stretches.append((start_s, end_s))


def _listed(stretches: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"start_s": round(a, 6), "end_s": round(b, 6), "duration_s": round(b - a, 6)} for a, b in stretches]
