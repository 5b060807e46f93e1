"""The command line as people and scripts use it: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import psycopg
import pytest

import actors  # noqa: F401 - makes ping known
from agentflow import settings
from agentflow.cli import commands, running, video
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import cli_support
from tests.cli_support import Command, Said
from tests.clips import film, real_clips, write_film  # noqa: F401 - a fixture
from tests.processes import ROOT
from tests.test_up import Up, open_folder, running_up, says

agentflow = cli_support.agentflow


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """An `agentflow up` with a home of its own, for the tests of this module that need somebody to work."""
    with (
        open_folder() as folder,
        running_up({"AGENTFLOW_HOME": str(folder / "home"), "CANARY_INTERVAL": "0"}, folder / "up.log") as up,
    ):
        up.home = folder / "home"
        yield up


@pytest.fixture
def with_up(up: Up, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process, on the home of `up`."""
    monkeypatch.setenv("AGENTFLOW_HOME", str(up.home))  # type: ignore[attr-defined]

    def run(*arguments: str) -> Said:
        settings.current.cache_clear()
        capfd.readouterr()
        status = commands.run(list(arguments))
        out, err = capfd.readouterr()
        return Said(status, out, err)

    yield run
    settings.current.cache_clear()


# ---- usage ----


def test_help_answers_without_loading_the_system() -> None:
    code = "import sys; from agentflow.cli import commands; commands.run(['--help']); print(len(sys.modules))"
    heavy = ["pydantic", "psycopg", "flask", "dramatiq", "gunicorn", "rich", "redis"]

    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print([m for m in {heavy!r} if m in sys.modules])"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    for command in ("up", "analyze", "jobs", "orgs", "keys", "callbacks", "queues", "ping", "doctor"):
        assert re.search(rf"^  {command} +\S", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["up", "--port", "many"],
        ["up", "--port", "70000"],
        ["jobs", "show", "no-uuid"],
        ["jobs", "list", "--state", "lost"],
        ["jobs", "submit"],
        ["jobs", "submit", "ping", "no json"],
        ["jobs", "submit", "ping", "[1]"],
        ["jobs", "submit", "ping", '{"sleep_ms": -1}'],
        ["jobs", "submit", "no_such_type"],
        ["jobs", "submit", "deliver_callback"],
        ["orgs", "create", "Not_A_Slug"],
        ["keys", "create"],
        ["keys", "create", "--name", "x", "--scope", "root"],
        ["keys", "create", "--name", "x", "--org", "nobody"],
        ["keys", "revoke", "af_nothing"],
        ["callbacks", "replay", "no-uuid"],
        ["analyze", "/no/such/file.mp4"],
        ["analyze", "/"],
        ["ping", "--count", "0"],
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_2(agentflow: Command, arguments: list[str]) -> None:
    said = agentflow(*arguments)

    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1), said.err
    assert said.err.startswith("agentflow: ")


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, group in {"": commands.cli, **commands.cli.commands}.items():
        if isinstance(group, click.Group):
            assert commands.run(name.split()) == 0, name

            said = capsys.readouterr()
            assert said.out.startswith("Usage: agentflow") and "\nCommands:\n" in said.out and not said.err


def test_a_wrong_setting_is_one_line_that_names_it(agentflow: Command) -> None:
    for command in (["jobs", "list"], ["doctor"], ["queues"], ["analyze", __file__]):
        said = agentflow(*command, DATABASE_POOL_SIZE="0")

        assert (said.status, said.err.count("\n")) == (2, 1), said.err
        assert "DATABASE_POOL_SIZE" in said.err


def test_an_absent_database_is_one_line_and_exit_3(agentflow: Command) -> None:
    url = f"postgresql://me:s3cret@127.0.0.1:{free_port()}/db"

    said = agentflow("jobs", "list", DATABASE_URL=url)

    assert (said.status, said.err.count("\n")) == (3, 1), said.err
    assert "agentflow doctor" in said.err and "s3cret" not in said.err


# ---- jobs ----


def test_jobs_are_listed_the_newest_first_and_by_state_and_type(agentflow: Command, system: System) -> None:
    assert "no jobs yet" in agentflow("jobs", "list").out
    first = system.submit(1, NewJob("ping", {})).job
    second = system.submit(1, NewJob("ping", {})).job
    system.cancel(1, first.id)

    said = agentflow("jobs", "list")
    lines = [line for line in said.out.splitlines() if "ping" in line]
    assert [line.split()[0] for line in lines] == [str(second.id), str(first.id)]
    assert "queued" in lines[0] and "cancelled" in lines[1]

    assert str(second.id) not in agentflow("jobs", "list", "--state", "cancelled").out
    assert "no jobs like that" in agentflow("jobs", "list", "--type", "analyze_video").out
    documents = [json.loads(line) for line in agentflow("jobs", "list", "--json").out.splitlines()]
    assert [d["id"] for d in documents] == [str(second.id), str(first.id)]


def test_a_job_is_cancelled_and_tried_again_as_a_new_one(agentflow: Command, system: System) -> None:
    job_id = agentflow("jobs", "submit", "ping", '{"sleep_ms": 5}').out.strip()

    said = agentflow("jobs", "cancel", job_id)
    assert (said.status, said.out) == (0, "cancelled\n")
    again = agentflow("jobs", "retry", job_id).out.strip()
    assert again != job_id

    shown = agentflow("jobs", "show", again)
    assert f"retry of     {job_id}" in shown.out and "queued" in shown.out
    assert json.loads(agentflow("jobs", "show", again, "--json").out)["payload"]["sleep_ms"] == 5
    said = agentflow("jobs", "retry", again)
    assert (said.status, said.err.count("\n")) == (1, 1) and "only a failed or cancelled" in said.err


def test_an_unknown_job_is_one_line(agentflow: Command) -> None:
    for command in ("show", "cancel", "retry"):
        said = agentflow("jobs", command, "01970000-0000-7000-8000-000000000000")

        assert (said.status, said.err) == (1, "agentflow: there is no job 01970000-0000-7000-8000-000000000000\n")


def test_ping_and_queues_say_when_nobody_works(agentflow: Command, conn: psycopg.Connection) -> None:
    said = agentflow("ping", "--timeout", "0.3")

    assert said.status == 1 and "no worker runs" in said.err
    assert conn.execute("select state from agentflow.jobs").fetchall() == [("cancelled",)], "it leaves nothing to do"
    assert "no worker runs" in agentflow("queues").out


def test_ping_measures_and_submit_waits_and_show_has_every_attempt(with_up: Command) -> None:
    pinged = with_up("ping", "--count", "3")
    assert pinged.status == 0
    assert re.search(r"3 of 3 answered; median [\d.]+ ms", pinged.out)

    waited = with_up("jobs", "submit", "ping", '{"fail_attempts": 1}', "--wait")
    job_id, state, *result = waited.out.splitlines()
    assert (waited.status, state) == (0, "succeeded")
    assert json.loads("".join(result)) == {"pong": True, "attempt": 2}

    shown = with_up("jobs", "show", job_id).out
    assert re.search(r"1 +retry .*attempt 1 fails as asked", shown) and re.search(r"2 +succeeded", shown), shown
    assert "attempt      2 of 5" in shown

    queues = with_up("queues").out
    assert re.search(r"^default +0 +0 +0 +– +1 +25", queues, re.MULTILINE), queues
    succeeded = re.search(r"(\d+) succeeded", queues)
    assert succeeded and int(succeeded[1]) >= 4, queues  # more where the canaries have been round
    assert json.loads(with_up("queues", "--json").out)["workers"][0]["kind"] == "up"


def test_a_job_that_fails_while_it_is_waited_for_ends_the_command_with_1(with_up: Command, tmp_path: Path) -> None:
    said = with_up("jobs", "submit", "analyze_video", '{"video_id": "01970000-0000-7000-8000-000000000000"}', "--wait")

    assert (said.status, said.out.splitlines()[1]) == (1, "failed")
    assert "There is no video" in said.err


# ---- analyze ----


def test_a_video_is_analysed_by_the_agentflow_of_the_home(
    with_up: Command,
    real_clips: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    said = with_up("analyze", str(real_clips / "bikes.mp4"))

    assert said.status == 0, said.err
    assert "640 × 272, 25 per second, h264" in said.out and "duration    0:10.00" in said.out
    assert "6 shots" in said.out
    assert re.search(r"^ +3 +0:03\.04 +0:05\.48 +2\.44 s +cut +keyframes/shot-0003\.jpg", said.out, re.MULTILINE), (
        said.out
    )
    assert "9 files are in agentflow-bikes" in said.out
    assert "finding shots" in said.err, "the stages are told"
    folder = tmp_path / "agentflow-bikes"
    assert (folder / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "keyframes").glob("shot-000[1-6].jpg"))) == 6
    assert "Starting AgentFlow" not in said.err, "one was running"


def test_json_is_all_that_stdout_gets_and_pictures_come_only_where_they_are_asked_for(
    with_up: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = write_film(tmp_path / "Mein Film #1.mp4", film([10, 10]))

    said = with_up("analyze", str(clip), "--json")
    assert json.loads(said.out)["video"]["frames"] == 20
    assert [path.name for path in tmp_path.iterdir()] == [clip.name]

    assert with_up("analyze", str(clip), "--json", "--out", str(tmp_path / "a" / "b")).status == 0
    assert (tmp_path / "a" / "b" / "contact-sheet.png").exists()
    assert video._name(str(clip), False) == "Mein-Film-1"
    assert video._name("https://example.org/x/clip%20one.webm?a=1", True) == "clip-one"


def test_what_is_no_video_fails_with_the_analysis_own_sentence(with_up: Command, tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("these are notes\n" * 100)

    said = with_up("analyze", str(text), "--out", str(tmp_path / "out"))

    assert (said.status, said.out) == (1, "")
    assert said.err.splitlines()[-1] == "agentflow: the analysis failed: this is not a video: found a text file"
    assert not (tmp_path / "out").exists()


def test_a_url_of_a_private_address_is_refused_by_the_guard(with_up: Command) -> None:
    said = with_up("analyze", "http://127.0.0.1/clip.mp4")

    assert said.status == 1 and "127.0.0.1" in said.err and said.err.count("\n") == 1


def test_a_named_agentflow_wants_its_key_and_a_wrong_url_is_said(
    agentflow: Command, up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_film(tmp_path / "a.mp4", film([5]))
    assert "key was refused" in agentflow("analyze", str(clip), "--url", up.url).err

    monkeypatch.delenv("ADMIN_API_KEY")
    said = agentflow("analyze", str(clip), "--url", up.url)
    assert (said.status, said.err.count("\n")) == (2, 1) and "ADMIN_API_KEY" in said.err

    key = (up.home / "admin.key").read_text().strip()
    said = agentflow("analyze", str(clip), "--json", ADMIN_API_KEY=key, AGENTFLOW_URL=up.url)
    assert json.loads(said.out)["video"]["frames"] == 5

    nobody = f"http://127.0.0.1:{free_port()}"
    said = agentflow("analyze", str(clip), "--url", nobody, ADMIN_API_KEY=key)
    assert (said.status, said.err.count("\n")) == (1, 1) and "does not answer" in said.err


def test_without_a_running_one_analyze_brings_its_own_and_takes_it_along(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    clip = write_film(tmp_path / "a.mp4", film([8, 8]))
    # Folders by the names of ours, where the user happens to be.
    for name in ("web", "actors", "agentflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")

    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom agentflow.cli import main\nmain()"

    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "analyze", str(clip), "--out", "pictures"],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )

    assert done.returncode == 0, done.stderr
    assert "Starting AgentFlow" in done.stderr and (tmp_path / "pictures" / "contact-sheet.png").exists()
    rows = conn.execute("select kind, stopped_at is not null from agentflow.workers").fetchall()
    assert rows == [("up", True)], "it was stopped in order"


def test_why_its_own_could_not_start_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"x")

    status, said = says(
        ["analyze", str(clip)], environment | {"DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/x"}
    )

    assert status == 3
    assert "database cannot be reached" in said.splitlines()[-1]


def test_the_address_of_a_home_is_known_only_while_it_serves(tmp_path: Path) -> None:
    with running.Advertisement(tmp_path, "http://one"):
        with running.Advertisement(tmp_path, "http://two"):
            assert running.url_of(tmp_path) == "http://one"
        assert running.url_of(tmp_path) == "http://one"
    assert running.url_of(tmp_path) is None

    (tmp_path / "up.url").write_text("http://of-one-that-was-killed")
    assert running.url_of(tmp_path) is None


# ---- doctor ----


def test_doctor_on_a_running_home(with_up: Command, up: Up) -> None:
    said = with_up("doctor")

    assert said.status == 0, said.out
    assert "✓ servers" in said.out and "✓ workers" in said.out and up.url in said.out
