"""`agentflow rules …`: what it sets is what the workers read, and what it refuses it names."""

from __future__ import annotations

import json

import psycopg
import pytest

from agentflow import organizations
from agentflow.jobs import rules
from agentflow.limits import Window
from tests import cli_support
from tests.cli_support import Command

Connection = psycopg.Connection
agentflow = cli_support.agentflow


@pytest.fixture
def acme(conn: Connection) -> int:
    with conn.transaction():
        return organizations.create(conn, "acme", "Acme").id


def test_what_is_set_is_read_shown_and_taken_back(agentflow: Command, conn: Connection, acme: int) -> None:
    for command in (
        ("pause", "type", "ping", "--org", "acme", "--reason", "too loud"),
        ("pause", "queue", "gpu"),
        ("cap", "3", "--type", "ping"),
        ("cap", "7", "--org", "acme"),
        ("limit", "type:ping", "100/60", "5000/3600", "--org", "acme"),
        ("budget", "usd", "2.5", "--org", "acme"),
        ("budget", "tokens", "1000000"),
    ):
        assert agentflow("rules", *command).status == 0
    listed = [json.loads(line) for line in agentflow("rules", "list", "--json").out.splitlines()]
    found = rules.read(conn)

    assert found.pause_of(acme, "default", "ping") is not None and found.pause_of(1, "default", "ping") is None
    assert found.pause_of(1, "gpu", "ping") is not None
    assert (found.cap_of(acme, "ping"), found.cap_of(acme, ""), found.cap_of(1, "")) == (3, 7, None)
    assert found.limit_of(acme, "type:ping") == (Window(100, 60), Window(5000, 3600))
    assert {(each["rule"], each["of"], each["organization"]) for each in listed} == {
        ("pause", "type ping", "acme"),
        ("pause", "queue gpu", "all"),
        ("cap", "ping", "each"),
        ("cap", "all types", "acme"),
        ("limit", "type:ping", "acme"),
        ("budget", "usd", "acme"),
        ("budget", "tokens", "each"),
    }
    assert next(each["says"] for each in listed if each["of"] == "usd") == "2.5 a day, 0 used today"

    for command in (
        ("resume", "type", "ping", "--org", "acme"),
        ("resume", "queue", "gpu"),
        ("cap", "off", "--type", "ping"),
        ("cap", "off", "--org", "acme"),
        ("limit", "type:ping", "--org", "acme"),
        ("budget", "usd", "off", "--org", "acme"),
        ("budget", "tokens", "off"),
    ):
        assert agentflow("rules", *command).status == 0
    left = rules.read(conn)
    assert (dict(left.pauses), dict(left.caps), dict(left.limits)) == ({}, {}, {})
    assert "no rules" in agentflow("rules", "list").out


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("pause", "queue", "nonsense"), "default, heavy, gpu"),
        (("pause", "queue", "gpu", "--org", "default"), "--org"),
        (("pause", "type", "nonsense"), "unknown job type"),
        (("pause", "organization", "nobody"), "agentflow orgs list"),
        (("cap", "0"), "1 to 100000"),
        (("cap", "many"), "1 to 100000"),
        (("limit", "type:ping", "100"), "100/60"),
        (("limit", "type:ping", "0/60"), "0/60"),
        (("limit", "type:ping", "1/60", "2/60"), "same length"),
        (("limit", "type:nonsense", "1/60"), "unknown job type"),
        (("budget", "US$", "5"), "such as usd"),
        (("budget", "usd", "0"), "an amount above 0"),
        (("budget", "usd", "nan"), "an amount above 0"),
        (("budget", "usd", "much"), "an amount above 0"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_changes_nothing(
    agentflow: Command,
    conn: Connection,
    command: tuple[str, ...],
    named: str,
) -> None:
    said = agentflow("rules", *command)

    assert (said.status, len(said.err.splitlines())) == (2, 1) and named in said.err
    assert not rules.read(conn).pauses and not rules.read(conn).caps and not rules.read(conn).limits


def test_resuming_what_goes_on_already_says_so(agentflow: Command) -> None:
    said = agentflow("rules", "resume", "queue", "gpu")

    assert said.status == 1 and "is not paused" in said.err
