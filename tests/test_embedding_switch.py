"""From one embedding model to another: searches use the old one until the new one is whole, and an interruption loses nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner
from flask.testing import FlaskClient

from agentflow import settings
from agentflow.cli.commands import cli
from agentflow.errors import Transient
from agentflow.knowledge import embedding_models, search, switching, vector_index, vectors
from agentflow.knowledge.switching import WrongModel
from agentflow.system import System
from tests import openrouter_server as faults
from tests.knowledge_support import (
    ORGANIZATION,
    Context,
    Killed,
    add_document,
    embed,
    embedded_texts,
    killed_at,
    remote,
    vendor,
)
from tests.openrouter_server import ModelServer, model_server
from tests.web_support import problem
from web import create_app

__all__ = ["remote", "vendor"]

OLD, NEW = "server/e5", "server/bge-m3"


@pytest.fixture
def operator(remote: System) -> FlaskClient:
    client = create_app(remote).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {remote.admin_key()}"
    return client


def switch(context: Context, title: str) -> dict[str, Any]:
    return switching.switch(context, title)  # type: ignore[arg-type]


def states(conn: psycopg.Connection) -> dict[str, str]:
    return {model.title: model.state for model in embedding_models.every(conn)}


def searched_with(system: System) -> str | None:
    return search.search(system, ORGANIZATION, "page", mode="vector").model


def filled(system: System, conn: psycopg.Connection, count: int = 30) -> UUID:
    document = add_document(conn, [f"Page {n}." for n in range(count)])
    embed(Context(system), document)
    return document


def test_searches_use_the_old_model_until_the_new_one_is_whole(
    remote: System, vendor: ModelServer, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'other', 'Other')")
    filled(remote, conn)
    other = add_document(conn, ["Theirs."], organization_id=2)
    embed(Context(remote, organization_id=2), other)
    monkeypatch.setattr(vectors, "TEXTS_AT_ONCE", 10)
    seen: list[tuple[str | None, dict[str, str]]] = []
    context = Context(remote)

    def look() -> None:
        if context.told and "vectors" in (context.told[-1][1] or "") and len(seen) < len(context.told):
            seen.append((searched_with(remote), states(conn)))

    context.at = look
    result = switch(context, NEW)

    assert result["model"] == NEW and result["vectors"] == 31
    assert len(seen) >= 4 and {each[0] for each in seen[:4]} == {OLD}
    assert seen[0][1] == {OLD: "active", NEW: "backfilling"}
    assert states(conn) == {NEW: "active"} and searched_with(remote) == NEW
    assert conn.execute("select count(distinct model_id), count(*) from agentflow.vectors").fetchone() == (1, 31)
    asked = [asked.body["model"] for asked in vendor.answered[-1:]]
    assert asked == ["bge-m3"]  # the question of the last search
    stages = [stage for _, stage in context.told if stage]
    assert "10 of 31 vectors, about " in stages[0] and stages[-1] == "deleting the old vectors"
    assert [fraction for fraction, _ in context.told] == sorted(fraction for fraction, _ in context.told)


def test_documents_that_come_during_a_switch_are_whole_after_it(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    filled(remote, conn)
    late: list[UUID] = []
    context = Context(remote)

    def hand_in() -> None:
        if context.told and not late:
            late.append(add_document(conn, ["It came late."]))
            embed(Context(remote), late[0])

    context.at = hand_in
    switch(context, NEW)

    assert late and embedded_texts(vendor).count("It came late.") == 2  # one of each model
    with remote.database.connection() as pooled:
        (model,) = embedding_models.every(pooled)
        assert vectors.count(pooled, ORGANIZATION, model) == (31, 0)


def test_a_switch_killed_anywhere_goes_on_and_pays_nothing_twice(
    remote: System, vendor: ModelServer, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(remote, conn)
    monkeypatch.setattr(vectors, "TEXTS_AT_ONCE", 5)
    before = len(vendor.answered)
    for nth in (3, 11, 26, 27, 45, 46, 60, 75, 76, 77, 90):
        with killed_at(monkeypatch, nth) as note, suppress(Killed):
            switch(Context(remote, at=note), NEW)
        model = states(conn).get(NEW)
        assert searched_with(remote) == (NEW if model == "active" else OLD)

    switch(Context(remote), NEW)

    assert states(conn) == {NEW: "active"}
    assert conn.execute("select count(*) from agentflow.vectors").fetchone() == (30,)
    texts = [
        text for asked in vendor.answered[before:] for text in asked.body.get("input", ())
    ]  # of a cut one, nothing
    pages = [text for text in texts if text.startswith("Page ")]
    assert len(pages) <= 30 + 11 * 5  # at most the batch that was under way at each kill


def test_one_switch_at_a_time_and_one_may_be_given_up(
    remote: System, vendor: ModelServer, conn: psycopg.Connection, operator: FlaskClient
) -> None:
    filled(remote, conn)
    vendor.fault(
        faults.status(500), when=lambda asked: asked.body["model"] == "bge-m3" and "Page" in asked.text, times=99
    )
    with pytest.raises(Transient):
        switch(Context(remote), NEW)
    assert states(conn) == {OLD: "active", NEW: "backfilling"}

    with pytest.raises(WrongModel, match="under way"):
        switch(Context(remote), "server/third")
    problem(operator.post("/api/knowledge/models", json={"model": "server/third"}), 409)
    assert operator.post("/api/knowledge/models/discard").json == {"model": NEW}
    assert operator.post("/api/knowledge/models/discard").json == {"model": None}

    assert states(conn) == {OLD: "active", NEW: "old"}
    switch(Context(remote), OLD)  # as the job does that was handed in
    assert states(conn) == {OLD: "active"}


def test_a_switch_that_is_given_up_while_it_runs_ends_and_writes_nothing_more(
    remote: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(remote, conn)
    monkeypatch.setattr(vectors, "TEXTS_AT_ONCE", 5)
    context = Context(remote)

    def give_up() -> None:
        if context.told:
            conn.execute("update agentflow.embedding_models set state = 'old' where state = 'backfilling'")

    context.at = give_up
    with pytest.raises(WrongModel, match="given up"):
        switch(context, NEW)

    assert searched_with(remote) == OLD
    rows = conn.execute(
        "select count(*) from agentflow.vectors v join agentflow.embedding_models m on m.id = v.model_id and m.state = 'old'"
    ).fetchone()
    assert rows == (5,)


def test_the_active_model_named_again_makes_what_is_missing(remote: System, conn: psycopg.Connection) -> None:
    filled(remote, conn)
    conn.execute("delete from agentflow.vectors where ctid in (select ctid from agentflow.vectors limit 7)")

    assert switch(Context(remote), OLD)["vectors"] == 7
    assert states(conn) == {OLD: "active"}


def test_the_indexes_of_the_old_model_go_with_it(
    remote: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_index, "MANY", 20)
    filled(remote, conn)
    (old,) = embedding_models.every(conn)
    assert vector_index.exists(conn, ORGANIZATION, old.id)

    switch(Context(remote), NEW)

    (new,) = embedding_models.every(conn)
    assert vector_index.exists(conn, ORGANIZATION, new.id)
    assert not vector_index.exists(conn, ORGANIZATION, old.id)


def test_vectors_of_two_models_never_meet(remote: System, conn: psycopg.Connection) -> None:
    """The same length, other directions: compared with each other they would only look right."""
    filled(remote, conn)
    (old,) = embedding_models.every(conn)
    other = embedding_models.add(conn, "server", "bge-m3", old.dimensions, "", "", "backfilling")
    assert other is not None
    for _ in vectors.fill(remote, Context(remote), Context(remote), ORGANIZATION, other):  # type: ignore[arg-type]
        pass
    conn.execute("delete from agentflow.vectors where model_id = %s", (old.id,))

    assert search.search(remote, ORGANIZATION, "Page 1.", mode="vector").hits == []


# ---- by the operator ----


def test_a_switch_is_started_over_http_and_done_by_a_job(
    remote: System, conn: psycopg.Connection, operator: FlaskClient
) -> None:
    filled(remote, conn)

    started = operator.post("/api/knowledge/models", json={"model": NEW})
    job = operator.get(f"/api/jobs/{started.json['job_id']}").json
    listed = operator.get("/api/knowledge/models").json

    assert started.status_code == 202 and (started.json["texts"], started.json["tokens"]) == (30, 3000)
    assert (job["type"], job["payload"]) == ("backfill_embeddings", {"model": NEW})
    assert listed["problem"] is None
    (model,) = listed["models"]
    assert (model["model"], model["state"], model["vectors"], model["missing"]) == (OLD, "active", 30, 0)
    said = problem(operator.post("/api/knowledge/models", json={"model": "nothing"}), 422)
    assert "PROVIDER/MODEL" in said["errors"][0]["problem"]
    problem(operator.post("/api/jobs", json={"type": "backfill_embeddings", "payload": {"model": NEW}}), 422)


def test_the_command_says_what_it_will_cost(
    environment: dict[str, str], conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_server() as vendor:
        named = {"OPENROUTER_API_KEY": faults.KEY, "OPENROUTER_BASE_URL": vendor.url}
        for name, value in {**environment, **named}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("agentflow.settings.current", lambda: settings.load({**environment, **named}))
        add_document(conn, ["one", "two"])

        said = CliRunner().invoke(
            cli, ["knowledge", "switch", "openrouter/openai/small", "--yes"], catch_exceptions=False
        )
        listed = CliRunner().invoke(cli, ["knowledge", "models"], catch_exceptions=False)
        found = CliRunner().invoke(cli, ["knowledge", "search", "one"], catch_exceptions=False)

    assert said.output.startswith("2 texts with about 200 tokens; about $0.0050\njob ")  # 0.0001 for the 4 of the probe
    assert "no vectors yet" in listed.output
    assert "one" in found.output and "by words alone" not in found.output
    assert conn.execute("select payload ->> 'model' from agentflow.jobs").fetchall() == [("openrouter/openai/small",)]
