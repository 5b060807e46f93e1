"""The OpenAPI 3.1 document, made from the operations and their models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import agentflow
from web.api import Media, Operation, Query, Routes
from web.problems import MEDIA_TYPE, Problem, phrase

_REF: Final = "#/components/schemas/{model}"
_ARGUMENT: Final = re.compile(r"<(?:(\w+):)?(\w+)>")
_ARGUMENT_SCHEMAS: Final[Mapping[str, Mapping[str, str]]] = {
    "uuid": {"type": "string", "format": "uuid"},
    "path": {"type": "string"},
    "workflow": {"type": "string"},
    "": {"type": "string"},
}
#: What any operation may answer: 400 is said by the server of a request that is no HTTP.
_ALWAYS: Final = (400, 414, 431, 500, 503)
_WITH_KEY: Final = (401, 403, 422, 429)

_INTRODUCTION: Final = """\
Background jobs that cannot get lost: hand one in, look at it, wait for it, cancel it.

Every operation under `/api` wants a key: `Authorization: Bearer <key>`. A key belongs to an organization, sees that
organization's rows alone, and has one or more scopes: `submit`, `read`, `manage`, `webhooks`; each operation names the one
that it needs under `security`. `admin` is the operator's key (ADMIN_API_KEY): it has every scope, sees every organization's
rows, and acts for the one that the header `X-Organization` names by slug or number (without it new rows belong to number 1).

Every error is a problem document (RFC 9457): 400 the body is no JSON, 401 the key is not known, was revoked or has expired,
403 it lacks the scope, 413 the body (or a payload) is too large, 415 it is of the wrong type, 422 a field is wrong and is
named in `errors`, 429 with `Retry-After` too many wrong keys came from this address, 503 with `Retry-After` the database
cannot be reached and nothing was kept. A 2xx is sent after the commit.
"""


def document(routes: Iterable[Routes]) -> dict[str, Any]:
    groups = list(routes)
    operations = [operation for group in groups for operation in group.operations]
    schemas = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _ARGUMENT.sub(lambda match: "{" + match.group(2) + "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, schemas.references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "AgentFlow", "version": agentflow.__version__, "description": _INTRODUCTION},
        "servers": [{"url": "/"}],
        "tags": [{"name": group.tag} for group in groups],
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The key of an organization (`agentflow keys create`), or the operator's",
                }
            },
        },
    }


class _Schemas:
    def __init__(
        self, references: dict[tuple[type[BaseModel], str], dict[str, Any]], definitions: dict[str, Any]
    ) -> None:
        self.references = references
        self.definitions = definitions


def _schemas(operations: list[Operation]) -> _Schemas:
    wanted: dict[tuple[type[BaseModel], Any], None] = {(Problem, "serialization"): None}
    for operation in operations:
        if operation.body is not None:
            wanted[operation.body, "validation"] = None
        for answer in operation.answers.values():
            if isinstance(answer, type):
                wanted[answer, "serialization"] = None
    references, definitions = models_json_schema(list(wanted), ref_template=_REF)
    return _Schemas(dict(references), definitions.get("$defs", {}))  # type: ignore[arg-type]


def _operation(
    operation: Operation, references: Mapping[tuple[type[BaseModel], str], dict[str, Any]]
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "operationId": f"{operation.tag}_{operation.name}",
        "tags": [operation.tag],
        "summary": operation.summary,
    }
    if operation.description:
        said["description"] = operation.description
    parameters = [*_path_parameters(operation.path), *_parameters(operation.query, "query")]
    parameters += _parameters(operation.headers, "header")
    if parameters:
        said["parameters"] = parameters
    content: dict[str, Any] = {kind: {"schema": schema} for kind, schema in operation.other_bodies.items()}
    if operation.body is not None:
        content["application/json"] = {"schema": references[operation.body, "validation"]}
    if content:
        said["requestBody"] = {"required": True, "content": content}
    said["responses"] = _responses(operation, references)
    said["security"] = [] if operation.open else [{"key": [operation.scope]}]
    return said


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": dict(_ARGUMENT_SCHEMAS[kind])}
        for kind, name in _ARGUMENT.findall(path)
    ]


def _parameters(model: type[Query] | None, place: str) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema(by_alias=True)
    required = schema.get("required", [])
    found = []
    for name, each in schema["properties"].items():
        # A parameter that is not there is not there: no `null` can be sent in its place.
        if "anyOf" in each:
            (kept,) = [option for option in each.pop("anyOf") if option != {"type": "null"}]
            each = {**kept, **each}
        if each.get("default", 0) is None:
            del each["default"]
        each.pop("title", None)
        parameter: dict[str, Any] = {"name": name, "in": place, "required": name in required, "schema": each}
        if "description" in each:
            parameter["description"] = each.pop("description")
        found.append(parameter)
    return found


def _responses(
    operation: Operation, references: Mapping[tuple[type[BaseModel], str], dict[str, Any]]
) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        entry: dict[str, Any] = {"description": phrase(status)}
        if isinstance(answer, Media):
            entry["description"] = answer.description
            entry["content"] = {answer.type: {"schema": answer.schema} if answer.schema is not None else {}}
        elif isinstance(answer, str):
            entry["description"] = answer
        else:
            entry["content"] = {"application/json": {"schema": references[answer, "serialization"]}}
        said[str(status)] = entry
    with_body = (413, 415) if operation.body is not None or operation.other_bodies else ()
    statuses = {*_ALWAYS, *(() if operation.open else _WITH_KEY), *with_body, *operation.problems}
    for status in sorted(statuses - set(operation.answers)):
        said[str(status)] = {
            "description": phrase(status),
            "content": {MEDIA_TYPE: {"schema": references[Problem, "serialization"]}},
        }
    return said
