"""`agentflow doctor --url` and `agentflow load`: a real system looked at, and loaded, by its URL alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agentflow import settings
from agentflow.cli import commands
from agentflow.cli.checkup.deployed import Deployed
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.cli.client import Client
from agentflow.cli.errors import CANNOT_START, USAGE, WRONG
from agentflow.prove import measuring
from agentflow.prove.measuring import Objective, Plan
from agentflow.prove.ports import free_port
from tests.cli_support import Said
from tests.conftest import ADMIN_KEY
from tests.kommo_server import Account as Kommo
from tests.kommo_support import server
from tests.processes import eventually, worker
from tests.test_up import Up, open_folder, running_up
from tests.web_support import AUTH, gunicorn

__all__ = ["server"]

Command = Callable[..., Said]


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """A system of its own, with a ping through each queue every second."""
    with open_folder() as folder:
        environment = {"AGENTFLOW_HOME": str(folder / "home"), "ADMIN_API_KEY": ADMIN_KEY, "CANARY_INTERVAL": "1"}
        with running_up(environment, folder / "up.log") as up:
            yield up


@pytest.fixture
def agentflow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Runs a command in this process, with nothing but a key in its environment."""
    for name in settings.TABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGENTFLOW_HOME", str(tmp_path))

    def run(*arguments: str, key: str | None = ADMIN_KEY) -> Said:
        settings.current.cache_clear()
        capfd.readouterr()
        with monkeypatch.context() as changed:
            if key is not None:
                changed.setenv("ADMIN_API_KEY", key)
            status = commands.run(list(arguments))
        out, err = capfd.readouterr()
        return Said(status, out, err)

    yield run
    settings.current.cache_clear()


def lines(said: Said) -> dict[str, str]:
    """By check: its mark and what was found."""
    found = {}
    for line in said.out.splitlines():
        mark, *rest = line.split(maxsplit=2)
        if mark in ("✓", "!", "✗", "ok", "note", "WRONG"):
            found[rest[0]] = f"{mark} {rest[1]}"
    return found


# ---- doctor --url ----


@pytest.mark.timeout(240)
def test_all_is_well_after_a_deploy(up: Up, agentflow: Command) -> None:
    said = agentflow("doctor", "--url", up.url, "--watch", "0.05")
    found = lines(said)

    assert said.status == 0, said.out + said.err
    assert list(found) == [
        *("web", "key", "metrics", "scheduler", "workers", "ping", "queues", "video", "kommo", "errors"),
    ]
    assert not [line for line in found.values() if line[0] in "✗W"]
    assert "default, gpu, heavy" in found["queues"] and "3 shots" in found["video"]
    assert "no account" in found["kommo"] and "no error in 3 s" in found["errors"]


@pytest.mark.timeout(240)
def test_a_web_without_workers_and_scheduler_is_told_with_what_to_do(
    environment: dict[str, str], tmp_path: Path, agentflow: Command
) -> None:
    with gunicorn(environment, tmp_path, METRICS_TOKEN="a-token-of-theirs") as web:
        said = agentflow("doctor", "--url", web.url)
        there = Deployed(Client(web.url, ADMIN_KEY), "a-token-of-theirs")
        there.key()
        by_token = there.metrics()
    found = lines(said)

    assert said.status == WRONG and "3 of 5 checks failed" in said.err
    assert {name for name, line in found.items() if line[0] in "✗W"} == {"metrics", "scheduler", "workers"}
    assert "METRICS_TOKEN" in said.out and "never ticked" in found["scheduler"] and "none is alive" in found["workers"]
    assert ADMIN_KEY not in said.out and "of the same queues" in by_token


@pytest.mark.parametrize(
    ("arguments", "key", "status", "text"),
    [
        (["--url", "http://127.0.0.1:{closed}"], ADMIN_KEY, WRONG, "does not answer"),
        (["--url", "{url}"], "another-key-of-theirs", WRONG, "the key was refused"),
        (["--url", "{url}/api"], ADMIN_KEY, WRONG, "is the URL right"),
        (["--url", "agentflow.example"], ADMIN_KEY, USAGE, "is not the URL of an AgentFlow"),
        (["--url", "{url}"], None, USAGE, "set ADMIN_API_KEY"),
        (["--watch", "1"], ADMIN_KEY, USAGE, "--watch goes with --url"),
        (["--url", "{url}", "--watch", "0"], ADMIN_KEY, USAGE, "--watch"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    arguments: list[str], key: str | None, status: int, text: str, up: Up, agentflow: Command
) -> None:
    said = agentflow("doctor", *(each.format(url=up.url, closed=free_port()) for each in arguments), key=key)

    assert said.status == status
    assert text in said.out + said.err


def test_a_job_that_fails_is_seen_by_whoever_watches(up: Up) -> None:
    """Also by a name that earlier failures had: only those since the beginning count."""
    with httpx2.Client(base_url=up.url, headers=AUTH, timeout=30) as http:

        def fail() -> None:
            body = {"type": "ping", "payload": {"fail_attempts": 1}, "max_attempts": 1}
            job = http.post("/api/jobs", json=body).json()["id"]
            eventually(lambda: http.get(f"/api/jobs/{job}?wait=5").json()["state"] == "failed")

        fail()
        there = Deployed(Client(up.url, ADMIN_KEY), None)
        quiet = there.watch(0.01, lambda _: None)
        happened: list[str] = []

        def say(line: str) -> None:
            if not happened:
                fail()
            happened.append(line)

        with pytest.raises(Wrong, match="ping failed: attempt 1 fails as asked") as caught:
            there.watch(0.01, say)

    assert "no error" in quiet and caught.value.advice and happened


def test_a_connected_account_is_read_and_nothing_changes_there(
    server: Kommo, environment: dict[str, str], tmp_path: Path
) -> None:
    server.add("leads", name="A lead")
    with gunicorn(environment, tmp_path) as web, worker(environment, tmp_path / "worker.log"):
        there = Deployed(Client(web.url, ADMIN_KEY), None)
        nobody = there.crm()
        wanted = {"host": server.host, "token": server.token, "name": "Theirs"}
        account = web.http.post("/api/crm/accounts", json=wanted).json()
        path = f"/api/crm/accounts/{account['id']}"
        eventually(lambda: web.http.get(path).json()["state"] == "connected", within_s=60)

        read = there.crm()

        runs = web.http.get(f"{path}/runs").json()["runs"]
        web.http.delete(path)
        gone = there.crm()

    assert (nobody, read) == ("no account to read", "Theirs was read")
    assert not isinstance(gone, Remark) or "no account is connected" in gone.found
    assert any(run["plan"] for run in runs)


# ---- load ----


@pytest.mark.timeout(240)
def test_a_load_is_timed_and_its_figures_are_written(up: Up, agentflow: Command, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    asked = ["--rate", "20", "--minutes", "0.1", "--kinds", "ping=4,sleeps=1", "--seed", "7", "--out", str(out)]

    said = agentflow("load", up.url, *asked, "--errors", "0", "--finish-p95", "600")

    made = json.loads(out.read_text())
    assert said.status == 0, said.out + said.err
    assert made["accepted"] == made["sent"] == made["ended"]["succeeded"] > 60
    assert made["missed"] == [] and made["errors_percent"] == 0 and made["lost"] == made["unended"] == 0
    for figure in ("intake_s", "pickup_s", "finish_s"):
        quantiles = list(made[figure].values())
        assert quantiles == sorted(quantiles) and quantiles[-1] > 0
    # A fifth of them sleeps for 20 ms or more.
    assert made["finish_s"]["p99"] > 0.02 and made["finish_s"]["p50"] >= made["pickup_s"]["p50"]
    assert "picked up" in said.out and "jobs handed in" in said.err


@pytest.mark.timeout(240)
def test_an_objective_that_is_missed_is_named(up: Up, agentflow: Command) -> None:
    said = agentflow("load", up.url, "--rate", "5", "--minutes", "0.05", "--pickup-p95", "0.0001")

    assert said.status == WRONG
    assert "pickup_s.p95 is" in said.out and "wanted at most 0.0001" in said.out


@pytest.mark.timeout(240)
def test_what_nobody_does_is_unended_and_could_not_be_measured(environment: dict[str, str], tmp_path: Path) -> None:
    plan = Plan(rate=5, minutes=0.05, mix={"ping": 1}, seed=1, patience_s=1)
    with gunicorn(environment, tmp_path) as web:
        made = measuring.measure(
            plan, web.url, ADMIN_KEY, [Objective("pickup_s.p95", 9), Objective("errors_percent", 0)]
        )

    assert made["accepted"] == made["unended"] > 0 and made["errors_percent"] == 100
    assert made["pickup_s"]["p95"] is None and made["intake_s"]["p95"] > 0
    assert [said.split(" ")[0] for said in made["missed"]] == ["pickup_s.p95", "errors_percent"]


@pytest.mark.parametrize(
    ("arguments", "key", "status", "text"),
    [
        (["https://agentflow.example"], ADMIN_KEY, USAGE, "say --yes"),
        (["http://10.0.0.1:8000"], ADMIN_KEY, USAGE, "say --yes"),
        (["http://[::1"], ADMIN_KEY, USAGE, "is not the URL"),
        (["ftp://localhost"], ADMIN_KEY, USAGE, "is not the URL"),
        (["http://localhost:{closed}", "--kinds", "rain=1"], ADMIN_KEY, USAGE, "'rain' is not one of ping"),
        (["http://localhost:{closed}", "--kinds", "ping=-1"], ADMIN_KEY, USAGE, "above 0"),
        (["http://localhost:{closed}", "--kinds", "ping=much"], ADMIN_KEY, USAGE, "is no weight"),
        (["http://localhost:{closed}", "--rate", "1000", "--minutes", "240"], ADMIN_KEY, USAGE, "the most of one run"),
        (["http://localhost:{closed}", "--rate", "0"], ADMIN_KEY, USAGE, "--rate"),
        (["http://localhost:{closed}", "--out", "/nowhere/at/all.json"], ADMIN_KEY, USAGE, "there is no folder"),
        (["http://localhost:{closed}"], None, USAGE, "set ADMIN_API_KEY"),
        (["http://127.0.0.1:{closed}"], ADMIN_KEY, CANNOT_START, "nobody answers"),
    ],
)
def test_a_load_that_cannot_be_meant_is_refused(
    arguments: list[str], key: str | None, status: int, text: str, agentflow: Command
) -> None:
    closed = free_port()

    said = agentflow("load", *(each.format(closed=closed) for each in arguments), key=key)

    assert said.status == status
    assert text in said.err and len(said.err.splitlines()) == 1


def test_another_systems_key_is_refused_before_anything_is_sent(up: Up, agentflow: Command) -> None:
    said = agentflow("load", up.url, key="another-key-of-theirs")

    assert said.status == CANNOT_START and "is ADMIN_API_KEY a key of it?" in said.err


def test_the_same_seed_is_the_same_load() -> None:
    def kinds(seed: int, **more: Any) -> list[str]:
        requests = measuring.Requests(seed, None, [], batches=0, crowds=0, mix={"ping": 3, "native": 1}, **more)
        return [request.kind for _ in range(20) for request in requests.second(10)]

    assert kinds(1) == kinds(1) != kinds(2)
    assert set(kinds(1)) == {"ping", "native"} and 20 < kinds(1).count("native") < 90
