"""`agentflow workflows …`: on the database itself, like the other commands of the operator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.cli.organization_commands import find_organization
from agentflow.comfyui import graphs, pool, preflight, versions
from agentflow.comfyui.graphs import InvalidGraph
from agentflow.comfyui.preflight import Complaint
from agentflow.comfyui.versions import NameTaken, TooMany, Workflow
from agentflow.comfyui.workflows import Definition, Parameter
from agentflow.database import Connection


def list_all(org: str | None, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = versions.search(conn, find_organization(conn, org).id if org is not None else None)
    if as_json:
        output.json_lines(found)
        return
    rows = [
        (
            each.name,
            each.version,
            each.organization_id if each.organization_id is not None else "shipped",
            output.ago(each.created_at),
            each.description.partition(". ")[0],
        )
        for each in found
    ]
    columns = ("name", "version", "organization", "added", "description")
    output.console().print(output.table(columns, rows, right=("version",)))


def show(name: str, org: str, version: int | None, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = _find(conn, org, name, version)
    if as_json:
        print(json.dumps({"name": found.name, **found.definition.content()}, indent=2, ensure_ascii=False))
        return
    print(f"{found.name} {found.version}: {found.definition.description or 'no description'}")
    rows = [(each, p.type, _values(p), p.description) for each, p in found.definition.parameters.items()]
    if rows:
        output.console().print(output.table(("parameter", "type", "values", "description"), rows))


def check(named: str, org: str, of_pool: str, nodes: Path | None) -> None:
    with connected() as system:
        if Path(named).is_file():
            wanted = _read(Path(named))
        else:
            with system.database.connection() as conn:
                wanted = _find(conn, org, named, None).definition
        known = _json(nodes) if nodes is not None else pool.known_nodes(system, of_pool)
    if not isinstance(known, dict):
        raise Failure(
            f"no server of the pool {of_pool!r} was asked for its nodes so far: give its /object_info by --nodes"
        )
    found = _complaints(wanted, known)
    for each in found:
        print(f"{_where(each)}: {each.message}")
    if found:
        raise Failure(f"{len(found)} thing{'s' if len(found) > 1 else ''} in the way of a render")
    print("nothing is in the way of a render")


def _complaints(wanted: Definition | graphs.Graph, known: dict[str, Any]) -> list[Complaint]:
    if isinstance(wanted, Definition):
        return preflight.of_definition(wanted, known)
    return preflight.complaints(wanted, known)


def add(file: Path, org: str, name: str | None) -> None:
    named: dict[str, Any] = {}
    definition = _read(file, named)
    if not isinstance(definition, Definition):
        raise Failure(f'{file} is a bare graph: a workflow is {{"name", "graph": …, "parameters": …}}', USAGE)
    name = name or named.get("name") or file.stem
    if not re.fullmatch(versions.NAME_PATTERN, name):
        raise Failure(f"{name!r} is no name: small letters, digits, dots, dashes; --name gives another", USAGE)
    with connected() as system, system.database.transaction() as conn:
        try:
            saved, created = versions.save(conn, find_organization(conn, org).id, name, definition)
        except (NameTaken, TooMany) as error:
            raise Failure(str(error)) from None
    print(f"{saved.name} {saved.version}{'' if created else ' has this content already'}")


def _find(conn: Connection, org: str, name: str, version: int | None) -> Workflow:
    found = versions.find(conn, find_organization(conn, org).id, name, version)
    if found is None:
        of_it = f" with a version {version}" if version is not None else ""
        raise Failure(f"there is no workflow {name!r}{of_it}; `agentflow workflows list` shows them", USAGE)
    return found


def _read(file: Path, named: dict[str, Any] | None = None) -> Definition | graphs.Graph:
    """A workflow, whose name is put into `named`, or a bare graph."""
    content = _json(file)
    try:
        if not (isinstance(content, dict) and isinstance(content.get("graph"), dict)):
            return graphs.parse(content)
        (named if named is not None else {}).update(name=content.pop("name", None))
        content.pop("version", None)
        return Definition.model_validate(content)
    except InvalidGraph as error:
        raise Failure(f"{file}: {error}", USAGE) from None
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, wrong["loc"])) or "the whole"
        raise Failure(f"{file}: {where}: {wrong['msg']}", USAGE) from None


def _json(file: Path) -> Any:
    try:
        return from_json(file.read_bytes(), allow_inf_nan=False)
    except ValueError as error:
        raise Failure(f"{file} is not JSON: {error}", USAGE) from None


def _values(parameter: Parameter) -> str:
    """`1 to 100, default 4`."""
    said = [", ".join(map(str, parameter.choices))] if parameter.choices else []
    if parameter.min is not None and parameter.max is not None:
        said.append(f"{parameter.min} to {parameter.max}")
    if parameter.default is not None:
        said.append(f"default {json.dumps(parameter.default)}")
    return ", ".join([*said, *(["required"] if parameter.required else [])])


def _where(complaint: Complaint) -> str:
    return ".".join(each for each in (complaint.node, complaint.input) if each) or "the graph"
