"""A workflow: a graph with parameters, so that a caller names values instead of nodes.

A parameter's value is written to its `paths` in the graph. Its `switch` changes more than that: other values, links, nodes that
go. In this order: the graph as it stands, defaults, switches, and what the caller gave, which nothing overrides.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from agentflow.comfyui import graphs
from agentflow.comfyui.graphs import Graph
from agentflow.jobs.text import is_storable

MAX_PARAMETERS: Final = 100
MAX_SEED: Final = (1 << 64) - 1
_MAX_TEXT: Final = 20_000
_NUMBERS: Final = ("integer", "number")
#: What may stand beside these fields of a parameter.
_BELONGS: Final[Mapping[str, tuple[str, ...]]] = {
    "min": _NUMBERS,
    "max": _NUMBERS,
    "max_length": ("text",),
    "choices": ("choice",),
    "default": ("text", *_NUMBERS, "boolean", "choice"),
}

Kind = Literal["text", "integer", "number", "boolean", "choice", "image", "seed"]
Number = Annotated[int | float, Field(allow_inf_nan=False)]
Path = Annotated[str, Field(pattern=r"^[^.]{1,100}\..{1,200}$", examples=["3.seed"])]
NodeId = Annotated[str, Field(min_length=1, max_length=100)]


class InvalidParameters(ValueError):
    """Values that a workflow does not take. `problems` are pairs of a field (`parameters.steps`) and what would be right."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in problems))
        self.problems = problems


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class Change(_Strict):
    """What a switch does to the graph."""

    set: dict[Path, Any] = Field({}, description='By `<node id>.<input>`: a value, or a link such as `["4", 0]`')
    remove: list[NodeId] = Field([], description="Nodes that go, with the inputs that link to them")


class Parameter(_Strict):
    type: Kind
    description: Annotated[str, Field(max_length=2000)] = ""
    paths: Annotated[list[Path], Field(max_length=50)] = Field(
        [], description="Where its value goes: `<node id>.<input>`; empty where its `switch` does all"
    )
    required: bool = False
    default: Any = Field(None, description="Left out: what stands in the graph")
    min: Number | None = None
    max: Number | None = None
    max_length: Annotated[int, Field(ge=1)] | None = Field(None, description=f"Characters; {_MAX_TEXT} if left out")
    choices: Annotated[list[str | Number], Field(min_length=1, max_length=1000)] | None = None
    switch: dict[str, Change] = Field(
        {},
        description="By value (`true`, `false`, one of `choices`), or `given` and `absent` where it has no default: what else"
        " changes",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Parameter:
        for name, types in _BELONGS.items():
            if getattr(self, name) is not None and self.type not in types:
                raise ValueError(f"{name} belongs to {', '.join(types)}, not to {self.type}")
        if self.type == "choice" and self.choices is None:
            raise ValueError("a choice needs choices")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is larger than max")
        if self.default is not None:
            if self.required:
                raise ValueError("what has a default is not required")
            problem = self.problem_of(self.default)
            if problem is not None:
                raise ValueError(f"default: {problem}")
        if not self.paths and (self.type in ("image", "seed") or not self.switch):
            raise ValueError("paths are missing: where its value goes, such as 3.seed")
        unknown = sorted(set(self.switch) - set(self._cases()))
        if unknown:
            raise ValueError(f"switch: {unknown[0]!r} is none of {', '.join(self._cases())}")
        return self

    def problem_of(self, value: Any) -> str | None:
        """What is wrong with a value; None: nothing."""
        said = _shown(value)
        if self.type == "text":
            most = self.max_length or _MAX_TEXT
            if not isinstance(value, str):
                return f"must be a text; {said} was given"
            if not is_storable(value):
                return "holds a NUL character or half of a surrogate pair"
            return None if len(value) <= most else f"has {len(value)} characters, and may have {most}: shorten it"
        if self.type == "boolean":
            return None if isinstance(value, bool) else f"must be true or false; {said} was given"
        if self.type == "choice":
            choices = self.choices or []
            if any(type(value) is type(each) and value == each for each in choices):
                return None
            return f"must be one of {', '.join(map(_shown, choices))}; {said} was given"
        lowest, highest = (0, MAX_SEED) if self.type == "seed" else (self.min, self.max)
        whole = self.type != "number"
        wanted = "must be a whole number" if whole else "must be a number"
        wanted += _range(lowest, highest)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return f"{wanted}; {said} was given"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{wanted}; {said} was given"
        if (lowest is not None and value < lowest) or (highest is not None and value > highest):
            return f"{wanted}; {said} was given"
        return None

    def change(self, value: Any) -> Change | None:
        """What its switch does; `value` None: it was left out and has no default."""
        if self._by_value:
            return self.switch.get(_case(value)) if value is not None else None
        return self.switch.get("absent" if value is None else "given")

    def changes(self) -> Iterator[tuple[Change, ...]]:
        """What its switch may do: one change, or none at a value that it does not name. Nothing where it has no switch."""
        yield from ((change,) for change in self.switch.values())
        if 0 < len(self.switch) < len(self._cases()):
            yield ()

    @property
    def _by_value(self) -> bool:
        return self.type in ("boolean", "choice")

    def _cases(self) -> list[str]:
        if self.type == "boolean":
            return ["true", "false"]
        return [_case(each) for each in self.choices or []] if self.type == "choice" else ["given", "absent"]


class Definition(_Strict):
    """A workflow without its name: what one version of it is."""

    description: Annotated[str, Field(max_length=10_000)] = ""
    graph: dict[str, Any] = Field(description="In API format: in ComfyUI, Workflow → Export (API)")
    parameters: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], Parameter], Field(max_length=MAX_PARAMETERS)
    ] = Field({}, description="By the name that callers use")
    outputs: Annotated[list[NodeId], Field(min_length=1, max_length=100)] | None = Field(
        None, description="The nodes whose outputs count; left out: all"
    )

    @field_validator("graph")
    @classmethod
    def _parsed(cls, graph: Any) -> Graph:
        return graphs.parse(graph)

    @model_validator(mode="after")
    def _consistent(self) -> Definition:
        for name, parameter in self.parameters.items():
            switched = [(case, change) for case, change in parameter.switch.items()]
            paths = [*parameter.paths, *(path for _, change in switched for path in change.set)]
            for node in (*(graphs.place(path)[0] for path in paths), *(n for _, c in switched for n in c.remove)):
                if node not in self.graph:
                    raise ValueError(f"parameters.{name}: the graph has no node {node!r}")
        for node in self.outputs or ():
            if node not in self.graph:
                raise ValueError(f"outputs: the graph has no node {node!r}")
        if not is_storable(json.dumps(self.content())):
            raise ValueError("holds a NUL character or half of a surrogate pair, which cannot be stored")
        return self

    def content(self) -> dict[str, Any]:
        """As JSON, without what is left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal: the same for the same content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def variants(self) -> Iterator[Graph]:
        """The graph with all defaults, and with each switch thrown: what a pre-flight without a request looks at."""
        yield _changed(self.graph, [(p, p.default) for p in self.parameters.values()])
        for name, parameter in self.parameters.items():
            others = [(p, p.default) for other, p in self.parameters.items() if other != name]
            for change in parameter.changes():
                yield _changed(self.graph, others, *change)


@dataclass(frozen=True, slots=True)
class Filled:
    """A graph that can be rendered once its images are put in `places` (by image, the nodes and inputs). `values` are those of
    all parameters but images, seeds too."""

    graph: Graph
    values: dict[str, Any]
    seeds: dict[str, int]
    places: dict[str, tuple[tuple[str, str], ...]]


def fill(
    definition: Definition, given: Mapping[str, Any], images: Collection[str], draw: Callable[[str], int]
) -> Filled:
    """Put a caller's values into the graph; seeds that are not given are drawn, by the parameter's name.

    Raises InvalidParameters with all that is wrong.
    """
    problems = list(_problems(definition.parameters, given, images))
    if problems:
        raise InvalidParameters(problems)
    values: dict[str, Any] = {}
    seeds: dict[str, int] = {}
    for name, parameter in definition.parameters.items():
        if parameter.type == "image":
            continue
        if parameter.type == "seed":
            seeds[name] = values[name] = given[name] if name in given else draw(name)
        elif name in given or parameter.default is not None:
            values[name] = given.get(name, parameter.default)
    chosen = [(p, values.get(name, True if name in images else None)) for name, p in definition.parameters.items()]
    graph = _changed(definition.graph, chosen)
    for name in (*given, *seeds):
        _put(graph, definition.parameters[name].paths, values[name])
    places = {
        name: tuple(at for at in map(graphs.place, definition.parameters[name].paths) if at[0] in graph)
        for name in images
    }
    return Filled(graph, values, seeds, places)


def _problems(
    parameters: Mapping[str, Parameter], given: Mapping[str, Any], images: Collection[str]
) -> Iterator[tuple[str, str]]:
    for name, value in given.items():
        parameter = parameters.get(name)
        if parameter is None:
            yield f"parameters.{name}", _unknown(name, [n for n, p in parameters.items() if p.type != "image"])
        elif parameter.type == "image":
            yield f"parameters.{name}", f"is an image: send it under images.{name}"
        elif (problem := parameter.problem_of(value)) is not None:
            yield f"parameters.{name}", problem
    known = [name for name, parameter in parameters.items() if parameter.type == "image"]
    for name in images:
        if name not in known:
            yield f"images.{name}", _unknown(name, known)
    for name, parameter in parameters.items():
        if parameter.required and name not in given and name not in images:
            yield f"{'images' if parameter.type == 'image' else 'parameters'}.{name}", "is missing"


def _changed(graph: Graph, values: list[tuple[Parameter, Any]], *more: Change) -> Graph:
    """A copy of the graph with the defaults of parameters, then what their switches do at these values."""
    changed = copy.deepcopy(graph)
    for parameter, _ in values:
        if parameter.default is not None:
            _put(changed, parameter.paths, parameter.default)
    removed: set[str] = set()
    for change in (*(each for parameter, value in values if (each := parameter.change(value)) is not None), *more):
        for path, value in change.set.items():
            _put(changed, [path], copy.deepcopy(value))
        removed.update(change.remove)
    return graphs.without(changed, frozenset(removed))


def _put(graph: Graph, paths: list[str], value: Any) -> None:
    for node, name in map(graphs.place, paths):
        if node in graph:  # or a switch has removed it
            graph[node]["inputs"][name] = value


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"is {near[0]!r} meant? " if near else ""
    return f"is not known here: {hint}the workflow has {', '.join(sorted(known)) or 'none'}"


def _range(lowest: int | float | None, highest: int | float | None) -> str:
    if lowest is not None and highest is not None:
        return f" from {lowest} to {highest}"
    if lowest is not None:
        return f" of at least {lowest}"
    return f" of at most {highest}" if highest is not None else ""


def _case(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
