"""Workflows: their parameters fill the graph or say what would be right, their versions never change, and the shipped ones pass
the pre-flight of recorded servers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentflow.comfyui import graphs, pool, preflight, requests, versions, workflows
from agentflow.comfyui.requests import Image, InvalidRender, RenderRequest
from agentflow.comfyui.versions import NameTaken, TooMany
from agentflow.comfyui.workflows import Definition, InvalidParameters, Parameter
from agentflow.system import System
from tests import cli_support
from tests.cli_support import Command
from tests.one_database import database_url, original
from tests.render_support import MODELS, VERSIONS, colour, nodes

__all__ = ["database_url", "original"]
agentflow = cli_support.agentflow

ORGANIZATION = 1
QWEN, SMOKE = versions.shipped()["qwen-image-edit"][0], versions.shipped()["smoke"][0]
PHOTO = Image(artefact="o/1/photo.png")


def definition(**more: Any) -> Definition:
    parameters = {"width": {"type": "integer", "paths": ["1.width"], "default": 64, "min": 1, "max": 2048}}
    return Definition.model_validate({"graph": colour(), "parameters": parameters, **more})


def never(name: str) -> int:
    raise AssertionError(f"{name} was drawn")


def problems(given: dict[str, Any], images: tuple[str, ...] = ("image",)) -> dict[str, str]:
    with pytest.raises(InvalidParameters) as caught:
        workflows.fill(QWEN.definition, given, images, lambda _: 1)
    return dict(caught.value.problems)


# ---- shipped ----


def test_a_shipped_version_never_changes() -> None:
    """Another content is another version, in another file: results name the version that they came from."""
    assert {(each.name, each.version): each.digest[:16] for found in versions.shipped().values() for each in found} == {
        ("qwen-image-edit", 1): "7e73f8da5a8163ce",
        ("smoke", 1): "7cfb39c2460ec774",
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("images", [("image",), ("image", "image2"), ("image", "image2", "image3")])
@pytest.mark.parametrize("lightning", [True, False])
def test_qwen_image_edit_passes_the_pre_flight_of_recorded_servers(
    version: str, images: tuple[str, ...], lightning: bool
) -> None:
    given = {"prompt": "make it snow", "lightning": lightning}
    filled = workflows.fill(QWEN.definition, given, images, lambda _: 42)
    places = [place for each in filled.places.values() for place in each]
    assert len(places) == len(images)

    assert preflight.complaints(filled.graph, nodes(version, models=True), places=places) == []
    # As recorded, without a model: its files are all that is missing.
    missing = preflight.complaints(filled.graph, nodes(version), places=places)
    files = [file for (node, _), file in MODELS.items() if lightning or node != "LoraLoaderModelOnly"]
    assert {each.code for each in missing} == {"model_missing"}
    assert sorted(file for each in missing for file in files if f"'{file}'" in each.message) == sorted(files)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_variant_of_the_shipped_workflows_passes(version: str) -> None:
    assert preflight.of_definition(QWEN.definition, nodes(version, models=True)) == []
    assert preflight.of_definition(SMOKE.definition, nodes(version)) == []
    broken = copy.deepcopy(nodes(version))
    del broken["ImageInvert"]  # with an image alone
    assert [each.node for each in preflight.of_definition(SMOKE.definition, broken)] == ["4"]


def test_lightning_switches_steps_cfg_and_the_lora_and_what_is_given_goes_before_it() -> None:
    def sampler(**given: Any) -> tuple[Any, Any, Any, bool]:
        graph = workflows.fill(QWEN.definition, {"prompt": "x", **given}, ("image",), lambda _: 5).graph
        inputs = graph["3"]["inputs"]
        return inputs["steps"], inputs["cfg"], graph["66"]["inputs"]["model"], "89" in graph

    assert sampler() == (4, 1.0, ["89", 0], True)
    assert sampler(lightning=False) == (20, 4.0, ["37", 0], False)
    assert sampler(lightning=False, steps=30, cfg=2.5) == (30, 2.5, ["37", 0], False)
    assert sampler(steps=8) == (8, 1.0, ["89", 0], True)


def test_smoke_makes_a_colour_or_scales_and_inverts_an_image() -> None:
    made = workflows.fill(SMOKE.definition, {"width": 10, "colour": 255}, (), never).graph
    assert sorted(made) == ["1", "3", "5"] and made["5"]["inputs"]["images"] == ["3", 0]
    assert made["1"]["inputs"] == {"width": 10, "height": 64, "batch_size": 1, "color": 255}
    scaled = workflows.fill(SMOKE.definition, {"width": 10}, ("image",), never)
    assert sorted(scaled.graph) == ["2", "3", "4", "5"] and scaled.places == {"image": (("2", "image"),)}
    assert scaled.graph["3"]["inputs"]["width"] == 10 and scaled.graph["3"]["inputs"]["image"] == ["2", 0]
    assert scaled.graph["5"]["inputs"]["images"] == ["4", 0]


# ---- parameters ----


def test_every_wrong_value_is_named_with_its_range_at_once() -> None:
    said = problems(
        {"promt": "x", "steps": 500, "cfg": "high", "seed": -1, "lightning": 1, "image": "x.png"}, ("image", "picture")
    )

    assert said == {
        "parameters.promt": "is not known here: is 'prompt' meant? the workflow has cfg, lightning, prompt, seed, steps",
        "parameters.steps": "must be a whole number from 1 to 100; 500 was given",
        "parameters.cfg": 'must be a number from 1 to 20; "high" was given',
        "parameters.seed": f"must be a whole number from 0 to {(1 << 64) - 1}; -1 was given",
        "parameters.lightning": "must be true or false; 1 was given",
        "parameters.image": "is an image: send it under images.image",
        "images.picture": "is not known here: the workflow has image, image2, image3",
        "parameters.prompt": "is missing",
    }
    assert problems({"prompt": "x" * 4001}, ()) == {
        "parameters.prompt": "has 4001 characters, and may have 4000: shorten it",
        "images.image": "is missing",
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_value_within_its_range_stands_in_the_graph_and_any_other_is_refused(data: st.DataObject) -> None:
    whole = data.draw(st.booleans())
    numbers = st.integers(-1000, 1000) if whole else st.floats(-1000, 1000)
    lowest, highest = sorted((data.draw(numbers), data.draw(numbers)))
    parameter = Parameter(type="integer" if whole else "number", paths=["1.width"], min=lowest, max=highest)
    value = data.draw(numbers)
    flow = Definition(graph=colour(), parameters={"n": parameter})

    if lowest <= value <= highest:
        assert workflows.fill(flow, {"n": value}, (), never).graph == colour(width=value)
    else:
        with pytest.raises(InvalidParameters, match=r"parameters\.n: must be"):
            workflows.fill(flow, {"n": value}, (), never)
    for wrong in (True, None, "1", [value], float("nan")):
        assert parameter.problem_of(wrong) is not None


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"type": "integer", "paths": ["9.width"]}, "the graph has no node '9'"),
        ({"type": "integer", "paths": ["width"]}, "pattern"),
        ({"type": "integer"}, "paths are missing"),
        ({"type": "integer", "paths": ["1.width"], "min": 3, "max": 2}, "min is larger than max"),
        (
            {"type": "integer", "paths": ["1.width"], "max": 2, "default": 3},
            "default: must be a whole number of at most 2",
        ),
        ({"type": "text", "paths": ["1.width"], "min": 3}, "min belongs to integer, number, not to text"),
        ({"type": "image", "paths": ["1.width"], "default": "x"}, "default belongs to"),
        ({"type": "choice", "paths": ["1.width"]}, "a choice needs choices"),
        ({"type": "integer", "paths": ["1.width"], "required": True, "default": 3}, "not required"),
        ({"type": "boolean", "switch": {"yes": {}}}, "switch: 'yes' is none of true, false"),
        ({"type": "boolean", "switch": {"true": {"remove": ["9"]}}}, "the graph has no node '9'"),
        ({"type": "boolean", "switch": {"true": {"set": {"9.x": 1}}}}, "the graph has no node '9'"),
        ({"type": "colour", "paths": ["1.width"]}, "Input should be"),
        ({"type": "integer", "paths": ["1.width"], "step": 2}, "Extra inputs"),
    ],
)
def test_a_workflow_that_contradicts_itself_is_refused(parameter: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        definition(parameters={"p": parameter})


def test_a_workflow_of_the_editor_an_unknown_output_and_what_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"Export \(API\)"):
        definition(graph={"nodes": [], "links": []})
    with pytest.raises(ValidationError, match="outputs: the graph has no node '7'"):
        definition(outputs=["7"])
    with pytest.raises(ValidationError, match="cannot be stored"):
        definition(description="\x00")


def test_a_choice_writes_its_value_and_throws_its_switch() -> None:
    flow = definition(
        parameters={
            "size": {
                "type": "choice",
                "choices": ["small", "large", 7],
                "default": "small",
                "switch": {"large": {"set": {"1.width": 999}}, "7": {"set": {"1.width": 7}}},
            }
        }
    )

    def width(**given: Any) -> int:
        return int(workflows.fill(flow, given, (), never).graph["1"]["inputs"]["width"])

    assert (width(), width(size="large"), width(size=7)) == (8, 999, 7)
    with pytest.raises(InvalidParameters, match='must be one of "small", "large", 7; "huge" was given'):
        width(size="huge")
    assert len(list(flow.variants())) == 4  # at its default, and at each value


# ---- versions ----


def test_another_content_is_a_new_version_and_the_same_content_is_not(conn: psycopg.Connection) -> None:
    first, created = versions.save(conn, ORGANIZATION, "mine", definition())
    assert (first.version, created) == (1, True)

    assert versions.save(conn, ORGANIZATION, "mine", definition()) == (first, False)
    second, created = versions.save(conn, ORGANIZATION, "mine", definition(description="other"))
    assert (second.version, created) == (2, True)
    back, created = versions.save(conn, ORGANIZATION, "mine", definition())
    assert (back.version, back.digest, created) == (3, first.digest, True)

    assert versions.find(conn, ORGANIZATION, "mine") == back
    assert versions.find(conn, ORGANIZATION, "mine", 1) == first
    assert versions.find(conn, ORGANIZATION, "mine", 4) is None
    assert [each.version for each in versions.history(conn, back)] == [3, 2, 1]
    assert [each.version for each in versions.history(conn, back, before=3, limit=1)] == [2]


def test_no_number_is_given_twice_even_after_a_workflow_was_deleted(conn: psycopg.Connection) -> None:
    versions.save(conn, ORGANIZATION, "mine", definition())
    versions.save(conn, ORGANIZATION, "mine", definition(description="other"))
    assert versions.delete(conn, ORGANIZATION, "mine")

    assert versions.find(conn, ORGANIZATION, "mine") is None and versions.find(conn, ORGANIZATION, "mine", 2) is None
    assert not versions.delete(conn, ORGANIZATION, "mine")
    assert "mine" not in versions.names(conn, ORGANIZATION)
    assert [each.name for each in versions.search(conn, ORGANIZATION)] == ["qwen-image-edit", "smoke"]
    assert versions.save(conn, ORGANIZATION, "mine", definition())[0].version == 3


def test_organizations_have_their_own_and_none_takes_a_shipped_name(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    versions.save(conn, 2, "mine", definition())
    versions.save(conn, 2, "zoo", definition())

    assert versions.find(conn, ORGANIZATION, "mine") is None
    found = versions.find(conn, None, "mine", own=ORGANIZATION)
    assert found is not None and found.organization_id == 2
    versions.save(conn, ORGANIZATION, "mine", definition(description="ours"))
    found = versions.find(conn, None, "mine", own=ORGANIZATION)
    assert found is not None and found.organization_id == ORGANIZATION
    whole = [(each.name, each.organization_id) for each in versions.search(conn, None)]
    assert whole == [("mine", 1), ("mine", 2), ("qwen-image-edit", None), ("smoke", None), ("zoo", 2)]
    paged: list[Any] = []
    while page := versions.search(conn, None, after=(paged[-1][0], paged[-1][1] or 0) if paged else None, limit=2):
        paged += [(each.name, each.organization_id) for each in page]
    assert paged == whole
    with pytest.raises(NameTaken, match="shipped"):
        versions.save(conn, ORGANIZATION, "smoke", definition())
    monkeypatch.setattr(versions, "MOST_NAMES", 1)
    with pytest.raises(TooMany):
        versions.save(conn, ORGANIZATION, "another", definition())
    monkeypatch.setattr(versions, "MOST_VERSIONS", 2)
    for n in range(3):
        last, _ = versions.save(conn, ORGANIZATION, "mine", definition(description=str(n)))
    assert [each.version for each in versions.history(conn, last)] == [4, 3]


# ---- requests ----


def test_a_prepared_request_says_where_images_go_which_outputs_count_and_where_it_came_from(
    conn: psycopg.Connection,
) -> None:
    parameters = {"prompt": "make it snow", "seed": 7}
    request = RenderRequest(workflow="qwen-image-edit", parameters=parameters, images={"image": PHOTO})

    prepared = requests.prepare(conn, ORGANIZATION, request)

    assert prepared.images == (requests.Place("78", "image", PHOTO),) and prepared.outputs == {"60"}
    assert prepared.graph["78"]["inputs"]["image"] == "" and prepared.graph["3"]["inputs"]["seed"] == 7
    assert prepared.provenance == {
        "workflow": "qwen-image-edit",
        "version": 1,
        "digest": QWEN.digest,
        "parameters": {"prompt": "make it snow", "seed": 7, "lightning": True},
        "seeds": {"seed": 7},
    }


def test_a_seed_is_drawn_once_and_each_attempt_renders_the_same(conn: psycopg.Connection) -> None:
    request = RenderRequest(workflow="qwen-image-edit", parameters={"prompt": "x"}, images={"image": PHOTO})

    one, two = (requests.pinned(conn, ORGANIZATION, request) for _ in range(2))

    assert one.version == 1 and one.parameters["seed"] != two.parameters["seed"]
    attempts = [requests.prepare(conn, ORGANIZATION, one) for _ in range(2)]
    assert attempts[0] == attempts[1] and attempts[0].provenance["seeds"] == {"seed": one.parameters["seed"]}
    # Of a job that was handed in without it, the seed follows from the job.
    job, other = uuid4(), uuid4()
    seeds = [
        requests.prepare(conn, ORGANIZATION, request, drawn_from=each).provenance["seeds"]["seed"]
        for each in (job, job, other)
    ]
    assert seeds[0] == seeds[1] != seeds[2] and all(0 <= seed < 1 << 53 for seed in seeds)


def test_a_pinned_request_means_the_same_after_its_workflow_was_changed(conn: psycopg.Connection) -> None:
    versions.save(conn, ORGANIZATION, "mine", definition())
    pinned = requests.pinned(conn, ORGANIZATION, RenderRequest(workflow="mine"))
    versions.save(conn, ORGANIZATION, "mine", definition(parameters={}))

    assert requests.prepare(conn, ORGANIZATION, pinned).graph == colour(width=64)
    assert requests.prepare(conn, ORGANIZATION, RenderRequest(workflow="mine")).graph == colour()
    versions.delete(conn, ORGANIZATION, "mine")
    with pytest.raises(InvalidRender, match="there is no workflow 'mine'; there are qwen-image-edit, smoke") as caught:
        requests.prepare(conn, ORGANIZATION, pinned)
    assert caught.value.code == "render_invalid"
    versions.save(conn, ORGANIZATION, "mine", definition())
    with pytest.raises(InvalidRender, match="has no version 1 any more"):
        requests.prepare(conn, ORGANIZATION, pinned)


def test_a_bare_graph_has_its_images_by_their_place_and_its_seeds_are_said(conn: psycopg.Connection) -> None:
    graph = {**colour(), "4": {"class_type": "LoadImage", "inputs": {"image": "mine.png"}}}
    graph["5"] = {"class_type": "KSampler", "inputs": {"seed": 3, "noise_seed": ["1", 0]}}
    before = copy.deepcopy(graph)

    prepared = requests.prepare(conn, ORGANIZATION, RenderRequest(graph=graph, images={"4.image": PHOTO}))

    assert prepared.graph["4"]["inputs"]["image"] == "" and graph == before
    assert prepared.images == (requests.Place("4", "image", PHOTO),) and prepared.outputs is None
    assert prepared.provenance["seeds"] == {"5.seed": 3} and prepared.provenance["workflow"] is None
    for name, said in (("image", "is not <node id>.<input>"), ("9.image", "has no node '9'")):
        with pytest.raises(InvalidRender, match=said):
            requests.prepare(conn, ORGANIZATION, RenderRequest(graph=graph, images={name: PHOTO}))
    with pytest.raises(InvalidRender, match=r"graph: .*Export \(API\)"):
        requests.prepare(conn, ORGANIZATION, RenderRequest(graph={"nodes": [], "links": []}))


@pytest.mark.parametrize("key", ["o/2/photo.png", "o/1/../2/photo.png", "photo.png", "/o/1/x.png", "o/12/x.png"])
def test_nobody_renders_from_a_file_of_another_organization(conn: psycopg.Connection, key: str) -> None:
    for request in (
        RenderRequest(workflow="smoke", images={"image": Image(artefact=key)}),
        RenderRequest(graph=colour(), images={"1.image": Image(artefact=key)}),
    ):
        with pytest.raises(InvalidRender, match="is not a key of a file of this organization"):
            requests.prepare(conn, ORGANIZATION, request)


# ---- command line ----


def test_workflows_are_added_listed_shown_and_checked(
    agentflow: Command, tmp_path: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, bare, known = tmp_path / "blue.json", tmp_path / "bare.json", tmp_path / "nodes.json"
    file.write_text(json.dumps({"name": "blue", **definition().content()}))
    bare.write_text(json.dumps(colour(width=0)))
    known.write_text(json.dumps(nodes("0.33.0")))

    assert agentflow("workflows", "add", str(file)).out == "blue 1\n"
    assert agentflow("workflows", "add", str(file)).out == "blue 1 has this content already\n"
    assert agentflow("workflows", "add", str(file), "--name", "other").out == "other 1\n"
    listed = [json.loads(line) for line in agentflow("workflows", "list", "--json").out.splitlines()]
    assert [each["name"] for each in listed] == ["blue", "other", "qwen-image-edit", "smoke"]
    assert "shipped" in agentflow("workflows", "list").out
    assert "1 to 2048, default 64" in agentflow("workflows", "show", "blue").out
    shown = agentflow("workflows", "show", "blue", "--json").out
    file.write_text(shown)
    assert agentflow("workflows", "add", str(file)).out == "blue 1 has this content already\n"

    assert agentflow("workflows", "check", "smoke", "--nodes", str(known)).status == 0
    said = agentflow("workflows", "check", "qwen-image-edit", "--nodes", str(known))
    assert said.status == 1 and "37.unet_name: the server has no file" in said.out and said.out.count("\n") == 4
    said = agentflow("workflows", "check", str(bare), "--nodes", str(known))
    assert said.status == 1 and "1.width: must be at least 1; 0 was given" in said.out
    said = agentflow("workflows", "check", "smoke")
    assert said.status == 1 and "no server of the pool 'default'" in said.err
    monkeypatch.setattr(pool, "known_nodes", lambda system, name: nodes("0.3.64"))
    assert agentflow("workflows", "check", "smoke").status == 0


def test_what_is_no_workflow_is_one_line_and_exit_2(agentflow: Command, tmp_path: Path) -> None:
    for name, content, said in (
        ("a.json", "{", "is not JSON"),
        ("b.json", json.dumps(colour()), "is a bare graph"),
        ("c.json", json.dumps({"nodes": [], "links": []}), "Export (API)"),
        ("d.json", json.dumps({"graph": {"nodes": [], "links": []}}), "Export (API)"),
        ("E.json", json.dumps({"graph": colour()}), "is no name"),
        ("f.json", json.dumps({"graph": colour(), "parameters": {"x": {"type": "text"}}}), "paths are missing"),
    ):
        (tmp_path / name).write_text(content)
        answer = agentflow("workflows", "add", str(tmp_path / name))
        assert (answer.status, answer.out, answer.err.count("\n")) == (2, "", 1), answer.err
        assert said in answer.err
    assert agentflow("workflows", "show", "nothing").status == 2


def test_a_graph_says_its_size(system: System) -> None:
    assert graphs.size_of(colour()) == len(json.dumps(colour()))
