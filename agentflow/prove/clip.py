"""A short film to be analysed: a real file, made here, so that a run needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import av
import numpy as np

_WIDTH, _HEIGHT, _RATE = 320, 180, 25
SHOTS: Final = 3


def write_clip(path: Path, seed: int) -> Path:
    """Three seconds with a hard cut after each: blocks of colour that drift, so that nothing else looks like a cut."""
    colours = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=_RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = _WIDTH, _HEIGHT, "yuv420p", 4_000_000
        for _ in range(SHOTS):
            blocks = colours.integers(0, 256, (9, 16, 3), np.uint8).repeat(20, 0).repeat(20, 1)
            for n in range(_RATE):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(blocks, n // 4, axis=1)), "rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
