"""An analysed video: what was said, by chapters; what is to be seen and to be read, shot by shot; its subtitles.

The file holds the parts of the result of `analyze_video` that are text (agentflow/analysis.py, web/videos.py say what they are).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from actors.generate_embeddings.passages import Passage, one_line, refused

#: What of an analysis is read.
PARTS: Final = ("shots", "transcript", "captions", "screen_text", "chapters", "summary", "subtitles", "video")


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    analysis = json.loads(path.read_text(encoding="utf-8"))
    shots = {shot["index"]: shot for shot in analysis.get("shots") or ()}
    facts["duration_s"] = (analysis.get("video") or {}).get("duration_s")
    facts["keyframes"] = [
        {"time_s": shown.get("time_s", shot["start_s"]), "key": shown["key"]}
        for shot in shots.values()
        if (shown := shot.get("keyframe") or {}).get("key")
    ]
    transcript = analysis.get("transcript") or {}
    passages = [
        *_summary(analysis),
        *_spoken(transcript.get("segments") or (), "transcript", analysis, shots),
        *_seen(analysis, shots),
        *_subtitles(analysis, transcript, shots),
    ]
    if not passages:
        raise refused(
            "no_text",
            "Nothing is said, shown or written in the analysis of this video: set OPENROUTER_API_KEY (or LLM_BASE_URL and"
            " TRANSCRIPTION_BASE_URL) and analyse it again.",
        )
    yield from passages


def _summary(analysis: Mapping[str, Any]) -> Iterator[Passage]:
    summary = analysis.get("summary") or {}
    if text := one_line(summary.get("long") or summary.get("short") or ""):
        yield Passage(text, place={"part": "summary"})


def _spoken(
    items: Any, part: str, analysis: Mapping[str, Any], shots: Mapping[int, Mapping[str, Any]]
) -> Iterator[Passage]:
    chapters = (analysis.get("chapters") or {}).get("items") or []
    starts = [chapter["start_s"] for chapter in chapters]
    for item in items:
        chapter = bisect_right(starts, item["start_s"]) - 1
        place = {"part": part, "start_s": item["start_s"], "end_s": item["end_s"]}
        if chapter >= 0:
            place["heading"] = [chapters[chapter]["title"]]
        if text := one_line(item["text"]):
            yield Passage(text, place=place | _picture(shots, item["start_s"]), tight=True)


def _seen(analysis: Mapping[str, Any], shots: Mapping[int, Mapping[str, Any]]) -> Iterator[Passage]:
    for part, name in (("captions", "caption"), ("screen_text", "text")):
        for item in (analysis.get(part) or {}).get("items") or ():
            said = item.get(name)
            text = one_line("; ".join(said) if isinstance(said, list) else said or "")
            shot = shots.get(item["shot"])
            if text and shot is not None:
                place = {"part": part, "start_s": shot["start_s"], "end_s": shot["end_s"]}
                yield Passage(text, place=place | _picture(shots, shot["start_s"]), tight=True)


def _subtitles(
    analysis: Mapping[str, Any], transcript: Mapping[str, Any], shots: Mapping[int, Mapping[str, Any]]
) -> Iterator[Passage]:
    """Those that say something else than the transcript: in another language, or where there is none."""
    spoken = (transcript.get("language") or "")[:2] if transcript.get("segments") else None
    for number, track in enumerate(analysis.get("subtitles") or ()):
        if spoken is None or (track.get("language") or "")[:2] not in ("", spoken):
            yield from _spoken(track.get("cues") or (), f"subtitles {number + 1}", analysis, shots)


def _picture(shots: Mapping[int, Mapping[str, Any]], time_s: float) -> dict[str, Any]:
    """The shot that is seen then, and its keyframe in storage."""
    for shot in shots.values():
        if shot["start_s"] <= time_s < shot["end_s"]:
            keyframe = shot.get("keyframe") or {}
            return {"shot": shot["index"]} | ({"thumbnail": keyframe["key"]} if keyframe.get("key") else {})
    return {}
