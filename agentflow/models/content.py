"""What goes to a model, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Image:
    """A picture's own bytes; `media_type` is image/png, image/jpeg, image/webp or image/gif."""

    data: bytes
    media_type: str


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Completion:
    """`finish_reason` is stop, or length where the answer was cut off at `max_tokens`."""

    text: str
    finish_reason: str | None
    model: str


@dataclass(frozen=True)
class Word:
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Segment:
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Transcription:
    """Times count from the start of the sound. Servers that know no times of words, or none at all, leave these empty."""

    text: str
    language: str | None
    segments: tuple[Segment, ...]
    words: tuple[Word, ...]
