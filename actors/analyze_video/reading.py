"""One pass over a file from first to last packet, and what the pass tells of rate, length and damage."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Discard
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from actors.analyze_video.audio import WARM_UP_S
from actors.analyze_video.pictures import Upright
from actors.analyze_video.probe import time_words
from agentflow.errors import Permanent

# Of the end: damage that begins here is the cut of a truncated file, not a hole in it.
_LAST_S = 0.5


@dataclass
class Reading:
    """One pass over the packets of a file, and what was learnt on the way.

    `pictures` gives the frames of one stream; the packets of sound and subtitles are handed on in the same pass.

    It can be taken up again at a key picture: packets before it are read and not decoded, which needs no index and is
    exact in every container. `decoded` counts the pictures that this process had decoded.
    """

    container: InputContainer
    stream: VideoStream
    max_pixels: int
    frames: int = 0
    time_s: float = 0.0  # of the last frame
    end_s: float = 0.0  # of the last frame, its own duration included
    bytes_share: float = 0.0
    upright: Upright = field(default_factory=Upright)
    _size: tuple[int, int] = (0, 0)
    _first_pts: int | None = None
    _last_pts: int | None = None
    _intervals: Counter[int] = field(default_factory=Counter)  # ticks between two frames
    _packets_end: dict[int, tuple[int, Any]] = field(default_factory=dict)  # by stream; the end and its time base
    _damage: int = 0
    _damage_at_s: float = 0.0
    _stopped: str | None = None
    _last_error: av.error.FFmpegError | None = None
    decoded: int = 0
    audio_damage: int = 0
    audio: AudioStream | None = None
    hear: Callable[[AudioFrame], None] | None = None
    subtitles: Callable[[Any], None] | None = None
    #: Called before each frame at which the reading can be taken up again, with what `resume` takes.
    at_key: Callable[[dict[str, Any]], None] | None = None
    _tick_s: float = 0.0  # of the pictures' time stamps
    _nominal_s: float = 0.0
    _packets_seen: int = 0  # of the pictures' stream
    _keys: dict[int, int] = field(default_factory=dict)  # number of the packet by the time stamp of the key picture
    _audio_seen: int = 0
    _audio_times: deque[tuple[int, float]] = field(default_factory=deque)
    _subtitles_seen: int = 0
    _from: dict[str, Any] | None = None

    def pictures(self, tick: Callable[[], None]) -> Iterator[VideoFrame]:
        """Frames in the order shown. `tick` is called with each packet, also when none can be decoded."""
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.options = {"max_pixels": str(self.max_pixels)}
        wanted = ("video", "audio", "subtitle")
        for stream in self.container.streams:
            if stream.type not in wanted:
                stream.discard = Discard.all
        size = self.container.size or 0
        for packet in self._packets():
            if size > 0 and packet.pos is not None:
                self.bytes_share = max(self.bytes_share, packet.pos / size)
            if packet.stream_index == self.stream.index:
                for frame in self._shown(packet):
                    self._learn(frame)
                    yield frame
            elif self.audio is not None and packet.stream_index == self.audio.index:
                self._listen(packet)
            elif self.subtitles is not None and packet.stream.type == "subtitle":
                self._subtitles_seen += 1
                if self._from is None or self._subtitles_seen > self._from["subtitles"]:
                    self.subtitles(packet)
            tick()

    def _shown(self, packet: Any) -> Iterator[VideoFrame]:
        number = self._packets_seen
        self._packets_seen += 1
        start = self._from
        if start is not None and number < start["packet"] and packet.size:
            return
        if packet.is_keyframe and packet.pts is not None:
            self._keys[packet.pts] = number
            if len(self._keys) > 16:
                del self._keys[next(iter(self._keys))]
        for frame in self._decoded(packet):
            self.decoded += 1
            if start is not None:
                # Pictures that are shown before the key picture may come after it, and need what was not decoded.
                if frame.pts is None or frame.pts < start["pts"]:
                    continue
                if not start.get("reached"):
                    start["reached"] = True
                    yield frame
                    continue
            if self.at_key is not None and frame.key_frame and frame.pts in self._keys and not frame.is_corrupt:
                self.at_key({"packet": self._keys[frame.pts], "pts": frame.pts, **self._audio_place()})
            yield frame

    def _listen(self, packet: Any) -> None:
        """Sound that cannot be decoded is left out: the pictures go on."""
        number = self._audio_seen
        self._audio_seen += 1
        if packet.pts is not None:
            self._audio_times.append((number, float(packet.pts * packet.time_base)))
            while self._audio_times[-1][1] - self._audio_times[0][1] > WARM_UP_S + 2:
                self._audio_times.popleft()
        if self.hear is None or (self._from is not None and number < self._from["audio_from"] and packet.size):
            return
        try:
            for frame in packet.decode():
                self.hear(frame)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self.audio_damage += 1

    def _audio_place(self) -> dict[str, Any]:
        times = self._audio_times
        return {
            "audio": self._audio_seen,
            "audio_from": times[0][0] if times else self._audio_seen,
            "subtitles": self._subtitles_seen,
        }

    def state(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "time_s": self.time_s,
            "end_s": self.end_s,
            "upright": [
                self.upright.transposed,
                self.upright.flip_x,
                self.upright.flip_y,
                str(self.upright.sample_aspect),
            ],
            "size": list(self._size),
            "first_pts": self._first_pts,
            "last_pts": self._last_pts,
            "intervals": [[ticks, count] for ticks, count in self._intervals.items()],
            "damage": [self._damage, self._damage_at_s, self.audio_damage],
        }

    def resume(self, place: dict[str, Any], state: dict[str, Any]) -> None:
        """Before `pictures`: go on at a place that `at_key` was called with."""
        self._from = dict(place)
        self.frames, self.time_s, self.end_s = state["frames"], state["time_s"], state["end_s"]
        transposed, flip_x, flip_y, aspect = state["upright"]
        self.upright = Upright(transposed, flip_x, flip_y, Fraction(aspect))
        self._size = (state["size"][0], state["size"][1])
        self._first_pts, self._last_pts = state["first_pts"], state["last_pts"]
        self._intervals = Counter(dict(state["intervals"]))
        self._damage, self._damage_at_s, self.audio_damage = state["damage"]

    def _packets(self) -> Iterator[Any]:
        packets = self.container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError as err:
                self._stopped = str(err.strerror)
                flush = av.Packet()
                flush.stream = self.stream
                yield flush
                return
            if packet.is_corrupt:
                self._note_damage()
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                end = stamp + (packet.duration or 0)
                known = self._packets_end.get(packet.stream_index)
                if known is None or end > known[0]:
                    self._packets_end[packet.stream_index] = (end, packet.time_base)
            yield packet

    def _decoded(self, packet: Any) -> list[VideoFrame]:
        try:
            frames: list[VideoFrame] = packet.decode()
        except av.error.MemoryError:
            raise
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as err:
            self._last_error = err
            self._note_damage()
            return []
        return frames

    def _learn(self, frame: VideoFrame) -> None:
        if self.frames == 0 or self._tick_s == 0:  # fractions are slow
            self._tick_s = float(frame.time_base or self.stream.time_base or Fraction(1, 1000))
            self._nominal_s = float(1 / (self.stream.average_rate or Fraction(25)))
        tick_s, nominal_s = self._tick_s, self._nominal_s
        if self.frames == 0:
            self.upright = Upright.of(frame, self.stream.sample_aspect_ratio)
            self._size = (frame.width, frame.height)
            self._first_pts = frame.pts
        elif frame.pts is None or self._last_pts is None or frame.pts <= self._last_pts or self._first_pts is None:
            self.time_s += nominal_s  # no time stamp, or one that goes back: as if the rate were constant
        else:
            self._intervals[frame.pts - self._last_pts] += 1
            if len(self._intervals) > 1000:  # a clock with jitter; the commonest tell enough
                self._intervals = Counter(dict(self._intervals.most_common(500)))
            by_clock = (frame.pts - self._first_pts) * tick_s
            self.time_s = by_clock if by_clock > self.time_s else self.time_s + nominal_s
        if frame.pts is not None:
            self._last_pts = frame.pts
        if frame.is_corrupt:
            self._note_damage()
        self.frames += 1
        self.end_s = self.time_s + (frame.duration * tick_s if frame.duration else nominal_s)

    def _note_damage(self) -> None:
        """Damage before the first picture is how every recording begins that starts in the middle of a broadcast."""
        if self.frames == 0 or (self._from is not None and not self._from.get("reached")):
            return
        if self._damage == 0:
            self._damage_at_s = self.time_s
        self._damage += 1

    def nothing_read(self) -> Permanent:
        """The error for a stream that gave no picture at all."""
        codec = self.stream.codec_context.name
        if isinstance(self._last_error, av.error.PatchWelcomeError | av.error.NotImplementedError):
            return Permanent(f"this kind of {codec} video cannot be decoded here", code="unsupported_codec")
        return Permanent(f"no picture of the {codec} video stream can be decoded", code="no_frames")

    @property
    def first_s(self) -> float:
        """The time stamp of the first picture, in seconds."""
        base = self.stream.time_base
        return float(self._first_pts * base) if self._first_pts is not None and base else 0.0

    def facts(self) -> dict[str, Any]:
        width, height = self.upright.size(*self._size)
        variable = self._is_variable()
        rate = self.stream.average_rate
        fps = float(rate) if rate and not variable else self.frames / self.end_s
        start = self.stream.time_base * self._first_pts if self._first_pts and self.stream.time_base else 0
        return {
            "stream": self.stream.index,
            "codec": self.stream.codec_context.name,
            "width": width,
            "height": height,
            "fps": round(fps, 3),
            "start_s": round(float(start), 6),
            "duration_s": round(self.end_s, 6),
            "frames": self.frames,
            "variable_frame_rate": variable,
        }

    def _is_variable(self) -> bool:
        """More than one interval in fifty differs from the commonest by more than a tick or a twentieth.

        A tick is how containers with coarse clocks round (Matroska and Flash: 1 ms, so 33 and 34 at 30 per second).
        """
        if not self._intervals:
            return False
        commonest = self._intervals.most_common(1)[0][0]
        tolerance = max(1.0, commonest / 20)
        odd = sum(count for ticks, count in self._intervals.items() if abs(ticks - commonest) > tolerance)
        return odd * 50 > self._intervals.total()

    def warnings(self, stated_s: float | None) -> list[str]:
        """What is missing of the file, in sentences; none if it was read whole. `stated_s` is what its headers say."""
        warnings = []
        if self._damage and self._damage_at_s < self.end_s - _LAST_S:
            places = "1 damaged place" if self._damage == 1 else f"{self._damage} damaged places"
            warnings.append(f"{places}, the first at {time_words(self._damage_at_s)}: pictures may be wrong or missing")
        read = f"read up to {time_words(self.end_s)}"
        if self._stopped:
            warnings.append(f"the file cannot be read to its end ({self._stopped}): {read}")
        elif stated_s and self._missing_s(stated_s):
            warnings.append(f"the file ends early: {read} of {time_words(stated_s)}")
        elif (self._damage and not warnings) or self._lacks_gif_trailer():
            warnings.append(f"the file ends early: {read}")
        return warnings

    def _missing_s(self, stated_s: float) -> float:
        """Seconds that the headers promise and the file does not hold; 0 for the inexactness of good files.

        The duration of the stream itself is compared with its pictures; where the container knows only its own, with
        the last packet of any stream, for sound often outlasts the pictures.
        """
        held_s = self.end_s
        if not self.stream.duration:
            start = (self.container.start_time or 0) / av.time_base
            held_s = max([held_s, *(float(end * base) - start for end, base in self._packets_end.values())])
        # Screen recordings hold their last picture for as long as nothing moved, and not every container says so.
        longest = max(self._intervals, default=0) * float(self.stream.time_base or 0)
        missing_s = stated_s - held_s
        return missing_s if missing_s > max(0.5, 2 * longest, 0.005 * stated_s) else 0.0

    def _lacks_gif_trailer(self) -> bool:
        """The one sign of a GIF that was cut short: FFmpeg counts the pictures that are there, and says nothing."""
        if self.container.format.name != "gif":
            return False
        with Path(self.container.name).open("rb") as file:
            file.seek(-1, 2)
            return file.read() != b";"
