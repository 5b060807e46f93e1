"""What an organization wants to be found in its documents: types of entities and of relations."""

from __future__ import annotations

from typing import Annotated, Final

from psycopg.types.json import Jsonb
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentflow.database import Connection

_Name = Annotated[
    str, Field(pattern="^[a-z][a-z0-9_]{0,49}$", description="As it stands in the graph, such as `works_for`")
]
_Description = Annotated[
    str, Field(max_length=300, pattern=r"^[^\x00-\x1f]*$", description="What the model is told about it")
]


class GraphType(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    description: _Description = ""


class GraphTypes(BaseModel):
    """Types of entities and of relations, each named once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entities: Annotated[tuple[GraphType, ...], Field(min_length=1, max_length=50)]
    relations: Annotated[tuple[GraphType, ...], Field(max_length=100)]

    @model_validator(mode="after")
    def _named_once(self) -> GraphTypes:
        for kind, types in (("entities", self.entities), ("relations", self.relations)):
            names = [each.name for each in types]
            if len(set(names)) < len(names):
                raise ValueError(f"a type stands twice among the {kind}")
        return self

    @property
    def entity_names(self) -> list[str]:
        return [each.name for each in self.entities]

    @property
    def relation_names(self) -> list[str]:
        return [each.name for each in self.relations]


def _types(**described: str) -> tuple[GraphType, ...]:
    return tuple(GraphType(name=name, description=description) for name, description in described.items())


DEFAULT: Final = GraphTypes(
    entities=_types(
        person="a human being who is named",
        organization="a company, an authority, a party, a school, a team",
        place="a country, a region, a city, an address",
        product="something made or sold: goods, software, a service, a model of a machine",
        event="something that happened or will happen, with a name: a conference, an election, an accident",
        work="a book, a film, a law, a contract, a standard",
    ),
    relations=_types(
        works_for="a person is employed by an organization or holds a post there",
        leads="a person is at the head of an organization, an event or a project",
        founded="a person or an organization has founded an organization",
        owns="a person or an organization owns an organization, a place or a product, or part of it",
        part_of="an organization, a place or a product belongs to a larger one",
        located_in="a person, an organization or an event is in a place",
        makes="an organization makes or sells a product",
        uses="a person or an organization uses a product",
        created="a person or an organization has written or made a work",
        takes_part_in="a person or an organization takes part in an event",
        works_with="two organizations or two people work together: partners, customers, suppliers",
        related_to="two people are of one family",
    ),
)


def read(conn: Connection, organization_id: int) -> GraphTypes:
    row = conn.execute(
        "select types from agentflow.graph_types where organization_id = %s", (organization_id,)
    ).fetchone()
    return GraphTypes.model_validate(row[0]) if row else DEFAULT


def write(conn: Connection, organization_id: int, types: GraphTypes | None) -> None:
    """None: the defaults again. What was found with other types stays until the documents are gone through again."""
    if types is None:
        conn.execute("delete from agentflow.graph_types where organization_id = %s", (organization_id,))
        return
    conn.execute(
        "insert into agentflow.graph_types (organization_id, types) values (%s, %s)"
        " on conflict (organization_id) do update set types = excluded.types, updated_at = clock_timestamp()",
        (organization_id, Jsonb(types.model_dump())),
    )
