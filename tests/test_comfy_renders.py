"""`comfy_render` on the tests' ComfyUI: each way in which a prompt can end is told apart, and none is run twice by us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from PIL import Image

from agentflow.comfyui import pool, preflight, supervisor
from agentflow.comfyui.times import Course, Times
from agentflow.jobs.model import Verdict
from tests.comfy_support import Studio, code, judge_quickly, node, picture, runs, stored, studio
from tests.comfyui_server import VERSIONS, Comfy, comfyui
from tests.core_support import read, rows, value
from tests.one_database import database_url, original
from tests.processes import eventually

__all__ = ["database_url", "original"]


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    with comfyui(tmp_path / "comfy") as comfy:
        yield comfy


@pytest.fixture
def one(comfy: Comfy, environment: dict[str, str], conn: psycopg.Connection) -> Iterator[Studio]:
    with studio(environment, conn, [comfy]) as opened:
        yield opened


@pytest.fixture
def impatient(comfy: Comfy, environment: dict[str, str], conn: psycopg.Connection) -> Iterator[Studio]:
    with studio(environment, conn, [comfy], COMFYUI_TIMEOUT="0.5") as opened:
        yield opened


@pytest.fixture
def quick_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_quickly(monkeypatch, 0.3)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pre-flight would find is sent."""
    monkeypatch.setattr(preflight, "complaints", lambda *_, **__: [])


def result(verdict: Verdict) -> dict:
    assert verdict.outcome == "succeeded" and verdict.result is not None, verdict
    return json.loads(verdict.result)


# ---- what goes well ----


@pytest.mark.parametrize("version", VERSIONS)
def test_a_render_ends_in_files_with_sizes_and_thumbnails(
    version: str, tmp_path: Path, environment: dict[str, str], conn: psycopg.Connection
) -> None:
    with comfyui(tmp_path / "comfy", version=version) as comfy, studio(environment, conn, [comfy]) as one:
        job = one.submit(picture(side=700))

        said = result(one.attempt(job))

        (made,) = said["outputs"]
        assert (made["node"], made["kind"], made["media_type"], made["width"], made["height"]) == (
            "3",
            "image",
            "image/png",
            700,
            700,
        )
        assert stored(one.system, made["key"]).stat().st_size == made["bytes"]
        with Image.open(stored(one.system, made["thumbnail_key"])) as thumbnail:
            assert (thumbnail.format, thumbnail.size) == ("JPEG", (512, 512))
        assert made["key"].startswith(f"o/1/renders/{job.id}/")
        assert said["provenance"]["server_version"] == version and not said["cached"]
        assert comfy.times_run() == {said["prompt_id"]: 1}
        done = read(conn, job)
        assert done.concurrency_key is None and one.states(job) == ["collected"]


def test_the_same_graph_again_is_another_file_and_says_that_it_came_from_the_cache(one: Studio, comfy: Comfy) -> None:
    first = result(one.attempt(one.submit(picture())))
    for path in comfy.files.of("output").rglob("*.png"):
        path.unlink()  # the cache would name it all the same

    second = result(one.attempt(one.submit(picture())))

    assert (first["cached"], second["cached"]) == (False, True)
    assert stored(one.system, second["outputs"][0]["key"]).exists()


def test_outputs_of_any_kind_are_kept(one: Studio) -> None:
    kinds = {
        "1": ("text", "", "forty-two"),
        "2": ("gifs", ".mp4", "not really a film"),
        "3": ("audio", ".flac", "sound"),
        "4": ("3d", ".glb", "shape"),
    }
    graph = {
        id_: node("TestOutput", key=key, suffix=suffix, filename_prefix="x", content=content)
        for id_, (key, suffix, content) in kinds.items()
    }

    said = result(one.attempt(one.submit(graph)))

    found = {each["node"]: (each["kind"], stored(one.system, each["key"]).read_text()) for each in said["outputs"]}
    assert found == {
        "1": ("text", "forty-two"),
        "2": ("video", "not really a film"),
        "3": ("audio", "sound"),
        "4": ("file", "shape"),
    }


def test_an_image_of_the_caller_is_uploaded_under_its_content(one: Studio, comfy: Comfy, tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.new("RGB", (20, 10), "red").save(source)
    one.system.storage.put_file("o/1/in.png", source)
    graph = {
        "1": node("LoadImage", image="x"),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node("SaveImage", images=["2", 0], filename_prefix="x"),
    }

    said = result(one.attempt(one.submit(graph, images={"1.image": {"artefact": "o/1/in.png"}})))

    with Image.open(stored(one.system, said["outputs"][0]["key"])) as made:
        assert made.size == (20, 10) and made.getpixel((0, 0)) == (0, 255, 255)
    (there,) = (comfy.files.of("input") / "agentflow").iterdir()
    assert there.read_bytes() == source.read_bytes() and there.suffix == ".png"


def test_a_file_of_another_organization_is_not_uploaded(one: Studio, comfy: Comfy) -> None:
    one.system.storage.put_bytes("o/2/secret.png", b"\x89PNG\r\n\x1a\n")
    graph = {"1": node("LoadImage", image="x"), "2": node("PreviewImage", images=["1", 0])}

    verdict = one.attempt(one.submit(graph, images={"1.image": {"artefact": "o/2/secret.png"}}))

    assert (verdict.outcome, code(verdict)) == ("failed", "render_invalid")
    assert not comfy.runs and comfy.requests["POST /upload/image"] == 0


def test_progress_follows_the_nodes_and_their_steps(one: Studio, comfy: Comfy) -> None:
    attempt = one.begin(one.submit(picture(1.5)))
    shares: list[float] = []

    def half_way() -> bool:
        progress = attempt.running._progress
        if progress is not None and progress.stage == "rendering":
            shares.append(progress.fraction)
        return bool(shares) and 0.3 < shares[-1] < 0.8

    eventually(half_way, every_s=0.01)
    assert attempt.result().outcome == "succeeded"
    assert shares == sorted(shares)
    learned = value(one.conn, "select seconds from agentflow.render_times")
    assert learned >= 1.5


def test_nodes_weigh_what_they_took_the_last_times() -> None:
    course = Course(picture(1), Times(10.0, {"1": 1.0, "2": 8.0, "3": 1.0}))
    shares = []
    for type_, data in [
        ("execution_start", {}),
        ("executing", {"node": "1"}),
        ("executing", {"node": "2"}),
        ("progress", {"node": "2", "value": 5, "max": 10}),
        ("executing", {"node": "3"}),
        ("executing", {"node": None}),
    ]:
        course.hear({"type": type_, "data": data})
        shares.append(round(course.fraction() or 0.0, 2))

    assert shares == [0.0, 0.0, 0.1, 0.5, 0.9, 1.0]
    assert course.took.keys() == {"1", "2", "3"} and course.entry() is None


def test_limits_without_end_are_no_reason_to_know_nothing_of_a_server(
    comfy: Comfy, environment: dict[str, str], conn: psycopg.Connection
) -> None:
    comfy.nodes["TestSleep"]["input"]["required"]["seconds"][1]["max"] = float("inf")

    with studio(environment, conn, [comfy]) as one:
        known = pool.known_nodes(one.system, "default")

        assert known is not None and known["TestSleep"]["input"]["required"]["seconds"][1]["max"] is None
        some = pool.known_nodes(one.system, "default", ["TestSleep", "SaveImage"])
        assert some == {name: known[name] for name in ("TestSleep", "SaveImage")}
        # With one that is none of its nodes all are needed: what is near it?
        assert pool.known_nodes(one.system, "default", ["TestSleep", "TestSlep"]) == known
        assert one.attempt(one.submit(picture(0.1))).outcome == "succeeded"


# ---- what goes wrong at the server ----


@pytest.mark.parametrize(
    ("fault", "outcome", "said", "state"),
    [
        ("out_of_memory", "retry", "render_out_of_memory", "failed"),
        ("node_error", "failed", "render_node_error", "failed"),
        ("fail_later", "failed", "render_partly_failed", "failed"),
        ("no_output", "failed", "render_no_output", "failed"),
        ("delete_outputs", "retry", "render_output_gone", "gone"),
    ],
)
def test_each_bad_end_has_its_own_name(
    fault: str, outcome: str, said: str, state: str, one: Studio, comfy: Comfy
) -> None:
    comfy.fault(fault, times=1)
    graph = picture()
    if fault == "fail_later":
        graph["4"] = node("ImageBlur", image=["2", 0], blur_radius=1, sigma=1.0)
        graph["5"] = node("SaveImage", images=["4", 0], filename_prefix="y")
    job = one.submit(graph)

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict), one.states(job)) == (outcome, said, [state])
    assert (comfy.requests["POST /free"] == 1) == (fault == "out_of_memory")
    if outcome == "retry":
        assert one.finished(job).state == "succeeded"
        assert len(runs(comfy, job)) == 2


def test_somebody_elses_interruption_is_tried_again(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(20))
    attempt = one.begin(job)
    one.at_work(comfy, job)

    comfy.worker.interrupt()

    assert code(attempt.result()) == "render_interrupted"
    assert one.states(job) == ["interrupted"] and one.state(job) == "queued"


@pytest.mark.usefixtures("unchecked")
def test_what_the_server_refuses_fails_with_its_words(one: Studio, comfy: Comfy) -> None:
    graph = picture()
    graph["1"]["inputs"]["width"] = 0

    verdict = one.attempt(one.submit(graph))

    assert (verdict.outcome, code(verdict)) == ("failed", "render_refused")
    assert verdict.error is not None and "node 1" in verdict.error and "width" in verdict.error
    assert not comfy.runs


@pytest.mark.usefixtures("unchecked")
def test_a_graph_that_would_run_in_part_does_not_run_to_an_end(one: Studio, comfy: Comfy) -> None:
    graph = picture(20)
    graph["4"] = node("ImageBlur", image=["1", 0])
    graph["5"] = node("SaveImage", images=["4", 0], filename_prefix="y")
    job = one.submit(graph)

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict)) == ("failed", "render_refused")
    assert "success" not in runs(comfy, job) and comfy.queue.remaining() == 0


@pytest.mark.usefixtures("unchecked")
def test_a_part_that_was_left_out_is_noticed_although_the_answer_was_lost(one: Studio, comfy: Comfy) -> None:
    comfy.fault("answer_500", path="/prompt", times=1, when=lambda request: request.method == "POST")
    graph = picture()
    graph["4"] = node("ImageBlur", image=["1", 0])
    graph["5"] = node("SaveImage", images=["4", 0], filename_prefix="y")
    job = one.submit(graph)

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict)) == ("failed", "render_partly_failed")
    assert "left out nodes 5" in str(verdict.error)


def test_a_cleared_history_loses_no_render_whose_end_was_heard(one: Studio, comfy: Comfy) -> None:
    comfy.fault("lose_history", times=1)
    job = one.submit(picture())

    assert one.attempt(job).outcome == "succeeded"
    assert runs(comfy, job) == ["success"]


def test_unknown_nodes_are_refused_before_anything_is_sent(one: Studio, comfy: Comfy) -> None:
    verdict = one.attempt(one.submit({"1": node("NoSuchNode")}))

    assert (verdict.outcome, code(verdict)) == ("failed", "render_refused")
    assert comfy.requests["POST /prompt"] == 0


def test_a_render_whose_time_is_over_is_interrupted_and_tried_again(impatient: Studio, comfy: Comfy) -> None:
    job = impatient.submit(picture(20))

    verdict = impatient.attempt(job)

    assert (verdict.outcome, code(verdict)) == ("retry", "render_timeout")
    assert impatient.states(job) == ["timed_out"] and runs(comfy, job) == ["interrupted"]
    assert comfy.queue.remaining() == 0


def test_a_render_that_hears_no_interruption_keeps_its_slot_until_it_has_ended(
    impatient: Studio, comfy: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_STOP_S", 0.2)
    comfy.fault("hang", times=1, seconds=4)
    job, other = impatient.submit(picture()), impatient.submit(picture(color=1))

    verdict = impatient.attempt(job)

    assert (verdict.outcome, code(verdict), impatient.states(job)) == ("wait", "render_stopping", ["sent"])
    assert code(impatient.attempt(other)) == "busy"
    eventually(lambda: runs(comfy, job) == ["interrupted"])
    assert code(impatient.attempt(job)) == "render_timeout" and impatient.states(job) == ["timed_out"]
    assert impatient.attempt(other).outcome == "succeeded"


@pytest.mark.parametrize("fault", ["deaf_socket", "drop_socket", "refuse_socket", "no_events"])
def test_without_news_polling_finds_the_end(fault: str, one: Studio, comfy: Comfy) -> None:
    comfy.fault(fault)

    assert one.attempt(one.submit(picture(0.3))).outcome == "succeeded"


def test_a_socket_is_not_more_than_the_server_and_process_may_have(one: Studio, comfy: Comfy) -> None:
    client = one.system.comfyui.of(comfy.url)
    assert client is not None
    for _ in range(3):
        attempt = one.begin(one.submit(picture(0.2)))
        eventually(lambda attempt=attempt: client.open > 1 or attempt.is_over, every_s=0.005)
        assert client.open <= 5
        assert attempt.result().outcome == "succeeded"

    assert client._sockets_open == 0


# ---- what goes wrong on the way ----


@pytest.mark.usefixtures("quick_to_judge")
@pytest.mark.parametrize("fault", ["answer_500", "lose_answer"])
def test_a_prompt_whose_answer_was_lost_is_found_and_not_sent_again(fault: str, one: Studio, comfy: Comfy) -> None:
    comfy.fault(fault, path="/prompt", times=1, when=lambda request: request.method == "POST")
    job = one.submit(picture(0.2))

    assert one.attempt(job).outcome == "succeeded"
    assert comfy.requests["POST /prompt"] == 1 and runs(comfy, job) == ["success"]


@pytest.mark.usefixtures("quick_to_judge")
@pytest.mark.parametrize("fault", ["fail_request", "lose_request"])
def test_a_prompt_that_never_arrived_is_sent_by_the_next_attempt(fault: str, one: Studio, comfy: Comfy) -> None:
    comfy.fault(fault, path="/prompt", times=1, when=lambda request: request.method == "POST")
    job = one.submit(picture())

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict), one.states(job)) == ("retry", "render_not_accepted", ["unsent"])
    assert one.finished(job).state == "succeeded" and runs(comfy, job) == ["success"]


def test_a_render_that_is_lost_in_a_restart_is_begun_anew(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(1))
    attempt = one.begin(job)
    one.at_work(comfy, job)

    comfy.restart()

    assert attempt.result().outcome == "succeeded"
    assert runs(comfy, job) == ["lost", "success"] and one.states(job) == ["lost", "collected"]


@pytest.mark.usefixtures("quick_to_judge")
def test_while_the_service_is_down_a_render_waits_and_spends_no_attempt(
    one: Studio, comfy: Comfy, conn: psycopg.Connection
) -> None:
    comfy.server.hang_up()
    job = one.submit(picture())

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict)) == ("wait", "comfyui_unreachable")
    assert read(conn, job).attempt == 0 and one.slots() == 0
    assert one.claim(job) is None, "it stands in line, with no thread"
    comfy.server.listen()
    assert one.finished(job).state == "succeeded"


@pytest.mark.usefixtures("quick_to_judge")
def test_a_render_whose_server_goes_away_is_taken_up_when_it_is_back(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(1))
    attempt = one.begin(job)
    one.at_work(comfy, job)

    comfy.server.hang_up()

    assert code(attempt.result()) == "comfyui_unreachable"
    assert one.states(job) == ["sent"]
    comfy.server.listen()
    assert one.finished(job).state == "succeeded" and runs(comfy, job) == ["success"]


@pytest.mark.usefixtures("quick_to_judge")
def test_a_stuck_server_gets_nothing_more_and_keeps_nothing(one: Studio, comfy: Comfy) -> None:
    comfy.fault("stuck", times=1)
    job = one.submit(picture())

    verdict = one.attempt(job)

    assert (verdict.outcome, code(verdict)) == ("wait", "comfyui_stuck")
    assert one.slots() == 0 and comfy.queue.remaining() == 0 and one.states(job) == ["unsent"]
    (server,) = rows(one.conn, "select problem, well from agentflow.comfyui_servers")
    assert (server.problem, server.well) == ("stuck", False)


# ---- ends from outside ----


def test_cancelling_interrupts_exactly_this_prompt(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(20))
    attempt = one.begin(job)
    one.at_work(comfy, job)

    attempt.running.stop("cancelled")

    verdict = attempt.result()
    assert verdict.outcome == "cancelled" and "was interrupted" in str(verdict.error)
    assert runs(comfy, job) == ["interrupted"] and one.states(job) == ["cancelled"]


def test_a_cancellation_that_comes_too_late_says_so(one: Studio, comfy: Comfy) -> None:
    comfy.fault("ignore_interrupt", times=1)
    comfy.durations["SaveImage"] = 0.5
    job = one.submit(picture())
    attempt = one.begin(job)
    eventually(lambda: comfy.worker.last_node == "3", every_s=0.005)

    attempt.running.stop("cancelled")

    verdict = attempt.result()
    assert verdict.outcome == "cancelled" and "had run to its end" in str(verdict.error)
    assert runs(comfy, job) == ["success"]


def test_a_shutdown_leaves_the_prompt_for_the_next_worker(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(0.6))
    attempt = one.begin(job)
    one.at_work(comfy, job)

    attempt.running.stop("shutdown")

    assert attempt.result().outcome == "handback" and one.states(job) == ["sent"]
    assert one.finished(job).state == "succeeded" and runs(comfy, job) == ["success"]


def test_the_prompt_of_a_job_that_was_cancelled_while_nobody_ran_it_is_removed(one: Studio, comfy: Comfy) -> None:
    job = one.submit(picture(20))
    attempt = one.begin(job)
    one.at_work(comfy, job)
    attempt.running.stop("shutdown")
    attempt.result()

    assert one.system.cancel(1, job.id) == "cancelled"
    one.look()

    assert runs(comfy, job) == ["interrupted"] and one.states(job) == ["cancelled"]
