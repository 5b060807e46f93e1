"""The models that make vectors: one is searched with, another may be filled beside it until it takes its place.

Vectors of two models are never compared. What tells models apart is the provider, the name, the number of dimensions, and
what is put before a text (the task: some models want `query:` before what is looked for and `passage:` before what is found).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from psycopg.rows import class_row

from agentflow.database import Connection

Provider = Literal["local", "openrouter", "server"]
State = Literal["active", "backfilling", "old"]

#: An index of pgvector takes so many numbers of 16 bits.
MOST_DIMENSIONS: Final = 4000


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    id: int
    provider: Provider
    name: str
    dimensions: int
    passage_prefix: str
    query_prefix: str
    state: State
    created_at: datetime

    @property
    def title(self) -> str:
        """As people name it: `openrouter/openai/text-embedding-3-small`."""
        return f"{self.provider}/{self.name}"


_COLUMNS: Final = ", ".join(EmbeddingModel.__dataclass_fields__)


def every(conn: Connection) -> list[EmbeddingModel]:
    """The active one first."""
    with conn.cursor(row_factory=class_row(EmbeddingModel)) as cursor:
        query = f"select {_COLUMNS} from agentflow.embedding_models order by state, id"  # noqa: S608
        return cursor.execute(query.encode()).fetchall()


def of_state(conn: Connection, state: State) -> EmbeddingModel | None:
    return next((model for model in every(conn) if model.state == state), None)


def add(
    conn: Connection,
    provider: Provider,
    name: str,
    dimensions: int,
    passage_prefix: str,
    query_prefix: str,
    state: Literal["active", "backfilling"],
) -> EmbeddingModel | None:
    """The model that is in this state now: this one, or another that was there before. None: this one is still an old one."""
    conn.execute(
        "insert into agentflow.embedding_models (provider, name, dimensions, passage_prefix, query_prefix, state)"
        " values (%s, %s, %s, %s, %s, %s) on conflict do nothing",
        (provider, name, dimensions, passage_prefix, query_prefix, state),
    )
    return of_state(conn, state)


def hold(conn: Connection, model_id: int) -> bool:
    """Whether vectors of this model may be written; until the transaction ends it does not become an old one."""
    query = "select from agentflow.embedding_models where id = %s and state <> 'old' for share"
    return conn.execute(query, (model_id,)).fetchone() is not None


def switch(conn: Connection, model_id: int) -> bool:
    """From the end of the caller's transaction on it is searched with. False: it was given up meanwhile."""
    query = "select from agentflow.embedding_models where id = %s and state = 'backfilling' for update"
    if conn.execute(query, (model_id,)).fetchone() is None:
        return False
    conn.execute("update agentflow.embedding_models set state = 'old' where state = 'active'")
    conn.execute("update agentflow.embedding_models set state = 'active' where id = %s", (model_id,))
    return True


def retire(conn: Connection, model_id: int) -> bool:
    """Give up a model that is being filled; its vectors are deleted as those of an old one."""
    query = "update agentflow.embedding_models set state = 'old' where id = %s and state = 'backfilling'"
    return conn.execute(query, (model_id,)).rowcount > 0


def forget(conn: Connection, model_id: int) -> None:
    """Delete an old model, of which no vector is left."""
    conn.execute("delete from agentflow.embedding_models where id = %s and state = 'old'", (model_id,))
