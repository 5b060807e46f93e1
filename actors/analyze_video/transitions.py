"""Finds where one shot ends and the next begins: cuts, dissolves, and fades through one colour.

Each frame becomes a vector (`vectors.py`). All that follows is computed from the dot products of these vectors, of which
each new frame adds one row.

A cut is a step: the frames before it differ from those after it by more than frames at the same distance in time do
within either shot. The least of all such pairs counts, so that a flash makes no cut (the frames around it are alike),
nor does a pan (all its frames differ).

In a dissolve or a fade every frame is a mixture: whether a window of frames looks like that says `gradual.py`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from actors.analyze_video import gradual
from actors.analyze_video.frames import Small
from actors.analyze_video.vectors import SIZE, UNIT, Floats, thumb_of, vector_of

Kind = Literal["cut", "dissolve", "fade"]

#: Lengths of the windows, in samples.
LAGS: Final = (8, 12, 17, 24, 34, 48, 66)
#: Above 45 frames a second only every second one (third, …) is a sample: lengths in time are what matters.
_SAMPLES_PER_S: Final = 30.0
#: Windows begin at every second sample, and are judged in batches.
_STEP: Final = 2
_BATCH: Final = 8
# Look-back of the longest window with what is looked at before it, and some room.
_KEPT: Final = 66 + 33 + 33 + 48
_CAPACITY: Final = _KEPT + 80

# Cuts: up to so many samples before and after are compared; a flash may last as long.
_BEFORE: Final = 4
_AFTER: Final = 6
_CUT_NEEDS: Final = _AFTER - 1 + _BEFORE + _AFTER - 1
_CUT_LEAST: Final = 10.0
_CUT_THRESHOLD: Final = -0.1
#: A frame that differs so much from the one before, relative to what is in them, may begin a shot.
_STEP_SHARE: Final = 0.3

_GRADUAL_THRESHOLD: Final = 0.85
# Two windows that share more than this of the shorter one speak of the same transition.
_SAME: Final = 0.25
# A group of windows is complete when nothing new belongs to it for so many samples.
_QUIET: Final = 40

# Below this contrast (standard deviation of gray) a picture is of one colour.
_UNIFORM: Final = 4.0
_NEARLY_UNIFORM: Final = 6.5


@dataclass(frozen=True, slots=True)
class Transition:
    """The new shot begins at the frame `at`; from `start` to `end` (exclusive) both are seen, or neither."""

    kind: Kind
    at: int
    start: int
    end: int


@dataclass(slots=True)
class _Window:
    """A window that looks like a gradual transition; all in samples."""

    start: int
    end: int
    score: float
    middle: float
    mixed_from: float
    mixed_to: float


class TransitionFinder:
    """Takes frames in order; tells transitions in order, up to `latency` frames after they ended."""

    def __init__(self, *, rate: float) -> None:
        """`rate` is the usual number of frames a second."""
        self.stride = max(1, round(rate / _SAMPLES_PER_S))
        self.latency = (_QUIET + LAGS[-1] // 2 + _BATCH + _CUT_NEEDS + 2) * self.stride
        self._least_shot = 5  # samples
        self._frames = 0
        self._samples = 0  # in all
        self._first = 0  # the sample at index 0 of the arrays
        self._thumbs = np.zeros((_CAPACITY, SIZE), np.uint8)
        self._vectors = np.zeros((_CAPACITY, SIZE))
        self._products = np.zeros((_CAPACITY, _CAPACITY))
        self._facts = np.zeros((_CAPACITY, 2))  # sharpness and contrast of each
        self._skipped: dict[int, list[NDArray[np.uint8]]] = {}  # by the sample that follows them
        self._windows: list[_Window] = []
        self._cuts: list[int] = []  # samples
        self._judged_cuts = 1
        self._judged_windows = 0
        self._told: list[_Window] = []  # of late
        self._cuts_told_to = 0
        self._told_to = 0  # sample of the last transition told
        self.may_cut = False  # the last frame may begin a shot

    def add(self, small: Small, sharpness: float, contrast: float) -> list[Transition]:
        """The next frame: its small picture, the variance of its Laplacian, the standard deviation of its gray."""
        number = self._frames
        self._frames += 1
        thumb = thumb_of(small)
        if number % self.stride:
            self._skipped.setdefault(self._samples, []).append(thumb)
            self.may_cut = False
            return []
        if self._samples - self._first == _CAPACITY:
            self._forget()
        index = self._samples - self._first
        self._thumbs[index] = thumb
        self._facts[index] = sharpness, contrast
        self._multiply(index)
        self._samples += 1
        self.may_cut = index > 0 and self._is_step(index)
        return self._judge(final=False)

    def finish(self) -> list[Transition]:
        """After the last frame: what is still to tell."""
        return self._judge(final=True)

    def state(self) -> dict[str, Any]:
        kept = self._samples - self._first
        return {
            "frames": self._frames,
            "samples": self._samples,
            "first": self._first,
            "thumbs": self._thumbs[:kept].copy(),
            "facts": self._facts[:kept].copy(),
            "skipped": [[sample, np.stack(thumbs)] for sample, thumbs in self._skipped.items()],
            "windows": [list(astuple(w)) for w in self._windows],
            "told": [list(astuple(w)) for w in self._told],
            "cuts": list(self._cuts),
            "judged_cuts": self._judged_cuts,
            "judged_windows": self._judged_windows,
            "cuts_told_to": self._cuts_told_to,
            "told_to": self._told_to,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._frames, self._samples, self._first = state["frames"], state["samples"], state["first"]
        kept = self._samples - self._first
        self._facts[:kept] = state["facts"]
        for index in range(kept):
            self._thumbs[index] = state["thumbs"][index]
            self._multiply(index)
        self._skipped = {sample: list(thumbs) for sample, thumbs in state["skipped"]}
        self._windows = [_Window(*values) for values in state["windows"]]
        self._told = [_Window(*values) for values in state["told"]]
        self._cuts = list(state["cuts"])
        self._judged_cuts, self._judged_windows = state["judged_cuts"], state["judged_windows"]
        self._cuts_told_to, self._told_to = state["cuts_told_to"], state["told_to"]

    def _multiply(self, index: int) -> None:
        # Whole numbers in doubles: sums are exact, and so the same in whatever order they are made.
        vector = vector_of(self._thumbs[index])
        self._vectors[index] = vector
        # No two samples further apart than the longest window are ever compared.
        first = max(0, index - LAGS[-1] - 1)
        row = self._vectors[first : index + 1] @ vector
        self._products[index, first : index + 1] = row
        self._products[first : index + 1, index] = row

    def _forget(self) -> None:
        dropped = _CAPACITY - _KEPT
        for array in (self._thumbs, self._vectors, self._facts):
            array[:_KEPT] = array[dropped:].copy()
        self._products[:_KEPT, :_KEPT] = self._products[dropped:, dropped:].copy()
        self._first += dropped
        for sample in [s for s in self._skipped if s < self._first]:
            del self._skipped[sample]

    def _is_step(self, index: int) -> bool:
        products = self._products
        one, other = products[index - 1, index - 1], products[index, index]
        gap = one + other - 2 * products[index - 1, index]
        return bool(gap > _STEP_SHARE**2 * max(one, other, 1.0) and gap * UNIT > (_CUT_LEAST / 2) ** 2)

    # ---- judging ----

    def _judge(self, *, final: bool) -> list[Transition]:
        known = self._samples
        while self._judged_cuts < (known if final else known - _CUT_NEEDS):
            if self._is_cut(self._judged_cuts):
                self._cuts.append(self._judged_cuts)
            self._judged_cuts += 1
        end = known if final else known // _BATCH * _BATCH
        if final or (end > self._judged_windows and end == known):
            self._look_at_windows(self._judged_windows, end, final=final)
            self._judged_windows = end
            return self._tell(final=final)
        return []

    def _distances(self, ones: NDArray[np.int64], others: NDArray[np.int64]) -> Floats:
        """Root mean square differences of samples (by index), in gray levels."""
        products = self._products
        square = products[ones, ones] + products[others, others] - 2 * products[ones, others]
        result: Floats = np.sqrt(np.maximum(square, 0) * UNIT)
        return result

    def _is_cut(self, sample: int) -> bool:
        last = self._samples - self._first - 1
        at = sample - self._first
        if at < 1 or not self._is_step(at):
            return False
        around = np.arange(max(1, at - 3), min(last, at + 3) + 1)
        steps = self._distances(around - 1, around)
        if steps[at - around[0]] < np.max(steps):
            return False
        before = np.arange(max(0, at - _BEFORE), at)
        after = np.arange(at, min(last, at + _AFTER - 1) + 1)
        ones, others = (grid.ravel() for grid in np.meshgrid(before, after, indexing="ij"))
        across = self._distances(ones, others)
        lags = others - ones
        # Within the shots at the same distance in time, where there are frames of them to tell: a cut before bounds the
        # one, a step after it that comes too late for a flash the other.
        begin = max([0, *(cut - self._first for cut in self._cuts if cut < sample)])
        reach = range(at + _AFTER - 1, min(last, at + 2 * (_BEFORE + _AFTER)) + 1)
        end = next((i - 1 for i in reach if self._is_step(i)), last)
        earlier, later = ones - lags, others + lags
        has_earlier, has_later = earlier >= begin, later <= end
        inside = self._distances(np.maximum(earlier, 0), ones) * has_earlier
        inside += self._distances(others, np.minimum(later, last)) * has_later
        inside /= np.maximum(1, has_earlier.astype(int) + has_later)
        ratio = float(np.min(across / (inside + 0.15)))
        near = np.arange(max(0, at - 6), min(last + 1, at + 6))
        scale = float(np.median(np.sqrt(self._products[near, near] * UNIT)))
        least = float(np.min(across))
        score = 2.0 * np.log(max(ratio, 1e-3)) + 2.2 * (least / (scale + 3.0) - 1.0)
        return bool(least > _CUT_LEAST and score > _CUT_THRESHOLD)

    def _look_at_windows(self, known: int, end: int, *, final: bool) -> None:
        """All windows that can be judged with `end` samples and could not with `known`."""
        for lag in LAGS:
            margin = max(4, lag // 2)
            first = max(self._first, (known - lag - margin + _STEP - 1) // _STEP * _STEP)
            stop = end - (lag if final else lag + margin)
            starts = np.arange(max(0, first), stop, _STEP, dtype=np.int64)
            if len(starts):
                self._look(starts, lag)

    def _look(self, starts: NDArray[np.int64], lag: int) -> None:
        last = self._samples - self._first - 1
        seen = gradual.features(self._products, self._facts[:, 0], starts - self._first, lag, last)
        if seen is None:
            return
        found, alpha, which = seen
        scores = gradual.judge(found)
        for row in np.flatnonzero(scores > _GRADUAL_THRESHOLD):
            start = int(starts[which[row]])
            rising = np.maximum.accumulate(alpha[row])
            shares = [start + float((rising < share).sum()) for share in (0.5, 0.1, 0.9)]
            window = _Window(start, start + lag, float(scores[row]), shares[0] - 0.5, *shares[1:])
            if not any(_is_same(window, other) for other in self._told):
                self._windows.append(window)

    # ---- telling ----

    def _tell(self, *, final: bool) -> list[Transition]:
        """Chooses among the windows and cuts of which everything is known: the likeliest of those that overlap."""
        # Nothing that comes later belongs to what ends before here.
        settled = self._samples if final else self._samples - _QUIET - LAGS[-1] // 2 - _BATCH
        self._windows.sort(key=lambda w: (-w.score, w.start, w.end))
        groups: list[list[_Window]] = []
        for window in self._windows:
            same = next((group for group in groups if _is_same(window, group[0])), None)
            if same is None:
                groups.append([window])
            else:
                same.append(window)
        chosen = [_joined(group) for group in groups]
        found: list[tuple[int, Transition]] = []
        for window in sorted(chosen, key=lambda w: w.start):
            if any(_is_same(window, other) for other in self._told):
                continue  # the other half of a fade
            if window.end > settled:
                settled = min(settled, window.start)
                break
            if not any(window.start - 1 <= cut <= window.end + 1 for cut in self._cuts):
                transition = self._gradual(window)
                found.append((transition.at // self.stride, transition))
                window.start = min(window.start, transition.start // self.stride)
                window.end = max(window.end, transition.end // self.stride)
            self._told.append(window)
        found += [(cut, self._cut(cut)) for cut in self._cuts if self._cuts_told_to < cut <= settled]
        found.sort(key=lambda pair: (pair[0], pair[1].kind))
        transitions = []
        for sample, transition in found:
            if sample - self._told_to >= self._least_shot:
                self._told_to = sample
                transitions.append(transition)
        # A long window that is judged late must not tell the same once more; a cut rules out windows for a while.
        self._told = [w for w in self._told if w.end > self._samples - _KEPT]
        self._windows = [
            w for w in self._windows if w.end > settled and not any(_is_same(w, other) for other in self._told)
        ]
        self._cuts = [c for c in self._cuts if c > self._samples - _KEPT]
        self._cuts_told_to = settled
        return transitions

    def _cut(self, sample: int) -> Transition:
        frame = sample * self.stride
        index = sample - self._first
        # Of the frames that were no samples, those that look like the new shot belong to it.
        for thumb in reversed(self._skipped.get(sample, [])):
            vector = vector_of(thumb)
            old, new = vector - self._vectors[index - 1], vector - self._vectors[index]
            if new @ new >= old @ old:
                break
            frame -= 1
        return Transition("cut", frame, frame, frame)

    def _gradual(self, window: _Window) -> Transition:
        first = max(0, window.start - 8 - self._first)
        contrast = self._facts[first : window.end + 9 - self._first, 1]
        contrast = contrast[: self._samples - self._first - first]
        least = float(np.min(contrast))
        stride = self.stride
        if least < _UNIFORM or (least < _NEARLY_UNIFORM and least < 0.35 * float(np.median(contrast))):
            plain = np.flatnonzero(contrast <= least + 1.0)
            # The middle of the run of plain pictures around the plainest.
            at = int(np.argmin(contrast))
            run = plain[np.abs(np.cumsum(np.diff(plain, prepend=plain[0]) > 1) - _run_of(plain, at)) == 0]
            middle = self._first + first + (int(run[0]) + int(run[-1]) + 1) // 2
            usual = float(np.percentile(contrast, 90))
            low = np.flatnonzero(contrast < 0.9 * usual)
            start, end = self._first + first + int(low[0]), self._first + first + int(low[-1]) + 1
            return Transition("fade", middle * stride, min(start, middle) * stride, max(end, middle) * stride)
        spread = (window.mixed_to - window.mixed_from) / 8
        start = max(0, round(window.mixed_from - spread))
        end = round(window.mixed_to + spread)
        at = round(window.middle + 0.5)
        return Transition("dissolve", at * stride, min(start, at) * stride, max(end, at) * stride)


def _run_of(plain: NDArray[np.int64], at: int) -> int:
    """The number of the run of neighbours in `plain` that `at` is in."""
    runs = np.cumsum(np.diff(plain, prepend=plain[0]) > 1)
    return int(runs[np.searchsorted(plain, at)])


def _is_same(one: _Window, other: _Window) -> bool:
    """Two windows that overlap, or the two halves of a transition that is longer than either."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    length = max(one.end - one.start, other.end - other.start)
    return shared > _SAME * min(one.end - one.start, other.end - other.start) or (shared >= -5 and length <= LAGS[2])


def _joined(group: list[_Window]) -> _Window:
    """The likeliest of the windows, with the middle and the extent that those like it agree upon."""
    best = group[0]
    alike = [w for w in group if w.end - w.start <= max(2 * (best.end - best.start), LAGS[2])]
    middle = sum(w.middle * w.score for w in alike) / sum(w.score for w in alike)
    short = [w for w in alike if w.end - w.start <= best.end - best.start + 4]
    mixed_from, mixed_to = min(w.mixed_from for w in short), max(w.mixed_to for w in short)
    return _Window(best.start, best.end, best.score, middle, min(mixed_from, middle), max(mixed_to, middle))
