"""Graphs in ComfyUI's API format, and the pre-flight: it says what recorded servers said, each damage by its own complaint."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow.comfyui import graphs, preflight
from agentflow.comfyui.graphs import InvalidGraph
from agentflow.comfyui.preflight import complaints
from tests.render_support import DATA, VERSIONS, colour, nodes

Graph = dict[str, Any]

# ---- graphs ----


def test_a_workflow_of_the_editor_is_refused_with_the_way_to_export_it() -> None:
    ui = {"last_node_id": 1, "nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4}

    with pytest.raises(InvalidGraph, match=r"Export \(API\)"):
        graphs.parse(ui)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({}, "has no nodes"),
        ({"prompt": colour(), "client_id": "x"}, "what stands under its `prompt`"),
        ({"1": "KSampler"}, "node 1: must be an object"),
        ({"1": {"inputs": {}}}, "node 1: class_type is missing"),
        ({"1": {"class_type": "SaveImage"}}, "node 1: inputs are missing"),
        ({"1": {"class_type": "SaveImage", "inputs": []}}, "node 1: inputs are missing"),
        ({"": {"class_type": "SaveImage", "inputs": {}}}, "the id of a node"),
        ({str(n): {"class_type": "A", "inputs": {}} for n in range(2001)}, "has 2001 nodes"),
        ({"1": {"class_type": "A", "inputs": {"text": "x" * (1 << 20)}}}, "larger than"),
    ],
)
def test_what_is_no_graph_is_refused_with_what_would_be_right(value: Any, said: str) -> None:
    with pytest.raises(InvalidGraph, match=said):
        graphs.parse(value)


def test_a_node_may_be_called_prompt() -> None:
    graph = {"prompt": {"class_type": "EmptyImage", "inputs": {}}}

    assert graphs.parse(graph) is graph


def test_nodes_go_with_the_links_to_them_and_nothing_else() -> None:
    graph = {
        "1": {"class_type": "A", "inputs": {"text": "1", "pair": {"__value__": ["2", 0]}}},
        "2": {"class_type": "B", "inputs": {"a": ["1", 0]}},
        "3": {"class_type": "C", "inputs": {"b": ["2", 1], "a": ["1", 0]}},
    }
    before = copy.deepcopy(graph)

    assert graphs.without(graph, frozenset({"2"})) == {
        "1": graph["1"],
        "3": {"class_type": "C", "inputs": {"a": ["1", 0]}},
    }
    assert graph == before


# ---- as recorded servers ----

#: What the server has no word of its own for.
OURS = {
    "missing_linked_node": "exception_during_validation",
    "missing_linked_output": "exception_during_validation",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_it_complains_where_recorded_servers_refused_and_nowhere_else(version: str) -> None:
    compared = 0
    for each in json.loads((DATA / f"refusals-{version}.json").read_text()):
        try:
            graph = graphs.parse(each["prompt"])
        except InvalidGraph:
            assert each["status"] == 400
            continue
        found = complaints(graph, nodes(version))
        uploaded = [errors for errors in each["node_errors"].values() if "custom_validation_failed" in errors]
        if uploaded:  # without its places, no file of the input folder is asked for
            assert not found
            (found,) = [complaints(graph, nodes(version), places=[])]
            assert [(c.node, c.input, c.code) for c in found] == [("1", "image", "value_not_in_list")]
            continue

        assert bool(found) == (each["error"] is not None or bool(each["node_errors"])), each
        if each["node_errors"] and "dependency_cycle" not in str(each):
            said = sorted((c.node, OURS.get(c.code, c.code)) for c in found)
            assert said == sorted((n, code) for n, codes in each["node_errors"].items() for code in codes), each
        compared += 1
    assert compared >= 13


# ---- each damage by its own complaint ----

#: Not to be changed.
KNOWN = {version: nodes(version) for version in VERSIONS}
_FILTERS = ("ImageInvert", "ImageScale", "ImageBlur", "ImageSharpen", "ImageQuantize", "ImageScaleBy")


@dataclass(frozen=True)
class Case:
    """A graph without fault: `first`, filters in a row, `save`."""

    version: str
    graph: Graph
    row: list[str]


def values(described: list[Any]) -> st.SearchStrategy[Any]:
    kind, options = described[0], described[1] if len(described) > 1 else {}
    if isinstance(kind, list):
        return st.sampled_from(kind)
    if kind == "COMBO":
        return st.sampled_from(options["options"])
    if kind == "INT":
        return st.integers(options["min"], options["max"])
    if kind == "FLOAT":
        return st.floats(options["min"], options["max"])
    return st.text(max_size=5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    version = draw(st.sampled_from(VERSIONS))
    said = KNOWN[version]
    kinds = ["EmptyImage", *draw(st.lists(st.sampled_from(_FILTERS), min_size=2, max_size=4)), "SaveImage"]
    ids = draw(st.lists(st.from_regex(r"[0-9]{1,3}(:[0-9])?", fullmatch=True), unique=True, min_size=6, max_size=6))
    graph: Graph = {}
    for kind, id_ in zip(kinds, ids, strict=False):
        inputs = {}
        for name, described in said[kind]["input"]["required"].items():
            inputs[name] = [ids[len(graph) - 1], 0] if described[0] == "IMAGE" else draw(values(described))
        graph[id_] = {"class_type": kind, "inputs": inputs}
    order = draw(st.permutations(list(graph)))
    return Case(version, {id_: graph[id_] for id_ in order}, ids[: len(kinds)])


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_graph_without_fault_has_no_complaints(case: Case) -> None:
    assert complaints(graphs.parse(case.graph), KNOWN[case.version]) == []


def required(case: Case, kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    said = KNOWN[case.version]
    found = []
    for id_ in case.row:
        for name, described in said[case.graph[id_]["class_type"]]["input"]["required"].items():
            if ("COMBO" if isinstance(described[0], list) else described[0]) in kinds:
                found.append((id_, name))
    return found


DAMAGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "required_input_missing": (("INT", "FLOAT", "COMBO", "STRING", "IMAGE"), None),
    "value_smaller_than_min": (("INT", "FLOAT"), -(10**9)),
    "value_bigger_than_max": (("INT", "FLOAT"), 10**9),
    "invalid_input_type": (("INT", "FLOAT"), "many"),
    "value_not_in_list": (("COMBO",), "of-no-kind"),
    "bad_linked_input": (("INT", "IMAGE"), ["1", 0, 0]),
    "missing_linked_node": (("IMAGE",), ["9999", 0]),
}


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_each_damage_of_an_input_is_its_own_single_complaint(case: Case, data: st.DataObject) -> None:
    code = data.draw(st.sampled_from(sorted(DAMAGES)))
    kinds, value = DAMAGES[code]
    id_, name = data.draw(st.sampled_from(required(case, kinds) or required(case, ("IMAGE",))))
    if not required(case, kinds):  # no such input in this graph
        code, value = "required_input_missing", None
    graph = copy.deepcopy(case.graph)
    if value is None:
        del graph[id_]["inputs"][name]
    else:
        graph[id_]["inputs"][name] = value

    (found,) = complaints(graph, KNOWN[case.version])

    assert (found.node, found.input, found.code) == (id_, name, code)


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_each_damage_of_the_whole_is_its_own_single_complaint(case: Case, data: st.DataObject) -> None:
    graph, said = copy.deepcopy(case.graph), KNOWN[case.version]
    kind = data.draw(st.sampled_from(["unknown", "no output node", "wrong output", "wrong type", "cycle"]))
    first, last, save = case.row[1], case.row[-2], case.row[-1]
    if kind == "unknown":
        graph[first]["class_type"] += "2"
        expected = (first, None, "missing_node_type")
    elif kind == "no output node":
        del graph[save]
        expected = (None, None, "prompt_no_outputs")
    elif kind == "wrong output":
        graph[save]["inputs"]["images"] = [last, 3]
        expected = (save, "images", "missing_linked_output")
    elif kind == "wrong type":
        graph["mask"] = {"class_type": "LoadImage", "inputs": {"image": "probe.png"}}
        graph[first]["inputs"]["image"] = ["mask", 1]
        expected = (first, "image", "return_type_mismatch")
    else:
        graph[first]["inputs"]["image"] = [last, 0]
        expected = (None, None, "dependency_cycle")

    (found,) = complaints(graph, said)

    assert found.code == expected[2]
    if kind == "cycle":
        assert found.node in case.row[1:-1] and all(f"{each} (" in found.message for each in case.row[1:-1])
    else:
        assert (found.node, found.input) == expected[:2]
    if kind == "unknown":
        assert case.graph[first]["class_type"] in found.message  # the near name


# ---- what it says ----


@pytest.mark.parametrize("version", VERSIONS)
def test_a_missing_model_is_named_with_its_folder_and_what_is_there(version: str) -> None:
    said = nodes(version, models=True)
    unet = {"unet_name": "qwen_image_edit_2511.safetensors", "weight_dtype": "default"}
    lora = {"model": ["1", 0], "lora_name": "x.safetensors", "strength_model": 1}
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": unet},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": lora},
        "3": {"class_type": "OtherLoader", "inputs": {"file": "y.gguf"}},
        "4": {"class_type": "Show", "inputs": {"model": ["2", 0], "other": ["3", 0]}},
    }
    said["OtherLoader"] = {"input": {"required": {"file": [[]]}}, "output": ["OTHER"]}
    said["Show"] = {"input": {"required": {"model": ["MODEL"], "other": ["*"]}}, "output": [], "output_node": True}

    found = complaints(graph, said)

    assert [each.code for each in found] == ["model_missing"] * 3
    first, second, third = (each.message for each in found)
    assert "'qwen_image_edit_2511.safetensors' in models/diffusion_models" in first
    assert "qwen_image_edit_2509_fp8_e4m3fn.safetensors" in first  # what is there
    assert "'x.safetensors' in models/loras" in second
    assert "OtherLoader" in third and "it has none there" in third


def test_lists_of_newer_nodes_and_types_that_adapt_are_understood() -> None:
    said = nodes("0.33.0")
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 30}},
        "3": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["2", 0], "filename_prefix": "v", "format": "mp4", "codec": "auto"},
        },
    }
    assert complaints(graph, said) == []

    method = {
        "class_type": "FluxKontextMultiReferenceLatentMethod",
        "inputs": {"conditioning": ["9", 0], "reference_latents_method": "no"},
    }
    said["Condition"] = {"input": {}, "output": ["CONDITIONING"]}
    said["Show"] = {"input": {"required": {"any": ["*"]}}, "output": [], "output_node": True}
    graph = {
        "9": {"class_type": "Condition", "inputs": {}},
        "8": method,
        "7": {"class_type": "Show", "inputs": {"any": ["8", 0]}},
    }
    (found,) = complaints(graph, said)
    assert (found.code, found.input) == ("value_not_in_list", "reference_latents_method")
    assert "index_timestep_zero" in found.message


def test_inputs_that_grow_or_whose_list_is_elsewhere_are_left_to_the_server() -> None:
    said = nodes("0.33.0")
    said["Batch"] = {
        "input": {
            "required": {"images": ["COMFY_AUTOGROW_V3", {}], "voice": ["COMBO", {"remote_combo": True, "options": []}]}
        },
        "output": ["COMFY_MATCHTYPE_V3"],
    }
    graph = colour()
    graph["3"] = {
        "class_type": "Batch",
        "inputs": {"images.image0": ["1", 0], "images.image1": ["1", 0], "voice": "alto"},
    }
    graph["2"]["inputs"]["images"] = ["3", 0]

    assert complaints(graph, said) == []
    graph["1"]["inputs"]["width"] = 0
    assert [(each.node, each.input) for each in complaints(graph, said)] == [("1", "width")]


def test_values_are_converted_as_the_server_does_it() -> None:
    said = nodes("0.33.0")

    for fine in ("64", 64.9, True, {"__value__": 64}):
        assert complaints(colour(width=fine), said) == [], fine
    for wrong in (None, "", "1.5", {"a": 1}, {"__value__": [1]}):
        assert [each.code for each in complaints(colour(width=wrong), said)] == ["invalid_input_type"], wrong
    assert [each.code for each in complaints(colour(width=0.9), said)] == ["value_smaller_than_min"]
    assert complaints(colour(nothing_known="x"), said) == []


def test_a_value_where_a_link_belongs_and_an_image_that_goes_nowhere_are_said_beforehand() -> None:
    said = nodes("0.33.0")
    graph = colour()
    graph["2"]["inputs"]["images"] = "x.png"
    assert [(each.input, each.code) for each in complaints(graph, said)] == [("images", "invalid_input_type")]

    for name, node in (("picture", "1"), ("width", "1"), ("images", "2")):
        found = complaints(colour(), said, places=[(node, name)])
        assert [(each.node, each.input, each.code) for each in found] == [(node, name, "no_image_input")]


def test_an_image_of_the_caller_is_not_looked_for_on_the_server_but_any_other_is() -> None:
    said = nodes("0.33.0")
    graph = colour()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": ""}}

    assert complaints(graph, said, places=[("1", "image")]) == []
    assert [each.code for each in complaints(graph, said, places=[])] == ["value_not_in_list"]
    for there in ("probe.png", "folder/x.png", "x.png [output]"):
        graph["1"]["inputs"]["image"] = there
        assert complaints(graph, said, places=[]) == []


def test_a_node_that_leads_to_no_output_is_passed_over_as_the_server_does_it() -> None:
    graph = {**colour(), "3": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0]}}}
    graph["1"]["inputs"]["unheard_of"] = ["3", 0]

    assert complaints(graph, nodes("0.33.0")) == []


def test_a_chain_as_long_as_a_graph_may_be_needs_no_deep_stack() -> None:
    graph: Graph = {"0": {"class_type": "EmptyImage", "inputs": colour()["1"]["inputs"]}}
    for n in range(1, graphs.MAX_NODES - 1):
        graph[str(n)] = {"class_type": "ImageInvert", "inputs": {"image": [str(n - 1), 0]}}
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": [str(n), 0], "filename_prefix": "x"}}

    assert complaints(graphs.parse(graph), nodes("0.33.0")) == []
    assert len(list(graphs.links(graph))) == graphs.MAX_NODES - 1
    graph["1"]["inputs"]["image"] = [str(n), 0]
    assert [each.code for each in complaints(graph, nodes("0.33.0"))] == ["dependency_cycle"]


def test_what_a_server_says_in_a_way_that_is_not_known_is_passed_over() -> None:
    said = nodes("0.33.0")
    said["EmptyImage"]["input"]["required"] |= {"odd": "ODD", "empty": [], "number": [7], "none": ["INT", None]}
    graph = colour(none=5)

    assert preflight.complaints(graph, said) == []
    said["EmptyImage"]["input"] = None
    assert preflight.complaints(graph, said) == []
