"""The layer between Flask and the functions that answer: operations with typed bodies, queries and headers.

An operation is a function and what is said about it; from both come the route, the checks and the OpenAPI document. Before a
function runs its caller is known, the size of the body has been looked at, and every field has its type: no unknown ones, no
doubled parameters, no number where a text should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from flask import Flask, Response, g, request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from agentflow.system import System
from web.access import Access, Caller, Needed
from web.problems import Fault, Refused, faults, invalid
from web.waiting import Seats

#: A body of JSON. One job with its `then` jobs fits many times over; a batch names its own limit.
MAX_JSON_BYTES: Final = 4 << 20
#: Whole numbers longer than this are none that any program meant, and Python refuses to print them from 4301 digits on.
#: Others that are too large (1e999) would become infinite, and null in the row.
_MAX_DIGITS: Final = 1000

Model = TypeVar("Model", bound=BaseModel)
Function = TypeVar("Function", bound=Callable[..., Any])


class Body(BaseModel):
    """A JSON body: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Query(BaseModel):
    """Query parameters, or headers by alias: texts, read as their types."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, populate_by_name=False)


class View(BaseModel):
    """What is answered: these fields and no others, as the document says."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Media:
    """An answer that is no JSON object of ours; `schema` None: binary."""

    type: str
    description: str
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """`problems` are the statuses that this operation answers beside those of all (401, 414, 422, 500, 503 …); `scope` is what
    the caller's key must have, where it is not `open` to all."""

    method: str
    path: str
    function: Callable[..., Any]
    tag: str
    answers: Mapping[int, type[BaseModel] | Media | str]
    problems: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    other_bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    query: type[Query] | None = None
    headers: type[Query] | None = None
    max_body_bytes: int = MAX_JSON_BYTES
    open: bool = False  # asks for no key
    scope: Needed = "read"

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or self.name).strip().split("\n")[0].rstrip(".")

    @property
    def description(self) -> str:
        return "\n".join(line.strip() for line in (self.function.__doc__ or "").strip().split("\n")[1:]).strip()


class Routes:
    """The operations of one module, gathered by its decorators."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.operations: list[Operation] = []

    def get(self, path: str, answers: Mapping[int, Any], **more: Any) -> Callable[[Function], Function]:
        """Wants the scope `read`, if nothing else is said."""
        return self._add("GET", path, answers, more)

    def post(
        self, path: str, answers: Mapping[int, Any], *, scope: Needed, **more: Any
    ) -> Callable[[Function], Function]:
        return self._add("POST", path, answers, {**more, "scope": scope})

    def patch(
        self, path: str, answers: Mapping[int, Any], *, scope: Needed, **more: Any
    ) -> Callable[[Function], Function]:
        return self._add("PATCH", path, answers, {**more, "scope": scope})

    def delete(
        self, path: str, answers: Mapping[int, Any], *, scope: Needed, **more: Any
    ) -> Callable[[Function], Function]:
        return self._add("DELETE", path, answers, {**more, "scope": scope})

    def put(
        self, path: str, answers: Mapping[int, Any], *, scope: Needed, **more: Any
    ) -> Callable[[Function], Function]:
        return self._add("PUT", path, answers, {**more, "scope": scope})

    def _add(
        self, method: str, path: str, answers: Mapping[int, Any], more: dict[str, Any]
    ) -> Callable[[Function], Function]:
        def declare(function: Function) -> Function:
            self.operations.append(Operation(method, path, function, self.tag, answers, **more))
            return function

        return declare


@dataclass(frozen=True, slots=True)
class Services:
    """What the functions of one app share."""

    system: System
    access: Access
    seats: Seats


@dataclass(frozen=True, slots=True)
class Call:
    """One request: the first argument of every function. `caller` is None where no key is asked for."""

    services: Services
    caller: Caller | None

    @property
    def system(self) -> System:
        return self.services.system

    @property
    def organization_id(self) -> int:
        """What new rows belong to."""
        assert self.caller is not None  # noqa: S101 - not asked by open operations
        return self.caller.organization_id

    @property
    def sees(self) -> int | None:
        """Whose rows may be found; None: everybody's."""
        assert self.caller is not None  # noqa: S101 - not asked by open operations
        return self.caller.sees


@dataclass(frozen=True, slots=True)
class Answer:
    """A model with a status or headers of its own; a bare model is answered with 200."""

    model: BaseModel
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def mount(app: Flask, services: Services, routes: Routes) -> None:
    for operation in routes.operations:
        app.add_url_rule(
            operation.path,
            endpoint=f"{routes.tag}.{operation.name}",
            view_func=_view(services, operation),
            methods=[operation.method],
            provide_automatic_options=False,
        )


def _view(services: Services, operation: Operation) -> Callable[..., Response]:
    def view(**arguments: Any) -> Response:
        call = Call(services, None if operation.open else services.access.caller(request, operation.scope))
        g.caller = call.caller
        _refuse_too_large(operation.max_body_bytes)
        if operation.query is not None:
            arguments["query"] = read_query(operation.query)
        elif not operation.open and request.args:
            raise invalid(next(iter(request.args)), "is not known here", "query")
        if operation.headers is not None:
            arguments["headers"] = read_headers(operation.headers)
        if operation.body is not None and not operation.other_bodies:
            arguments["body"] = read_json(operation.body, operation.max_body_bytes)
        return _response(operation.function(call, **arguments))

    return view


def _response(answer: BaseModel | Answer | Response) -> Response:
    if isinstance(answer, Response):
        return answer
    if isinstance(answer, BaseModel):
        answer = Answer(answer)
    made = Response(answer.model.model_dump_json(by_alias=True), answer.status, content_type="application/json")
    made.headers.update(answer.headers)
    return made


def read_query(model: type[Model]) -> Model:
    values: dict[str, str] = {}
    for name, given in request.args.lists():
        if len(given) > 1:
            raise invalid(name, "is given more than once", "query")
        values[name] = given[0]
    return validated(lambda: model.model_validate_strings(values), "query")


def read_headers(model: type[Model]) -> Model:
    names = [f.alias or name for name, f in model.model_fields.items()]
    values = {name: request.headers[name] for name in names if name in request.headers}
    return validated(lambda: model.model_validate_strings(values, by_alias=True), "header")


def read_json(model: type[Model], max_bytes: int = MAX_JSON_BYTES) -> Model:
    """The body as a model. Raises Refused: 400 when it is no JSON, 413, 415, 422 when it is JSON of the wrong shape."""
    data = read_bytes(max_bytes)
    if not data:
        raise Refused(400, "the body is missing: JSON is expected")
    if not (request.mimetype == "application/json" or request.mimetype.endswith("+json")):
        raise Refused(
            415, "the body must be JSON: Content-Type: application/json", headers={"Accept": "application/json"}
        )
    return parse_json(model, data)


def parse_json(model: type[Model], data: bytes) -> Model:
    """Raises Refused: 400 when it is no JSON, 422 when it is JSON of the wrong shape."""
    try:
        # pydantic alone would take NaN and Infinity, which are no JSON and no jsonb.
        parsed = from_json(data, allow_inf_nan=False, cache_strings="none")
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    _refuse_huge_numbers(parsed)
    return validated(lambda: model.model_validate_json(data), "body")


def read_bytes(max_bytes: int) -> bytes:
    """A body that fits in memory. One without a length (chunked) is cut off at the limit, too."""
    data = request.stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    if request.content_length is not None and len(data) < request.content_length:
        raise Refused(400, "the body ended before its Content-Length")
    return data


def _refuse_too_large(max_bytes: int) -> None:
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> Refused:
    return Refused(413, f"the body is larger than {max_bytes} bytes")


def _refuse_huge_numbers(value: Any) -> None:
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, dict):
            stack.extend(each.values())
        elif isinstance(each, list):
            stack.extend(each)
        elif (type(each) is int and abs(each) >> (_MAX_DIGITS * 3)) or (type(each) is float and math.isinf(each)):
            raise Refused(422, "a number in the body is too large to be kept")


def validated(validate: Callable[[], Model], where: str) -> Model:
    try:
        return validate()
    except ValidationError as error:
        found: list[Fault] = faults(
            list(error.errors(include_url=False, include_input=False, include_context=False)), where
        )
        raise Refused(422, f"{found[0].field}: {found[0].problem}", errors=found) from None


def began() -> float:
    """When this request began, by the monotonic clock."""
    return float(g.began)
