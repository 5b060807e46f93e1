"""`agentflow graph …`: what an organization wants to be found in its documents."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from agentflow import organizations
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.knowledge import graph_types
from agentflow.knowledge.graph_types import GraphTypes


def types(org: str | None, file: Path | None, default: bool) -> None:
    """Print the types as JSON, after changing them if a file or the default was asked for."""
    if file is not None and default:
        raise Failure("--file and --default are two answers to one question", USAGE)
    wanted = _read(file) if file is not None else None
    with connected() as system, system.database.transaction() as conn:
        organization = organizations.find(conn, org or str(organizations.DEFAULT_ORGANIZATION))
        if organization is None:
            raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
        if wanted is not None or default:
            graph_types.write(conn, organization.id, wanted)
        print(graph_types.read(conn, organization.id).model_dump_json(indent=2))


def _read(file: Path) -> GraphTypes:
    try:
        return GraphTypes.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, wrong["loc"])) or "the whole"
        raise Failure(f"{file}: {where}: {wrong['msg']}", USAGE) from None
