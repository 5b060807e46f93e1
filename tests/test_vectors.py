"""The vectors of chunks: only missing ones are made, one bad text costs no other its vector, and a kill changes no row."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil
import psycopg
import pytest

from agentflow import settings
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.jobs import rules
from agentflow.knowledge import embedding_models, encoder, vectors
from agentflow.knowledge.encoder import Encoder
from agentflow.limits import Window
from agentflow.system import System
from tests import openrouter_server as faults
from tests.knowledge_support import (
    ORGANIZATION,
    Context,
    Killed,
    PlacedContext,
    add_document,
    answering,
    embed,
    embedded_texts,
    key_of,
    killed_at,
    not_numbers,
    remote,
    set_chunks,
    stored,
    vendor,
    with_server,
)
from tests.openrouter_server import KEY, ModelServer, model_server
from tests.processes import eventually

__all__ = ["remote", "vendor"]

PROBE = "What is this about?"


def pages(count: int, changed: int | None = None) -> list[str]:
    return [f"Page {n}{' anew' if n == changed else ''}: what stands there." for n in range(count)]


# ---- what is made ----


def test_one_changed_page_of_five_hundred_costs_one_vector(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    document = add_document(conn, pages(500))
    first = embed(Context(remote), document)
    assert sorted(embedded_texts(vendor)) == sorted([PROBE, *pages(500)])
    before = len(vendor.answered)

    old = set_chunks(conn, document, pages(500, changed=123))
    with remote.database.transaction() as pooled:
        dropped = vectors.drop_orphans(pooled, ORGANIZATION, old)
    again = embed(Context(remote), document)

    assert [text for asked in vendor.answered[before:] for text in asked.body["input"]] == [
        "Page 123 anew: what stands there."
    ]
    assert dropped == 1
    assert (first["vectors"], again["vectors"], again["reused"]) == (500, 1, 499)
    assert stored(conn).keys() == {key_of(text) for text in pages(500, changed=123)}


def test_the_same_text_in_two_documents_is_made_once_and_stays_while_one_of_them_has_it(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    one, other = add_document(conn, ["shared", "mine"]), add_document(conn, ["shared", "shared", "theirs"])
    embed(Context(remote), one)
    embed(Context(remote), other)
    assert sorted(embedded_texts(vendor)) == [PROBE, "mine", "shared", "theirs"]

    with remote.database.transaction() as pooled:
        keys = set_chunks(pooled, one, [])
        dropped = vectors.drop_orphans(pooled, ORGANIZATION, keys)

    assert dropped == 1
    assert stored(conn).keys() == {key_of("shared"), key_of("theirs")}


def test_another_organizations_vectors_are_neither_used_nor_dropped(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'other', 'Other')")
    mine, theirs = add_document(conn, ["a text"]), add_document(conn, ["a text"], organization_id=2)
    embed(Context(remote), mine)

    embed(Context(remote, organization_id=2), theirs)
    with remote.database.transaction() as pooled:
        dropped = vectors.drop_orphans(pooled, ORGANIZATION, set_chunks(pooled, mine, []))

    assert embedded_texts(vendor).count("a text") == 2
    assert dropped == 1
    rows = conn.execute("select organization_id, chunk_key from agentflow.vectors").fetchall()
    assert rows == [(2, key_of("a text"))]


def test_batches_keep_to_the_budget_of_tokens(remote: System, vendor: ModelServer, conn: psycopg.Connection) -> None:
    document = add_document(conn, ["hello"])
    set_chunks(conn, document, pages(10), tokens=3000)

    embed(Context(remote), document)

    assert [len(asked.body["input"]) for asked in vendor.answered[1:]] == [2, 2, 2, 2, 2]


def test_what_was_used_up_is_told_and_returned(environment: dict[str, str], conn: psycopg.Connection) -> None:
    with model_server() as vendor:
        named = {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url, "EMBEDDINGS_MODEL": "openai/small"}
        system = System.start(settings.load({**environment, **named}), "test")
        context = Context(system)

        result = embed(context, add_document(conn, pages(3)))

        system.close()
    assert context.measures == {"model_calls": 2, "tokens_in": 4 + 15, "usd": pytest.approx(0.0002)}
    assert result == {
        **{"model": "openrouter/openai/small", "vectors": 3, "reused": 0, "refused": 0},
        **{"tokens_in": 19, "usd": pytest.approx(0.0002)},
    }
    assert context.told[-1] == (1.0, "vectors")


def test_what_a_job_embeds_keeps_to_the_limits_and_goes_on_from_where_it_was_held_back(
    environment: dict[str, str], conn: psycopg.Connection
) -> None:
    rules.set_limit(conn, ORGANIZATION, "openrouter", [Window(2, 3600)])
    with model_server() as vendor:
        named = {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url, "EMBEDDINGS_MODEL": "openai/small"}
        system = System.start(settings.load({**environment, **named}), "test")
        document = add_document(conn, pages(100))  # 80 of which are a batch

        with pytest.raises(Wait) as raised:
            embed(PlacedContext(system), document)
        held_back = len(vendor.asked), len(stored(conn))

        rules.set_limit(conn, ORGANIZATION, "openrouter", [Window(1000, 60)])
        eventually(lambda: system.rules.now().limit_of(ORGANIZATION, "openrouter", ()) == (Window(1000, 60),))
        result = embed(PlacedContext(system), document)
        paid_for = embedded_texts(vendor)
        system.close()
    assert raised.value.reason == "limit" and raised.value.seconds > 60
    assert held_back == (2, 80)  # the model was asked for its dimensions, and then for one batch
    assert result["vectors"] == 20
    assert sorted(paid_for) == sorted([PROBE, *pages(100)])


def test_prefixes_stand_before_what_is_found_and_what_is_looked_for(
    environment: dict[str, str], vendor: ModelServer, conn: psycopg.Connection
) -> None:
    named = {"EMBEDDINGS_PASSAGE_PREFIX": "passage:", "EMBEDDINGS_QUERY_PREFIX": "query:"}
    system = with_server(environment, vendor, **named)
    context = Context(system)
    embed(context, add_document(conn, ["a text"]))
    (model,) = embedding_models.every(conn)

    system.embeddings.question(context, model, "a question")

    system.close()
    assert embedded_texts(vendor) == [PROBE, "passage: a text", "query: a question"]


def test_vectors_have_length_one_whatever_the_server_sends(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    embed(Context(remote), add_document(conn, ["first"]))  # the dimensions are known
    vendor.fault(answering(lambda text: [3e9, 4e9, 0, 0, 0, 0, 0, 0]))

    embed(Context(remote), add_document(conn, ["second"]))

    row = conn.execute(
        "select vector::text from agentflow.vectors where chunk_key = %s", (key_of("second"),)
    ).fetchone()
    assert row is not None
    assert [round(float(n), 3) for n in row[0].strip("[]").split(",")] == [0.6, 0.8, 0, 0, 0, 0, 0, 0]


# ---- faults ----


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (faults.status(413, "too long"), "model_too_large"),
        (faults.status(400, "This model's maximum context length is 512 tokens"), "model_bad_request"),
        (faults.refused("violence"), "model_refused"),
        (not_numbers, "model_bad_answer"),
    ],
    ids=["413", "400", "moderation", "NaN"],
)
def test_a_text_that_is_refused_is_kept_with_its_error_and_the_others_get_their_vectors(
    remote: System, vendor: ModelServer, conn: psycopg.Connection, fault: faults.Fault, code: str
) -> None:
    texts = [*pages(20), "poison one", "poison two"]
    document = add_document(conn, texts)
    vendor.fault(fault, when=lambda asked: "poison" in asked.text, times=1000)

    result = embed(Context(remote), document)

    kept = stored(conn)
    assert (result["vectors"], result["refused"]) == (20, 2)
    assert {key for key, vector in kept.items() if vector is None} == {key_of("poison one"), key_of("poison two")}
    errors = conn.execute("select distinct error ->> 'code' from agentflow.vectors where vector is null").fetchall()
    assert errors == [(code,)]
    asked = len(vendor.asked)
    assert embed(Context(remote), document)["vectors"] == 0
    assert len(vendor.asked) == asked, "what was refused is not asked again"


@pytest.mark.parametrize("fault", [faults.status(400, "no such parameter"), not_numbers], ids=["400", "NaN"])
def test_a_server_that_refuses_everything_marks_no_text(
    remote: System, vendor: ModelServer, conn: psycopg.Connection, fault: faults.Fault
) -> None:
    embed(Context(remote), add_document(conn, ["known"]))  # the model is known, and then the server breaks
    remote.embeddings._sane.clear()
    document = add_document(conn, pages(20))
    vendor.fault(fault, times=1000)

    with pytest.raises(Permanent):
        embed(Context(remote), document)

    assert stored(conn).keys() == {key_of("known")}
    vendor.heal()
    assert embed(Context(remote), document)["vectors"] == 20


def test_another_model_behind_the_same_name_is_noticed(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    embed(Context(remote), add_document(conn, ["a text"]))
    vendor.fault(answering(lambda text: [0.5] * 3))

    with pytest.raises(Permanent, match="another model") as raised:
        embed(Context(remote), add_document(conn, ["another"]))

    assert raised.value.code == "model_dimensions"
    assert stored(conn).keys() == {key_of("a text")}


def test_a_model_whose_vectors_no_index_takes_is_refused(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    vendor.fault(answering(lambda text: [0.1] * 4001))

    with pytest.raises(Permanent, match="4000"):
        embed(Context(remote), add_document(conn, ["a text"]))

    assert embedding_models.every(conn) == []


def test_the_largest_vectors_that_an_index_takes_can_be_kept(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    vendor.fault(answering(lambda text: [0.1] * 4000), times=2)

    assert embed(Context(remote), add_document(conn, ["a text"]))["vectors"] == 1


def test_a_hiccup_is_sat_out_and_a_limit_parks_the_job(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    document = add_document(conn, pages(150))
    embed(Context(remote), add_document(conn, ["known"]))
    context = Context(remote)
    vendor.fault(faults.status(503, "down"), times=2)
    vendor.fault(faults.busy("20"), when=lambda asked: len(asked.body["input"]) < 80)

    with pytest.raises(Wait) as raised:
        embed(context, document)

    assert len(context.slept) == 2
    assert 20 <= raised.value.seconds < 22
    done = len(stored(conn))
    assert 1 < done < 151
    before = len(vendor.answered)
    assert embed(Context(remote), document)["vectors"] == 151 - done
    assert sum(len(asked.body["input"]) for asked in vendor.answered[before:]) == 151 - done


def test_an_outage_fails_the_attempt(remote: System, vendor: ModelServer, conn: psycopg.Connection) -> None:
    embed(Context(remote), add_document(conn, ["known"]))
    vendor.fault(faults.status(500), times=1000)
    context = Context(remote)

    with pytest.raises(Transient) as raised:
        embed(context, add_document(conn, ["another"]))

    assert raised.value.code == "model_failed" and len(context.slept) == 2


# ---- kills and races ----


def test_a_run_killed_at_ten_points_ends_in_the_same_rows(
    environment: dict[str, str],
    remote: System,
    vendor: ModelServer,
    conn: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [*pages(30), "poison"]
    document = add_document(conn, texts)
    vendor.fault(faults.status(400, "odd"), when=lambda asked: "poison" in asked.text, times=10_000)
    monkeypatch.setattr(vectors, "TEXTS_AT_ONCE", 7)

    def run(nth: int | None) -> int:
        with killed_at(monkeypatch, nth) as note, suppress(Killed):
            embed(Context(remote, at=note), document)
        return int(note.count())  # type: ignore[attr-defined]

    def wipe() -> None:
        conn.execute("delete from agentflow.vectors")
        conn.execute("delete from agentflow.embedding_models")

    events = run(None)
    whole = stored(conn)
    assert len(whole) == 31 and events > 40
    for nth in random.Random(7).sample(range(1, events), 10):
        wipe()
        run(nth)
        assert stored(conn).items() <= whole.items(), nth

        run(None)

        assert stored(conn) == whole, nth


def test_a_vector_is_neither_lost_nor_left_behind_by_a_deletion_at_the_same_time(
    remote: System, conn: psycopg.Connection, connect: Callable[[], psycopg.Connection]
) -> None:
    old = add_document(conn, ["shared", "gone"])
    embed(Context(remote), old)
    deleting = connect()
    with deleting.transaction():
        keys = set_chunks(deleting, old, [])
        assert vectors.drop_orphans(deleting, ORGANIZATION, keys) == 2
        new = add_document(conn, ["shared"])
        embedding = threading.Thread(target=embed, args=(Context(remote), new))
        embedding.start()
        waiting = "select count(*) from pg_stat_activity where wait_event = 'advisory' and datname = current_database()"
        eventually(lambda: conn.execute(waiting).fetchone() == (1,))
    embedding.join(60)

    assert stored(conn).keys() == {key_of("shared")}


# ---- the local model ----


def test_without_settings_vectors_come_from_the_local_model_in_a_child(
    system: System, conn: psycopg.Connection
) -> None:
    result = embed(Context(system), add_document(conn, ["Собака спит в саду.", "The invoice is due on Friday."]))

    assert result == {"model": f"local/{encoder.NAME}", "vectors": 2, "reused": 0, "refused": 0}
    (model,) = embedding_models.every(conn)
    assert model.dimensions == 512
    question = system.embeddings.question(Context(system), model, "A dog is sleeping outside.")
    row = conn.execute(
        "select c.text from agentflow.vectors v join agentflow.chunks c on c.key = v.chunk_key"
        " order by v.vector operator(agentflow_extensions.<=>) %s::agentflow_extensions.halfvec limit 1",
        (question,),
    ).fetchone()
    assert row == ("Собака спит в саду.",)

    child = psutil.Process(system.embeddings.encoder_pid)
    assert "numpy" not in {name.partition(".")[0] for name in _modules_of_the_web()}
    child.send_signal(signal.SIGKILL)
    assert system.embeddings.question(Context(system), model, "A dog is sleeping outside.") == question
    assert system.embeddings.encoder_pid != child.pid
    system.close()
    eventually(lambda: system.embeddings.encoder_pid is None)


def _modules_of_the_web() -> set[str]:
    import subprocess
    import sys

    said = subprocess.run(
        [sys.executable, "-c", "import web.wsgi, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "DATABASE_URL": "postgresql://127.0.0.1:1/none", "PYTHONPATH": "."},
    )
    return set(said.stdout.split())


def test_who_waits_for_the_local_model_hears_of_a_stop() -> None:
    idle = Encoder()
    blocked = threading.Event()
    idle._turns.submit(blocked.wait, 60)

    def stop() -> None:
        raise Killed

    try:
        with pytest.raises(Killed):
            idle.vectors(["a text"], stop)
    finally:
        blocked.set()
        idle.close()


def test_a_child_that_always_dies_is_an_error_and_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Encoder()
    monkeypatch.setattr(encoder.sys, "executable", "/bin/false")

    with pytest.raises(Transient, match="ended with status 1") as raised:
        broken.vectors(["a text"], lambda: None)

    assert raised.value.code == "child_died"
    broken.close()


# ---- without pgvector ----


def test_without_pgvector_documents_say_what_to_install_and_then_go_on(
    remote: System, vendor: ModelServer, conn: psycopg.Connection
) -> None:
    conn.execute("drop table agentflow.vectors; drop extension vector")
    conn.execute(
        "create function public.refuse() returns event_trigger language plpgsql as $$ begin raise 'not permitted'; end $$"
    )
    conn.execute(
        "create event trigger refuse on ddl_command_start when tag in ('CREATE EXTENSION') execute function refuse()"
    )
    document = add_document(conn, ["a text"])

    with pytest.raises(JobError, match=r"pgvector 0.8 .*not permitted") as raised:
        embed(Context(remote), document)
    assert raised.value.code == "pgvector_missing"
    with remote.database.transaction() as pooled:
        assert vectors.drop_orphans(pooled, ORGANIZATION, [key_of("a text")]) == 0

    conn.execute("drop event trigger refuse")
    assert embed(Context(remote), document)["vectors"] == 1


def test_a_vector_is_written_number_for_number_with_five_digits() -> None:
    assert encoder.as_text([0.123456789, -0.0, 1.0, 6e-6, -2e-7]) == "[0.12346,-0.00000,1.00000,0.00001,-0.00000]"
    assert encoder.as_text([0.5]) == "[0.50000]"
