"""A job's payload made of an event: a template in which `{"$from": place}` stands for a value of the event."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from agentflow.webhooks import places

_FROM: Final = "$from"
_DEFAULT: Final = "default"
_PLACE: Final = re.compile(places.PATTERN)
MAX_DEPTH: Final = 32


class Unmappable(ValueError):
    """A template that cannot be filled. `path` says where in it."""

    def __init__(self, path: tuple[str, ...], problem: str) -> None:
        super().__init__(f"{'.'.join(path)}: {problem}")
        self.path = path
        self.problem = problem


def fill(template: dict[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """The payload. `read` gives the value at a place, or places.MISSING. Raises Unmappable for that without a default."""

    def value_of(reference: dict[str, Any], path: tuple[str, ...]) -> Any:
        found = read(reference[_FROM])
        if found is not places.MISSING:
            return found
        if _DEFAULT in reference:
            return reference[_DEFAULT]
        raise Unmappable(path, f"the event has nothing at {reference[_FROM]}")

    filled: dict[str, Any] = _replaced(template, value_of, ())
    return filled


def check(template: dict[str, Any], model: type[BaseModel]) -> None:
    """Whether what is constant in a template suits the payload of a job's type. Raises Unmappable.

    What comes from events is known only then: its fields count as given, and as right.
    """
    unknown: list[tuple[str, ...]] = []

    def remember(reference: dict[str, Any], path: tuple[str, ...]) -> None:
        if not isinstance(reference[_FROM], str) or not _PLACE.fullmatch(reference[_FROM]):
            raise Unmappable(path, f"{_FROM} is /a/pointer, header:Name or event:{'|'.join(places.EVENT_FIELDS)}")
        unknown.append(path)

    constant = _replaced(template, remember, ())
    try:
        model.model_validate_json(json.dumps(constant))
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            at = tuple(str(part) for part in fault["loc"])
            of_an_event = any(at[: len(path)] == path or path[: len(at)] == at for path in unknown)
            if not of_an_event or fault["type"] == "extra_forbidden":
                raise Unmappable(at, _said(fault)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Unmappable((), f"is not JSON: {error}") from None


def _said(fault: Any) -> str:
    return {"extra_forbidden": "is not known to this type of job", "missing": "is missing"}.get(
        fault["type"], str(fault["msg"])
    )


def _replaced(value: Any, replace: Callable[[dict[str, Any], tuple[str, ...]], Any], path: tuple[str, ...]) -> Any:
    if len(path) > MAX_DEPTH:
        raise Unmappable(path[:3], f"is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict) and _FROM in value:
        if not value.keys() <= {_FROM, _DEFAULT}:
            raise Unmappable(path, f"an object with {_FROM} has a {_DEFAULT} beside it, and nothing else")
        return replace(value, path)
    if isinstance(value, dict):
        return {name: _replaced(each, replace, (*path, name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, replace, (*path, str(index))) for index, each in enumerate(value)]
    return value
