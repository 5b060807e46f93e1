"""An analysis that is killed half-way: whoever takes it up gets the same result, and decodes little twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.analyze_video import analysis, checkpoint
from tests import clips
from tests.clips import RATE, moved, plain, scene, write_film

LENGTHS = (90, 40, 120, 200, 75, 150, 60, 300, 45, 220, 110, 80, 260)

#: Plays the worker: keeps each state elsewhere before it removes it, as storage would. The child itself writes down how many
#: pictures it has decoded.
CHILD = """
import json, os, shutil, sys
from pathlib import Path
from actors.analyze_video import child
from actors.analyze_video.reading import Reading

source, out, kept, resume, log, speech = sys.argv[1:]
out, kept = Path(out), Path(kept)
count = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
decoded = Reading._decoded

def counted(self, packet):
    for frame in decoded(self, packet):
        os.write(count, b".")
        yield frame

Reading._decoded = counted

def note(files):
    *pictures, state = files
    for name in pictures:
        (kept / name).parent.mkdir(exist_ok=True)
        shutil.copy(out / name, kept / name)
    shutil.copy(out / state, kept / "last.part")
    (kept / "last.part").rename(kept / "last.zip")
    print("kept", flush=True)
    (out / state).unlink()

result = child.analyze(source=source, out_dir=str(out), share_done=0.0, share_end=1.0, report=lambda f, s: None,
                       note=note,
                       resume=resume or None, speech=bool(speech))
shutil.copytree(out, kept, dirs_exist_ok=True)
print("result " + json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 s of shots, a dissolve and a fade, with sound and key pictures every 4 s."""
    return write_film(
        tmp_path_factory.mktemp("film") / "film.mkv",
        _pictures(),
        sound_s=sum(LENGTHS) / RATE,
        encoding={
            "preset": "ultrafast",
            "crf": "20",
            "g": str(4 * RATE),
            "bf": "2",
            "x264-params": "scenecut=0:open-gop=1",
        },
    )


def _pictures() -> Iterator[clips.Picture]:
    for n, length in enumerate(LENGTHS):
        for i in range(length):
            picture = moved(scene(n), i // 2)
            fading = 12 - (length - i)
            if n % 4 == 1 and fading >= 0:
                picture = clips.mixed(picture, scene(n + 1), fading / 13)
            elif n % 4 == 3 and fading >= 0:
                picture = clips.mixed(picture, plain(16), fading / 11)
            yield picture


class Runs:
    """Runs of the analysis of one film, each in a process of its own, with what is kept from one to the next."""

    def __init__(self, film: Path, folder: Path, speech: bool = False) -> None:
        self.film, self.kept, self._folder, self._speech = film, folder / "kept", folder, speech
        self.kept.mkdir(parents=True)
        self._runs = 0

    def start(self) -> subprocess.Popen[str]:
        out = self._folder / f"out-{self._runs}"
        out.mkdir()
        self._runs += 1
        state = self.kept / "last.zip"
        arguments = [self.film, out, self.kept, state if state.exists() else "", self.log(self._runs - 1)]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, arguments), "yes" if self._speech else ""],
            stdout=subprocess.PIPE,
            text=True,
        )

    def log(self, run: int) -> Path:
        return self._folder / f"decoded-{run}"

    def decoded(self) -> list[int]:
        return [self.log(run).stat().st_size for run in range(self._runs)]

    def end(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """The result, with a digest of each file that it names."""
        said, _ = process.communicate(timeout=200)
        result = json.loads(said.rsplit("result ", 1)[1])
        files = sorted(p for p in self.kept.rglob("*") if p.is_file() and p.suffix != ".zip")
        result["digests"] = {str(p.relative_to(self.kept)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        assert process.returncode == 0
        return result


def kill_after(process: subprocess.Popen[str], log: Path, frames: int) -> None:
    """Kills it when it has decoded so many pictures."""
    while process.poll() is None:
        if log.exists() and log.stat().st_size >= frames:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def whole(film: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = Runs(film, tmp_path_factory.mktemp("whole"), speech=True)
    return runs.end(runs.start())


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_a_killed_analysis_goes_on_and_gives_the_same(
    film: Path, whole: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    runs = Runs(film, tmp_path, speech=True)
    at = 0

    for _ in range(3):
        at = rng.randrange(100, 900)
        kill_after(runs.start(), runs.log(runs._runs - 1), at)
    result = runs.end(runs.start())

    assert result == whole
    frames = whole["video"]["frames"]
    # Each of the three kills may cost 30 s.
    assert sum(runs.decoded()) - frames <= 3 * analysis.AGAIN_S * RATE
    assert frames == sum(LENGTHS)
    kinds = [shot["transition"]["kind"] for shot in whole["shots"][1:]]
    assert {"cut", "dissolve", "fade"} == set(kinds)


def test_each_kill_costs_at_most_thirty_seconds_of_film(film: Path, tmp_path: Path) -> None:
    runs = Runs(film, tmp_path)
    rng = random.Random(7)
    frames = sum(LENGTHS)

    done = rng.randrange(300, frames - 200)
    kill_after(runs.start(), runs.log(0), done)
    runs.end(runs.start())

    first, second = runs.decoded()
    assert first + second - frames <= analysis.AGAIN_S * RATE
    assert second < frames  # it did not begin anew


def test_a_state_of_another_file_or_a_damaged_one_is_passed_over(film: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.zip"
    state = {"identity": checkpoint.identity(film, speech=False), "a": [np.arange(5), b"x", {"b": None}]}
    checkpoint.save(path, state)

    same = checkpoint.load(path, checkpoint.identity(film, speech=False))
    assert same is not None
    assert same["a"][0].tolist() == [0, 1, 2, 3, 4]
    assert same["a"][1:] == [b"x", {"b": None}]
    assert checkpoint.load(path, checkpoint.identity(film, speech=True)) is None
    other = tmp_path / "other.mkv"
    shutil.copy(film, other)
    with other.open("ab") as file:
        file.write(b"\0")
    assert checkpoint.load(path, checkpoint.identity(other, speech=False)) is None
    path.write_bytes(path.read_bytes()[:-40])
    assert checkpoint.load(path, checkpoint.identity(film, speech=False)) is None
    path.write_bytes(os.urandom(500))
    assert checkpoint.load(path, checkpoint.identity(film, speech=False)) is None


def test_decoding_waits_for_a_state_that_is_not_stored_yet(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    ahead: list[float] = []
    passes: list[analysis.Pass] = []
    save = analysis.Pass._save
    monkeypatch.setattr(analysis.Pass, "_save", lambda self, place: (passes.append(self), save(self, place))[1])

    def sleep(seconds: float) -> None:  # only a pass that waits sleeps
        one = passes[-1]
        ahead.append(one.reading.end_s - one._stored_s)
        if one._on_its_way:
            one._on_its_way.unlink(missing_ok=True)

    monkeypatch.setattr(analysis.time, "sleep", sleep)
    analysis.analyze(str(film), str(tmp_path), report=lambda f, s: None, note=lambda files: None)

    assert ahead
    assert max(ahead) <= analysis.AGAIN_S
