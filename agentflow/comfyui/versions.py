"""The versions of workflows: files that are shipped with this package, and rows of organizations. A version never changes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any, Final

from psycopg.types.json import Jsonb

from agentflow.comfyui.workflows import Definition
from agentflow.database import Connection

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,99}$"
#: The last word of an operation's address.
NO_NAME: Final = "check"
#: Of one organization; names that were deleted count, since their versions are not given again.
MOST_NAMES: Final = 1000
#: Of one name; of more, the oldest go.
MOST_VERSIONS: Final = 200


class NameTaken(Exception):
    """A shipped workflow has this name, or none may have it."""


class TooMany(Exception):
    """The organization has as many workflows as it may have."""


@dataclass(frozen=True, slots=True)
class Workflow:
    """One version. `organization_id` is None of one that is shipped."""

    name: str
    version: int
    definition: Definition
    digest: str
    organization_id: int | None = None
    created_at: datetime | None = None

    @property
    def listed(self) -> Listed:
        description = self.definition.description
        return Listed(self.name, self.version, description, self.digest, self.organization_id, self.created_at)


@dataclass(frozen=True, slots=True)
class Listed:
    """One version without its graph."""

    name: str
    version: int
    description: str
    digest: str
    organization_id: int | None
    created_at: datetime | None


@functools.lru_cache(maxsize=1)
def shipped() -> dict[str, list[Workflow]]:
    """By name, the newest version first."""
    found: dict[str, list[Workflow]] = {}
    for file in files("agentflow.comfyui").joinpath("shipped").iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            name, version = content.pop("name"), content.pop("version")
            definition = Definition.model_validate(content)
            found.setdefault(name, []).append(Workflow(name, version, definition, definition.digest))
    return {name: sorted(found[name], key=lambda each: -each.version) for name in sorted(found)}


def find(
    conn: Connection, organization_id: int | None, name: str, version: int | None = None, *, own: int | None = None
) -> Workflow | None:
    """A version, or the newest one. None where there is none, or only another organization's.

    An `organization_id` of None sees all; where several have one of this name, that of `own` is meant.
    """
    row = conn.execute(
        "select organization_id, version, definition, digest, created_at from agentflow.workflows"
        " where (%(organization)s::bigint is null or organization_id = %(organization)s) and name = %(name)s"
        " and definition is not null and (%(version)s::integer is null or version = %(version)s)"
        " order by organization_id = %(own)s desc, organization_id, version desc limit 1",
        {"organization": organization_id, "name": name, "version": version, "own": own},
    ).fetchone()
    if row is not None:
        return Workflow(name, row[1], Definition.model_validate(row[2]), bytes(row[3]).hex(), row[0], row[4])
    return next((each for each in shipped().get(name, ()) if version in (None, each.version)), None)


def names(conn: Connection, organization_id: int) -> list[str]:
    """What an organization may ask for."""
    rows = conn.execute(
        "select distinct name from agentflow.workflows where organization_id = %s and definition is not null",
        (organization_id,),
    ).fetchall()
    return sorted({*shipped(), *(row[0] for row in rows)})


def save(conn: Connection, organization_id: int, name: str, definition: Definition) -> tuple[Workflow, bool]:
    """The newest version if its content is the same, else a new one: then the second is True. Raises NameTaken, TooMany."""
    if name in shipped():
        raise NameTaken(f"the workflow {name!r} is shipped with AgentFlow; choose another name")
    if name == NO_NAME:
        raise NameTaken(f"no workflow can be called {name!r}; choose another name")
    # Two requests at once are numbered one after the other.
    conn.execute("select from agentflow.organizations where id = %s for no key update", (organization_id,))
    newest = conn.execute(
        "select version, definition is null, digest, created_at from agentflow.workflows"
        " where organization_id = %s and name = %s order by version desc limit 1",
        (organization_id, name),
    ).fetchone()
    digest = definition.digest
    if newest is None:
        _check_room(conn, organization_id)
    elif not newest[1] and bytes(newest[2]).hex() == digest:
        return Workflow(name, newest[0], definition, digest, organization_id, newest[3]), False
    version = newest[0] + 1 if newest is not None else 1
    row = conn.execute(
        "insert into agentflow.workflows (organization_id, name, version, definition, digest)"
        " values (%s, %s, %s, %s, %s) returning created_at",
        (organization_id, name, version, Jsonb(definition.content()), bytes.fromhex(digest)),
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    conn.execute(
        "delete from agentflow.workflows where organization_id = %s and name = %s and version <= %s",
        (organization_id, name, version - MOST_VERSIONS),
    )
    return Workflow(name, version, definition, digest, organization_id, row[0]), True


def _check_room(conn: Connection, organization_id: int) -> None:
    row = conn.execute(
        "select count(distinct name) from agentflow.workflows where organization_id = %s", (organization_id,)
    ).fetchone()
    if row is not None and row[0] >= MOST_NAMES:
        raise TooMany(f"there were {row[0]} workflows already, and at most {MOST_NAMES} are allowed")


def delete(conn: Connection, organization_id: int, name: str) -> bool:
    """All its versions; the number of the last one is kept. False: there is no such workflow."""
    conn.execute("select from agentflow.organizations where id = %s for no key update", (organization_id,))
    row = conn.execute(
        "update agentflow.workflows w set definition = null where organization_id = %(organization)s and name = %(name)s"
        " and definition is not null and version = (select max(version) from agentflow.workflows n"
        " where n.organization_id = %(organization)s and n.name = %(name)s) returning version",
        {"organization": organization_id, "name": name},
    ).fetchone()
    if row is None:
        return False
    conn.execute(
        "delete from agentflow.workflows where organization_id = %s and name = %s and version < %s",
        (organization_id, name, row[0]),
    )
    return True


def search(
    conn: Connection, organization_id: int | None, *, after: tuple[str, int] | None = None, limit: int = 1000
) -> list[Listed]:
    """The newest version of each, by name; of one organization, or (None) of all, and those that are shipped.

    `after` is the name and the organization (0: shipped) of the last one on the page before.
    """
    name, number = after or (None, None)
    rows = conn.execute(
        "select distinct on (name, organization_id) name, version, coalesce(definition->>'description', ''), digest,"
        " organization_id, created_at from agentflow.workflows"
        " where (%(organization)s::bigint is null or organization_id = %(organization)s) and definition is not null"
        " and (%(name)s::text is null or (name, organization_id) > (%(name)s::text, %(number)s::bigint))"
        " order by name, organization_id, version desc limit %(limit)s",
        {"organization": organization_id, "name": name, "number": number, "limit": limit},
    ).fetchall()
    found = [_listed(row) for row in rows]
    newest = (versions[0] for versions in shipped().values())
    found += [each.listed for each in newest if after is None or (each.name, 0) > after]
    return sorted(found, key=lambda each: (each.name, each.organization_id or 0))[:limit]


def history(conn: Connection, workflow: Workflow, *, before: int | None = None, limit: int = 1000) -> list[Listed]:
    """All versions of the same workflow that are kept, the newest first; `before` is the last one on the page before."""
    if workflow.organization_id is None:
        every = [each.listed for each in shipped()[workflow.name]]
        return [each for each in every if before is None or each.version < before][:limit]
    rows = conn.execute(
        "select name, version, coalesce(definition->>'description', ''), digest, organization_id, created_at"
        " from agentflow.workflows where organization_id = %(organization)s and name = %(name)s and definition is not null"
        " and (%(before)s::integer is null or version < %(before)s) order by version desc limit %(limit)s",
        {"organization": workflow.organization_id, "name": workflow.name, "before": before, "limit": limit},
    ).fetchall()
    return [_listed(row) for row in rows]


def _listed(row: tuple[Any, ...]) -> Listed:
    return Listed(row[0], row[1], row[2], bytes(row[3]).hex(), row[4], row[5])
