"""Subtitles that are stored in a film as text: their cues, and a WebVTT file of each track."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import av
from av.container import InputContainer

#: Cues and characters in the result, of all tracks together; the files have all up to MAX_CUES of a track.
CUES_LISTED: Final = 3000
CHARACTERS_LISTED: Final = 300_000
MAX_TRACKS: Final = 64
MAX_CUES: Final = 20_000
MAX_CUE_CHARACTERS: Final = 1000

_OVERRIDE: Final = re.compile(r"\{\\[^}]*\}")
_TAG: Final = re.compile(r"</?[A-Za-z][^<>]{0,80}>")
_ASS_FIELDS: Final = 8  # before the text, as FFmpeg gives it


class Subtitles:
    """Takes the packets of all subtitle streams. Pictures of text (DVD, Blu-ray, broadcast) are named, not read."""

    def __init__(self, container: InputContainer) -> None:
        self._streams = {stream.index: stream for stream in container.streams.subtitles[:MAX_TRACKS]}
        self._cues: dict[int, list[tuple[float, float, str]]] = {index: [] for index in self._streams}
        self._damaged: set[int] = set()

    def add(self, packet: Any) -> None:
        index = packet.stream_index
        cues = self._cues.get(index)
        if cues is None or len(cues) >= MAX_CUES or packet.pts is None or packet.time_base is None:
            return
        if self._streams[index].codec_context is None:
            return
        try:
            decoded = packet.decode()
        except av.error.MemoryError:
            raise
        except (av.error.FFmpegError, UnicodeDecodeError):
            self._damaged.add(index)
            return
        start_s = float(packet.pts * packet.time_base)
        end_s = start_s + float((packet.duration or 0) * packet.time_base)
        lines = [_text(piece.ass) for piece in decoded if getattr(piece, "ass", None)]
        if text := "\n".join(filter(None, lines)):
            cues.append((start_s, end_s, text[:MAX_CUE_CHARACTERS]))

    def write(self, out_dir: Path, first_s: float) -> list[dict[str, Any]]:
        """JSON of each track; `first_s` is the time stamp of the first picture, from which all times count."""
        left, characters = CUES_LISTED, CHARACTERS_LISTED
        tracks = []
        for index, stream in self._streams.items():
            cues = [(a - first_s, b - first_s, text) for a, b, text in sorted(self._cues[index]) if b > first_s]
            facts: dict[str, Any] = {
                "stream": index,
                "codec": stream.codec_context.name if stream.codec_context else None,
                "language": stream.language if stream.language not in (None, "", "und") else None,
                "title": stream.metadata.get("title"),
                "is_text": _is_text(stream),
                "cue_count": len(cues),
                "cues": [],
                "file": None,
            }
            for start_s, end_s, text in cues:
                left, characters = left - 1, characters - len(text)
                if left < 0 or characters < 0:
                    break
                facts["cues"].append({"start_s": round(start_s, 3), "end_s": round(end_s, 3), "text": text})
            if cues:
                facts["file"] = f"subtitles/track-{index:02d}.vtt"
                (out_dir / "subtitles").mkdir(parents=True, exist_ok=True)
                (out_dir / facts["file"]).write_text(web_vtt(cues), encoding="utf-8")
            tracks.append(facts)
        return tracks

    @property
    def warnings(self) -> list[str]:
        return [f"some subtitles of stream {index} cannot be read" for index in sorted(self._damaged)]

    def state(self) -> dict[str, Any]:
        cues = {str(index): [list(cue) for cue in cues] for index, cues in self._cues.items()}
        return {"cues": cues, "damaged": sorted(self._damaged)}

    def restore(self, state: dict[str, Any]) -> None:
        self._cues = {int(index): [(a, b, text) for a, b, text in cues] for index, cues in state["cues"].items()}
        self._damaged = set(state["damaged"])


def _is_text(stream: Any) -> bool:
    return stream.codec_context is not None and stream.codec_context.name not in (
        *("pgssub", "hdmv_pgs_subtitle", "dvdsub", "dvd_subtitle", "dvbsub", "dvb_subtitle", "xsub", "dvb_teletext"),
    )


def _text(event: bytes) -> str:
    """The words of an ASS event (`ReadOrder,Layer,Style,Name,MarginL,MarginR,MarginV,Effect,Text`)."""
    fields = event.decode("utf-8", "replace").split(",", _ASS_FIELDS)
    text = _OVERRIDE.sub("", fields[-1]).replace("\\N", "\n").replace("\\n", "\n").replace("\\h", " ")
    return "\n".join(filter(None, (line.strip() for line in _TAG.sub("", text).replace("\0", "").split("\n"))))


def web_vtt(cues: list[tuple[float, float, str]]) -> str:
    """A WebVTT file of cues (start and end in seconds, text)."""
    blocks = ["WEBVTT"]
    for start_s, end_s, text in cues:
        shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_clock(start_s)} --> {_clock(max(end_s, start_s + 0.001))}\n{shown}")
    return "\n\n".join(blocks) + "\n"


def _clock(seconds: float) -> str:
    milliseconds = max(0, round(seconds * 1000))
    hours, rest = divmod(milliseconds, 3_600_000)
    return f"{hours:02d}:{rest // 60_000:02d}:{rest % 60_000 / 1000:06.3f}"
