"""Answers of a given shape: the JSON schema that every server takes, and reading what comes back."""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

Shape = TypeVar("Shape", bound=BaseModel)

_FENCED: Final = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)
# Not every server's grammar knows these; the answer is checked here anyway.
_DROPPED: Final = frozenset(
    {"title", "default", "format", "pattern", "examples"}
    | {"minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    | {"minItems", "maxItems", "uniqueItems"}
)


class WrongShape(Exception):
    """The answer is not what was asked for; the text tells the model what is wrong with it."""


def portable_schema(shape: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of `shape` in the subset that OpenAI, vLLM, llama.cpp and Ollama share: no references, every
    property required, nothing beside them. Raises RecursionError for a shape that contains itself."""
    document = shape.model_json_schema()
    schema: dict[str, Any] = _portable(document, document.get("$defs", {}))
    return schema


def _portable(node: Any, definitions: dict[str, Any], property_names: bool = False) -> Any:
    if isinstance(node, list):
        return [_portable(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if reference := node.get("$ref"):
        return _portable(definitions[reference.removeprefix("#/$defs/")], definitions)
    kept = {
        name: _portable(value, definitions, property_names=name == "properties")
        for name, value in node.items()
        if property_names or (name not in _DROPPED and name != "$defs")
    }
    if not property_names and node.get("type") == "object" and "properties" in node:
        kept |= {"required": list(node["properties"]), "additionalProperties": False}
    return kept


def read(text: str, shape: type[Shape]) -> Shape:
    """What the model's text says. Fences and words around the JSON are passed over. Raises WrongShape."""
    fenced = _FENCED.search(text)
    candidates = [text, fenced[1] if fenced else "", text[text.find("{") : text.rfind("}") + 1]]
    for candidate in candidates:
        try:
            document = json.loads(candidate)
        except ValueError:
            continue
        try:
            return shape.model_validate(document)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False, include_context=False)[:5]
            said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in wrong)
            raise WrongShape(f"it does not fit the schema ({said})") from None
    raise WrongShape("it is not a whole JSON object")
