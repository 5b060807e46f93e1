"""GPU slots: who gets which server, who waits without a thread and is woken at once, and what a dead worker leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from agentflow import metrics
from agentflow.cli.checkup import comfyui as checkup
from agentflow.cli.checkup.report import Wrong
from agentflow.comfyui import pool, prompts
from agentflow.comfyui.client import HTTP_CONNECTIONS, Client
from agentflow.comfyui.servers import Server, parse
from agentflow.jobs import keys
from agentflow.jobs.requests import NewJob
from agentflow.settings import SettingsError, load
from tests.comfy_support import code, picture, runs, studio
from tests.comfyui_server import Comfy, comfyui
from tests.core_support import column, read, rows, value
from tests.one_database import database_url, original
from tests.processes import eventually, worker

__all__ = ["database_url", "original"]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Comfy]]:
    with comfyui(tmp_path / "a") as a, comfyui(tmp_path / "b") as b:
        yield [a, b]


def server_of(conn: psycopg.Connection, prompt_id: UUID) -> str:
    return str(value(conn, "select server from agentflow.renders where prompt_id = %s", prompt_id))


# ---- the setting ----


def test_servers_are_read_from_their_urls() -> None:
    found = parse("http://a:8188, https://me:s%40cret@b/comfy/?pool=video&slots=2")

    assert found[0] == Server("http://a:8188", "default", 1)
    assert (found[1].name, found[1].pool, found[1].slots) == ("https://b/comfy", "video", 2)
    assert found[1].headers == (("Authorization", "Basic bWU6c0BjcmV0"),)
    assert "cret" not in repr(found)


@pytest.mark.parametrize(
    "wrong", ["ftp://a", "http://", "http://a?slot=2", "http://a?slots=0", "http://a?pool=A b", "http://a,http://a"]
)
def test_a_wrong_server_stops_the_process_with_the_variables_name(wrong: str) -> None:
    with pytest.raises(SettingsError, match="COMFYUI_URL"):
        load({"COMFYUI_URL": wrong})


# ---- lines ----


def test_two_servers_take_one_render_each_and_the_third_waits_in_line(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two, WORKER_GPU_LOCK_TIMEOUT="20") as pair:
        jobs = [pair.submit(picture(3, color=n)) for n in range(3)]
        attempts = [pair.begin(job) for job in jobs[:2]]
        for job in jobs[:2]:
            eventually(lambda job=job: "sent" in pair.states(job), every_s=0.01)

        assert pair.slots() == 2
        assert pair.claim(jobs[2]) is None
        waiting = read(conn, jobs[2])
        assert (waiting.state, waiting.wait_reason, waiting.attempt) == ("queued", "busy", 0)
        seconds = value(
            conn, "select extract(epoch from wake_at - clock_timestamp()) from agentflow.jobs where id = %s", jobs[2].id
        )
        assert 10 < seconds <= 20
        assert {server_of(conn, pair.prompts(job)[0][0]) for job in jobs[:2]} == {comfy.url for comfy in two}
        assert [attempt.result().outcome for attempt in attempts] == ["succeeded"] * 2
        assert pair.attempt(jobs[2]).outcome == "succeeded"


def test_a_server_with_two_slots_is_given_two_renders(
    tmp_path: Path, environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with comfyui(tmp_path / "a") as comfy, studio(environment, conn, [f"{comfy.url}?slots=2"]) as one:
        jobs = [one.submit(picture(3, color=n)) for n in range(3)]
        attempts = [one.begin(job) for job in jobs[:2]]
        eventually(lambda: [one.states(job) for job in jobs[:2]] == [["sent"]] * 2, every_s=0.01)

        assert one.claim(jobs[2]) is None
        slots = rows(conn, "select slot from agentflow.renders where server = %s order by slot", comfy.url)
        assert [row.slot for row in slots] == [0, 1]
        assert [attempt.result().outcome for attempt in attempts] == ["succeeded"] * 2


def test_a_pool_has_its_own_line_and_its_own_servers(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, [two[0].url, f"{two[1].url}?pool=video"]) as pair:
        assert pair.attempt(pair.submit(picture(), pool="video")).outcome == "succeeded"
        assert (len(two[0].runs), len(two[1].runs), pair.slots(), pair.slots("video")) == (0, 1, 1, 1)

        verdict = pair.attempt(pair.submit(picture(), pool="nowhere"))

        assert (verdict.outcome, code(verdict)) == ("failed", "not_configured")


def test_the_line_is_left_when_the_gpu_is_free_and_entered_again_where_it_is_needed_again(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one:
        first, second = one.submit(picture()), one.submit(picture(color=1))
        running = one.claim(first)
        assert running is not None and one.claim(second) is None

        with one.system.database.connection() as own:
            woken = keys.leave(own, running.job)

        assert woken == [second.id]
        assert (column(conn, first, "concurrency_key"), column(conn, first, "slot")) == (None, None)
        other = one.claim(second)
        assert other is not None
        assert one.perform(running).outcome == "succeeded"  # nobody told this attempt: its own slot is long given up
        with one.system.database.connection() as own:
            keys.leave(own, other.job)
            assert keys.enter(own, other.job, pool.line("default"))
            assert not keys.enter(own, running.job, pool.line("default")), "its lease is over"
        one.die(other)
        assert column(conn, second, "concurrency_key") == "gpu:default"


def test_a_sick_server_leaves_and_comes_back_by_itself(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two) as pair:
        two[0].server.hang_up()
        pair.look()
        assert pair.slots() == 1
        assert pair.attempt(pair.submit(picture())).outcome == "succeeded"
        assert (len(two[0].runs), len(two[1].runs)) == (0, 1)
        assert value(conn, "select count(*) from agentflow.comfyui_servers where sick_until > clock_timestamp()") == 1

        two[0].server.listen()
        pair.look()

        assert pair.slots() == 2


def test_with_no_server_that_is_well_nobody_is_claimed_and_its_return_rings_for_who_waits(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    rung: list[UUID] = []
    with studio(environment, conn, two[:1]) as one:
        one.keeper._ring = lambda _conn, ids: rung.extend(ids)
        two[0].server.hang_up()
        one.look()
        job = one.submit(picture())
        assert one.slots() == 0 and one.claim(job) is None

        two[0].server.listen()
        one.look()

        assert rung == [job.id] and one.slots() == 1


# ---- deaths ----


def test_a_prompt_of_a_dead_worker_keeps_its_slot_and_is_adopted(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one:
        job, other = one.submit(picture(1)), one.submit(picture(color=1))
        dead = one.begin(job)
        one.at_work(two[0], job)
        dead.running.stop("lost")  # as a worker does whose lease is over
        dead.result()
        one.die(dead.running)

        assert code(one.attempt(other)) == "busy"
        assert len(two[0].runs) == 1

        assert one.attempt(job).outcome == "succeeded"
        assert runs(two[0], job) == ["success"] and one.states(job) == ["collected"]
        assert one.attempt(other).outcome == "succeeded"


def test_a_worker_that_dies_with_the_result_in_its_hands_renders_nothing_again(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one:
        job = one.submit(picture())
        dead = one.claim(job)
        assert dead is not None
        said = one.perform(dead, write=False)
        assert said.outcome == "succeeded" and said.result is not None
        one.die(dead)

        again = one.attempt(job)

        assert again.result is not None and json.loads(again.result) == json.loads(said.result)
        assert runs(two[0], job) == ["success"] and two[0].requests["GET /view"] == 1


def test_a_worker_that_has_not_the_server_leaves_its_prompt_to_one_that_has(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one, studio(environment, conn, two[1:]) as other:
        job = one.submit(picture(1))
        attempt = one.begin(job)
        one.at_work(two[0], job)
        attempt.running.stop("shutdown")
        attempt.result()

        assert code(other.attempt(job)) == "busy"

        assert one.attempt(job).outcome == "succeeded"
        assert (runs(two[0], job), two[1].runs) == (["success"], [])


def test_who_was_frozen_before_sending_sends_nothing(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one:
        job = one.submit(picture())
        frozen = one.claim(job)
        assert frozen is not None
        with one.system.database.transaction() as own:
            taken = pool.take(own, frozen.job, "default", [two[0].url])
        assert taken is not None
        one.die(frozen)
        assert one.attempt(job).outcome == "succeeded"

        with one.system.database.connection() as own:
            assert not prompts.move(own, taken, "sending", come_from=["taken"])

        assert one.states(job) == ["unsent", "collected"] and len(two[0].runs) == 1


@pytest.mark.timeout(180)
def test_killing_the_worker_while_the_prompt_runs_does_not_run_it_twice(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    with studio(environment, conn, two[:1]) as one:
        environment |= {"JOB_LEASE": "6", "JOB_LEASE_RENEW": "1"}
        job = one.submit(picture(4))
        with worker(environment, tmp_path / "worker.log"):
            eventually(lambda: "" in runs(two[0], job))
        with worker(environment, tmp_path / "worker.log"):
            eventually(lambda: read(conn, job).terminal, within_s=90)

        done = read(conn, job)
        assert (done.state, done.crashes, one.states(job)) == ("succeeded", 1, ["collected"])
        assert runs(two[0], job) == ["success"]


@pytest.mark.timeout(180)
def test_renders_follow_each_other_at_once_and_hold_no_thread_while_they_wait(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    # Longer than the test waits: who is not woken does not come.
    with studio(environment, conn, two[:1], WORKER_GPU_LOCK_TIMEOUT="600") as one:
        environment |= {"JOB_CONCURRENCY": "2"}
        with worker(environment, tmp_path / "worker.log"):
            jobs = [one.submit(picture(0.3, color=n)) for n in range(6)]
            ping = one.system.submit(1, NewJob("ping", {})).job
            eventually(lambda: read(conn, ping).terminal)
            assert any(not read(conn, job).terminal for job in jobs), "those that wait had kept the thread"
            eventually(lambda: all(read(conn, job).terminal for job in jobs), within_s=90)

        assert {read(conn, job).state for job in jobs} == {"succeeded"}
        assert [len(runs(two[0], job)) for job in jobs] == [1] * 6


# ---- what operators see ----


def test_doctor_shows_version_memory_and_load_of_each_server(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    named = two[0].url.replace("http://", "http://me:s3cret@")
    with studio(environment, conn, [named, f"{two[1].url}?slots=2"]) as pair:
        found = checkup.servers(pair.system)

        assert isinstance(found, str)
        first, second = found.splitlines()
        assert f"{two[0].url} (default): ComfyUI 0.33.0" in first and "24.0 of 25.3 GB free" in first
        assert "0 prompts in its queue; 0 of 1 slot taken" in first and "0 of 2 slots taken" in second
        two[1].server.hang_up()
        with pytest.raises(Wrong, match="cannot be reached") as wrong:
            checkup.servers(pair.system)
        assert "s3cret" not in found + str(wrong.value)


def test_a_process_has_few_connections_to_a_server_however_many_ask(two: list[Comfy]) -> None:
    two[0].fault("stall", seconds=0.05)
    client = Client(Server(two[0].url))
    open_at_once: list[int] = []

    def ask(_: int) -> int:
        open_at_once.append(client.open)
        return client.remaining(lambda: None)

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(24))) == [0] * 24

    assert 1 < max(open_at_once) <= HTTP_CONNECTIONS
    client.close()


def test_connections_to_a_server_are_a_metric(
    two: list[Comfy], environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with studio(environment, conn, two[:1]) as one:
        assert one.attempt(one.submit(picture())).outcome == "succeeded"

        shown = metrics.REGISTRY.get_sample_value("agentflow_comfyui_connections", {"server": two[0].url})

        assert shown is not None and 1 <= shown <= 5
