"""The table of alerts: as Prometheus' rules, which promtool tests; as the scheduler raises them by itself; in the documents.

`python -m tests.test_alerts` writes the table of ops/monitoring/README.md.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from prometheus_client import Metric
from standardwebhooks import Webhook

from agentflow import settings
from agentflow.alerts import prometheus, standing, table, telling
from agentflow.alerts.judging import judge
from agentflow.alerts.standing import Found
from agentflow.system import System
from scheduler.alerts import Watch
from tests import cli_support
from tests.calendar_support import schedule
from tests.cli_support import Command
from tests.folders import server_folder
from tests.http_server import Reply, Server, serve
from tests.processes import ROOT, eventually
from tests.prometheus import AMTOOL, PROMTOOL
from tests.servers import Postgres

agentflow = cli_support.agentflow
FOLDER = ROOT / "ops" / "monitoring"
RULES = FOLDER / "alerts.yml"
BOT_TOKEN = "123456789:AAtesttesttesttesttest"
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


_BEGIN = "<!-- alerts: .venv/bin/python -m tests.test_alerts writes this table -->\n"
_END = "<!-- end of alerts -->"


def alerts_table() -> str:
    rows = "".join(
        f"| {alert.name} | {alert.severity} | {alert.threshold:g} | {alert.meaning} | {alert.for_s // 60} min |"
        f" {'yes' if alert.conditions else 'no'} |\n"
        for alert in table.ALERTS
    )
    return f"\n| alert | severity | threshold | of what | for | by itself |\n|---|---|---|---|---|---|\n{rows}\n"


def checked(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- the files ----


def test_the_rules_are_the_tables() -> None:
    assert RULES.read_text() == prometheus.rules(table.ALERTS), (
        "run: agentflow alerts rules > ops/monitoring/alerts.yml"
    )


def test_promtool_and_amtool_accept_the_files(tmp_path: Path) -> None:
    checked(PROMTOOL, "check", "rules", "alerts.yml")
    assert "SUCCESS" in checked(PROMTOOL, "check", "config", "prometheus.yml")
    # Debian's Alertmanager is older than the keys that name files of secrets.
    written = (FOLDER / "alertmanager.yml").read_text()
    older = re.sub(r"bot_token_file: \S+", 'bot_token: "1:x"', written)
    older = re.sub(r"url_file: \S+", "url: http://receiver.example/alerts", older)
    assert older.count("_file:") == 0 and written.count("_file:") == 2
    (tmp_path / "alertmanager.yml").write_text(older)
    checked(AMTOOL, "check-config", tmp_path / "alertmanager.yml")
    routed = checked(
        AMTOOL, "config", "routes", "test", f"--config.file={tmp_path}/alertmanager.yml", "severity=critical"
    )
    assert routed.split()[0] == "everything"


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    assert "SUCCESS" in checked(PROMTOOL, "test", "rules", "alerts_test.yml")
    tested: dict[str, set[bool]] = {}
    for each in yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]:
        for case in each.get("promql_expr_test", ()):
            name = re.findall(r'alertname="(\w+)"', case["expr"])[0]
            tested.setdefault(name, set()).add(bool(case["exp_samples"]))
    assert tested == {alert.name: {True, False} for alert in table.ALERTS}


def test_inhibited_alerts_exist() -> None:
    names = set(
        re.findall(
            r"[A-Z][A-Za-z]+", " ".join(re.findall(r'alertname=~?"([^"]+)"', (FOLDER / "alertmanager.yml").read_text()))
        )
    )

    assert len(names) > 5 and names <= {alert.name for alert in table.ALERTS}


def test_each_alert_has_its_paragraph_in_the_runbook() -> None:
    text = (ROOT / "ops" / "runbook.md").read_text()
    paragraphs = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL))

    assert list(paragraphs) == [alert.name for alert in table.ALERTS]
    assert all(len(paragraph) > 60 for paragraph in paragraphs.values())


def test_the_documented_table_is_the_programs_own() -> None:
    written = (FOLDER / "README.md").read_text().split(_BEGIN)[1].split(_END)[0]

    assert written == alerts_table(), "run: .venv/bin/python -m tests.test_alerts"


def test_other_thresholds_are_in_the_rules_and_wrong_names_are_refused() -> None:
    changed = settings.load({"ALERT_THRESHOLDS": "QueueTooLong=50, MemoryHigh=0.9"})

    rules = yaml.safe_load(prometheus.rules(table.with_thresholds(dict(changed.alert_thresholds))))

    expressions = {rule["alert"]: rule["expr"] for rule in rules["groups"][0]["rules"]}
    assert expressions["QueueTooLong"] == 'max by (queue) (agentflow_jobs{state="due"}) > 50'
    assert expressions["MemoryHigh"].endswith("> 0.9")
    for wrong in ("QueueToLong=5", "QueueTooLong", "QueueTooLong=many"):
        with pytest.raises(settings.SettingsError, match=r"ALERT_THRESHOLDS: .*Name=number"):
            settings.load({"ALERT_THRESHOLDS": wrong})


# ---- without Prometheus ----


@pytest.fixture
def receiver() -> Iterator[Server]:
    with serve() as server:
        server.on("/alerts", Reply())
        yield server


def told(server: Server) -> list[tuple[str, str, dict[str, str]]]:
    """(name, status, subject) of each alert in each message, in order; every message has to be signed."""
    found = []
    for request in server.requests:
        body = Webhook(SECRET).verify(request.body, dict(request.headers))
        found += [(each["name"], each["status"], each["subject"]) for each in body["data"]["alerts"]]
    return found


@pytest.fixture
def watched(environment: dict[str, str], receiver: Server) -> Iterator[System]:
    environment |= {"ALERT_WEBHOOK_URL": receiver.url("/alerts"), "ALERT_WEBHOOK_SECRET": SECRET}
    system = System.start(settings.load(environment), "scheduler")
    yield system
    system.close()


def too_long(conn: psycopg.Connection, jobs: int = 11) -> None:
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at)"
        " select gen_random_uuid(), 1, 'ping', 'default', 1, 60, clock_timestamp() from generate_series(1, %s)",
        (jobs,),
    )


def later(conn: psycopg.Connection) -> None:
    """All that is wrong has been so for an hour."""
    conn.execute("update agentflow.alerts set since = since - interval '1 h'")


def test_an_alert_is_told_once_when_it_has_lasted_and_once_when_it_is_over(
    watched: System, receiver: Server, conn: psycopg.Connection
) -> None:
    watch = Watch(watched)
    too_long(conn)
    silent = ("WorkersSilent", {})

    assert watch.look() and watch.look()
    assert told(receiver) == []
    later(conn)
    assert watch.look() and watch.look()
    fired = told(receiver)
    conn.execute("delete from agentflow.jobs")
    assert watch.look() and watch.look()

    assert sorted(fired, key=lambda each: each[0]) == [
        ("QueueTooLong", "firing", {"queue": "default"}),
        (silent[0], "firing", silent[1]),
    ]
    assert told(receiver)[2:] == [("QueueTooLong", "resolved", {"queue": "default"})]
    assert len(receiver.requests) == 2, "what is new at a look is one message"
    assert conn.execute("select name, told from agentflow.alerts").fetchall() == [("WorkersSilent", ["log", "webhook"])]


def test_a_scheduler_that_starts_anew_goes_on_where_the_last_one_was(
    watched: System, receiver: Server, conn: psycopg.Connection
) -> None:
    first, second = Watch(watched), Watch(watched)
    too_long(conn)
    first.look()
    later(conn)
    first.look()
    before = len(told(receiver))

    assert not second.look(), "one watches at a time"
    conn.execute("update agentflow.alert_watch set until = clock_timestamp()")  # the first one was killed
    assert second.look() and not first.look()
    second.leave()
    assert first.look()

    assert len(told(receiver)) == before == 2


def test_who_did_not_take_it_is_told_again_and_the_others_are_not(
    watched: System, receiver: Server, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.on("/alerts", Reply(500), Reply())
    watch = Watch(watched)
    watch.look()
    later(conn)

    for _ in range(3):
        watch.look()

    assert len(receiver.requests) == 2
    ids = {request.headers["webhook-id"] for request in receiver.requests}
    assert len(ids) == 1, "the same news, by which the receiver may know it"
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_a_condition_that_comes_and_goes_has_to_last_anew(
    watched: System, receiver: Server, conn: psycopg.Connection
) -> None:
    watch = Watch(watched)
    found = [Found("QueueTooLong", {"queue": "gpu"}, 11.0)]
    for there in (found, [], found):
        standing.note(conn, there, {"QueueTooLong": 300.0})
        later(conn)
    row = conn.execute("select fired_at from agentflow.alerts").fetchone()

    assert row == (None,)
    assert watch.look()
    assert told(receiver) == []


def test_subjects_are_judged_each_by_itself() -> None:
    family = Metric("agentflow_canary_away_seconds", "", "gauge")
    family.add_sample(family.name, {"queue": "gpu"}, 500.0)
    family.add_sample(family.name, {"queue": "default"}, 5.0)
    failed = Metric("agentflow_canary_failed", "", "gauge")
    failed.add_sample(failed.name, {"queue": "gpu"}, 1.0)
    failed.add_sample(failed.name, {"queue": "heavy"}, 1.0)

    found = judge(table.ALERTS, [family, failed])

    assert [(each.name, each.subject["queue"]) for each in found] == [
        ("CanaryFailed", "gpu"),
        ("CanaryFailed", "heavy"),
    ]


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server that a test may stop."""
    with server_folder("postgres") as folder:
        server = Postgres(folder / "postgres")
        server.start()
        yield server
        server.close()


def test_an_outage_of_postgres_is_told_by_the_one_that_watched(
    environment: dict[str, str], receiver: Server, postgres: Postgres
) -> None:
    environment |= {"DATABASE_URL": postgres.make_database(), "ALERT_WEBHOOK_URL": receiver.url("/alerts")}
    environment["ALERT_WEBHOOK_SECRET"] = SECRET
    systems = [System.start(settings.load(environment), "scheduler") for _ in range(2)]
    try:
        first, second = (Watch(system) for system in systems)
        for watch in (first, second):
            watch._for_s["PostgresUnreachable"] = 0.0
        assert first.look() and not second.look()
        postgres.stop()
        for watch in (first, second, first):
            assert not watch.look()
        assert told(receiver) == [("PostgresUnreachable", "firing", {})]
        postgres.start()
        eventually(first.look, within_s=60)
        assert told(receiver)[1:] == [("PostgresUnreachable", "resolved", {})]
    finally:
        for system in systems:
            system.close()


def test_whole_numbers_and_shares_stand_beside_each_other(conn: psycopg.Connection) -> None:
    found = [Found("QueueTooLong", {"queue": "gpu"}, 12), Found("MemoryHigh", {}, 0.85)]

    stand = standing.note(conn, found, {"QueueTooLong": 0.0, "MemoryHigh": 0.0})

    assert {each.name: each.value for each in stand} == {"QueueTooLong": 12.0, "MemoryHigh": 0.85}


def test_a_message_for_people_names_what_when_and_where_to_read_on(watched: System, conn: psycopg.Connection) -> None:
    standing.note(conn, [Found("QueueTooLong", {"queue": "gpu"}, 1234.0)], {"QueueTooLong": 0.0})
    (found,) = standing.every(conn)

    assert telling._line(found) == "🟡 QueueTooLong: Queue gpu has 1234 due jobs (ops/runbook.md#queuetoolong)"


def test_a_chat_is_told_by_the_bot_and_a_refusal_is_told_again(
    environment: dict[str, str], receiver: Server, conn: psycopg.Connection
) -> None:
    answer = Reply(body=b'{"ok": true, "result": {}}', headers={"Content-Type": "application/json"})
    receiver.on(f"/bot{BOT_TOKEN}/sendMessage", Reply(502), answer)
    environment |= {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": receiver.url().rstrip("/")}
    system = System.start(settings.load(environment | {"ALERT_TELEGRAM_CHAT": "-100123"}), "scheduler")
    try:
        watch = Watch(system)
        watch.look()
        later(conn)
        for _ in range(3):
            watch.look()
    finally:
        system.close()

    said = [json.loads(request.body) for request in receiver.requests]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0]["chat_id"] == "-100123"
    assert said[0]["text"].startswith("🔴 WorkersSilent: No worker has been heard of for a minute (ops/runbook.md#")


def test_the_schedule_looks_at_alerts_unless_it_is_told_not_to(environment: dict[str, str]) -> None:
    for seconds, there in (("15", True), ("0", False)):
        system = System.start(settings.load({**environment, "ALERT_INTERVAL": seconds}), "scheduler")
        running = schedule.Running(system, [])
        assert any("Watch.look" in job.func_ref for job in running.get_jobs()) == there
        system.close()


# ---- on the command line ----


def test_the_command_prints_the_rules_and_shows_what_is_up(
    agentflow: Command, watched: System, conn: psycopg.Connection
) -> None:
    assert agentflow("alerts", "rules").out == RULES.read_text()
    assert "nothing is wrong" in agentflow("alerts", "list").out
    watch = Watch(watched)
    watch.look()
    later(conn)
    watch.look()

    (line,) = agentflow("alerts", "list", "--json").out.splitlines()

    found = json.loads(line)
    assert (found["alert"], found["status"], found["told"]) == ("WorkersSilent", "firing", "log, webhook")
    assert "WorkersSilent" in agentflow("alerts", "list").out


def test_the_command_tells_a_test_or_says_why_it_was_not_taken(
    agentflow: Command, receiver: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = agentflow("alerts", "test")
    monkeypatch.setenv("ALERT_WEBHOOK_URL", receiver.url("/alerts"))
    monkeypatch.setenv("ALERT_WEBHOOK_SECRET", SECRET)
    taken = agentflow("alerts", "test")
    receiver.on("/alerts", Reply(503))
    refused = agentflow("alerts", "test")

    assert nobody.status == 2 and "ALERT_TELEGRAM_CHAT or ALERT_WEBHOOK_URL" in nobody.err
    assert (taken.status, taken.out) == (0, "webhook was told\n")
    assert told(receiver)[0] == ("Test", "firing", {})
    assert refused.status == 1 and "ALERT_WEBHOOK_URL answered 503" in refused.err


if __name__ == "__main__":
    head, rest = (FOLDER / "README.md").read_text().split(_BEGIN)
    (FOLDER / "README.md").write_text(head + _BEGIN + alerts_table() + _END + rest.split(_END)[1])
