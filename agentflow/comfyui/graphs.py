"""Graphs in ComfyUI's API format: `{"<node id>": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0]}}}`.

An input is a value, or a link `[node id, number of the output]`. A list that is meant as a value is wrapped:
`{"__value__": [1, 2]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: As `parse` answers it: each node has a `class_type` and `inputs`.
Graph = dict[str, dict[str, Any]]

MAX_NODES: Final = 2000
MAX_BYTES: Final = 1 << 20
_MAX_ID: Final = 100
_WRAPPED: Final = "__value__"

HOW_TO_EXPORT: Final = (
    "this is a workflow as ComfyUI's editor saves it, which its API does not run; export it there by Workflow → Export (API)"
    " (in older editors: switch Dev mode on in the settings, then Save (API Format)), and send that file's content"
)


class InvalidGraph(ValueError):
    """This is no graph in API format. `node` is where, `problem` what would be right."""

    def __init__(self, problem: str, node: str | None = None) -> None:
        super().__init__(f"node {node}: {problem}" if node is not None else problem)
        self.problem = problem
        self.node = node


@dataclass(frozen=True, slots=True)
class Link:
    """The output number `output` of node `source` goes into `input` of `node`."""

    node: str
    input: str
    source: str
    output: int


def classes_of(graph: Graph) -> set[str]:
    """The kinds of its nodes."""
    return {node["class_type"] for node in graph.values()}


def parse(value: Any) -> Graph:
    """The value as a graph, unchanged. Raises InvalidGraph. Whether its nodes exist is for the pre-flight to say."""
    if not isinstance(value, dict):
        raise InvalidGraph("must be an object of nodes by their ids")
    if isinstance(value.get("nodes"), list) or isinstance(value.get("links"), list):
        raise InvalidGraph(HOW_TO_EXPORT)
    if isinstance(value.get("prompt"), dict) and "class_type" not in value["prompt"]:
        raise InvalidGraph("this is the whole body of a POST /prompt: send what stands under its `prompt`")
    if not value:
        raise InvalidGraph("has no nodes")
    if len(value) > MAX_NODES:
        raise InvalidGraph(f"has {len(value)} nodes, and may have {MAX_NODES}")
    for id_, node in value.items():
        _check_node(id_, node)
    if size_of(value) > MAX_BYTES:
        raise InvalidGraph(f"is larger than {MAX_BYTES} bytes: load large things from files")
    return value


def _check_node(id_: Any, node: Any) -> None:
    if not isinstance(id_, str) or not 0 < len(id_) <= _MAX_ID:
        raise InvalidGraph(f"the id of a node must be a text of 1 to {_MAX_ID} characters")
    if not isinstance(node, dict):
        raise InvalidGraph("must be an object with class_type and inputs", id_)
    if not isinstance(node.get("class_type"), str) or not node["class_type"]:
        raise InvalidGraph("class_type is missing: the name of the node's kind, such as KSampler", id_)
    if not isinstance(node.get("inputs"), dict):
        raise InvalidGraph("inputs are missing: an object, {} for a node without any", id_)


def size_of(value: Any) -> int:
    """Bytes, as JSON. Raises InvalidGraph where it cannot be JSON."""
    try:
        return len(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))
    except (TypeError, RecursionError) as error:
        raise InvalidGraph(f"is not JSON: {error}") from None


def is_linked(value: Any) -> bool:
    """Whether an input is taken for a link: ComfyUI takes every list for one, also one that is none."""
    return isinstance(value, list)


def link_of(value: Any) -> tuple[str, int] | None:
    """The node and the number of its output that an input links to; None where the input is no (good) link."""
    if isinstance(value, list) and len(value) == 2:
        source, output = value
        if isinstance(source, str) and isinstance(output, int) and not isinstance(output, bool) and output >= 0:
            return source, output
    return None


def literal(value: Any) -> Any:
    """An input's value without its wrapping."""
    return value[_WRAPPED] if isinstance(value, dict) and _WRAPPED in value else value


def links(graph: Mapping[str, Mapping[str, Any]]) -> Iterator[Link]:
    """All good links, whether or not they lead anywhere."""
    for id_, node in graph.items():
        for name, value in node["inputs"].items():
            found = link_of(value)
            if found is not None:
                yield Link(id_, name, *found)


def without(graph: Graph, removed: frozenset[str]) -> Graph:
    """A copy that lacks these nodes, and the inputs that linked to them."""
    return {
        id_: {
            **node,
            "inputs": {name: value for name, value in node["inputs"].items() if _source(value) not in removed},
        }
        for id_, node in graph.items()
        if id_ not in removed
    }


def _source(value: Any) -> str | None:
    found = link_of(value)
    return found[0] if found is not None else None


def place(text: str) -> tuple[str, str]:
    """`"3.seed"`: the input `seed` of the node `3`. Raises ValueError. A node's id has no dot, an input's name may have."""
    node, dot, name = text.partition(".")
    if not (node and dot and name):
        raise ValueError(f"{text!r} is not <node id>.<input>, such as 3.seed")
    return node, name
