"""The pictures that a person sees: keyframes the right way up, and the contact sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

Picture: TypeAlias = NDArray[np.uint8]

KEYFRAME_WIDTH = 1280
# Enough for 9:16 in full width; keeps a strip of 100 × 30,000 pixels from becoming a huge file.
KEYFRAME_HEIGHT = 2276
JPEG_QUALITY = 88

MAX_TILES = 60
SHEET_WIDTH = 1920
# A sheet of few tiles is not blown up beyond this, in pixels of a tile's longer side; small videos half as far.
TILE_SIDE = 640
# Room for a time code with hours.
LEAST_TILE_WIDTH = 120
GAP = 16
CAPTION = 34
# Wanted shape of the sheet; a tall one is easier to scroll than a wide one, so it is below that of a screen.
SHEET_ASPECT = 1.4

_BACKGROUND = (26, 24, 23)  # BGR, as all colours here
_TILE_BACKGROUND = (0, 0, 0)
_TEXT = (240, 240, 240)
_FAINT_TEXT = (160, 155, 150)
_UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class Upright:
    """How stored pictures become pictures for the eye: turned, mirrored, and with square pixels."""

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False
    sample_aspect: Fraction = Fraction(1)

    @classmethod
    def of(cls, frame: VideoFrame, sample_aspect: Any) -> Upright:  # a Fraction; PyAV 19: its AVRational
        """By the display matrix of a frame, to quarter turns. Its rows a b u, c d v mean x' = ax + cy, y' = bx + dy."""
        aspect = Fraction(sample_aspect or 1)
        if not Fraction(1, 8) <= aspect <= 8:  # no camera makes these: a damaged header
            aspect = Fraction(1)
        try:
            # Asked for once per file: the side data and its frame hold each other until the garbage collector comes.
            matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32).reshape(3, 3)  # type: ignore[typeddict-item, unused-ignore]  # the stub of PyAV 18 knows one kind
        except KeyError:
            return cls(sample_aspect=aspect)
        (a, b), (c, d) = matrix[:2, :2].tolist()
        if abs(b) > abs(a):
            return cls(True, flip_x=c < 0, flip_y=b < 0, sample_aspect=aspect)
        return cls(False, flip_x=a < 0, flip_y=d < 0, sample_aspect=aspect)

    @property
    def mirrored(self) -> bool:
        return self.transposed ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Degrees clockwise by which the stored picture is turned (after mirroring it left to right, if `mirrored`)."""
        if self.transposed:
            return 270 if self.flip_y != self.mirrored else 90
        return 180 if self.flip_y else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height for the eye of a stored picture of this size."""
        width = max(1, round(width * self.sample_aspect))
        return (height, width) if self.transposed else (width, height)

    def apply(self, picture: Picture) -> Picture:
        """The stored picture, already scaled to square pixels, turned and mirrored."""
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        if self.flip_x:
            picture = picture[:, ::-1]
        if self.flip_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


class KeyframeWriter:
    """Writes full frames as JPEG files `shot-0001.jpg` … of a folder."""

    def __init__(self, folder: Path, upright: Upright) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._upright = upright
        self._reformatter = VideoReformatter()

    def write(self, frame: VideoFrame, shot_index: int) -> dict[str, Any]:
        """`{file, width, height}`, the file relative to the folder above."""
        width, height = self._upright.size(frame.width, frame.height)
        scale = min(1.0, KEYFRAME_WIDTH / width, KEYFRAME_HEIGHT / height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        stored = (height, width) if self._upright.transposed else (width, height)
        # What HD files that say nothing mean; FFmpeg would take the matrix of SD, and reds would turn orange.
        unsaid_hd = frame.colorspace == _UNSPECIFIED_COLORSPACE and frame.height >= 720
        scaled = self._reformatter.reformat(
            frame,
            *stored,
            "bgr24",
            src_colorspace=Colorspace.ITU709 if unsaid_hd else None,
            interpolation=Interpolation.AREA if scale < 1 else Interpolation.BICUBIC,
            dst_color_range="JPEG",
            threads=1,
        )
        picture = self._upright.apply(scaled.to_ndarray())  # type: ignore[arg-type]  # uint8 for this format
        path = self._folder / f"shot-{shot_index + 1:04d}.jpg"
        _write(path, picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        return {"file": f"{self._folder.name}/{path.name}", "width": width, "height": height}


def sheet_tiles(shots: int) -> list[int]:
    """Which shots stand on the contact sheet: all, or `MAX_TILES` spread evenly from the first to the last."""
    if shots <= MAX_TILES:
        return list(range(shots))
    return [round(i * (shots - 1) / (MAX_TILES - 1)) for i in range(MAX_TILES)]


class ContactSheet:
    """A grid of pictures, each with its time code below. Filled tile by tile, so that progress can be told between."""

    def __init__(self, tiles: int, width: int, height: int) -> None:
        """For so many pictures, most of them of this size; others are fitted into the same box."""
        aspect = min(max(width / height, 0.4), 5.0)
        most_columns = (SHEET_WIDTH - GAP) // (LEAST_TILE_WIDTH + GAP)
        self.columns = min(range(1, min(tiles, most_columns) + 1), key=lambda n: _awkwardness(n, tiles, aspect))
        self.rows = math.ceil(tiles / self.columns)
        largest = min(TILE_SIDE, max(width, height, TILE_SIDE // 2)) * min(1.0, aspect)
        self._tile_width = max(LEAST_TILE_WIDTH, int(min((SHEET_WIDTH - GAP) / self.columns - GAP, largest)))
        self._tile_height = max(1, round(self._tile_width / aspect))
        self.width = GAP + self.columns * (self._tile_width + GAP)
        self.height = GAP + self.rows * (self._tile_height + CAPTION + GAP)
        self._canvas: Picture = np.full((self.height, self.width, 3), _BACKGROUND, np.uint8)
        self._font = cv2.FontFace("sans")
        self._filled = 0

    def add(self, picture: Path, width: int, time_code: str, note: str) -> None:
        """The next picture (a JPEG so wide), with its time code (bright, left) and a note (faint, right) below."""
        row, column = divmod(self._filled, self.columns)
        self._filled += 1
        x = GAP + column * (self._tile_width + GAP)
        y = GAP + row * (self._tile_height + CAPTION + GAP)
        box = self._canvas[y : y + self._tile_height, x : x + self._tile_width]
        box[:] = _TILE_BACKGROUND
        # Half the size costs a JPEG decoder a third of the time.
        halved = width >= 2 * self._tile_width
        image = cv2.imread(str(picture), cv2.IMREAD_REDUCED_COLOR_2 if halved else cv2.IMREAD_COLOR)
        if image is None:
            raise OSError(f"cannot read back {picture}")
        scale = min(self._tile_width / image.shape[1], self._tile_height / image.shape[0])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        size = min(size[0], self._tile_width), min(size[1], self._tile_height)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        left, top = (self._tile_width - size[0]) // 2, (self._tile_height - size[1]) // 2
        box[top : top + size[1], left : left + size[0]] = image
        baseline = y + self._tile_height + CAPTION - 11
        _, end = self._text(time_code, x, baseline, _TEXT, weight=600)
        start, _ = self._measure(note)
        if end + GAP + start <= x + self._tile_width:
            self._text(note, x + self._tile_width - start, baseline, _FAINT_TEXT, weight=400)

    def write(self, path: Path) -> None:
        _write(path, self._canvas, [cv2.IMWRITE_PNG_COMPRESSION, 6])

    def _text(self, text: str, x: int, y: int, colour: tuple[int, int, int], weight: int) -> tuple[int, int]:
        (end, _), _ = cv2.putText(self._canvas, text, (x, y), colour, self._font, _FONT_SIZE, weight)
        return x, end

    def _measure(self, text: str) -> tuple[int, int]:
        _, _, width, height = cv2.getTextSize((self.width, self.height), text, (0, 0), self._font, _FONT_SIZE, 400)
        return width, height


_FONT_SIZE = 18


def _awkwardness(columns: int, tiles: int, aspect: float) -> float:
    """How far a grid is from the wanted shape, plus what its empty places cost."""
    rows = math.ceil(tiles / columns)
    shape = math.log(columns * aspect / (rows * (1 + 0.2 * aspect)) / SHEET_ASPECT)
    return abs(shape) + (columns * rows - tiles) / (columns * rows)


def time_code(seconds: float) -> str:
    """`02:03.456`, or `1:02:03.456` from an hour on."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    clock = f"{minutes:02d}:{milliseconds / 1000:06.3f}"
    return f"{hours}:{clock}" if hours else clock


def _write(path: Path, picture: Picture, parameters: list[int]) -> None:
    done, data = cv2.imencode(path.suffix, picture, parameters)
    if not done:
        raise ValueError(f"cannot encode {path.name} of {picture.shape}")
    path.write_bytes(data.tobytes())
