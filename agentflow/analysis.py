"""The shape of the result of `analyze_video`, for its readers: the API's description, and a test that holds the actor to it.

Times are seconds from the first picture, frames are counted from 0 in the order shown. Where a file is named, `key` is its key
in storage and the API adds `url`, a signed link.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoredFile(_Part):
    file: str = Field(description="Its name, as `keyframes/shot-0001.jpg`")
    key: str | None = None
    url: str | None = None


class Stretch(_Part):
    start_s: float
    end_s: float
    duration_s: float


class VideoFacts(_Part):
    stream: int
    codec: str
    width: int = Field(description="For the eye: turned upright, pixels made square")
    height: int
    fps: float = Field(description="Frames by time; the mean where it varies")
    start_s: float = Field(description="Time stamp of the first picture in the file")
    duration_s: float
    frames: int
    variable_frame_rate: bool


class TransitionFacts(_Part):
    """How a shot begins. From the start to the end (exclusive) the last shot is still seen, or nothing; none for a cut."""

    kind: Literal["cut", "dissolve", "fade"]
    start_frame: int
    end_frame: int
    start_s: float
    end_s: float


class Picture(StoredFile):
    width: int
    height: int


class KeyframeFacts(Picture):
    frame: int
    time_s: float
    sharpness: float = Field(description="Variance of the Laplacian of the small gray picture")
    luma: float = Field(description="16 black, 235 white")
    phash: str = Field(description="64 bits, hexadecimal; pictures that look alike differ in few")


class ShotFacts(_Part):
    index: int
    start_frame: int
    end_frame: int
    start_s: float
    end_s: float
    duration_s: float
    transition: TransitionFacts | None = Field(description="null for the first shot")
    brightness: float = Field(description="Mean, 0 black to 1 white")
    motion: float = Field(description="Mean change from frame to frame, 0 to 1; above 0.03 is lively")
    duplicate_of: int | None = Field(description="Index of the first shot whose keyframe looks the same")
    keyframe: KeyframeFacts


class ContactSheetFacts(Picture):
    columns: int
    rows: int


class SpriteFacts(ContactSheetFacts):
    """Small pictures at even distances, for the preview above a time line; `vtt` names the part for each time."""

    tiles: int
    tile_width: int
    tile_height: int
    every_s: float
    vtt: StoredFile


class Loudness(_Part):
    """EBU R128 (ITU-R BS.1770-4)."""

    integrated_lufs: float | None = Field(description="null if all is below -70 LUFS")
    range_lu: float
    true_peak_dbtp: float | None


class AudioFacts(_Part):
    stream: int
    loudness: Loudness
    silences: list[Stretch] = Field(description="At least 0.5 s below -50 dBFS; at most 5000")


class Cue(_Part):
    start_s: float
    end_s: float
    text: str


class SubtitleTrack(_Part):
    stream: int
    codec: str | None
    language: str | None
    title: str | None
    is_text: bool = Field(description="false for pictures of text, which are not read")
    cue_count: int
    cues: list[Cue] = Field(description="The first ones: 3000 or 300,000 characters, of all tracks together")
    file: str | None = Field(description="WebVTT with all of them")
    key: str | None = None
    url: str | None = None


class SpeechChunk(StoredFile):
    index: int
    start_s: float
    end_s: float
    overlap_s: float = Field(description="So much of its beginning is in the chunk before, too")


class Speech(_Part):
    sample_rate: int
    channels: int
    format: str
    chunks: list[SpeechChunk]


class Analysis(BaseModel):
    """What was found in a video. Later versions may add fields."""

    container: dict[str, Any]
    streams: list[dict[str, Any]]
    video: VideoFacts
    shots: list[ShotFacts] = Field(description="They tile the video")
    contact_sheet: ContactSheetFacts
    sprite: SpriteFacts
    black: list[Stretch] = Field(description="At least 0.5 s with nothing to be seen")
    frozen: list[Stretch] = Field(description="At least 2 s in which nothing moves")
    audio: AudioFacts | None = Field(description="null without sound")
    subtitles: list[SubtitleTrack]
    speech: Speech | None = Field(description="What a transcript is made from; null unless one is")
    partial: bool = Field(description="The file is damaged or cut short; `warnings` say where")
    warnings: list[str]


def json_schema() -> dict[str, Any]:
    """The JSON schema, without references, so that it may stand anywhere in a larger one."""
    schema = Analysis.model_json_schema()
    parts = schema.pop("$defs")

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            part = parts[value["$ref"].rsplit("/", 1)[1]]
            return whole({**part, **{name: each for name, each in value.items() if name != "$ref"}})
        return {name: whole(each) for name, each in value.items()}

    inlined: dict[str, Any] = whole(schema)
    return inlined
