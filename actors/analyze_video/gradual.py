"""Whether a window of samples is a dissolve or a fade: what it looks like, and a small network (`weights.py`) that judges that.

In a dissolve or a fade every frame is a mixture, so that the vectors go along the chord from the first to the last one,
and get shorter on the way; in a pan or with a moving object they go around it. The network is fitted on the tuning half of
ops/bench/shots.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actors.analyze_video import weights
from actors.analyze_video.vectors import UNIT, Floats


def features(
    products: Floats, sharpness: Floats, starts: NDArray[np.int64], lag: int, last: int
) -> tuple[Floats, Floats, NDArray[np.int64]] | None:
    """What windows of `lag` samples from `starts` on look like: (windows × 16), their shares of the new picture (windows
    × lag + 1), and which of `starts` they are of: those whose two ends are alike are left out. None if all are.

    `products` are the dot products of all samples up to the index `last`.
    """
    ends = starts + lag
    first2, last2 = products[starts, starts] * UNIT, products[ends, ends] * UNIT
    chord2 = first2 + last2 - 2 * products[starts, ends] * UNIT + 1e-3
    size2 = (first2 + last2) / 2 + 1e-3
    which = np.flatnonzero((chord2 > 0.3 * size2) & (chord2 > 36.0))
    if not len(which):
        return None
    starts, ends = starts[which], ends[which]
    first2, last2, chord2, size2 = first2[which], last2[which], chord2[which], size2[which]
    t = starts[:, None] + np.arange(lag + 1)
    to_first = products[t, starts[:, None]] * UNIT
    to_last = products[t, ends[:, None]] * UNIT
    between = products[starts, ends][:, None] * UNIT
    norm2 = products[t, t] * UNIT
    # How far along the chord, and how far from it.
    alpha = (to_last - to_first - between + first2[:, None]) / chord2[:, None]
    off = norm2 - 2 * to_first + first2[:, None]
    off = np.maximum(0, off - alpha * alpha * chord2[:, None]) / chord2[:, None]

    def gap2(ones: NDArray[np.int64], others: NDArray[np.int64]) -> Floats:
        square = products[ones, ones] + products[others, others] - 2 * products[ones, others]
        result: Floats = np.maximum(square, 0) * UNIT / chord2
        return result

    margin = max(4, lag // 2)
    before, after = gap2(np.maximum(starts - margin, 0), starts), gap2(ends, np.minimum(ends + margin, last))
    near_before, near_after = gap2(np.maximum(starts - 4, 0), starts), gap2(ends, np.minimum(ends + 4, last))
    quarter = lag // 4
    inner = slice(quarter, lag - quarter + 1)
    detail = np.log(sharpness + 4.0)
    detail_first = (detail[np.maximum(starts - 1, 0)] + detail[starts]) / 2
    detail_last = (detail[np.minimum(ends + 1, last)] + detail[ends]) / 2
    detail_inner = detail[t[:, inner]].mean(axis=1)
    columns = (
        between[:, 0] / np.sqrt(first2 * last2 + 1e-3),
        _log(off[:, inner].mean(axis=1)),
        _log(off.max(axis=1)),
        _log(norm2[:, inner].mean(axis=1) / size2),
        _log(norm2[:, inner].min(axis=1) / size2),
        detail_inner - np.maximum(detail_first, detail_last),
        detail_inner - np.minimum(detail_first, detail_last),
        np.minimum(np.maximum(0, alpha[:, :-2] - alpha[:, 2:]).sum(axis=1), 2),
        np.minimum((alpha[:, 1:] - alpha[:, :-1]).max(axis=1), 1.5),
        np.minimum(chord2 / size2, 4),
        np.full(len(starts), np.log(lag / 24)),
        _log(before),
        _log(after),
        _log(np.maximum(near_before, near_after)),
        _log(np.sqrt(size2) / 30),
        np.minimum(np.abs(alpha - np.arange(lag + 1) / lag).mean(axis=1), 1),
    )
    return np.stack(columns, axis=1), alpha, which


def _log(values: Floats) -> Floats:
    result: Floats = np.log(np.clip(values + 0.02, 1e-3, 1e3))
    return result


def judge(found: Floats) -> Floats:
    """How likely each row of `features` is a gradual transition, 0 to 1."""
    hidden = np.tanh((found - weights.MEAN) / weights.DEVIATION @ weights.HIDDEN + weights.HIDDEN_BIAS)
    result: Floats = 1 / (1 + np.exp(-np.clip(hidden @ weights.OUT + weights.OUT_BIAS, -30, 30)))
    return result
