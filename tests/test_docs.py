"""What the documents say is so: settings, commands, routes and processes.

`python -m tests.test_docs` writes README's table of settings.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from agentflow import settings
from agentflow.cli import commands
from agentflow.settings import TABLE
from agentflow.system import System
from tests.processes import BIN, ROOT
from web import create_app

README = ROOT / "README.md"
RUSSIAN = ROOT / "README.ru.md"
PAGES = [*sorted((ROOT / "ops").glob("*.md")), *sorted((ROOT / "ops").glob("deploy/*.md"))]
DOCUMENTS = [README, RUSSIAN, ROOT / "CHANGELOG.md", *PAGES]
_BEGIN = "<!-- settings: .venv/bin/python -m tests.test_docs writes this table -->\n"
_END = "<!-- end of settings -->"


def settings_table() -> str:
    rows = "".join(
        f"| `{name}` | {f'`{default}`' if default and default != 'see text' else default} | {description} |\n"
        for name, (default, description) in TABLE.items()
    ).replace("`()`", "")
    return f"\n| variable | default | meaning |\n|---|---|---|\n{rows}\n"


def section(document: Path, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{document.name} has no section {title!r}"
    return found.group(1)


# ---- README ----


def test_the_table_of_settings_is_the_programs_own() -> None:
    written = README.read_text().split(_BEGIN)[1].split(_END)[0]

    assert written == settings_table(), "run: .venv/bin/python -m tests.test_docs"


def test_every_command_is_described_and_every_described_one_exists() -> None:
    def paths(group: click.Group, before: str) -> set[str]:
        found = set()
        for name, command in group.commands.items():
            path = f"{before} {name}"
            found |= paths(command, path) if isinstance(command, click.Group) else {path}
        return found

    described = set(re.findall(r"^\| `(agentflow [a-z -]+)` \|", section(README, "Command line"), re.MULTILINE))

    assert described == paths(commands.cli, "agentflow")


def test_every_option_that_is_described_exists() -> None:
    def options(path: str) -> set[str]:
        command: Any = commands.cli
        for name in path.split()[1:]:
            command = command.commands[name]
        return {option for parameter in command.params for option in parameter.opts}

    for path, text in re.findall(
        r"^\| `(agentflow [a-z -]+)` \| (.*) \|$", section(README, "Command line"), re.MULTILINE
    ):
        assert set(re.findall(r"`(--[a-z-]+)`", text)) <= options(path), path


def command_lines(text: str) -> list[str]:
    """What a document tells people to run, in blocks of shell and between backticks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*lines, *re.findall(r"`([^`\n]+)`", prose)]


def problem_of(line: str) -> str | None:
    """What is wrong with the command of ours that a line calls; None: nothing, or it calls none."""
    called = re.match(r"(?:[A-Z_]+=\S+ +)*(?:\.venv/bin/)?agentflow(?: (.*))?$", line)
    if called is None:
        return None
    words = shlex.split(re.split(r" [|&;<>] ?| [0-9]?> ", called[1] or "")[0], comments=True)
    command: click.Command = commands.cli
    while isinstance(command, click.Group) and words and words[0][0] not in "-…<":
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
    unknown = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)} - known
    return f"it has no option {sorted(unknown)}" if unknown else None


def test_every_command_that_a_document_names_is_one() -> None:
    found = {
        (document.name, line): problem
        for document in DOCUMENTS
        for line in command_lines(document.read_text())
        if (problem := problem_of(line))
    }

    assert not found


def test_a_command_that_is_none_is_noticed() -> None:
    assert problem_of("agentflow jobs list --state failed | head") is None
    assert problem_of("KEY=x .venv/bin/agentflow restore s3://b --hold  # wait") is None
    assert problem_of("agentflow jobs delete ID") and problem_of("agentflow restore X --force")


def test_every_link_within_a_document_leads_somewhere() -> None:
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        headings = {slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings, document.name


def slug(title: str) -> str:
    """The name of a heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_route_is_described_and_every_described_one_exists() -> None:
    app = create_app(System(settings.load({}), "test"))
    served = {
        method + " " + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    served.discard("GET /docs/{name}")  # the page's own files
    served = {each for each in served if " /dashboard/" not in each}  # pages, which are told of as a whole

    described = re.findall(r"^\| `([A-Z]+ /\S*)` \|", section(README, "HTTP API"), re.MULTILINE)

    assert sorted(described) == sorted(served)


def test_paths_and_variables_that_are_named_exist() -> None:
    known = set(TABLE) | set(re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", (ROOT / "agentflow" / "settings.py").read_text()))
    # Ours on the command line, the platforms', other programs', and one that is announced as coming.
    known |= {
        "AGENTFLOW_URL",
        "PYTHON",
        "RABBITMQ_URL",
        "XDG_DATA_HOME",
        "SIGTERM",
        "UPDATE",
        "HTTP",
        "JSON",
        "FILE",
        "TYPE",
        "POST",
    }
    known |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT"}
    known |= {"PGSSLMODE", "WRONGPASS", "ACCESS_REFUSED"}
    known |= {"LISTEN", "ON_FAILURE", "REPOSITORY"}
    for document in DOCUMENTS:
        text = document.read_text()
        for variable in re.findall(r"`\$?([A-Z][A-Z0-9_]{3,})`", text):
            assert variable in known, f"{document.name} names {variable}"
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / path).exists(), f"{document.name} links to {path}"
        for path in re.findall(r"`((?:ops|tests|agentflow|actors|web|scheduler|migrations|\.ci)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_metrics_that_the_runbook_names_exist() -> None:
    text = "".join((ROOT / "agentflow" / name).read_text() for name in ("metrics.py", "gauges.py"))
    named = re.findall(r"`((?:worker|agentflow)_[a-z_]+?)(?:_total)?`", (ROOT / "ops" / "runbook.md").read_text())

    assert len(named) > 4
    for name in named:
        if name not in ("worker_lost", "worker_out_of_memory"):  # an error's code
            assert f'"{name}"' in text, name


# ---- README in Russian ----


def outline(document: Path) -> list[int]:
    """The levels of the headings, in order."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


def blocks(document: Path) -> list[tuple[str, list[str]]]:
    """What stands in the blocks of code, without comments; of diagrams only that there is one."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [
        (
            kind,
            []
            if kind == "mermaid"
            else [line for each in text.splitlines() if (line := re.sub(r"(^| +)# .*", "", each))],
        )
        for kind, text in found
    ]


def test_the_russian_readme_is_in_step_with_the_english_one() -> None:
    assert outline(RUSSIAN) == outline(README)
    assert blocks(RUSSIAN) == blocks(README)
    assert "(README.ru.md)" in README.read_text() and "(README.md)" in RUSSIAN.read_text()


def test_the_russian_readme_names_the_same_variables_paths_and_files() -> None:
    """Of what stands between backticks: whoever changes one has to look at the other."""
    # These three sections are tables of the program's, and stand in English alone.
    english = README.read_text()
    for title in ("HTTP API", "Command line", "Settings"):
        english = english.replace(section(README, title), "")
    folders = "ops|tests|agentflow|actors|web|scheduler"
    named = re.compile(rf"`((?:[A-Z][A-Z0-9_]{{4,}}|(?:{folders})/[\w./-]+|agentflow [a-z -]+[a-z]))`")

    assert set(named.findall(english)) <= set(named.findall(RUSSIAN.read_text()))


# ---- processes ----


def processes() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_procfile_names_the_processes_and_their_commands_resolve() -> None:
    assert list(processes()) == ["release", "web", "worker", "scheduler"]
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "JOB_CONCURRENCY": "3"}
    for name, command in processes().items():
        # What the shell makes of it, as the platforms' does, up to the program itself.
        shown = subprocess.run(
            ["/bin/sh", "-c", f"printf '%s\\n' {command}"], env=environment, capture_output=True, text=True, check=True
        ).stdout.split("\n")[:-1]
        program = shutil.which(shown[0], path=environment["PATH"])
        assert program, f"{name}: {shown[0]}"
        if shown[0] == "python":
            assert (ROOT / shown[2] / "__main__.py").exists()
        elif shown[0] == "gunicorn":
            checked = subprocess.run(
                [program, "--check-config", *shown[1:]], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert checked.returncode == 0, checked.stderr
        else:
            assert shown == ["dramatiq", "actors", "--processes", "1", "--threads", "3"]


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def test_compose_runs_the_processes_of_the_procfile_on_servers_that_are_ready() -> None:
    services = compose()["services"]

    by_profile: dict[str, set[str]] = {}
    for name, service in services.items():
        by_profile.setdefault(",".join(service.get("profiles", ())), set()).add(name)
    assert by_profile == {
        "": {"postgres", "valkey", "migrate", "web", "worker", "scheduler"},
        "cluster": {"rabbitmq1", "rabbitmq2", "rabbitmq3"},
        "monitoring": {"prometheus", "alertmanager", "grafana"},
    }
    assert "pgvector" in services["postgres"]["image"] and "valkey" in services["valkey"]["image"]
    for name, process in (("migrate", "release"), ("web", "web"), ("worker", "worker"), ("scheduler", "scheduler")):
        words = services[name]["command"]
        command = words[2].removeprefix("exec ").replace("$$", "$") if words[0] == "sh" else shlex.join(words)
        assert command == processes()[process]
    for name in ("web", "worker", "scheduler"):
        waits = services[name]["depends_on"]
        assert waits["migrate"]["condition"] == "service_completed_successfully"
        assert waits["valkey"]["condition"] == "service_healthy"
        assert "/health/live" in services[name]["healthcheck"]["test"][-1]
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in ("postgres", "valkey"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    mounted = {volume.split(":")[0] for s in services.values() for volume in s.get("volumes", [])}
    assert {volume for volume in mounted if not volume.startswith("./")} == set(compose()["volumes"])
    made_by_its_owner = "./ops/monitoring/secrets"
    assert all((ROOT / volume).exists() for volume in mounted - {made_by_its_owner} if volume.startswith("./"))


def test_the_settings_in_compose_are_read_without_a_complaint() -> None:
    written = {k: str(v) for k, v in compose()["services"]["web"]["environment"].items()}
    unknown = set(written) - set(TABLE)
    key = written["ADMIN_API_KEY"]
    unset = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in written.items()}

    read = settings.load(unset | {"ADMIN_API_KEY": "a-key-of-16-or-more"})

    assert not unknown and not read.warnings()
    assert key.startswith("${ADMIN_API_KEY:?"), "it must not start with a key that everybody knows"


@pytest.mark.parametrize("profile", ["default", "monitoring", "cluster"])
def test_docker_compose_itself_accepts_the_file(profile: str) -> None:
    """Debian's, which knows no engine here; the newer plugin takes the same format."""
    variables = {"PATH": os.environ["PATH"], "ADMIN_API_KEY": "a-key-of-16-or-more", "COMPOSE_PROFILES": profile}

    done = subprocess.run(
        ["/usr/bin/docker-compose", "config"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(compose()["services"]) >= set(yaml.safe_load(done.stdout)["services"])


def test_the_image_is_made_of_what_is_there() -> None:
    lines = (ROOT / "ops" / "Dockerfile").read_text()

    for source in re.findall(r"^COPY (\S+) ", lines, re.MULTILINE):
        assert (ROOT / source).exists()
    version = (ROOT / ".python-version").read_text().strip()
    assert f"FROM python:{version}-slim" in lines
    command = re.search(r"^CMD (\[.*\])$", lines, re.MULTILINE)
    assert command and yaml.safe_load(command.group(1))[:2] == ["agentflow", "up"]


if __name__ == "__main__":
    before, rest = README.read_text().split(_BEGIN)
    README.write_text(before + _BEGIN + settings_table() + _END + rest.split(_END, 1)[1])
    sys.exit(0)
