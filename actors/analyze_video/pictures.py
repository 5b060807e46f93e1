"""The pictures that a person sees: keyframes the right way up, and the contact sheet, the sprite of a time line."""

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
# Tiles of the sprite: pixels of the longer side, and how many about; twice as many at most.
SPRITE_SIDE = 160
SPRITE_TILES = 100
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


@dataclass(frozen=True, slots=True)
class Keyframe:
    """A JPEG, the right way up."""

    data: bytes
    width: int
    height: int


class KeyframeMaker:
    """Makes JPEGs of full frames, with one kept swscale context."""

    def __init__(self, upright: Upright) -> None:
        self._upright = upright
        self._reformatter = VideoReformatter()

    def make(
        self, frame: VideoFrame, *, most_width: int = KEYFRAME_WIDTH, most_height: int = KEYFRAME_HEIGHT
    ) -> Keyframe:
        width, height = self._upright.size(frame.width, frame.height)
        scale = min(1.0, most_width / width, most_height / height)
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
        return Keyframe(_encode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]), width, height)


class Thumbnails:
    """Small copies of keyframes for the contact sheet: of all, or of every second, fourth … once there are many."""

    def __init__(self) -> None:
        self._every = 1
        self._kept: dict[int, tuple[bytes, float]] = {}

    def add(self, index: int, keyframe: Keyframe, time_s: float) -> None:
        if index % self._every:
            return
        # Half the size costs a JPEG decoder a third of the time.
        halved = keyframe.width >= 2 * TILE_SIDE
        image = _decode(keyframe.data, cv2.IMREAD_REDUCED_COLOR_2 if halved else cv2.IMREAD_COLOR)
        scale = TILE_SIDE / max(image.shape[:2])
        if scale < 1:
            size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]  # of the same kind
        self._kept[index] = _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]), time_s
        if len(self._kept) > 2 * MAX_TILES:
            self._every *= 2
            self._kept = {n: kept for n, kept in self._kept.items() if n % self._every == 0}

    def shown(self) -> list[tuple[int, bytes, float]]:
        """Index, JPEG and time of at most `MAX_TILES`, spread evenly."""
        kept = [(index, *self._kept[index]) for index in sorted(self._kept)]
        return [kept[i] for i in sheet_tiles(len(kept))]

    def state(self) -> dict[str, Any]:
        return {"every": self._every, "kept": [[n, data, time_s] for n, (data, time_s) in self._kept.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        self._every = state["every"]
        self._kept = {n: (data, time_s) for n, data, time_s in state["kept"]}


class Sprite:
    """Small pictures at even distances in time, for the preview above a player's time line."""

    def __init__(self, maker: KeyframeMaker, declared_s: float | None) -> None:
        self._maker = maker
        # At least ten pictures of a short film, and about a hundred of a long one.
        self._every_s = min(max(1.0, (declared_s or 0.0) / SPRITE_TILES), max(0.1, (declared_s or 10.0) / 10))
        self._tiles: list[Keyframe] = []

    def add(self, frame: VideoFrame, time_s: float) -> None:
        """Tile k is the first frame from `k * every_s` on; after a gap in time it stands for several."""
        while time_s >= len(self._tiles) * self._every_s - 1e-6:
            late = time_s >= (len(self._tiles) + 1) * self._every_s and self._tiles
            tile = self._tiles[-1] if late else self._maker.make(frame, most_width=SPRITE_SIDE, most_height=SPRITE_SIDE)
            self._tiles.append(tile)
            if len(self._tiles) > 2 * SPRITE_TILES:
                self._tiles = self._tiles[::2]
                self._every_s *= 2

    def write(self, out_dir: Path, end_s: float) -> dict[str, Any]:
        """`sprite.jpg`, and `sprite.vtt` whose cues name a part of it each (`sprite.jpg#xywh=160,0,160,90`)."""
        width, height = self._tiles[0].width, self._tiles[0].height
        columns = min(len(self._tiles), max(1, round(math.sqrt(len(self._tiles) * height * 1.6 / width))))
        rows = math.ceil(len(self._tiles) / columns)
        canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
        lines = ["WEBVTT"]
        for number, tile in enumerate(self._tiles):
            row, column = divmod(number, columns)
            image = _decode(tile.data, cv2.IMREAD_COLOR)[:height, :width]
            x, y = column * width, row * height
            canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
            start, end = number * self._every_s, (number + 1) * self._every_s
            end = end_s if number == len(self._tiles) - 1 else end
            clock = f"{_vtt_clock(start)} --> {_vtt_clock(max(end, start + 0.001))}"
            lines.append(f"{clock}\nsprite.jpg#xywh={x},{y},{width},{height}")
        _write(out_dir / "sprite.jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, 80])
        (out_dir / "sprite.vtt").write_text("\n\n".join(lines) + "\n")
        return {
            "file": "sprite.jpg",
            "width": columns * width,
            "height": rows * height,
            "columns": columns,
            "rows": rows,
            "tiles": len(self._tiles),
            "tile_width": width,
            "tile_height": height,
            "every_s": round(self._every_s, 6),
            "vtt": {"file": "sprite.vtt"},
        }

    def state(self) -> dict[str, Any]:
        return {"every_s": self._every_s, "tiles": [[t.data, t.width, t.height] for t in self._tiles]}

    def restore(self, state: dict[str, Any]) -> None:
        self._every_s = state["every_s"]
        self._tiles = [Keyframe(*tile) for tile in state["tiles"]]


def _vtt_clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    return f"{hours:02d}:{rest // 60_000:02d}:{rest % 60_000 / 1000:06.3f}"


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

    def add(self, picture: bytes, time_code: str, note: str) -> None:
        """The next picture (a JPEG), with its time code (bright, left) and a note (faint, right) below."""
        row, column = divmod(self._filled, self.columns)
        self._filled += 1
        x = GAP + column * (self._tile_width + GAP)
        y = GAP + row * (self._tile_height + CAPTION + GAP)
        box = self._canvas[y : y + self._tile_height, x : x + self._tile_width]
        box[:] = _TILE_BACKGROUND
        image = _decode(picture, cv2.IMREAD_COLOR)
        scale = min(self._tile_width / image.shape[1], self._tile_height / image.shape[0])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        size = min(size[0], self._tile_width), min(size[1], self._tile_height)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = cv2.resize(image, size, interpolation=how)  # type: ignore[assignment]  # of the same kind
        left, top = (self._tile_width - size[0]) // 2, (self._tile_height - size[1]) // 2
        box[top : top + size[1], left : left + size[0]] = image
        baseline = y + self._tile_height + CAPTION - 11
        _, end = self._text(time_code, x, baseline, _TEXT, weight=600)
        start, _ = self._measure(note)
        if end + GAP + start <= x + self._tile_width:
            self._text(note, x + self._tile_width - start, baseline, _FAINT_TEXT, weight=400)

    def write(self, path: Path) -> None:
        _write(path, self._canvas, [cv2.IMWRITE_PNG_COMPRESSION, 3])

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
    path.write_bytes(_encode(path.suffix, picture, parameters))


def _encode(suffix: str, picture: Picture, parameters: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, picture, parameters)
    if not done:
        raise ValueError(f"cannot encode a {suffix} of {picture.shape}")
    return data.tobytes()


def _decode(data: bytes, how: int) -> Picture:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    if image is None:
        raise ValueError("cannot read a picture back")
    return image  # type: ignore[return-value]  # uint8 for these
