"""`agentflow analyze`: upload or name a video, follow its analysis, show what was found, fetch the pictures."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from agentflow import settings
from agentflow.cli import output, running
from agentflow.cli.client import Client, operator_key
from agentflow.cli.errors import CANNOT_START, USAGE, Failure
from agentflow.settings import Settings

_ASK_EVERY_S: Final = 0.25
_START_WITHIN_S: Final = 90.0
_SHOTS_SHOWN: Final = 40
_STRETCHES_SHOWN: Final = 4

_PARTS: Final = ("summary", "chapters", "tags", "transcript", "captions")
_SILENT: Final = ("none", "not_configured")
_STAGES: Final = {
    "queued": "waiting for a worker",
    "download": "downloading",
    "probe": "looking at the file",
    "shots": "finding shots",
    "pictures": "drawing the contact sheet",
    "store": "storing the pictures",
    "transcript": "listening to the speech",
    "captions": "looking at the pictures",
    "story": "telling what it is about",
}


def analyze(video: str, base: str | None, out: Path | None, as_json: bool) -> None:
    """Raises Failure with the analysis' own error."""
    is_url = re.match(r"https?://", video, re.IGNORECASE) is not None
    path = Path(video)
    if not is_url:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is no file"
            raise Failure(f"{video} {problem}", USAGE)
        if not os.access(path, os.R_OK):
            raise Failure(f"{video} may not be read by this user", USAGE)
        if path.stat().st_size == 0:
            raise Failure(f"{video} is empty")
    if out is None and not as_json:
        out = Path(f"agentflow-{_name(video, is_url)}")
    read = settings.current()
    said = output.console(stderr=True)
    with _somewhere(base, read, said) as client:
        try:
            with _follower(said) as show:
                if is_url:
                    request = {"url": video}
                else:
                    total = path.stat().st_size
                    request = {"video_id": client.upload(path, lambda done: show("uploading", done / total))}
                task = client.analyze(request)
                status = _wait(client, task, show)
            result = status["result"]
            if out is not None:
                fetched = _fetch(client, result, out)
        finally:
            client.close()
    if as_json:
        output.print_json(result)
    else:
        assert out is not None  # noqa: S101 - named above
        _print_summary(output.console(), video, result, out, fetched)


def _name(video: str, is_url: bool) -> str:
    name = PurePosixPath(unquote(urlsplit(video).path)).name if is_url else Path(video).name
    return re.sub(r"[^\w.-]+", "-", name.rsplit(".", 1)[0]).strip(".-") or "video"


# ---- which AgentFlow ----


@contextmanager
def _somewhere(base: str | None, read: Settings, said: Console) -> Iterator[Client]:
    """The one that was named; the one that runs on this home; or one of our own for as long as this takes."""
    if base:
        yield Client(base, operator_key(read))
    elif url := running.url_of(read.agentflow_home):
        yield Client(url, operator_key(read))
    else:
        said.print(f"Starting AgentFlow in {read.agentflow_home} …", style="dim", soft_wrap=True)
        with _own(read) as url:
            yield Client(url, operator_key(read))


@contextmanager
def _own(read: Settings) -> Iterator[str]:
    """An `agentflow up` on a free port; it stops when we do, however that may be."""
    ours, theirs = socket.socketpair()
    environment = {"WORKER_LOG_LEVEL": "WARNING", **os.environ}
    environment.pop("PORT", None)
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with ours, tempfile.TemporaryFile() as log:
        with theirs:
            # -P: a folder `web` or `actors` in the user's current folder is not ours.
            command = [sys.executable, "-P", "-m", "agentflow.cli", "up", "--host", "127.0.0.1", "--port", "0"]
            process = subprocess.Popen(
                [*command, "--announce", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is ours: the job is cancelled first
                env=environment,
            )
        try:
            ours.settimeout(_START_WITHIN_S)
            try:
                with ours.makefile("rb") as lines:
                    url = lines.readline().decode().strip()
            except TimeoutError:
                url = ""
            if not url:
                process.kill() if process.poll() is None else None
                raise Failure(_end_of(log) or "AgentFlow did not start", CANNOT_START)
            yield url
        finally:
            ours.close()
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(read.shutdown_grace + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("agentflow: ") if lines else ""


# ---- following ----

Show = Callable[[str, float], None]


@contextmanager
def _follower(said: Console) -> Iterator[Show]:
    """`show(stage, share done of it)`: a bar on a terminal, a line for each stage elsewhere."""
    if not said.is_terminal:
        told: list[str] = []

        def tell(stage: str, share: float) -> None:
            if stage not in told:
                told.append(stage)
                said.print(f"  {stage} …")

        yield tell
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=said, transient=True) as progress:
        bar = progress.add_task("starting", total=1.0)
        last = ""

        def draw(stage: str, share: float) -> None:
            nonlocal last
            # Uploading and analysing have bars of their own: the time left of one says nothing of the other.
            if (stage == "uploading") != (last == "uploading"):
                progress.reset(bar, total=1.0, description=stage)
            last = stage
            progress.update(bar, description=stage, completed=share)

        yield draw


def _wait(client: Client, task: str, show: Show) -> dict[str, Any]:
    """The status once it is completed. Raises Failure. Ctrl-C cancels the analysis."""
    try:
        while True:
            status = client.status(task)
            if status["status"] == "completed":
                return status
            if status["status"] == "failed":
                raise Failure(f"the analysis failed: {status['error']}")
            if status["status"] == "cancelled":
                raise Failure("the analysis was cancelled")
            stage = status["stage"] or "queued"
            show(_STAGES.get(stage, stage), status["progress"] or 0.0)
            time.sleep(_ASK_EVERY_S)
    except KeyboardInterrupt:
        client.cancel(task)
        raise


# ---- what was found ----


def _pictures(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = [result["contact_sheet"]] if result.get("contact_sheet") else []
    if sprite := result.get("sprite"):
        found += [sprite, sprite["vtt"]]
    found += [track for track in result.get("subtitles") or [] if track.get("file")]
    return found + [shot["keyframe"] for shot in result["shots"] if shot.get("keyframe")]


def _fetch(client: Client, result: dict[str, Any], out: Path) -> int:
    """The pictures into `out`; returns how many."""
    pictures = _pictures(result)
    try:
        for picture in pictures:
            # The server's names: two levels at most, nothing else (`contact-sheet.png`, `keyframes/shot-0001.jpg`).
            if not re.fullmatch(r"(?:[\w-]+/)?[\w-]+\.\w+", picture["file"]):
                raise Failure(f"the picture's name {picture['file']!r} is not one to write to")
            path = out / picture["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download(picture["url"], path)
    except OSError as error:
        raise Failure(f"the pictures cannot be written to {out}: {error.strerror or error}") from error
    return len(pictures)


def _print_summary(console: Console, video: str, result: dict[str, Any], out: Path, fetched: int) -> None:
    container, facts, shots = result["container"], result["video"], result["shots"]
    console.print(f"\n[bold]{escape(video)}[/bold]")
    for name, value in (*_facts(container, facts, result["streams"]), *_findings(result)):
        console.print(f"  {name:<11} {escape(value)}")
    if result.get("partial"):
        console.print("  [yellow]only a part of it could be read:[/yellow]")
    for warning in result.get("warnings", []):
        console.print(f"  [yellow]·[/yellow] {escape(warning)}")
    console.print(f"\n[bold]{len(shots)} shot{'s' if len(shots) != 1 else ''}[/bold]")
    rows = [
        (
            shot["index"] + 1,
            output.time_code(shot["start_s"]),
            output.time_code(shot["end_s"]),
            f"{shot['duration_s']:.2f} s",
            shot["transition"]["kind"] if shot.get("transition") else "",
            shot["keyframe"]["file"] if shot.get("keyframe") else None,
        )
        for shot in shots[:_SHOTS_SHOWN]
    ]
    console.print(
        output.table(
            ("shot", "from", "to", "length", "begins", "picture"),
            rows,
            right=("shot", "from", "to", "length"),
        )
    )
    if len(shots) > _SHOTS_SHOWN:
        console.print(f"  … and {len(shots) - _SHOTS_SHOWN} more (--json lists all)")
    _print_understanding(console, result)
    if fetched:
        sheet = f", the contact sheet is {out / result['contact_sheet']['file']}" if result.get("contact_sheet") else ""
        console.print(f"\n{fetched} files are in {out}{sheet}", soft_wrap=True)


def _print_understanding(console: Console, result: dict[str, Any]) -> None:
    """What models said; nothing where none is configured."""
    parts = {name: result[name] for name in _PARTS if result.get(name, {}).get("status", "none") not in _SILENT}
    if summary := parts.get("summary", {}).get("long"):
        console.print(f"\n[bold]summary[/bold]\n{escape(summary)}", soft_wrap=True)
    if chapters := parts.get("chapters", {}).get("items"):
        console.print("\n[bold]chapters[/bold]")
        for chapter in chapters:
            console.print(f"  {output.time_code(chapter['start_s'])}  {escape(chapter['title'])}")
    if tags := parts.get("tags", {}).get("items"):
        console.print(f"\n[bold]tags[/bold] {escape(', '.join(tags))}", soft_wrap=True)
    for name, part in parts.items():
        if part["status"] in ("failed", "partial"):
            console.print(f"  [yellow]·[/yellow] {name} {part['status']}: {escape(part['reason'])}", soft_wrap=True)


def _facts(
    container: dict[str, Any], facts: dict[str, Any], streams: list[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    file = container["format_name"] + (f", {output.size(container['size_bytes'])}" if container["size_bytes"] else "")
    yield "format", file
    yield "duration", f"{output.time_code(facts['duration_s'])} ({facts['frames']} pictures)"
    rate = f"{facts['fps']:g} per second" + (", varying" if facts["variable_frame_rate"] else "")
    yield "picture", f"{facts['width']} × {facts['height']}, {rate}, {facts['codec']}"
    for stream in streams:
        if stream["kind"] == "audio":
            described = [
                stream["codec"],
                stream.get("layout"),
                f"{stream['sample_rate']} Hz" if stream.get("sample_rate") else None,
            ]
            yield "sound", ", ".join(filter(None, described))


def _findings(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was heard, and where there is nothing to see or hear."""
    if audio := result.get("audio"):
        loudness = audio["loudness"]
        described = []
        if loudness["integrated_lufs"] is not None:
            described.append(f"{loudness['integrated_lufs']:g} LUFS, range {loudness['range_lu']:g} LU")
        if loudness["true_peak_dbtp"] is not None:
            described.append(f"peak {loudness['true_peak_dbtp']:g} dBTP")
        yield "loudness", ", ".join(described) or "silent"
        yield from _stretches("silences", audio["silences"])
    yield from _stretches("black", result.get("black") or [])
    yield from _stretches("frozen", result.get("frozen") or [])
    for track in result.get("subtitles") or []:
        what = f"{track['cue_count']} cues" if track["is_text"] else "pictures, which are not read"
        yield "subtitles", ", ".join(filter(None, (track["language"], track["title"], track["codec"], what)))


def _stretches(name: str, stretches: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
    if stretches:
        shown = ", ".join(
            f"{output.time_code(each['start_s'])}–{output.time_code(each['end_s'])}"
            for each in stretches[:_STRETCHES_SHOWN]
        )
        more = len(stretches) - _STRETCHES_SHOWN
        yield name, shown + (f" and {more} more" if more > 0 else "")
