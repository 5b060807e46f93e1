"""Opens a file that may be anything, and says what it is before a single picture is decoded.

FFmpeg guesses by content, and some of its guesses reach further than one file: playlists, concat scripts and numbered
pictures open other files, or the network. So only formats that keep everything inside one file are let in, through the
`file` protocol alone.
"""

from __future__ import annotations

import re
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from agentflow.errors import Permanent

MAX_STREAMS_LISTED = 64
# A broadcast of many channels has some fifty. FFmpeg keeps a parser, and perhaps a decoder, for each.
MAX_STREAMS = 128
MAX_TAG_CHARACTERS = 500

# Not in the lists on purpose: hls, dash, concat, sdp, image2 (open other files), the picture formats, tty (any text is
# a film to it), and subtitles.
VIDEO_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,"
    "asf,asf_o,ogg,gif,yuv4mpegpipe,mxf,gxf,dv,rm,nut,wtv,swf,vc1,dirac,nsv,nuv,dhav,ty,pva"
)
# Sound alone is let in only so that the answer can be "no video stream" and not "not a video".
AUDIO_FORMATS = "mp3,wav,w64,flac,aac,ac3,eac3,aiff,amr,au,caf,dts,ape,tta,wv"

_PICTURE_FLAGS = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_PICTURE_BRANDS = {"avif", "heic", "heix", "mif1"}
# A tag that is no UTF-8 is no reason to refuse a film. PyAV 19 (Python 3.12 and newer) has no such argument, and never does.
_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
_REFUSED_SIZE = re.compile(r"Picture size (\d+)x(\d+) ")


def open_media(source: str, *, max_pixels: int) -> InputContainer:
    """The opened container of a local file.

    Raises `Permanent`: `not_a_video`, `no_frames` (a video file of which nothing can be read), `too_many_pixels`,
    `too_many_streams`.
    """
    path = Path(source).absolute()  # which keeps a name such as `http:…` or `concat:…` a name
    path.stat()  # a missing file is the caller's mistake, and no fact about a video
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": f"{VIDEO_FORMATS},{AUDIO_FORMATS}",
        # FFmpeg decodes a first picture while it probes; its own limit is 2^31 bytes.
        "max_pixels": str(max_pixels),
        "max_streams": str(MAX_STREAMS + 1),
    }
    # FFmpeg replaces a size from the header that it finds absurd by the one of the first picture, or by nothing; only
    # its log tells. Captured around the opening alone: no decoder thread of ours is alive that could log meanwhile.
    skip_repeated = av.logging.get_skip_repeated()
    av.logging.set_skip_repeated(False)
    av.logging.set_level(av.logging.ERROR)
    container = None
    try:
        with av.logging.Capture(local=False) as log:
            container = cast(InputContainer, av.open(str(path), options=options, **_TAGS))
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as err:
        _refuse_claimed_size(log, max_pixels)
        _refuse_streams(0, log)
        what, is_media = found(path)
        if is_media:
            message = f"this is {what}, but nothing in it can be read: it is damaged, or was cut short"
            raise Permanent(message, code="no_frames") from err
        raise Permanent(f"this is not a video: found {what}", code="not_a_video") from err
    finally:
        av.logging.set_level(None)
        av.logging.set_skip_repeated(skip_repeated)
    try:
        _refuse_claimed_size(log, max_pixels)
        _refuse_streams(len(container.streams), log)
        for stream in container.streams.video:
            if stream.codec_context is not None:
                _refuse_size(stream.width, stream.height, max_pixels)
    except Permanent:
        container.close()
        raise
    return container


def _refuse_claimed_size(log: list[tuple[int, str, str]], max_pixels: int) -> None:
    for _, _, line in log:
        if size := _REFUSED_SIZE.match(line):
            _refuse_size(int(size[1]), int(size[2]), max_pixels)


def _refuse_streams(streams: int, log: list[tuple[int, str, str]]) -> None:
    if streams > MAX_STREAMS or any("max_streams" in line for _, _, line in log):
        raise Permanent(f"the file has more than {MAX_STREAMS} streams", code="too_many_streams")


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = (
            f"the video claims pictures of {width} × {height} pixels; at most {max_pixels / 1e6:g} million are taken"
        )
        raise Permanent(message, code="too_many_pixels")


def pick_video_stream(container: InputContainer, source: str) -> VideoStream:
    """The stream to analyse: the largest that is a moving picture.

    Raises `Permanent`: `not_a_video` (a still picture), `no_video_stream`, `unsupported_codec`.
    """
    moving = [s for s in container.streams.video if not s.disposition & _PICTURE_FLAGS]
    if container.metadata.get("major_brand", "").strip() in _PICTURE_BRANDS:
        raise Permanent("this is not a video: found a HEIF or AVIF picture", code="not_a_video")
    if not moving:
        what, is_media = found(Path(source))
        if not is_media and what != _UNKNOWN:
            raise Permanent(f"this is not a video: found {what}", code="not_a_video")
        kinds = sorted({"cover art" if s.type == "video" else s.type for s in container.streams}) or ["nothing"]
        message = f"there is no video stream in this {container.format.long_name} file, only {', '.join(kinds)}"
        raise Permanent(message, code="no_video_stream")
    readable = [s for s in moving if s.codec_context is not None]
    if not readable:
        raise Permanent("the video is coded in a way that is not known here", code="unsupported_codec")
    return max(readable, key=lambda s: (s.width * s.height, -s.index))


def pick_audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound to listen to: the default one, else the first that can be decoded."""
    readable = [s for s in container.streams.audio if s.codec_context is not None and s.codec_context.sample_rate]
    return max(readable, key=lambda s: (bool(s.disposition & Disposition.default), -s.index), default=None)


def declared_duration(container: InputContainer, stream: VideoStream) -> tuple[float | None, bool]:
    """Seconds of video by the headers, and whether that is a statement (else it is an estimate, fit for progress)."""
    guessing: int = Flags.ts_discont.value | Flags.no_timestamps.value  # type: ignore[assignment]  # the stub says Flags
    stated = not container.format.flags & guessing
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base), stated
    if container.duration and container.duration > 0:
        return container.duration / av.time_base, stated
    return None, False


def container_facts(container: InputContainer) -> dict[str, Any]:
    """JSON of the file as a whole. `start_s` is the smallest time stamp, as written in the file."""
    tags = {key.lower(): value[:MAX_TAG_CHARACTERS] for key, value in container.metadata.items()}
    return {
        "format": container.format.name,
        "format_name": container.format.long_name,
        "duration_s": _seconds(container.duration, Fraction(1, av.time_base)),
        "start_s": _seconds(container.start_time, Fraction(1, av.time_base)),
        "size_bytes": container.size,
        "bit_rate": container.bit_rate or None,
        "tags": {key: tags[key] for key in ("title", "artist", "comment", "creation_time", "encoder") if key in tags},
    }


def stream_facts(container: InputContainer) -> list[dict[str, Any]]:
    """JSON of each stream, at most `MAX_STREAMS_LISTED`. Rotation is known only from a decoded frame: None here."""
    return [_stream_facts(s) for s in list(container.streams)[:MAX_STREAMS_LISTED]]


def _stream_facts(stream: Stream) -> dict[str, Any]:
    codec: Any = stream.codec_context
    facts: dict[str, Any] = {
        "index": stream.index,
        "kind": stream.type,
        "codec": codec.name if codec else None,
        "profile": (stream.profile if codec else None) or None,
        "bit_rate": (getattr(codec, "bit_rate", None) if codec else None) or None,
        "duration_s": _seconds(stream.duration, stream.time_base),
        "language": stream.language if stream.language not in (None, "", "und") else None,
        "default": bool(stream.disposition & Disposition.default),
    }
    if stream.type == "video" and codec:
        aspect = codec.sample_aspect_ratio or stream.sample_aspect_ratio  # type: ignore[attr-defined]  # VideoStream's
        facts |= {
            "width": codec.width,
            "height": codec.height,
            "fps": round(float(stream.average_rate), 3) if stream.average_rate else None,
            "rotation": None,
            "pixel_format": codec.pix_fmt,
            "sample_aspect_ratio": f"{aspect.numerator}:{aspect.denominator}" if aspect else None,
            "attached_picture": bool(stream.disposition & _PICTURE_FLAGS),
        }
    elif stream.type == "audio" and codec:
        facts |= {"channels": codec.channels, "layout": codec.layout.name, "sample_rate": codec.sample_rate}
    return facts


def _seconds(ticks: int | None, time_base: Any) -> float | None:  # a Fraction; PyAV 19: its AVRational
    return None if ticks is None or time_base is None else round(float(ticks * time_base), 6)


_UNKNOWN = "data of no known kind"

_MAGIC: list[tuple[bytes, str, bool]] = [
    (b"\x89PNG", "a PNG picture", False),
    (b"\xff\xd8\xff", "a JPEG picture", False),
    (b"BM", "a BMP picture", False),
    (b"II*\0", "a TIFF picture", False),
    (b"MM\0*", "a TIFF picture", False),
    (b"%PDF", "a PDF document", False),
    (b"PK\x03\x04", "a ZIP archive or an Office document", False),
    (b"\x1f\x8b", "a gzip archive", False),
    (b"7z\xbc\xaf", "a 7z archive", False),
    (b"Rar!", "a RAR archive", False),
    (b"\x7fELF", "a program", False),
    (b"MZ", "a program", False),
    (b"\xd0\xcf\x11\xe0", "an old Office document", False),
    (b"#EXTM3U", "a playlist (M3U)", False),
    (b"ffconcat", "a list of files for FFmpeg", False),
    (b"<!DOCTYPE html", "a web page", False),
    (b"<html", "a web page", False),
    (b"<?xml", "an XML document", False),
    (b"{", "a JSON or text file", False),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM file", True),
    (b"FLV", "a Flash video", True),
    (b"GIF8", "a GIF", True),
    (b"OggS", "an Ogg file", True),
    (b"0&\xb2u\x8ef\xcf\x11", "a Windows Media file", True),
    (b"\0\0\x01\xba", "an MPEG programme stream", True),
    (b"YUV4MPEG2 ", "a YUV4MPEG film", True),
]


def found(path: Path) -> tuple[str, bool]:
    """What a file that FFmpeg refuses looks like, in words for people, and whether that is a film or sound."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file", False
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "an MP4 or QuickTime file without a readable index", True
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP", b"WAVE"):
        return {b"AVI ": "an AVI file", b"WEBP": "a WebP picture", b"WAVE": "a WAV file"}[head[8:12]], head[
            8:12
        ] != b"WEBP"
    bare = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what, is_media in _MAGIC:
        if bare[: len(magic)].lower() == magic.lower():
            return what, is_media
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "an MPEG transport stream", True
    return ("a text file", False) if _is_text(head) else (_UNKNOWN, False)


def _is_text(head: bytes) -> bool:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return True
    try:
        text = head[: max(1, len(head) - 3)].decode("utf-8", "strict")
    except UnicodeDecodeError as err:
        if err.start < len(head) - 8:
            return False
        text = head[: err.start].decode()
    return all(c.isprintable() or c in "\t\r\n\f\b\x1b" for c in text)


def time_words(seconds: float) -> str:
    """For people: `6.04 s`, `1:02:03`."""
    return f"{seconds:.2f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
