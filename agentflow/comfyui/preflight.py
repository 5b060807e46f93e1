"""The check of a graph before it is sent, against what a server says of its nodes (`GET /object_info`).

It complains where the server would refuse (`validate_inputs` in ComfyUI's execution.py, whose words the codes are), and not
otherwise: values are converted as the server does it, inputs that it does not know are passed over, and so are nodes that lead to
no output. Two things are said that the server finds out only while it runs: a plain value where a link belongs, and, beforehand,
which file of which folder is missing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agentflow.comfyui import graphs
from agentflow.comfyui.graphs import Graph
from agentflow.comfyui.workflows import Definition

_SHOWN: Final = 5
#: What only a node can make. Nodes of others have types of their own, some of which are plain values.
_SOCKETS: Final = frozenset(
    {
        *(
            "MODEL",
            "CLIP",
            "VAE",
            "CONDITIONING",
            "LATENT",
            "IMAGE",
            "MASK",
            "AUDIO",
            "VIDEO",
            "CONTROL_NET",
            "CLIP_VISION",
        ),
        *("CLIP_VISION_OUTPUT", "STYLE_MODEL", "UPSCALE_MODEL", "SAMPLER", "SIGMAS", "NOISE", "GUIDER"),
    }
)
#: Types of newer nodes that grow into several inputs, or take what their neighbours have: what fits is for the server to say.
_ADAPTING: Final = "COMFY_"
_UPLOADS: Final = ("image_upload", "video_upload", "audio_upload", "animated_image_upload", "file_upload")
#: The folder below `models` that the loaders' lists are made of, by their input.
_FOLDERS: Final[Mapping[str, str]] = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "vae_name": "vae",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    "style_model_name": "style_models",
    "gligen_name": "gligen",
    "hypernetwork_name": "hypernetworks",
}
_FOLDERS_BY_NODE: Final[Mapping[str, str]] = {
    "CLIPVisionLoader": "clip_vision",
    "UpscaleModelLoader": "upscale_models",
    "AudioEncoderLoader": "audio_encoders",
}
_MODEL_FILE: Final = re.compile(r".*\.(safetensors|sft|ckpt|pth?|pt2|bin|gguf|onnx|pkl)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Complaint:
    """`node` and `input` are None where it is about the whole graph, or the whole node."""

    node: str | None
    input: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class _Input:
    """What a node says of one of its inputs. `choices` is None of what is no list."""

    type: str
    choices: list[Any] | None
    options: Mapping[str, Any]
    required: bool

    @property
    def adapting(self) -> bool:
        return self.type.startswith(_ADAPTING)

    @property
    def uploaded(self) -> bool:
        return any(self.options.get(each) for each in _UPLOADS)


def complaints(
    graph: Graph, object_info: Mapping[str, Any], *, places: Collection[tuple[str, str]] | None = None
) -> list[Complaint]:
    """What is wrong with a graph; empty: nothing.

    `places` are the nodes and inputs that an image of the caller's is going to be put into; None: they are not known here, and
    no file of a server's input folder is asked for.
    """
    found = [
        Complaint(id_, None, "missing_node_type", _unknown(node["class_type"], object_info))
        for id_, node in graph.items()
        if node["class_type"] not in object_info
    ]
    outputs = [id_ for id_, node in graph.items() if object_info.get(node["class_type"], {}).get("output_node")]
    if not outputs and not found:
        return [Complaint(None, None, "prompt_no_outputs", "the graph has no output node, such as SaveImage")]
    reached, cycle = _reach(graph, outputs, object_info)
    known = [id_ for id_ in reached if graph[id_]["class_type"] in object_info]
    found += [each for id_ in known for each in _of_node(id_, graph, object_info, places)]
    found += [each for id_, name in places or () for each in _of_place(id_, name, graph, object_info)]
    if cycle:
        path = " -> ".join(f"{id_} ({graph[id_]['class_type']})" for id_ in cycle)
        found.append(Complaint(cycle[0], None, "dependency_cycle", f"its inputs lead back to itself: {path}"))
    return found


def of_definition(definition: Definition, object_info: Mapping[str, Any]) -> list[Complaint]:
    """What is wrong with a workflow at its defaults, and with any of its switches thrown."""
    paths = [path for p in definition.parameters.values() if p.type == "image" for path in p.paths]
    found: dict[Complaint, None] = {}
    for graph in definition.variants():
        places = [place for place in map(graphs.place, paths) if place[0] in graph]
        found.update(dict.fromkeys(complaints(graph, object_info, places=places)))
    return list(found)


def _reach(graph: Graph, outputs: list[str], object_info: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """All nodes that outputs are made of, in the graph's order, and one cycle among them, if there is one."""
    inputs = {id_: _inputs(object_info.get(node["class_type"], {})) for id_, node in graph.items()}
    links: dict[str, list[str]] = {id_: [] for id_ in graph}
    for link in graphs.links(graph):
        # Several inputs that one grows into are called `images.image0`, `images.image1` …
        if link.source in graph and link.input.partition(".")[0] in inputs[link.node]:
            links[link.node].append(link.source)
    done: set[str] = set()
    cycle: list[str] = []
    for output in outputs:
        # Depth first, without recursion: a chain may be as long as the graph.
        path: list[tuple[str, Iterator[str]]] = [] if output in done else [(output, iter(links[output]))]
        on_path = {output}
        while path:
            id_, rest = path[-1]
            following = next(rest, None)
            if following is None:
                path.pop()
                on_path.discard(id_)
                done.add(id_)
            elif following in on_path:
                nodes = [each for each, _ in path]
                cycle = cycle or [*nodes[nodes.index(following) :], following]
            elif following not in done:
                path.append((following, iter(links[following])))
                on_path.add(following)
    return [id_ for id_ in graph if id_ in done], cycle


def _of_node(
    id_: str, graph: Graph, object_info: Mapping[str, Any], places: Collection[tuple[str, str]] | None
) -> Iterator[Complaint]:
    node = graph[id_]
    for name, wanted in _inputs(object_info[node["class_type"]]).items():
        if places is not None and (id_, name) in places:
            continue
        if name not in node["inputs"]:
            if wanted.required and not wanted.adapting:
                yield Complaint(id_, name, "required_input_missing", "is missing")
            continue
        value = node["inputs"][name]
        if graphs.is_linked(value):
            problem = _of_link(value, wanted, graph, object_info)
        elif wanted.uploaded:
            problem = _of_uploaded(graphs.literal(value), wanted) if places is not None else None
        else:
            problem = _of_value(graphs.literal(value), node["class_type"], name, wanted)
        if problem is not None:
            yield Complaint(id_, name, *problem)


def _of_place(id_: str, name: str, graph: Graph, object_info: Mapping[str, Any]) -> Iterator[Complaint]:
    """The server passes an unknown input over: the image would be sent in vain."""
    class_type = graph[id_]["class_type"]
    if class_type not in object_info:
        return
    wanted = _inputs(object_info[class_type]).get(name)
    if wanted is None or not (wanted.uploaded or wanted.choices is not None or wanted.type == "STRING"):
        yield Complaint(id_, name, "no_image_input", f"{class_type} takes no image's name there")


def _inputs(said: Mapping[str, Any]) -> dict[str, _Input]:
    """By name. What is described in a way that is not known here is left out."""
    found = {}
    for section in ("required", "optional"):
        for name, described in (said.get("input") or {}).get(section, {}).items():
            if not isinstance(described, list) or not described:
                continue
            options = described[1] if len(described) > 1 and isinstance(described[1], dict) else {}
            kind, choices = described[0], options.get("options")
            if isinstance(kind, list):
                kind, choices = "COMBO", kind
            if kind != "COMBO" or not isinstance(choices, list) or options.get("remote_combo"):
                choices = None
            if isinstance(kind, str):
                found[name] = _Input(kind, choices, options, section == "required")
    return found


def _of_link(value: Any, wanted: _Input, graph: Graph, object_info: Mapping[str, Any]) -> tuple[str, str] | None:
    link = graphs.link_of(value)
    if link is None:
        return "bad_linked_input", 'a list is a link, such as ["4", 0]; one that is a value must be {"__value__": […]}'
    source, number = link
    if source not in graph:
        return "missing_linked_node", f"is linked to node {source}, which the graph does not have"
    class_type = graph[source]["class_type"]
    if class_type not in object_info:  # complained of already
        return None
    made = object_info[class_type].get("output") or []
    if number >= len(made):
        return (
            "missing_linked_output",
            f"is linked to output {number} of node {source} ({class_type}), which has {len(made)}",
        )
    if not _fits(made[number], wanted):
        return (
            "return_type_mismatch",
            f"wants {wanted.type}; output {number} of node {source} ({class_type}) is {made[number]}",
        )
    return None


def _fits(made: Any, wanted: _Input) -> bool:
    """As the server's validate_node_input: types may be lists with commas, `*` is anything. What makes a list goes
    unchecked."""
    if wanted.adapting or not isinstance(made, str) or made.startswith(_ADAPTING):
        return True
    ours, theirs = ({each.strip() for each in text.split(",")} for text in (made, wanted.type))
    return bool(ours & theirs) or "*" in ours | theirs


def _of_uploaded(value: Any, wanted: _Input) -> tuple[str, str] | None:
    """A file of the server's input folder. Its list has only those at the top, and names such as `x.png [output]` mean others."""
    if wanted.choices is None or value in wanted.choices or not isinstance(value, str) or re.search(r"/|\]\s*$", value):
        return None
    return (
        "value_not_in_list",
        f"the server has no file {value!r} in its input folder: send it with the request, under images",
    )


def _of_value(value: Any, class_type: str, name: str, wanted: _Input) -> tuple[str, str] | None:
    if wanted.type in _SOCKETS:
        if value is None and not wanted.required:
            return None
        return "invalid_input_type", f"wants a link to a node that makes {wanted.type}, not a value"
    try:
        if wanted.type == "INT":
            value = int(value)
        elif wanted.type == "FLOAT":
            value = float(value)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if wanted.type == "INT" else "a number"
        return "invalid_input_type", f"must be {kind}; {_shown(value)} was given"
    if isinstance(value, int | float):
        lowest, highest = (_number(wanted.options.get(each)) for each in ("min", "max"))
        if isinstance(value, float) and not math.isfinite(value):
            return "invalid_input_type", "must be a finite number"
        if lowest is not None and value < lowest:
            return "value_smaller_than_min", f"must be at least {lowest}; {value} was given"
        if highest is not None and value > highest:
            return "value_bigger_than_max", f"must be at most {highest}; {value} was given"
    if wanted.choices is None:
        return None
    several = wanted.options.get("multiselect") and isinstance(value, list)
    missing = [each for each in (value if several else [value]) if each not in wanted.choices]
    return _not_in_list(missing[0], class_type, name, wanted.choices) if missing else None


def _not_in_list(value: Any, class_type: str, name: str, choices: list[Any]) -> tuple[str, str]:
    folder = _FOLDERS_BY_NODE.get(class_type) or _FOLDERS.get(name.rstrip("0123456789"))
    if not (isinstance(value, str) and (folder or _MODEL_FILE.fullmatch(value))):
        return "value_not_in_list", f"must be one of {_some(choices, value)}; {_shown(value)} was given"
    where = f"in models/{folder}" if folder else f"among the files that {class_type} lists"
    there = f"it has {_some(choices, value)}" if choices else "it has none there"
    return "model_missing", f"the server has no file {value!r} {where} ({there})"


def _unknown(class_type: str, object_info: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(class_type, object_info, n=3, cutoff=0.7)
    hint = f"near to it are {', '.join(near)}" if near else "it may be of a custom node that is not installed there"
    return f"the server has no node type {class_type!r}; {hint}"


def _some(choices: list[Any], value: Any) -> str:
    """A few of them, the nearest first."""
    texts = [str(each) for each in choices]
    near = difflib.get_close_matches(str(value), texts, n=_SHOWN, cutoff=0.5)
    shown = [*near, *(each for each in texts if each not in near)][:_SHOWN]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
