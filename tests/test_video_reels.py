"""A small part of ops/bench/shots.py: one reel of real clips, spliced at known frames and made worse on purpose."""

from __future__ import annotations

from pathlib import Path

from ops.bench import reels, shots
from tests import clips

real_clips = clips.real_clips  # the fixture


def test_shots_of_a_reel_are_found_better_than_by_the_adaptive_detector(real_clips: Path, tmp_path: Path) -> None:
    reel = reels.make(reels.read_scenes(real_clips), tmp_path, 1001, transitions=8)

    found = shots.detect(reel)

    ours = shots.score([reel], [found["ours"]])
    assert ours["F1"] >= 0.85, (reel.truths, found["ours"])
    assert ours["kind right"] == 1
    assert all(ours["F1"] > shots.score([reel], [found[name]])["F1"] for name in shots.ADAPTIVE)
