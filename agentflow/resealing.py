"""Bringing every sealed value under ENCRYPTION_KEY: `agentflow rotate-key`. May be stopped and started again at any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from agentflow import signing
from agentflow.database import Connection
from agentflow.kommo import accounts
from agentflow.secrets import Sealer, Unreadable, context_of
from agentflow.webhooks import endpoints

BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """A column with values of agentflow.secrets; its table has `id` and `organization_id`. `purpose` stands in their context.
    `busy`: SQL that is true of a row whose value somebody is about to replace, and knows it again by what it is now."""

    table: str
    column: str
    purpose: str
    busy: str = "false"


#: All there are. A table with credentials joins by a line here, and seals by `agentflow.secrets.context_of`.
COLUMNS: Final = (
    SealedColumn("callback_secrets", "sealed", signing.SECRET_PURPOSE),
    SealedColumn("webhook_credentials", "sealed", endpoints.SECRET_PURPOSE),
    *(
        SealedColumn("crm_accounts", f"{what}_sealed", accounts.purpose(what), "grant_held_until > clock_timestamp()")
        for what in ("access", "grant", "client")
    ),
)


@dataclass(frozen=True, slots=True)
class KeysInUse:
    """The ids of the keys that values are sealed under, and how many values are not encrypted."""

    keys: frozenset[str]
    unsealed: int


@dataclass(slots=True)
class Resealed:
    """How many values were there, how many of them are new under the key, and which could not be read (table, row, why).

    `busy`: values that are just being replaced, which were left (table, row).
    """

    seen: int = 0
    changed: int = 0
    unreadable: list[tuple[str, UUID, str]] = field(default_factory=list)
    busy: list[tuple[str, UUID]] = field(default_factory=list)


def reseal(conn: Connection, sealer: Sealer, *, report: Callable[[Resealed], None] = lambda _: None) -> Resealed:
    """Read each value by the key that it is under and seal it by the one that counts now, in batches that are committed.

    Needs no lock: a value that somebody else has written meanwhile is under the new key already. `report` is called after each
    batch. For a connection in autocommit mode.
    """
    done = Resealed()
    for column in COLUMNS:
        after = UUID(int=0)
        while rows := _batch(conn, column, after):
            with conn.transaction():
                for row_id, organization_id, sealed in rows:
                    done.seen += 1
                    if sealer.is_current(sealed):
                        continue
                    context = context_of(column.purpose, organization_id, row_id)
                    try:
                        plain = sealer.open(sealed, context=context)
                    except Unreadable as error:
                        done.unreadable.append((column.table, row_id, str(error)))
                        continue
                    row = conn.execute(
                        f"update agentflow.{column.table} set {column.column} = case when {column.busy}"  # noqa: S608 - constants
                        f" then {column.column} else %s end where id = %s and organization_id = %s"
                        f" and {column.column} = %s returning {column.column} <> %s",
                        (sealer.seal(plain, context=context), row_id, organization_id, sealed, sealed),
                    ).fetchone()
                    if row == (False,):
                        done.busy.append((column.table, row_id))
                    done.changed += row == (True,)
            after = rows[-1][0]
            report(done)
    return done


def keys_in_use(conn: Connection) -> KeysInUse:
    keys: set[str] = set()
    unsealed = 0
    for column in COLUMNS:
        rows = conn.execute(
            f"select case when {column.column} like 'v1.%' then split_part({column.column}, '.', 2) end as sealed_under,"  # noqa: S608 - constants
            f" count(*) from agentflow.{column.table} where {column.column} is not null group by 1"
        ).fetchall()
        keys |= {key for key, _ in rows if key is not None}
        unsealed += sum(count for key, count in rows if key is None)
    return KeysInUse(frozenset(keys), unsealed)


def _batch(conn: Connection, column: SealedColumn, after: UUID) -> list[tuple[UUID, int, str]]:
    return conn.execute(
        f"select id, organization_id, {column.column} from agentflow.{column.table} where id > %s"  # noqa: S608 - constants
        f" and {column.column} is not null order by id limit %s",
        (after, BATCH),
    ).fetchall()
