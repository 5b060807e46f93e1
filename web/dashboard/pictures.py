"""Stored files as pictures: of renders what went in and what came out, of films their shots along the time, and what was said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agentflow.comfyui.requests import TYPE as RENDER
from agentflow.comfyui.requests import is_own
from agentflow.jobs.model import Job
from web.dashboard.frame import Visit
from web.dashboard.shown import PICTURE
from web.videos import TYPE as FILM

_WIDTH: Final = 1000.0
_LEAST_WIDTH: Final = 1.5
#: So many shots have their keyframe drawn, and so many segments of what was said are written: a browser has to hold them.
MOST_SHOTS: Final = 240
MOST_SEGMENTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Picture:
    """A file with its signed link; `picture` is what to draw of it (None: nothing can be), `kind` as renders have it."""

    name: str
    url: str
    picture: str | None
    kind: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class Render:
    before: list[Picture]
    after: list[Picture]


@dataclass(frozen=True, slots=True)
class Shot:
    """`x` and `width` of 1000, on the time line."""

    number: int
    start_s: float
    end_s: float
    x: float
    width: float
    keyframe: Picture | None
    caption: str | None
    duplicate_of: int | None


@dataclass(frozen=True, slots=True)
class Segment:
    start_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Film:
    """What `analyze_video` found. `said` are the segments of the transcript, `chapters` their beginnings and titles."""

    duration_s: float
    contact_sheet: Picture | None
    shots: list[Shot]
    chapters: list[Segment]
    said: list[Segment]
    summary: str | None
    more_shots: int
    more_said: int


def of(visit: Visit, job: Job) -> Render | Film | None:
    """None: its result has no pictures that belong together."""
    if not isinstance(job.result, dict):
        return None
    if job.type == RENDER:
        return _render(visit, job, job.result)
    return _film(visit, job, job.result) if job.type == FILM else None


def pictures(visit: Visit, outputs: Iterable[Any], organization_id: int) -> list[Picture]:
    """Of the outputs of a render, those that are the organization's."""
    found = [_picture(visit, each, organization_id) for each in outputs if isinstance(each, dict)]
    return [each for each in found if each is not None]


def _picture(visit: Visit, file: Mapping[str, Any], organization_id: int) -> Picture | None:
    key, thumbnail = file.get("key"), file.get("thumbnail_key")
    if not isinstance(key, str) or not is_own(organization_id, key):
        return None
    sign = visit.system.links.sign
    url = sign(key)
    drawn = sign(thumbnail) if isinstance(thumbnail, str) and is_own(organization_id, thumbnail) else None
    if drawn is None and PICTURE.search(key):
        drawn = url
    width, height = (each if isinstance(each := file.get(name), int) else None for name in ("width", "height"))
    kind = file.get("kind")
    return Picture(key.rpartition("/")[2], url, drawn, kind if isinstance(kind, str) else None, width, height)


def _render(visit: Visit, job: Job, result: Mapping[str, Any]) -> Render | None:
    images, outputs = job.payload.get("images"), result.get("outputs")
    given = [
        {"key": each.get("artefact")}
        for each in (images.values() if isinstance(images, dict) else ())
        if isinstance(each, dict)
    ]
    after = pictures(visit, outputs if isinstance(outputs, list) else (), job.organization_id)
    return Render(pictures(visit, given, job.organization_id), after) if after else None


def _film(visit: Visit, job: Job, result: Mapping[str, Any]) -> Film | None:
    found = [each for each in _list(result, "shots") if _seconds(each, "end_s") is not None]
    if not found:
        return None
    whole_s = max(_seconds(each, "end_s") or 0.0 for each in found) or 1.0
    captions = {each.get("shot"): each.get("caption") for each in _list(result.get("captions"), "items")}
    shots = [
        _shot(visit, job, number, each, whole_s, captions.get(each.get("index", number)))
        for number, each in enumerate(found)
    ]
    said = _segments(_list(result.get("transcript"), "segments"), "text")
    sheet, summary = result.get("contact_sheet"), result.get("summary")
    short = summary.get("short") if isinstance(summary, dict) else None
    return Film(
        duration_s=whole_s,
        contact_sheet=_picture(visit, sheet, job.organization_id) if isinstance(sheet, dict) else None,
        shots=shots[:MOST_SHOTS],
        chapters=_segments(_list(result.get("chapters"), "items"), "title"),
        said=said[:MOST_SEGMENTS],
        summary=short if isinstance(short, str) else None,
        more_shots=max(0, len(shots) - MOST_SHOTS),
        more_said=max(0, len(said) - MOST_SEGMENTS),
    )


def _shot(visit: Visit, job: Job, number: int, said: Mapping[str, Any], whole_s: float, caption: Any) -> Shot:
    start_s, end_s = _seconds(said, "start_s") or 0.0, _seconds(said, "end_s") or 0.0
    keyframe, same = said.get("keyframe"), said.get("duplicate_of")
    return Shot(
        number=number + 1,
        start_s=start_s,
        end_s=end_s,
        x=round(_WIDTH * start_s / whole_s, 2),
        width=round(max(_LEAST_WIDTH, _WIDTH * (end_s - start_s) / whole_s), 2),
        keyframe=_picture(visit, keyframe, job.organization_id) if isinstance(keyframe, dict) else None,
        caption=caption if isinstance(caption, str) else None,
        duplicate_of=same + 1 if isinstance(same, int) else None,
    )


def _segments(found: list[Mapping[str, Any]], text: str) -> list[Segment]:
    return [
        Segment(start_s, str(each[text]))
        for each in found
        if (start_s := _seconds(each, "start_s")) is not None and each.get(text)
    ]


def _list(value: Any, name: str) -> list[Mapping[str, Any]]:
    found = value.get(name) if isinstance(value, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _seconds(value: Mapping[str, Any], name: str) -> float | None:
    found = value.get(name)
    return float(found) if isinstance(found, (int, float)) and found >= 0 else None
