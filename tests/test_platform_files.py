"""The files that platforms look for: of the shape that they document, with the commands of the Procfile and the settings that
there are. What of them can only be tried at the vendors is said in ops/deploy."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from agentflow import settings
from agentflow.settings import TABLE
from tests.processes import ROOT
from tests.test_docs import processes

SCHEMAS = ROOT / "tests" / "data" / "platforms"
UNITS = ROOT / "ops" / "deploy" / "systemd"
#: Without them a process would not start there, or each would make a key of its own.
NEEDED = {"DATABASE_URL", "REDIS_URL", "ADMIN_API_KEY", "ENCRYPTION_KEY", "AGENTFLOW_ENV"}
#: What stands for a value that only the platform or its user knows.
ASKED_FOR = {
    "DATABASE_URL": "postgresql://db.internal/agentflow",
    "REDIS_URL": "redis://cache.internal:6379",
    "ADMIN_API_KEY": "a-key-of-16-or-more",
    "ENCRYPTION_KEY": "k" * 32,
    "SUPABASE_URL": "https://ref.supabase.co",
    "SUPABASE_SECRET_KEY": "sb_secret_x",
    "PORT": "8080",
}


def render() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "render.yaml").read_text())
    return found


def app_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "app.json").read_text())
    return found


def fly() -> dict[str, Any]:
    return tomllib.loads((ROOT / "fly.toml").read_text())


def railway() -> dict[str, Any]:
    """The graph that Railway's own library makes of our file."""
    spec = importlib.util.spec_from_file_location("railway_file", ROOT / ".railway" / "railway.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph: dict[str, Any] = module.main().to_graph()
    return graph


def railway_services() -> dict[str, dict[str, Any]]:
    """By process."""
    found = (each for each in railway()["resources"] if "startCommand" in each.get("deploy", {}))
    return {each["name"].removeprefix("agentflow-"): each for each in found}


def problems(document: Any, schema: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(yaml.safe_load((SCHEMAS / f"{schema}.yaml").read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


# ---- shape ----


@pytest.mark.parametrize(("read", "schema"), [(render, "render"), (app_json, "app"), (fly, "fly")])
def test_a_file_says_only_what_its_platform_knows(read: Callable[[], Any], schema: str) -> None:
    assert problems(read(), schema) == []


@pytest.mark.parametrize(
    ("read", "schema", "path", "value"),
    [
        (render, "render", ("services", 0, "plan"), "huge"),
        (render, "render", ("services", 0, "startCommand"), "python -m scheduler"),
        (render, "render", ("services", 1, "healthCheckPath"), "/health/live"),
        (render, "render", ("services", 1, "maxShutdownDelaySeconds"), 301),
        (render, "render", ("envVarGroups", 0, "envVars", 0), {"key": "PORT", "sync": False}),
        (app_json, "app", ("formation", "worker", "quantity"), 2),
        (app_json, "app", ("env", "ADMIN_API_KEY", "value"), "twice"),
        (fly, "fly", ("kill_signal",), "TERM"),
        (fly, "fly", ("env", "PORT"), 8080),
        (fly, "fly", ("checks", "alive", "interval"), "30"),
    ],
)
def test_a_schema_refuses_what_its_platform_would(
    read: Callable[[], Any], schema: str, path: tuple[Any, ...], value: Any
) -> None:
    document = deepcopy(read())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value

    assert problems(document, schema)


def test_what_render_refers_to_is_there_and_all_of_it_in_one_region() -> None:
    document = render()
    services = {each["name"]: each for each in document["services"]}
    databases = {each["name"] for each in document["databases"]}
    groups = {each["name"] for each in document["envVarGroups"]}
    everything = [*document["services"], *document["databases"]]

    assert set(services) == {"agentflow-web", "agentflow-worker", "agentflow-scheduler", "agentflow-redis"}
    assert len({each["name"] for each in everything}) == len(everything)
    assert len({each["region"] for each in everything}) == 1
    for service in services.values():
        for variable in service.get("envVars", []):
            if "fromDatabase" in variable:
                assert variable["fromDatabase"]["name"] in databases
            if "fromService" in variable:
                other = services[variable["fromService"]["name"]]
                assert variable["fromService"]["type"] == other["type"]
                if key := variable["fromService"].get("envVarKey"):
                    assert key in {each.get("key") for each in other["envVars"]}
            if "fromGroup" in variable:
                assert variable["fromGroup"] in groups


def test_fly_checks_every_process_and_stops_by_sigterm() -> None:
    document = fly()
    names = set(document["processes"])
    checks = [*document["http_service"]["checks"], *document["checks"].values()]
    checked = {*document["http_service"]["processes"], *document["checks"]["alive"]["processes"]}

    assert document["primary_region"] == "fra" and document["kill_signal"] == "SIGTERM"
    assert checked == names == {name for vm in document["vm"] for name in vm["processes"]}
    for check in checks:
        assert (check["interval"], check["timeout"], check["grace_period"]) == ("30s", "10s", "10s")
    ports = {
        document["http_service"]["internal_port"],
        document["checks"]["alive"]["port"],
        document["metrics"]["port"],
    }
    assert {str(port) for port in ports} == {document["env"]["PORT"]}


def test_railway_restarts_drains_and_runs_two_of_what_may_be_two() -> None:
    services = railway_services()
    replicas = {name: sum(n["numReplicas"] for n in regions(each).values()) for name, each in services.items()}

    assert replicas == {"web": 2, "worker": 2, "scheduler": 1}
    for each in services.values():
        deploy = each["deploy"]
        assert (deploy["restartPolicyType"], deploy["restartPolicyMaxRetries"]) == ("ON_FAILURE", 10)
        assert deploy["drainingSeconds"] == 30
        assert each["build"] == {"builder": "DOCKERFILE", "dockerfilePath": "ops/Dockerfile"}


def regions(service: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = service["deploy"]["multiRegionConfig"]
    return found


# ---- commands ----


def platform_commands() -> Iterator[tuple[str, str, str]]:
    """File, process of the Procfile, command. None of them is read by a shell; the Procfile's own, at Heroku, is."""
    document = render()
    for service in document["services"]:
        if "dockerCommand" in service:
            yield "render.yaml", service["name"].removeprefix("agentflow-"), service["dockerCommand"]
            yield "render.yaml", "release", service["preDeployCommand"]
    for name, command in fly()["processes"].items():
        yield "fly.toml", name, command
    yield "fly.toml", "release", fly()["deploy"]["release_command"]
    for name, service in railway_services().items():
        yield "railway.py", name, service["deploy"]["startCommand"]
        (before,) = service["deploy"]["preDeployCommand"]
        yield "railway.py", "release", before
    for unit, name in (("web", "web"), ("worker@", "worker"), ("scheduler", "scheduler"), ("migrate", "release")):
        command = units()[f"agentflow-{unit}.service"]["Service"]["ExecStart"][0]
        yield "systemd", name, command.replace("$$", "$").replace("/srv/agentflow/.venv/bin/", "")


def test_every_command_is_the_procfiles() -> None:
    seen: dict[str, set[str]] = {}
    for file, name, command in platform_commands():
        words = shlex.split(command)
        if words[0] in ("sh", "/bin/sh"):
            assert words[1] == "-c" and len(words) == 3 and words[2].startswith("exec "), f"{file}: {command}"
            command = words[2].removeprefix("exec ")
        else:
            assert "$" not in command, f"{file}: {command} is read by no shell"
        assert command == processes()[name], f"{file}: {name}"
        seen.setdefault(file, set()).add(name)

    assert set(app_json()["formation"]) | {"release"} == set(processes())
    for file, names in seen.items():
        assert names == set(processes()), file


# ---- settings ----


def render_environment(service: str) -> dict[str, str | None]:
    """By name; None: only known there."""
    document = render()
    (found,) = (each for each in document["services"] if each["name"] == service)
    groups = {each["name"]: each["envVars"] for each in document["envVarGroups"]}
    listed = [one for each in found["envVars"] for one in groups.get(each.get("fromGroup"), [each])]
    return {each["key"]: each.get("value") for each in listed}


def environments() -> dict[str, dict[str, str | None]]:
    heroku = {name: each.get("value") for name, each in app_json()["env"].items()}
    # Add-ons set these.
    addons = {"heroku-postgresql": "DATABASE_URL", "heroku-redis": "REDIS_URL"}
    heroku |= {addons[each.partition(":")[0]]: None for each in app_json()["addons"]}
    found = {f"render.yaml {name}": render_environment(f"agentflow-{name}") for name in ("web", "worker", "scheduler")}
    found["app.json"] = heroku
    found["fly.toml"] = {**fly()["env"], **dict.fromkeys(fly_secrets())}
    found["agentflow.env"] = unit_environment()
    for name, service in railway_services().items():
        found[f"railway.py {name}"] = {key: value.get("value") for key, value in service["variables"].items()}
    return found


def fly_secrets() -> set[str]:
    """What its page has one set: a fly.toml holds no secrets."""
    lines = re.findall(r"fly secrets set --stage (.*?)\n```", (ROOT / "ops/deploy/fly.md").read_text(), re.DOTALL)
    return {name for line in lines for name in re.findall(r"\b([A-Z][A-Z0-9_]+)=", line)}


def unit_environment() -> dict[str, str | None]:
    lines = (UNITS / "agentflow.env").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value or None for name, value in pairs}


def test_every_variable_of_a_file_is_a_setting_and_every_needed_setting_is_in_each_file() -> None:
    for file, environment in environments().items():
        assert set(environment) <= set(TABLE), file
        assert set(environment) >= NEEDED, file


def test_the_values_in_the_files_are_read_without_a_complaint() -> None:
    for file, environment in environments().items():
        given = {name: value or ASKED_FOR[name] for name, value in environment.items()}
        read = settings.load(given)
        settings.check_files(read, {"RENDER": "true"})
        complaints = [each for each in read.warnings() if "TLS_VERIFY" not in each]

        assert read.agentflow_env == "production" and not complaints, file
        # Heroku's servers have certificates that nobody has signed.
        assert read.tls_verify is (file != "app.json"), file


@pytest.mark.parametrize("name", sorted(NEEDED - {"AGENTFLOW_ENV"}))
def test_a_process_of_its_own_does_not_do_without_a_needed_setting(name: str) -> None:
    """What `NEEDED` says: without it something is made, or kept, on one instance alone."""
    read = settings.load({key: value for key, value in ASKED_FOR.items() if key != name})
    field = name.lower()

    assert getattr(read, field) is None
    if name == "REDIS_URL":
        assert read.tier == "database only"  # all the rest works: jobs start later


def test_the_grace_ends_before_the_platforms_kill() -> None:
    kills = {
        "app.json": 30.0,  # Heroku's own, and nobody changes it
        "fly.toml": float(fly()["kill_timeout"].removesuffix("s")),
        "agentflow.env": min(
            float(units()[f"agentflow-{n}.service"]["Service"]["TimeoutStopSec"][0])
            for n in ("web", "worker@", "scheduler")
        ),
    }
    for service in render()["services"]:
        if "maxShutdownDelaySeconds" in service:
            kills[f"render.yaml {service['name'].removeprefix('agentflow-')}"] = service["maxShutdownDelaySeconds"]
    for name, service in railway_services().items():
        kills[f"railway.py {name}"] = service["deploy"]["drainingSeconds"]

    assert set(kills) == set(environments())
    for file, environment in environments().items():
        read = settings.load({name: value or ASKED_FOR[name] for name, value in environment.items()})
        assert kills[file] - read.shutdown_grace >= 5, file


# ---- systemd ----


def unit_files() -> list[Path]:
    return sorted(path for path in UNITS.iterdir() if path.suffix in (".service", ".target"))


def units() -> dict[str, dict[str, dict[str, list[str]]]]:
    """By file, section and key."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for path in unit_files():
        section = ""
        sections = found.setdefault(path.name, {})
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                name, value = line.split("=", 1)
                sections.setdefault(section, {}).setdefault(name, []).append(value)
    return found


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """By systemd's own check, which wants the programs to be where the units say: they are put there, and no further."""
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is missing: apt-get install systemd"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gunicorn", "python"):
        (programs / name).symlink_to("/bin/true")
    for path in unit_files():
        (tmp_path / path.name).write_text(path.read_text().replace("/srv/agentflow/.venv/bin/", f"{programs}/"))
    (tmp_path / "agentflow-worker@01.service").write_text((tmp_path / "agentflow-worker@.service").read_text())

    def complaints() -> list[str]:
        files = [str(path) for path in sorted(tmp_path.glob("agentflow*")) if "@." not in path.name]
        said = subprocess.run(
            [analyze, "verify", "--man=no", "--generators=no", "--recursive-errors=no", *files],
            capture_output=True,
            text=True,
        )
        return [line for line in said.stderr.splitlines() if "agentflow" in line]

    assert complaints() == []
    (tmp_path / "agentflow-scheduler.service").write_text("[Service]\nExecStart=/bin/true\nTimeoutStopSecs=5\n")
    assert complaints(), "it would take anything"


def test_the_units_belong_together() -> None:
    every = units()

    wanted = every["agentflow.target"]["Unit"]["Wants"][0].split()
    assert {re.sub(r"@\d\d", "@", name) for name in wanted} | {"agentflow-migrate.service"} == set(every) - {
        "agentflow.target"
    }
    for name in ("web", "worker@", "scheduler"):
        unit = every[f"agentflow-{name}.service"]
        assert unit["Unit"]["PartOf"] == ["agentflow.target"] == unit["Install"]["WantedBy"]
        assert unit["Service"]["KillMode"] == ["mixed"] and unit["Service"]["Restart"] == ["always"]
        assert unit["Service"]["EnvironmentFile"] == ["/etc/agentflow.env"]
    ports = [
        line.partition("PORT=")[2]
        for unit in every.values()
        for line in unit.get("Service", {}).get("Environment", [])
        if line.startswith("PORT=")
    ]
    assert len(set(ports)) == len(ports) == 3
