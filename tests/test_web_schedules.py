"""Schedules over HTTP and on the command line: what is asked for is kept and shown, what cannot be is refused by its field."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.schedules import firing, records
from agentflow.system import System
from tests import cli_support
from tests.calendar_support import jobs_of, overdue
from tests.cli_support import Command
from tests.one_database import database_url, original
from tests.web_support import client, problem

__all__ = ["client", "database_url", "original"]
agentflow = cli_support.agentflow

HOURLY = {"name": "hourly", "every_s": 3600, "type": "ping", "payload": {"sleep_ms": 1}}
MORNING = {"name": "morning", "cron": "30 7 * * mon-fri", "time_zone": "Europe/Berlin", "type": "ping"}


def create(client: FlaskClient, **more: Any) -> dict[str, Any]:
    answer = client.post("/api/schedules", json={**HOURLY, **more})
    assert answer.status_code == 201, answer.text
    return dict(answer.json)


def test_a_schedule_is_made_shown_changed_run_and_deleted(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    made = client.post("/api/schedules", json=MORNING)
    url = made.headers["Location"]
    assert made.json == client.get(url).json
    times = [datetime.fromisoformat(each) for each in made.json["next_times"]]
    assert len(times) == 5 and times[0] == datetime.fromisoformat(made.json["next_at"])
    assert all(time.astimezone(UTC).hour in (5, 6) and time.minute == 30 and time.weekday() < 5 for time in times)

    changed = client.patch(url, json={"every_s": 120, "payload": {"sleep_ms": 5}, "enabled": True}).json
    assert (changed["cron"], changed["every_s"], changed["payload"]) == (None, 120, {"sleep_ms": 5})
    paused = client.patch(url, json={"enabled": False}).json
    assert (paused["enabled"], paused["next_at"], paused["next_times"]) == (False, None, [])
    assert client.patch(url, json={"enabled": True}).json["next_at"] is not None

    ran = client.post(f"{url}/run")
    assert ran.status_code == 202 and client.get(ran.headers["Location"]).json["payload"]["sleep_ms"] == 5
    overdue(conn, UUID(changed["id"]), 300)
    assert firing.fire_due(system)
    by_hand, due = sorted(client.get(f"{url}/ticks").json["ticks"], key=lambda tick: not tick["by_hand"])
    assert (by_hand["by_hand"], by_hand["job_id"], by_hand["missed"]) == (True, ran.json["job_id"], 0)
    assert (due["by_hand"], due["outcome"], due["missed"], due["error"]) == (False, "submitted", 2, None)

    assert client.delete(url).status_code == 204
    for method, path in (
        ("GET", url),
        ("PATCH", url),
        ("DELETE", url),
        ("POST", f"{url}/run"),
        ("GET", f"{url}/ticks"),
    ):
        problem(client.open(path, method=method, json={} if method == "PATCH" else None), 404)
    assert len(jobs_of(conn, UUID(changed["id"]))) == 2
    assert client.get("/api/schedules").json["schedules"] == []


def test_the_list_is_paged(client: FlaskClient) -> None:
    ids = [create(client, name=f"n{n}")["id"] for n in range(5)]

    first = client.get("/api/schedules?limit=3").json
    rest = client.get(f"/api/schedules?limit=3&cursor={first['next_cursor']}").json

    assert [each["id"] for each in (*first["schedules"], *rest["schedules"])] == ids[::-1]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"every_s": None}, "cron"),
        ({"cron": "* * * * *"}, "cron"),
        ({"every_s": None, "cron": "* * *"}, "cron"),
        ({"every_s": None, "cron": "* * * * *", "time_zone": "Nowhere/No"}, "time_zone"),
        ({"every_s": None, "at": "2020-01-01T00:00:00Z"}, "at"),
        ({"every_s": None, "at": "2020-01-01T00:00:00"}, "at"),
        ({"every_s": 59}, "every_s"),
        ({"jitter_s": 3600}, "jitter_s"),
        ({"type": "no_such_type"}, "type"),
        ({"type": "web_secret"}, "type"),
        ({"payload": {"sleep_ms": "long"}}, "payload.sleep_ms"),
        ({"payload": {"nothing": 1}}, "payload.nothing"),
        ({"name": "x\x00"}, "name"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_by_its_field(
    client: FlaskClient, change: dict[str, Any], field: str
) -> None:
    body = {name: value for name, value in {**HOURLY, **change}.items() if value is not None}
    said = problem(client.post("/api/schedules", json=body), 422)
    assert [each["field"] for each in said["errors"]] == [field]

    url = f"/api/schedules/{create(client)['id']}"
    before = client.get(url).json
    if not {"cron", "at"} & set(change) and change.get("every_s", 1) is not None:  # others take the interval's place
        assert problem(client.patch(url, json=change), 422)["errors"][0]["field"] == field
    assert client.get(url).json == before


def test_a_name_is_one_of_a_kind_and_so_many_are_enough(
    client: FlaskClient, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client)
    other = create(client, name="other")
    problem(client.post("/api/schedules", json=HOURLY), 409)
    problem(client.patch(f"/api/schedules/{other['id']}", json={"name": "hourly"}), 409)

    monkeypatch.setattr(system, "settings", system.settings.model_copy(update={"schedules_most": 2}))

    said = problem(client.post("/api/schedules", json={**HOURLY, "name": "third"}), 409)
    assert "SCHEDULES_MOST" in said["detail"]
    client.delete(f"/api/schedules/{other['id']}")
    create(client, name="third")


def test_one_that_is_over_can_still_be_renamed(client: FlaskClient, conn: psycopg.Connection) -> None:
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    made = client.post("/api/schedules", json={"name": "once", "at": later, "type": "ping"}).json
    conn.execute("update agentflow.schedules set once_at = '2020-01-01', next_at = null, wake_at = null")

    renamed = client.patch(f"/api/schedules/{made['id']}", json={"name": "was once"})

    assert (renamed.status_code, renamed.json["name"], renamed.json["next_times"]) == (200, "was once", [])


def test_the_system_says_when_its_calendar_ticked_last(client: FlaskClient, conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into agentflow.ticks (schedule, at, outcome, ended_at) values"
        " ('clean_up.failed', '2026-01-01 00:00Z', 'done', '2026-01-01 00:00Z'),"
        " ('clean_up.failed', '2026-01-01 00:10Z', 'behind', '2026-01-01 00:10Z')"
    )

    stats = client.get("/api/system/stats").json

    (entry,) = stats["calendar"]
    assert (entry["schedule"], entry["at"], entry["outcome"]) == ("clean_up.failed", "2026-01-01T00:10:00Z", "behind")
    assert entry["behind_s"] > 600
    assert stats["canaries"] == []


# ---- on the command line ----


def test_schedules_on_the_command_line(agentflow: Command, system: System, conn: psycopg.Connection) -> None:
    made = agentflow(
        *("schedules", "create", "every morning", "ping", "--cron", "30 7 * * *", "--zone", "Europe/Berlin"),
        *("--payload", '{"sleep_ms": 3}'),
    )
    assert made.status == 0 and "30 7 * * * (Europe/Berlin)" in made.out
    (listed,) = [json.loads(line) for line in agentflow("schedules", "list", "--json").out.splitlines()]
    assert (listed["name"], listed["payload"], listed["jitter_s"]) == ("every morning", {"sleep_ms": 3}, 0)

    assert agentflow("schedules", "pause", "every morning").status == 0
    assert "paused" in agentflow("schedules", "show", "every morning").out
    assert agentflow("schedules", "resume", listed["id"]).status == 0
    job = agentflow("schedules", "run", "every morning").out.strip()
    assert jobs_of(conn, UUID(listed["id"])) == [UUID(job)]
    shown = json.loads(agentflow("schedules", "show", listed["id"], "--json").out)
    assert len(shown["next_times"]) == 5 and [tick["job_id"] for tick in shown["ticks"]] == [job]
    assert agentflow("schedules", "delete", "every morning").status == 0
    assert records.search(conn, None) == [] and "no schedules" in agentflow("schedules", "list").out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("create", "x", "ping"), "one of cron"),
        (("create", "x", "ping", "--every", "5"), "at least 60"),
        (("create", "x", "ping", "--at", "tomorrow"), "2026-03-01T07:30:00"),
        (("create", "x", "ping", "--every", "60", "--payload", "[]"), "JSON object"),
        (("create", "x", "nothing", "--every", "60"), "unknown job type"),
        (("create", "x", "ping", "--every", "60", "--org", "nobody"), "no organization"),
        (("run", "nobody"), "no schedule"),
    ],
)
def test_wrong_commands_are_one_line(agentflow: Command, arguments: tuple[str, ...], word: str) -> None:
    said = agentflow("schedules", *arguments)

    assert (said.status, said.err.count("\n")) == (2, 1)
    assert word in said.err
