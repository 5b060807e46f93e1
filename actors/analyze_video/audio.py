"""What is heard: loudness and silences, and on request the sound as pieces that a speech recogniser takes.

Everything is computed on blocks of 100 ms of one audio stream, which FFmpeg's `ebur128` filter gives together with the
loudness up to there. Its own totals are not used: they would begin anew where an interrupted analysis is taken up again.

With `speech=True` an analysis has the field `speech`: what the transcript is made from.

    {"sample_rate": 16000, "channels": 1, "format": "flac", "chunks": [
        {"index": 0, "start_s": 0.0, "end_s": 221.4, "overlap_s": 0.0, "file": "speech/chunk-0001.flac"}, …]}

Times are seconds from the first picture, as everywhere (a sound that begins earlier has a negative start); sample k of
a chunk is at `start_s + k / 16000`. A chunk lasts at most `CHUNK_S` (FLAC of 16 bits: 7.7 MB at worst). It ends in the
longest pause of its last minute; where there is none it is cut hard, and the next chunk begins `OVERLAP_S` before that:
its `overlap_s` says how much of its beginning the chunk before it has, too (else 0). A gap in the sound of more than
`GAP_S` ends a chunk as well, so that a recogniser's times need only `start_s` added. `speech` is None for a film
without sound. The job puts each file into storage and its `key` beside `file`.
"""

from __future__ import annotations

import math
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.filter import Graph
from numpy.typing import NDArray

SPEECH_RATE: Final = 16_000
CHUNK_S: Final = 240.0
OVERLAP_S: Final = 1.0
GAP_S: Final = 0.5
# Where a cut is looked for, and how long a pause must be for it.
_SEARCHED_S: Final = 60.0
_PAUSE_S: Final = 0.2
# Below the loud parts of a chunk by so much is a pause, also where music or traffic goes on.
_PAUSE_BELOW_DB: Final = 25.0

SILENCE_DB: Final = -50.0
SILENCE_S: Final = 0.5
MAX_SILENCES: Final = 5000

# ITU-R BS.1770-4 and EBU Tech 3342: gates and percentiles. The histograms have steps of 0.01 LU.
_FLOOR_LUFS: Final = -70.0
_STEPS_PER_LU: Final = 100
_STEPS: Final = 80 * _STEPS_PER_LU
_MOMENTARY_BLOCKS: Final = 4
_SHORT_TERM_BLOCKS: Final = 30
# A filter that starts in the middle of a film needs the three seconds of the short-term loudness, and the decoder some
# packets before them.
WARM_UP_S: Final = 4.0

_SUBBLOCKS: Final = 10


class Listener:
    """Takes the decoded frames of one audio stream; times are those of the file, in seconds, until `finish`."""

    def __init__(self, speech: Speech | None = None) -> None:
        self.speech = speech
        self._loudness = _Loudness()
        self._silences = _Silences()
        self._graph: Graph | None = None
        self._format: tuple[Any, ...] = ()
        self._source: Any = None
        self._clock_s = 0.0  # what is added to time stamps, since they began again
        self._last_s: float | None = None  # end of the last frame, by its time stamp
        self._resume_at_s: float | None = None
        self._recent: deque[tuple[float, float]] = deque()  # time stamps of frames, and what was made of them
        self._known: dict[float, float] = {}  # the same, before an interruption
        self.heard_to_s: float | None = None  # end of the last block

    def add(self, frame: AudioFrame) -> None:
        """Raises av.error.FFmpegError for sound that the filter refuses."""
        start_s = self._time_of(frame)
        layout = (frame.sample_rate, frame.format.name, frame.layout.name, frame.layout.nb_channels)
        if layout != self._format:
            if self._graph is not None:
                self._end_graph()
            self._open_graph(frame, start_s)
            self._format = layout
        frame.pts, frame.time_base = round(start_s * frame.sample_rate), Fraction(1, frame.sample_rate)
        self._source.push(frame)
        self._pull()

    def finish(self, start_s: float) -> dict[str, Any] | None:
        """`start_s` is the time of the first picture. None if nothing was heard."""
        if self._graph is not None:
            self._end_graph()
        if self.speech is not None:
            self.speech.finish()
        if self.heard_to_s is None:
            return None
        return {"loudness": self._loudness.facts(), "silences": self._silences.facts(self.heard_to_s, start_s)}

    def state(self) -> dict[str, Any]:
        """JSON and arrays for `restore`; at the same place `Speech` is brought to a state that can be written down."""
        return {
            "heard_to_s": self.heard_to_s,
            "clock_s": self._clock_s,
            "recent": [list(pair) for pair in self._recent],
            "loudness": self._loudness.state(),
            "silences": self._silences.state(),
            "speech": self.speech.state() if self.speech is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there: frames must come from `WARM_UP_S` before `heard_to_s` on."""
        self.heard_to_s = self._resume_at_s = state["heard_to_s"]
        self._clock_s = state["clock_s"]
        self._known = dict(state["recent"])
        self._loudness.restore(state["loudness"])
        self._silences.restore(state["silences"])
        if self.speech is not None:
            self.speech.restore(state["speech"])

    def _time_of(self, frame: AudioFrame) -> float:
        length_s = frame.samples / frame.sample_rate
        if frame.pts is None or frame.time_base is None:
            start_s = self._last_s or 0.0
        else:
            stamp = start_s = float(frame.pts * frame.time_base) + self._clock_s
            if self._last_s is None:
                start_s = self._known.get(stamp, stamp)
            if self._last_s is not None and start_s < self._last_s - 0.5:  # time stamps that begin again
                self._clock_s += self._last_s - start_s
                start_s = self._last_s
            # A clock of milliseconds rounds: sound without a gap goes on from sample to sample.
            elif self._last_s is not None and abs(start_s - self._last_s) < 0.02:
                start_s = self._last_s
            self._recent.append((stamp, start_s))
            while self._recent[-1][1] - self._recent[0][1] > WARM_UP_S + 4:
                self._recent.popleft()
        self._last_s = start_s + length_s
        return start_s

    def _open_graph(self, frame: AudioFrame, start_s: float) -> None:
        graph = Graph()
        rate = frame.sample_rate
        source: Any = graph.add_abuffer(
            sample_rate=rate,
            format=frame.format.name,
            layout=frame.layout.name,
            channels=frame.layout.nb_channels,
            time_base=Fraction(1, rate),
        )
        last = source
        if self._resume_at_s is not None:
            # The blocks must fall where they fell before the interruption.
            hop = rate // 10
            back = math.floor(min(WARM_UP_S, self._resume_at_s - start_s) * rate / hop) * hop
            skipped = round((self._resume_at_s - start_s) * rate) - back
            if skipped > 0:
                trim = graph.add("atrim", f"start_sample={skipped}")
                last.link_to(trim)
                last = trim
        meter = graph.add("ebur128", "metadata=1:framelog=quiet:peak=true")
        sink = graph.add("abuffersink")
        last.link_to(meter)
        meter.link_to(sink)
        graph.configure()
        self._graph, self._source = graph, source

    def _end_graph(self) -> None:
        self._source.push(None)
        self._pull()
        self._graph = None
        self._loudness.begin_again()

    def _pull(self) -> None:
        assert self._graph is not None  # noqa: S101 - opened by the first frame
        while True:
            try:
                block: Any = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            self._hear(block)

    def _hear(self, block: Any) -> None:
        rate = block.sample_rate
        start_s = float(block.pts * block.time_base)
        if self._resume_at_s is not None:
            if start_s < self._resume_at_s - 0.01:
                self._loudness.warm_up()
                return
            self._resume_at_s = None
        self._loudness.add(block.metadata)
        samples: NDArray[np.float64] = block.to_ndarray()  # packed: (1, samples × channels)
        samples = samples.reshape(block.samples, -1)
        self._silences.add(samples, start_s, rate)
        if self.speech is not None:
            self.speech.add(block, samples, start_s)
        self.heard_to_s = start_s + block.samples / rate


class _Loudness:
    """Histograms of the momentary (0.4 s) and the short-term (3 s) loudness of all blocks, and the highest peak."""

    def __init__(self) -> None:
        self._momentary = np.zeros(_STEPS, np.int64)
        self._short_term = np.zeros(_STEPS, np.int64)
        self._true_peak = 0.0
        self._since_start = 0

    def begin_again(self) -> None:
        self._since_start = 0

    def warm_up(self) -> None:
        self._since_start += 1

    def add(self, metadata: dict[str, str]) -> None:
        self._since_start += 1
        if "lavfi.r128.M" not in metadata:  # the last block, which is shorter
            return
        # A window that is not full yet counts its missing part as silence.
        if self._since_start >= _MOMENTARY_BLOCKS:
            _count(self._momentary, float(metadata["lavfi.r128.M"]))
        if self._since_start >= _SHORT_TERM_BLOCKS:
            _count(self._short_term, float(metadata["lavfi.r128.S"]))
        self._true_peak = max(self._true_peak, float(metadata["lavfi.r128.true_peak"]))

    def facts(self) -> dict[str, Any]:
        integrated = _gated_mean(self._momentary, -10.0)
        return {
            "integrated_lufs": None if integrated is None else round(integrated[0], 1),
            "range_lu": round(_range(self._short_term), 1),
            "true_peak_dbtp": round(20 * math.log10(self._true_peak), 1) if self._true_peak > 0 else None,
        }

    def state(self) -> dict[str, Any]:
        return {
            "momentary": self._momentary.copy(),
            "short_term": self._short_term.copy(),
            "true_peak": self._true_peak,
            "since_start": self._since_start,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._momentary, self._short_term = state["momentary"].copy(), state["short_term"].copy()
        self._true_peak = state["true_peak"]
        # What the warm-up counts in the end is no less than was counted before, or more than any window.
        self._since_start = max(0, state["since_start"] - round(WARM_UP_S * 10))


def _count(histogram: NDArray[np.int64], lufs: float) -> None:
    if lufs > _FLOOR_LUFS:
        histogram[min(_STEPS - 1, int((lufs - _FLOOR_LUFS) * _STEPS_PER_LU))] += 1


_LEVELS: Final = _FLOOR_LUFS + (np.arange(_STEPS) + 0.5) / _STEPS_PER_LU
_ENERGIES: Final = 10 ** (_LEVELS / 10)


def _gated_mean(histogram: NDArray[np.int64], gate_lu: float) -> tuple[float, NDArray[np.int64]] | None:
    """The mean of what lies above the floor and above the relative gate, in LUFS; and that part of the histogram."""
    if not histogram.any():
        return None
    mean = 10 * math.log10(float(histogram @ _ENERGIES) / int(histogram.sum()))
    kept = np.where(mean + gate_lu <= _LEVELS, histogram, 0)
    return 10 * math.log10(float(kept @ _ENERGIES) / int(kept.sum())), kept


def _range(histogram: NDArray[np.int64]) -> float:
    found = _gated_mean(histogram, -20.0)
    if found is None:
        return 0.0
    total = np.cumsum(found[1])
    low, high = (int(np.searchsorted(total, total[-1] * share)) for share in (0.10, 0.95))
    return float(_LEVELS[min(high, _STEPS - 1)] - _LEVELS[low])


class _Silences:
    """Stretches of at least `SILENCE_S` in which no sample of any channel is above `SILENCE_DB`, to 10 ms."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []
        self._since_s: float | None = None
        self._to_s = 0.0
        self._total_s = 0.0

    def add(self, samples: NDArray[np.float64], start_s: float, rate: int) -> None:
        if self._since_s is not None and start_s > self._to_s + GAP_S:
            self._close(self._to_s)
        threshold = 10 ** (SILENCE_DB / 20)
        step = max(1, rate // (10 * _SUBBLOCKS))
        # Of all channels in one run through memory: the highest of each sample first takes up to thirty times as long.
        peaks = np.maximum.reduceat(np.abs(samples).ravel(), np.arange(0, len(samples), step) * samples.shape[1])
        for number, peak in enumerate(peaks.tolist()):
            at_s = start_s + number * step / rate
            if peak > threshold:
                self._close(at_s)
            elif self._since_s is None:
                self._since_s = at_s
        self._to_s = start_s + len(samples) / rate

    def _close(self, at_s: float) -> None:
        if self._since_s is not None and at_s - self._since_s >= SILENCE_S - 1e-6:
            self._total_s += at_s - self._since_s
            if len(self._found) < MAX_SILENCES:
                self._found.append((self._since_s, at_s))
        self._since_s = None

    def facts(self, end_s: float, start_s: float) -> list[dict[str, float]]:
        self._close(end_s)
        return [
            {"start_s": round(a - start_s, 2), "end_s": round(b - start_s, 2), "duration_s": round(b - a, 2)}
            for a, b in self._found
        ]

    def state(self) -> dict[str, Any]:
        return {
            "found": list(self._found),
            "since_s": self._since_s,
            "to_s": self._to_s,
            "total_s": self._total_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._found = [(a, b) for a, b in state["found"]]
        self._since_s, self._to_s, self._total_s = state["since_s"], state["to_s"], state["total_s"]


class Speech:
    """Writes the sound as 16 kHz mono FLAC files `chunk-0001.flac` … of a folder. At most one chunk is in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._chunks: list[dict[str, Any]] = []
        self._resampler: av.AudioResampler | None = None
        self._pcm = bytearray()  # of the open chunk: 16 bits, as the machine has them
        self._start_s: float | None = None
        self._overlap_s = 0.0
        self._levels: deque[float] = deque()  # dB of each block of the open chunk
        self._given_s = 0.0  # end of what was given to the resampler

    def add(self, block: Any, samples: NDArray[np.float64], start_s: float) -> None:
        if self._start_s is not None and abs(start_s - self._given_s) > GAP_S:
            self._drain()
            self._write(len(self._pcm), overlap=0)
            self._start_s = None
        if self._start_s is None:
            self._start_s, self._overlap_s = start_s, 0.0
        if self._resampler is None:
            self._resampler = av.AudioResampler("s16", "mono", SPEECH_RATE)
        block.pts = None
        for piece in self._resampler.resample(block):
            self._pcm += bytes(piece.planes[0])[: piece.samples * 2]
        mean = float(np.square(samples).mean()) if samples.size else 0.0
        self._levels.append(10 * math.log10(mean) if mean > 1e-12 else -120.0)
        self._given_s = start_s + block.samples / block.sample_rate
        if len(self._pcm) >= CHUNK_S * SPEECH_RATE * 2:
            self._cut()

    def finish(self) -> None:
        self._drain()
        self._write(len(self._pcm), overlap=0)

    def facts(self, start_s: float) -> dict[str, Any] | None:
        """See above; `start_s` is the time of the first picture."""
        chunks = [
            {
                "index": index,
                "start_s": round(chunk["start_s"] - start_s, 4),
                "end_s": round(chunk["start_s"] + chunk["samples"] / SPEECH_RATE - start_s, 4),
                "overlap_s": round(chunk["overlap_s"], 4),
                "file": chunk["file"],
            }
            for index, chunk in enumerate(self._chunks)
        ]
        if not chunks:
            return None
        return {"sample_rate": SPEECH_RATE, "channels": 1, "format": "flac", "chunks": chunks}

    @property
    def files(self) -> list[str]:
        return [chunk["file"] for chunk in self._chunks]

    def state(self) -> dict[str, Any]:
        """The resampler ends here and begins anew, so that a run that is taken up again has the same samples."""
        self._drain()
        return {
            "chunks": list(self._chunks),
            "pcm": bytes(self._pcm),
            "start_s": self._start_s,
            "overlap_s": self._overlap_s,
            "levels": list(self._levels),
            "given_s": self._given_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._chunks = list(state["chunks"])
        self._pcm = bytearray(state["pcm"])
        self._start_s, self._overlap_s = state["start_s"], state["overlap_s"]
        self._levels = deque(state["levels"])
        self._given_s = state["given_s"]

    def _drain(self) -> None:
        if self._resampler is not None:
            for piece in self._resampler.resample(None):
                self._pcm += bytes(piece.planes[0])[: piece.samples * 2]
            self._resampler = None

    def _cut(self) -> None:
        """Ends the chunk in the longest pause of its last minute, or here."""
        levels = np.array(self._levels)
        quiet = levels < max(SILENCE_DB, float(np.percentile(levels, 95)) - _PAUSE_BELOW_DB)
        searched = round(_SEARCHED_S * 10)
        first = max(1, len(quiet) - searched)
        best, run = (0, 0), 0
        for number in range(first, len(quiet)):
            run = run + 1 if quiet[number] else 0
            if run >= max(best[0], round(_PAUSE_S * 10)):
                best = (run, number + 1)
        length, end = best
        if length:
            middle = end - length / 2
            self._write(round(middle * SPEECH_RATE / 10) * 2, overlap=0)
        else:
            self._write(len(self._pcm), overlap=round(OVERLAP_S * SPEECH_RATE) * 2)

    def _write(self, cut: int, *, overlap: int) -> None:
        """The first `cut` bytes become a file; the rest, and `overlap` bytes before it, begin the next chunk."""
        cut = min(cut, len(self._pcm))
        if cut == 0 or self._start_s is None:
            return
        name = f"chunk-{len(self._chunks) + 1:04d}.flac"
        _write_flac(self._folder / name, bytes(self._pcm[:cut]))
        self._chunks.append(
            {
                "start_s": self._start_s,
                "samples": cut // 2,
                "overlap_s": self._overlap_s,
                "file": f"{self._folder.name}/{name}",
            }
        )
        kept = cut - overlap
        self._start_s += kept / 2 / SPEECH_RATE
        self._overlap_s = overlap / 2 / SPEECH_RATE
        del self._pcm[:kept]
        for _ in range(min(len(self._levels), round(kept / 2 / SPEECH_RATE * 10))):
            self._levels.popleft()


def _write_flac(path: Path, pcm: bytes) -> None:
    samples = np.frombuffer(pcm, np.int16)
    with av.open(str(path), "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate=SPEECH_RATE)
        stream.layout, stream.format = "mono", "s16"
        for start in range(0, len(samples), 1 << 16):
            piece = np.ascontiguousarray(samples[start : start + (1 << 16)].reshape(1, -1))
            frame = AudioFrame.from_ndarray(piece, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = SPEECH_RATE, start, Fraction(1, SPEECH_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
