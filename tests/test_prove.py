"""`agentflow prove`: a whole run on a private copy, the command, and the figures it makes of what happened."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner

from agentflow import settings
from agentflow.cli import commands, proving
from agentflow.cli.errors import USAGE, Failure
from agentflow.prove import page, plan, report, run, soak
from agentflow.prove.faults import Fault
from agentflow.prove.plan import Options
from agentflow.prove.ports import free_port
from agentflow.prove.rabbitmq import Entrance
from agentflow.prove.receiver import Receiver
from agentflow.prove.requests import Requests
from tests.conftest import ADMIN_KEY
from tests.processes import worker
from tests.web_support import gunicorn


def options(out: Path, **more: Any) -> Options:
    fields: dict[str, Any] = {
        "minutes": 1.0,
        "seed": 4,
        "faults": plan.offers(rabbitmq=True),
        "jobs_per_minute": 1200.0,
        "out": out,
        "worker": "agentflow.cli.prove_worker",
        "web": "agentflow.cli.prove_web",
    }
    return Options(**{**fields, **more})


# ---- a run ----


@pytest.mark.timeout(900)
def test_a_run_with_every_kind_of_fault_loses_nothing_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "web.log").write_text('{"level": "error", "event": "of a run before"}\n')

    made = run.prove(options(tmp_path, minutes=1.0))

    # How fast it recovers is for runs that have the machine to themselves.
    assert {name: n for name, n in made["wrong"].items() if n and name != "slow_recoveries"} == {}, made
    assert made["accepted"] > 500 and made["finished"]["succeeded"] > 500 and made["finished"]["cancelled"] > 0
    assert made["claims"] > made["jobs"], "nothing ran twice: the faults hurt nobody"
    assert made["deliveries"] > made["applied"] > 20
    # On a slow machine a lane may not get through all of its kinds; each gets through some.
    happened = {lane for lane, kinds in plan.LANES.items() if any(made["faults"].get(kind) for kind in kinds)}
    assert happened == set(plan.LANES)
    assert sum(made["faults"].values()) >= 8
    assert made == json.loads((tmp_path / "report.json").read_text())
    written = (tmp_path / "report.html").read_text()
    assert "<svg" in written and "polyline" in written and "http" not in written.replace("http-equiv", "")


@pytest.fixture
def admin_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command finds it in its environment, which is read once in a process."""
    monkeypatch.setenv("ADMIN_API_KEY", ADMIN_KEY)
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("admin_key")
def test_a_staging_system_is_loaded_and_checked_by_its_url(environment: dict[str, str], tmp_path: Path) -> None:
    with worker(environment, tmp_path / "worker.log"), gunicorn(environment, tmp_path) as web:
        arguments = ["prove", "--url", web.url, "--minutes", "0.2", "--jobs-per-minute", "600", "--seed", "1"]
        status = commands.run([*arguments, "--yes", "--out", str(tmp_path / "out")])

    made = json.loads((tmp_path / "out/report.json").read_text())
    assert status == 0, made
    assert made["accepted"] > 60 and sum(made["finished"].values()) == made["accepted"]
    assert set(made["wrong"].values()) == {0}


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults", "kill_worker,rain"], "'rain' is not one of kill_worker"),
        (["--url", "http://127.0.0.1:9"], "say --yes"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["prove", *arguments]) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("admin_key")
def test_nobody_at_the_url_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["prove", "--url", "http://127.0.0.1:9", "--yes"]) == 3
    assert capsys.readouterr().err.startswith("agentflow: nobody answers at http://127.0.0.1:9")


@pytest.mark.parametrize(("verdict", "status"), [("ok", 0), ("wrong", 1), ("weak", 2)])
def test_the_exit_status_is_the_verdict(
    verdict: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_up(verdict=verdict, weak=["too few"] if verdict == "weak" else [])
    monkeypatch.setattr(run, "prove", lambda *_: made)

    assert (
        CliRunner().invoke(commands.cli, ["prove", "--out", str(tmp_path)], standalone_mode=False).return_value
        == status
    )


def test_a_cluster_needs_rabbitmq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving.rabbitmq, "installed", lambda: False)

    with pytest.raises(Failure, match="--cluster needs RabbitMQ"):
        proving.prove(None, None, None, None, None, False, True, False, False, None)


# ---- the plan ----


def test_the_same_seed_is_the_same_faults_and_the_same_load() -> None:
    for lane in plan.LANES:
        first, second, other = (list(plan.schedule(lane, plan.FAULTS, seed, 600)) for seed in (1, 1, 2))
        assert first == second != other
    bodies = [[r.body for r in Requests(seed, 80, []).second(200) if "run_at" not in r.body] for seed in (5, 5, 6)]
    assert bodies[0] == bodies[1] != bodies[2]


@pytest.mark.parametrize("cluster", [False, True])
def test_ten_minutes_have_each_kind_of_fault_often_enough(cluster: bool) -> None:
    kinds = plan.offers(rabbitmq=True, cluster=cluster)
    for seed in range(50):
        for lane in plan.LANES:
            planned = [kind for _, kind in plan.schedule(lane, kinds, seed, 600)]
            for kind in set(plan.LANES[lane]) & set(kinds):
                assert planned.count(kind) >= plan.ENOUGH_OF_A_KIND_IN_10_MIN, (seed, kind)


# ---- the receiver ----


def test_the_receiver_applies_a_key_once_whatever_it_answers(tmp_path: Path) -> None:
    receiver = Receiver(1, tmp_path / "journal")
    try:
        key = str(uuid4())
        statuses = {receiver.take("effects", key, {"id": key, "fence": 1}, 0.0) for _ in range(300)}
    finally:
        receiver.close()

    assert statuses == {200, 500, 503}  # it refuses, and it does what it then does not say
    assert sum(d.applied for d in receiver.deliveries) == 1
    assert len(receiver.deliveries) == len((tmp_path / "journal").read_text().splitlines()) == 300


# ---- the entrance of a cluster ----


def test_the_entrance_leads_past_a_node_that_is_gone() -> None:
    gone = free_port()
    with socket.create_server(("127.0.0.1", 0)) as node:
        entrance = Entrance([gone, node.getsockname()[1]])
        try:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", entrance.port), 5) as client:
                    led, _ = node.accept()
                    client.sendall(b"there")
                    assert led.recv(5) == b"there"
                    led.sendall(b"back")
                    assert client.recv(4) == b"back"
                    led.close()  # a node that dies takes the connection along
                    assert client.recv(1) == b""
            with socket.create_connection(("127.0.0.1", entrance.port), 5) as client:
                led, _ = node.accept()
                client.sendall(b"there")
                assert led.recv(5) == b"there"
                entrance.cut()
                assert (client.recv(1), led.recv(1)) == (b"", b"")
                led.close()
        finally:
            entrance.close()


# ---- the figures ----

BROKER = plan.LANES["rabbitmq"]


def test_a_recovery_counts_from_the_parts_return_to_the_first_success() -> None:
    kill = Fault("kill_web", began=10.0, back=12.0)

    found = report.recovery(kill, [kill], BROKER, ends=[9.0, 11.0, 14.5, 15.0])

    assert (found["recovered_s"], found["down_s"], found["disturbed"]) == (2.5, 2.0, [])


def test_a_recovery_does_not_count_the_time_in_which_what_it_needs_was_away() -> None:
    job = uuid4()
    kill = Fault("kill_worker", began=10.0, back=12.0, victims=[(job, 1)])
    database = Fault("freeze_postgres", began=9.0, back=11.0)
    broker = Fault("restart_rabbitmq", began=16.0, back=20.0)
    others = [database, kill, broker, Fault("kill_web", began=12.0, back=21.0)]

    found = report.recovery(kill, others, BROKER, ends=[12.5], victims=({job: 17.0}, {job: 21.5}))

    assert (found["recovered_s"], found["taken_s"], found["rerun_s"]) == (0.5, 6.0, 1.5)
    assert found["disturbed"] == ["taken_s", "rerun_s"]


def test_a_locked_table_keeps_jobs_from_being_taken_as_a_database_does_that_is_away() -> None:
    job = uuid4()
    kill = Fault("kill_process", began=10.0, back=14.0, victims=[(job, 1)])
    lock = Fault("cut_rabbitmq", began=15.0, back=18.5)

    found = report.recovery(kill, [kill, lock], BROKER, ends=[14.5], victims=({job: 22.0}, {job: 22.5}))

    assert (found["taken_s"], found["rerun_s"]) == (3.5, 4.0)
    assert found["disturbed"] == ["taken_s", "rerun_s"]


def test_what_came_back_in_spite_of_another_fault_is_counted_in_full() -> None:
    job = uuid4()
    kill = Fault("kill_worker", began=10.0, back=12.0, victims=[(job, 1)])
    broker = Fault("refuse_publishes", began=9.0, back=30.0)

    found = report.recovery(kill, [kill, broker], BROKER, ends=[13.0], victims=({job: 17.0}, {job: 21.5}))

    assert (found["recovered_s"], found["taken_s"], found["rerun_s"]) == (1.0, 7.0, 11.5)
    assert found["disturbed"] == ["recovered_s", "rerun_s"]


def test_slow_recoveries_are_wrong() -> None:
    quick = {"recovered_s": 1.0, "taken_s": 7.0, "rerun_s": 10.9, "disturbed": []}

    assert report.in_time(quick, lease_s=6.0)
    assert not report.in_time({**quick, "rerun_s": 11.1}, lease_s=6.0)
    assert not report.in_time({**quick, "taken_s": 11.1}, lease_s=6.0)
    assert report.in_time({**quick, "rerun_s": 50.0, "disturbed": ["rerun_s"]}, lease_s=6.0)
    assert not report.in_time({**quick, "taken_s": 50.0, "disturbed": ["rerun_s"]}, lease_s=6.0)
    assert not report.in_time({**quick, "recovered_s": 60.1}, lease_s=6.0)
    assert report.in_time({**quick, "recovered_s": None}, lease_s=6.0)


def test_too_few_jobs_or_faults_make_a_run_weak(tmp_path: Path) -> None:
    ten = options(tmp_path, minutes=10)

    assert report.weakness(ten, 3000, {"cut_redis": 5}, ["cut_redis"]) == []
    assert report.weakness(ten, 2999, {"cut_redis": 5}, ["cut_redis"]) == ["2999 jobs a minute; 3000 are needed"]
    assert report.weakness(ten, 3000, {"cut_redis": 4}, ["cut_redis"]) == ["cut_redis only 4 times; 5 are needed"]
    assert report.weakness(options(tmp_path, minutes=3), 3000, {"cut_redis": 1}, ["cut_redis"]) == []


def test_errors_in_the_logs_are_counted_and_those_that_were_asked_for_are_not(tmp_path: Path) -> None:
    lines = [
        {
            "level": "error",
            "event": "unexpected error",
            "exception": "Traceback:\n  x\nerrors.UniqueViolation: slot\nDETAIL:  Key\nCONTEXT:  PL",
        },
        {"level": "error", "event": "out of attempts"},
        {"level": "warning", "event": "lease lost: the job is stopped here"},
    ]
    (tmp_path / "worker-1.log").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"level": "error", "ev'
    )

    assert report.unexpected_errors(tmp_path) == {"worker-1 – unexpected error – errors.UniqueViolation: slot": 1}


def made_up(**more: Any) -> dict[str, Any]:
    """A report as a run makes it."""
    chance = random.Random(1)
    fault = {"began": 10.0, "back": 14.0, "down_s": 4.0, "recovered_s": 0.5, "rerun_s": None, "note": None}
    return {
        "verdict": "ok",
        "version": "1",
        "seed": 1,
        "minutes": 1.0,
        "tier": "RabbitMQ",
        "machine": "one",
        "lease_s": 6.0,
        "began": "2030-01-01T00:00:00+00:00",
        "accepted": 3000,
        "jobs_per_minute": 3000,
        "finished": {"succeeded": 2990, "failed": 0, "cancelled": 10},
        "claims": 3100,
        "events": 20000,
        "wrong": {"lost": 0, "stuck": 0},
        "violations": {},
        "unexpected_errors": {},
        "protocol_errors": [],
        "weak": [],
        "faults": {"freeze_postgres": 1, "kill_worker": 1},
        "faults_not_to_be_had": {},
        "slowest_recovery_s": {"freeze_postgres": {"recovered_s": 0.5}},
        "throughput_per_s": [chance.randint(30, 70) for _ in range(60)],
        "history": [{"kind": "freeze_postgres", **fault}, {"kind": "kill_worker", **fault, "rerun_s": 7.5}],
        **more,
    }


@pytest.mark.parametrize("verdict", ["ok", "wrong", "weak"])
def test_the_page_holds_all_it_needs(verdict: str) -> None:
    violations = {"lost": {"count": 1, "counted_as": "lost", "examples": [{"job": None, "said": "<b>gone</b>"}]}}

    written = page.page(made_up(verdict=verdict, violations=violations if verdict == "wrong" else {}))

    assert written.count("<rect") == 4 and "freeze postgres at 10.0 s" in written
    assert ("&lt;b&gt;gone" in written) == (verdict == "wrong") and "<b>gone" not in written
    assert "src=" not in written and "href=" not in written


# ---- the soak ----


def test_a_process_that_grows_is_found_and_one_that_warms_up_is_not(tmp_path: Path) -> None:
    half_an_hour = options(tmp_path, minutes=30, jobs_per_minute=6000)
    seconds = [10.0 * n for n in range(180)]
    samples = {
        "steady": [(s, 80.0 + (n % 3) * 0.02, 20) for n, s in enumerate(seconds)],
        "warms up": [(s, 60.0 + min(s, 500) / 25, 20) for s in seconds],
        "leaks": [(s, 80.0 + 1.5 * s / 3600, 20) for s in seconds],
        "opens": [(s, 80.0, 20 + int(s / 300)) for s in seconds],
        "runs more and more at once": [(s, 80.0, 20 + 3 * (n % 4) * n // 90) for n, s in enumerate(seconds)],
        "came later": [(s, 80.0 + s, 20) for s in seconds[100:]],
    }
    ends = [n / 100 for n in range(180_000)]

    made = soak.make(half_an_hour, samples, accepted=180_000, ends=ends, began=datetime.now(UTC))

    assert [line.split(":")[0] for line in made["grows"]] == ["leaks", "opens"]
    assert made["verdict"] == "wrong" and made["jobs_per_s"] == 100 and made["weak"] == []
    assert "came later" not in made["processes"]
    assert soak.page(made).count("<polyline") == 2 * 5
