"""The indexes over vectors: one for each organization that has many, and model.

Below MANY an exact look at all of an organization's vectors takes milliseconds. Above it a graph (HNSW) of that organization's
own is made; one graph for all would be searched past the vectors of others, the further the smaller the organization is.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg import sql

from agentflow import log
from agentflow.database import Connection
from agentflow.knowledge.embedding_models import EmbeddingModel

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

MANY: Final = 10_000
_BUILD_S: Final = 6 * 3600.0
#: What does not fit into memory is built many times slower; more than this a small server does not have.
_MOST_MEMORY_KB: Final = 256 * 1024
#: Of each vector beside its numbers: its neighbours.
_NEIGHBOURS_BYTES: Final = 700


def name_of(organization_id: int, model_id: int) -> str:
    return f"vectors_near_{model_id}_{organization_id}"


def find_types(conn: Connection) -> None:
    """Until the transaction ends, pgvector's types and operators are found, in whatever schema it was installed."""
    conn.execute(
        "select set_config('search_path', quote_ident(n.nspname) || ', pg_catalog', true)"
        " from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector'"
    )


def exists(conn: Connection, organization_id: int, model_id: int) -> bool:
    """Whether there is one that is whole."""
    row = conn.execute(
        "select indisvalid from pg_index where indexrelid = to_regclass(%s)",
        (f"agentflow.{name_of(organization_id, model_id)}",),
    ).fetchone()
    return row is not None and bool(row[0])


def ensure(system: System, organization_id: int, model: EmbeddingModel) -> bool:
    """Make the index where the organization has many vectors and none is there. Returns whether one was made.

    Takes about a minute for 100,000 vectors of 512 numbers; reads and writes go on meanwhile.
    """
    with system.database.connection() as conn:
        if exists(conn, organization_id, model.id) or not _has_many(conn, organization_id, model.id):
            return False
    logger.info("an index over vectors is made", organization=organization_id, model=model.title)
    # A connection of its own: it may take long, and cannot stand in a transaction.
    with closing(system.database.connect(answer_timeout_s=_BUILD_S)) as conn:
        return _build(conn, organization_id, model)


def drop_all(system: System, model_id: int) -> None:
    """All organizations' indexes of a model."""
    with system.database.connection() as conn:
        rows = conn.execute(
            "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid"
            " where i.indrelid = to_regclass(%s) and starts_with(c.relname, %s)",
            (
                "agentflow.vectors",
                f"vectors_near_{model_id}_",
            ),
        ).fetchall()
    for (name,) in rows:
        with closing(system.database.connect(answer_timeout_s=_BUILD_S)) as conn:
            conn.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier("agentflow", name)))


def _has_many(conn: Connection, organization_id: int, model_id: int) -> bool:
    row = conn.execute(
        "select count(*) from (select from agentflow.vectors where organization_id = %s and model_id = %s limit %s) x",
        (organization_id, model_id, MANY),
    ).fetchone()
    return row is not None and int(row[0]) >= MANY


def _build(conn: Connection, organization_id: int, model: EmbeddingModel) -> bool:
    name = name_of(organization_id, model.id)
    # What a killed build left behind; one that goes on is left alone.
    left = conn.execute(
        "select from pg_index i where i.indexrelid = to_regclass(%s) and not i.indisvalid and not exists ("
        "select from pg_stat_progress_create_index p where p.index_relid = i.indexrelid)",
        (f"agentflow.{name}",),
    ).fetchone()
    if left is not None:
        conn.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier("agentflow", name)))
    conn.execute(
        "select set_config('maintenance_work_mem', greatest(least((count(*) * %s / 1024)::bigint, %s), s.setting::bigint)"
        " || 'kB', false) from pg_settings s left join agentflow.vectors v on v.organization_id = %s and v.model_id = %s"
        " where s.name = 'maintenance_work_mem' group by s.setting",
        (2 * model.dimensions + _NEIGHBOURS_BYTES, _MOST_MEMORY_KB, organization_id, model.id),
    )
    try:
        conn.execute(_definition(conn, name, organization_id, model))
    except psycopg.errors.DuplicateTable:
        return False  # somebody else is at it
    except psycopg.errors.UniqueViolation:
        return False  # … and began in the same moment
    return True


def _definition(conn: Connection, name: str, organization_id: int, model: EmbeddingModel) -> sql.Composed:
    row = conn.execute(
        "select n.nspname from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector'"
    ).fetchone()
    assert row is not None  # noqa: S101 - there are vectors of its type
    return sql.SQL(
        "create index concurrently {name} on agentflow.vectors"
        " using hnsw ((vector::{schema}.halfvec({dimensions})) {schema}.halfvec_cosine_ops)"
        " where organization_id = {organization} and model_id = {model} and vector is not null"
    ).format(
        name=sql.Identifier(name),
        schema=sql.Identifier(row[0]),
        dimensions=sql.Literal(model.dimensions),
        organization=sql.Literal(organization_id),
        model=sql.Literal(model.id),
    )
