"""The small picture of each frame, that all looking is done on: cheap enough to be made of every one.

A frame of 1080p takes some 5 ms to decode and 0.4 ms to scale down well. Here two rows of eight are averaged along their
length instead, straight from the decoder's planes: 0.15 ms, and as good for finding shots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

Picture: TypeAlias = NDArray[np.uint8]

# Pixels of the long side. Enough to see a cut and to tell sharp from blurred.
SMALL_SIDE: Final = 240
# The colour planes need less.
COLOUR_SIDE: Final = 32

# Planes that can be read as they are: bits, shift to 8 of them, and whether both colours share one plane.
_PLANAR: Final = {
    **dict.fromkeys(("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"), (8, 0, False)),
    "nv12": (8, 0, True),
    **dict.fromkeys(("yuv420p10le", "yuv422p10le", "yuv444p10le"), (16, 2, False)),
    **dict.fromkeys(("yuv420p12le", "yuv422p12le", "yuv444p12le"), (16, 4, False)),
    "p010le": (16, 8, True),
}
_FULL_RANGE: Final = 2  # AVCOL_RANGE_JPEG
_TO_LIMITED: Final = np.round(16 + np.arange(256) * (219 / 255)).astype(np.uint8)


@dataclass(slots=True)
class Small:
    """`y` is gray, 16 black and 235 white, at most `SMALL_SIDE` long; `u` and `v` are the colours, 128 for none."""

    y: Picture
    u: Picture
    v: Picture


class SmallPictures:
    """Makes the small picture of each frame, all of one size, whatever the size of the frame."""

    def __init__(self, width: int, height: int) -> None:
        self.size = _fitted(width, height, SMALL_SIDE)
        self._colour_size = _fitted(width, height, COLOUR_SIDE)
        self._reformatter: VideoReformatter | None = None

    def of(self, frame: VideoFrame) -> Small:
        layout = _PLANAR.get(frame.format.name)
        if layout is None:
            return self._scaled(frame)
        bits, shift, interleaved = layout
        planes: Any = frame.planes
        y = _reduced(_plane(planes[0], bits), self.size, shift)
        if frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"):
            y = cv2.LUT(y, _TO_LIMITED)  # type: ignore[assignment]  # of the same kind
        if interleaved:
            pairs = _plane(planes[1], bits, 2).reshape(planes[1].height, -1, 2)
            colours = [np.ascontiguousarray(pairs[:: max(1, pairs.shape[0] // COLOUR_SIDE), :, i]) for i in (0, 1)]
        else:
            colours = [_plane(planes[1], bits), _plane(planes[2], bits)]
        return Small(y, *(_reduced(plane, self._colour_size, shift) for plane in colours))

    def _scaled(self, frame: VideoFrame) -> Small:
        """Of any other format, by FFmpeg."""
        self._reformatter = self._reformatter or VideoReformatter()
        width, height = (max(2, side // 2 * 2) for side in self.size)
        picture: Any = self._reformatter.reformat(
            frame, width, height, "yuv420p", interpolation=Interpolation.AREA, dst_color_range="MPEG", threads=1
        )
        y, u, v = (_plane(plane, 8) for plane in picture.planes)
        return Small(_reduced(y, self.size, 0), _reduced(u, self._colour_size, 0), _reduced(v, self._colour_size, 0))


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(width, height))
    return max(2, round(width * scale)), max(2, round(height * scale))


def _plane(plane: Any, bits: int, columns: int = 1) -> NDArray[Any]:
    """A view of the decoder's memory: not to be kept. `columns` samples stand for each pixel."""
    samples = np.frombuffer(plane, np.uint8 if bits == 8 else np.dtype("<u2"))
    rows = samples.reshape(plane.height, plane.line_size * 8 // bits)
    return rows[:, : plane.width * columns]


def _reduced(plane: NDArray[Any], size: tuple[int, int], shift: int) -> Picture:
    step = plane.shape[0] // size[1]
    if step >= 4:
        # Rows of one parity, so that interlaced fields are not mixed.
        first = step // 4 // 2 * 2
        above, below = plane[first::step], plane[first + step // 2 // 2 * 2 :: step]
        rows = min(len(above), len(below))
        plane = cv2.addWeighted(above[:rows], 0.5, below[:rows], 0.5, 0)
    small: NDArray[Any] = plane if plane.shape[::-1] == size else cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    if shift:
        return (small >> shift).astype(np.uint8)
    return small.copy() if small is plane else small  # never a view of the decoder's memory
