"""What ComfyUI says to a graph before it queues it: execution.validate_prompt, answer for answer.

Written after execution.py of 0.3.64 and 0.33.0; the answers are compared with the recorded ones in test_comfyui_server.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

Graph = dict[str, Any]
Errors = list[dict[str, Any]]
#: What Python raises of inputs that are not of the shape that a node expects.
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Verdict:
    outputs: list[str]  # the nodes to run: those that are valid
    error: dict[str, Any] | None
    node_errors: dict[str, Any]


@dataclass
class Validation:
    nodes: dict[str, Any]  # /object_info
    file_exists: Callable[[str], bool]
    old: bool

    def verdict(self, graph: Graph, targets: Collection[str] | None = None) -> Verdict:
        """Raises whatever the real one raises on what is no graph: the server answers 500."""
        outputs = []
        for id_ in graph:
            if "class_type" not in graph[id_]:
                return _refused(self._unknown(graph, id_, None))
            if (node := self.nodes.get(graph[id_]["class_type"])) is None:
                return _refused(self._unknown(graph, id_, graph[id_]["class_type"]))
            if node["output_node"] and (targets is None or id_ in targets):
                outputs.append(id_)
        if not outputs:
            return _refused(_error("prompt_no_outputs", "Prompt has no outputs", ""))

        if cycle := _cycle(graph, outputs):
            found = {} if self.old else _of_cycle(graph, cycle, outputs)
            return Verdict(
                [], _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", ""), found
            )

        good: list[str] = []
        failed: list[Errors] = []
        node_errors: dict[str, Any] = {}
        seen: dict[str, Errors | None] = {}
        for output in outputs:
            try:
                reasons = self._errors(graph, output, seen)
            except MALFORMED as error:  # ComfyUI answers it, as it does whatever a node's check raises
                reasons = seen[output] = [_raised(error)]
            if reasons is None:
                good.append(output)
                continue
            failed.append(reasons)
            for id_, errors in seen.items():
                if errors:
                    empty = {"errors": errors, "dependent_outputs": [], "class_type": graph[id_]["class_type"]}
                    node_errors.setdefault(id_, empty)["dependent_outputs"].append(output)
        if good:
            return Verdict(good, None, node_errors)
        details = "\n".join(f"{reason['message']}: {reason['details']}" for errors in failed for reason in errors)
        error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return Verdict([], error, node_errors)

    def _unknown(self, graph: Graph, id_: str, class_type: str | None) -> dict[str, Any]:
        details = f"Node ID '#{id_}'"
        if self.old:
            what = (
                "a node is missing the class_type property"
                if class_type is None
                else f"node {class_type} does not exist"
            )
            return _error("invalid_prompt", f"Cannot execute because {what}.", details)
        title = graph[id_].get("_meta", {}).get("title", class_type)
        if class_type is None:
            message = f"Node 'ID #{id_}' has no class_type. The workflow may be corrupted or a custom node is missing."
        else:
            message = f"Node '{title}' not found. The custom node may not be installed."
        told = {"node_id": id_, "class_type": class_type, "node_title": title}
        return _error("missing_node_type", message, details, **told)

    def _errors(self, graph: Graph, id_: str, seen: dict[str, Errors | None]) -> Errors | None:
        """None: valid. An empty list: only a node above is not."""
        if id_ in seen:
            return seen[id_]
        inputs = graph[id_]["inputs"]
        class_type = graph[id_]["class_type"]
        errors: Errors = []
        valid = True
        for category in ("required", "optional"):
            for name, known in self.nodes[class_type]["input"].get(category, {}).items():
                config = [known[0], known[1] if len(known) > 1 else {}]
                if name not in inputs:
                    if category == "required":
                        errors.append(
                            _error("required_input_missing", "Required input is missing", name, input_name=name)
                        )
                elif isinstance(inputs[name], list):
                    problem = self._linked(graph, name, inputs[name], config)
                    if problem is not None:
                        errors.append(problem)
                    elif self._above(graph, name, inputs[name], config, seen) is not None:
                        valid = False
                elif (problem := self._given(class_type, inputs, name, config)) is not None:
                    errors.append(problem)
        seen[id_] = None if valid and not errors else errors
        return seen[id_]

    def _above(
        self, graph: Graph, name: str, link: list[Any], config: list[Any], seen: dict[str, Errors | None]
    ) -> Errors | None:
        try:
            return self._errors(graph, link[0], seen)
        except MALFORMED as error:
            about = {"input_name": name, "input_config": config, "linked_node": link, "exception_message": str(error)}
            raised = _raised(error)
            raised |= {"type": "exception_during_inner_validation", "message": "Exception when validating inner node"}
            raised |= {"details": str(error), "extra_info": {**about, **raised["extra_info"]}}
            seen[link[0]] = [raised]
            return seen[link[0]]

    def _linked(self, graph: Graph, name: str, link: list[Any], config: list[Any]) -> dict[str, Any] | None:
        about = {"input_name": name, "input_config": config}
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _error("bad_linked_input", message, name, **about, received_value=link)
        received = tuple(self.nodes[graph[link[0]]["class_type"]]["output"])[link[1]]
        if "*" in (received, config[0]) or received == config[0]:
            return None
        details = f"{name}, received_type({received}) mismatch input_type({config[0]})"
        message = "Return type mismatch between linked nodes"
        return _error("return_type_mismatch", message, details, **about, received_type=received, linked_node=link)

    def _given(self, class_type: str, inputs: dict[str, Any], name: str, config: list[Any]) -> dict[str, Any] | None:
        kind, limits = config
        about: dict[str, Any] = {"input_name": name, "input_config": config}
        value = inputs[name]
        try:
            if isinstance(value, dict) and "__value__" in value:
                value = value["__value__"]
            cast: Callable[[Any], Any] | None = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(
                str(kind)
            )
            value = inputs[name] = value if cast is None else cast(value)
        except (ValueError, TypeError) as error:
            details = f"{name}, {value}, {error}"
            message = f"Failed to convert an input value to a {kind} value"
            return _error(
                "invalid_input_type", message, details, **about, received_value=value, exception_message=str(error)
            )
        if class_type in ("LoadImage", "LoadImageMask") and name == "image":
            if self.file_exists(value):
                return None
            details = f"image - Invalid image file: {value}"
            return _error("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
        if "min" in limits and value < limits["min"]:
            message = f"Value {value} smaller than min of {limits['min']}"
            return _error("value_smaller_than_min", message, name, **about, received_value=value)
        if "max" in limits and value > limits["max"]:
            message = f"Value {value} bigger than max of {limits['max']}"
            return _error("value_bigger_than_max", message, name, **about, received_value=value)
        options = kind if isinstance(kind, list) else limits.get("options", []) if kind == "COMBO" else None
        if options is None or value in options:
            return None
        many = len(options) > 20
        listed = f"(list of length {len(options)})" if many else str(options)
        about["input_config"] = None if many else about["input_config"]
        details = f"{name}: '{value}' not in {listed}"
        return _error("value_not_in_list", "Value not in list", details, **about, received_value=value)


def _cycle(graph: Graph, outputs: list[str]) -> list[str]:
    """The nodes of a circle that an output hangs on, in the order of its links."""
    done: set[str] = set()

    def walk(id_: str, path: list[str]) -> list[str]:
        if id_ in path:
            return path[path.index(id_) :]
        if id_ in done or id_ not in graph:
            return []
        for value in graph[id_].get("inputs", {}).values():
            if isinstance(value, list) and value and (found := walk(value[0], [*path, id_])):
                return found
        done.add(id_)
        return []

    return next((found for output in outputs if (found := walk(output, []))), [])


def _of_cycle(graph: Graph, cycle: list[str], outputs: list[str]) -> dict[str, Any]:
    details = " -> ".join(f"{id_} ({graph[id_]['class_type']})" for id_ in [*cycle, cycle[0]])
    return {
        id_: {
            "errors": [
                _error("dependency_cycle", "Dependency cycle detected", details, node_id=id_, cycle_nodes=cycle),
            ],
            "dependent_outputs": outputs,
            "class_type": graph[id_]["class_type"],
        }
        for id_ in cycle
    }


def _raised(error: Exception) -> dict[str, Any]:
    told = {"exception_type": type(error).__name__, "traceback": traceback.format_tb(error.__traceback__)}
    return _error("exception_during_validation", "Exception when validating node", str(error), **told)


def _refused(error: dict[str, Any]) -> Verdict:
    return Verdict([], error, {})


def _error(type_: str, message: str, details: str, **extra_info: Any) -> dict[str, Any]:
    return {"type": type_, "message": message, "details": details, "extra_info": extra_info}
