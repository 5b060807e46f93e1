"""Speech that a program can hear exactly: each word is a tone of its own, so that a fake recogniser really has to listen.

sound = speak([Spoken("w07", 0.5, 0.8), …], duration_s=10)     # samples, 16 kHz
recognise(wav_of(sound))                                       # {"text", "language", "words": [{"word", "start", "end"}]}
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

RATE = 16_000
_LOWEST_HZ, _STEP_HZ = 400.0, 25.0
_WINDOW = RATE // 100
_WHOLE_S = 0.15  # what is shorter was cut by the edge of a chunk, and is misheard

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Spoken:
    word: str  # w00 … w99
    start_s: float
    end_s: float


def speak(words: list[Spoken], duration_s: float) -> Samples:
    sound = np.zeros(round(duration_s * RATE), np.float32)
    for spoken in words:
        first, last = round(spoken.start_s * RATE), round(spoken.end_s * RATE)
        tone = np.sin(2 * np.pi * (_LOWEST_HZ + _STEP_HZ * int(spoken.word[1:])) * np.arange(last - first) / RATE)
        sound[first:last] = 0.5 * tone
    return sound


def wav_of(sound: Samples) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def recognise(file: bytes, *, late_s: float = 0.0) -> dict[str, Any]:
    """What a recogniser answers; it may be late (or early) by `late_s` with every word."""
    words = [
        {"word": word, "start": max(0.0, start + late_s), "end": max(0.0, end + late_s)}
        for word, start, end in _heard(_samples(file))
    ]
    sentence = " ".join(str(word["word"]) for word in words)
    return {"text": f"{sentence}." if sentence else "", "language": "en", "words": words}


def _samples(file: bytes) -> Samples:
    with av.open(io.BytesIO(file)) as container:
        resampler = av.AudioResampler("flt", "mono", RATE)
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in frames]) if frames else np.zeros(0, np.float32)


def _heard(sound: Samples) -> list[tuple[str, float, float]]:
    windows = sound[: len(sound) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
    loud = np.concatenate([[False], np.abs(windows).max(axis=1) > 0.1, [False]])
    edges = np.flatnonzero(loud[1:] != loud[:-1]).reshape(-1, 2)
    return [(_word(sound[a * _WINDOW : b * _WINDOW]), a * _WINDOW / RATE, b * _WINDOW / RATE) for a, b in edges]


def _word(tone: Samples) -> str:
    if len(tone) < _WHOLE_S * RATE:
        return "uh"
    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), 1 << 16))
    return f"w{round((np.argmax(spectrum) * RATE / (1 << 16) - _LOWEST_HZ) / _STEP_HZ):02}"
