"""The servers as all processes know them: which are well, who has a slot on which, and what each said of itself.

A render waits in the line of its pool (`line`), whose slots are those of the pool's servers that are well: `count` says so
whenever that changes, and rings who may come. Who has left the line takes a slot of a server; slots are held by prompts, not by
attempts, so that one which runs on while its worker is dead is not joined by another.

A server is sick, and gets nothing, from the moment somebody meets with it: unreachable, or stuck (it takes prompts and runs
none). It is looked at again after 2 s, doubled with each failure in a row up to a minute; a stuck one, which looks well, is
believed for a while after 30 s, doubled up to 10 min, until a render has ended on it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from agentflow.comfyui.prompts import Render
from agentflow.comfyui.servers import Server
from agentflow.database import Connection
from agentflow.jobs.model import Job
from agentflow.jobs.text import storable_json

if TYPE_CHECKING:
    from agentflow.system import System

Problem = Literal["unreachable", "stuck"]

LOOK_EVERY_S: Final = 5.0
NODES_EVERY_S: Final = 60.0
_HELD: Final = "('taken', 'sending', 'sent')"


@dataclass(frozen=True, slots=True)
class Known:
    """A row of a server. `unseen_s`: since its last answer; None: it never gave one. `renders`: ours that it has."""

    name: str
    pool: str
    slots: int
    well: bool
    problem: str | None
    sick_until: datetime | None
    version: str | None
    devices: list[dict[str, Any]]
    queue: int | None
    unseen_s: float | None
    renders: int


def line(pool: str) -> str:
    """The concurrency key of a pool's renders."""
    return f"gpu:{pool}"


def names(conn: Connection) -> list[str]:
    """Of the pools."""
    return [row[0] for row in conn.execute("select distinct pool from agentflow.comfyui_servers order by 1").fetchall()]


def list_servers(conn: Connection, servers: Sequence[Server]) -> None:
    """Say that these are in the settings of a worker."""
    for server in sorted(servers, key=lambda each: each.name):
        conn.execute(
            "insert into agentflow.comfyui_servers as s (name, pool, slots) values (%s, %s, %s)"
            " on conflict (name) do update set pool = excluded.pool, slots = excluded.slots, listed_at = clock_timestamp()",
            (server.name, server.pool, server.slots),
        )


def forget(conn: Connection) -> None:
    """Those that no worker has had in its settings for long."""
    conn.execute("delete from agentflow.comfyui_servers where listed_at < clock_timestamp() - interval '30 days'")


def due(conn: Connection, names: Collection[str]) -> list[tuple[str, bool]]:
    """Take those that are to be looked at now, for this process to look: name, and whether its nodes are to be asked for."""
    rows = conn.execute(
        "update agentflow.comfyui_servers s set looked_at = clock_timestamp()"
        " where s.name in (select d.name from agentflow.comfyui_servers d where d.name = any (%(names)s)"
        " and coalesce(d.sick_until, '-infinity') <= clock_timestamp()"
        " and coalesce(d.looked_at, '-infinity') <= clock_timestamp()"
        " - make_interval(secs => case when d.well then %(every)s::float8 else 0.5 end)"
        " order by d.name for update skip locked)"
        " returning s.name, coalesce(s.nodes_at, '-infinity') <= clock_timestamp() - make_interval(secs => %(nodes)s)",
        {"names": list(names), "every": LOOK_EVERY_S, "nodes": NODES_EVERY_S},
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def seen(conn: Connection, name: str, stats: dict[str, Any], queue: int, nodes: str | None) -> bool:
    """It answered; `nodes` as JSON, where they were asked for. Returns whether that is news: it was not well before."""
    row = conn.execute(
        "with before as materialized (select name, well from agentflow.comfyui_servers where name = %(name)s for update)"
        " update agentflow.comfyui_servers s set seen_at = clock_timestamp(), version = %(version)s, devices = %(devices)s,"
        # Megabytes: what is as it was is not written again.
        " queue = %(queue)s, nodes = case when s.nodes is distinct from %(nodes)s::jsonb"
        " then coalesce(%(nodes)s::jsonb, s.nodes) else s.nodes end,"
        " nodes_at = case when %(nodes)s::jsonb is null then nodes_at else clock_timestamp() end,"
        " well = coalesce(sick_until, '-infinity') <= clock_timestamp(),"
        " failures = case when problem = 'unreachable' then 0 else failures end,"
        " problem = case when coalesce(sick_until, '-infinity') <= clock_timestamp() then null else problem end"
        " from before where s.name = before.name returning s.well and not before.well",
        {
            "name": name,
            "version": str(stats["system"].get("comfyui_version") or ""),
            "devices": Jsonb(stats.get("devices") if isinstance(stats.get("devices"), list) else []),
            "queue": queue,
            "nodes": storable_json(nodes)[0] if nodes is not None else None,
        },
    ).fetchone()
    return bool(row and row[0])


def sick(conn: Connection, name: str, problem: Problem) -> bool:
    """It gets nothing for a while. Returns whether that is news.

    Who says the same while that lasts adds nothing: several renders meet with it at once.
    """
    row = conn.execute(
        "with before as materialized (select name, well from agentflow.comfyui_servers where name = %(name)s for update)"
        " update agentflow.comfyui_servers s set well = false, problem = %(problem)s, failures = least(s.failures + 1, 20),"
        " sick_until = clock_timestamp() + make_interval(secs => case %(problem)s"
        " when 'stuck' then least(600, 30 * 2 ^ least(s.failures, 10)) else least(60, 2 * 2 ^ least(s.failures, 10)) end)"
        " from before where s.name = before.name and not (not before.well and s.sick_until > clock_timestamp()"
        " and s.problem = %(problem)s) returning before.well",
        {"name": name, "problem": problem},
    ).fetchone()
    return bool(row and row[0])


def proved(conn: Connection, name: str) -> None:
    """A render has ended on it: it is no longer suspected of being stuck."""
    conn.execute(
        "update agentflow.comfyui_servers set failures = 0, seen_at = clock_timestamp() where name = %s and failures > 0",
        (name,),
    )


def count(conn: Connection, pool: str, look_again_s: float) -> list[UUID]:
    """Give the pool's line as many slots as its servers that are well have. Returns whom to ring."""
    row = conn.execute("select agentflow.count_gpus_1(%s, %s::real)", (pool, look_again_s)).fetchone()
    return list(row[0] or ()) if row else []


def take(conn: Connection, job: Job, pool: str, names: Collection[str]) -> Render | None:
    """A free slot of a server of the pool that is well and among `names`, with a prompt in it of which nothing is sent yet.

    None: there is none, or another attempt of this job has one. In a transaction of the caller's.
    """
    conn.execute(
        "select name from agentflow.comfyui_servers where pool = %s and well and name = any (%s) order by name for update",
        (pool, list(names)),
    )
    row = conn.execute(
        "insert into agentflow.renders (prompt_id, organization_id, job_id, fence, server, slot)"  # noqa: S608 - constants
        " select %(prompt)s, %(organization)s, %(job)s, %(fence)s, c.name, c.slot from ("
        " select s.name, f.slot from agentflow.comfyui_servers s"
        " cross join lateral (select count(*) as held from agentflow.renders r"
        f" where r.server = s.name and r.state in {_HELD}) h"
        " cross join lateral (select n::smallint as slot from generate_series(0, s.slots - 1) n where not exists ("
        f" select from agentflow.renders r where r.server = s.name and r.slot = n and r.state in {_HELD})"
        " order by n limit 1) f"
        " where s.pool = %(pool)s and s.well and s.name = any (%(names)s)"
        # A server that has work of others is not the first choice.
        " order by h.held::float8 / s.slots, greatest(0, coalesce(s.queue, 0) - h.held), s.name limit 1) c"
        " on conflict do nothing returning prompt_id, server",
        {
            "prompt": uuid4(),
            "organization": job.organization_id,
            "job": job.id,
            "fence": job.fence,
            "pool": pool,
            "names": list(names),
        },
    ).fetchone()
    return Render(row[0], job.organization_id, job.id, row[1], "taken", None, 0.0) if row else None


def servers(conn: Connection) -> list[Known]:
    """All that a worker had in its settings within the last minutes."""
    rows = conn.execute(
        "select s.name, s.pool, s.slots, s.well, s.problem, s.sick_until, s.version, coalesce(s.devices, '[]'), s.queue,"  # noqa: S608 - constants
        " extract(epoch from clock_timestamp() - s.seen_at)::float8,"
        f" (select count(*) from agentflow.renders r where r.server = s.name and r.state in {_HELD})"
        " from agentflow.comfyui_servers s where s.listed_at > clock_timestamp() - interval '5 min' order by s.name"
    ).fetchall()
    return [Known(*row) for row in rows]


#: One pass over megabytes: asked for class by class, Postgres would unpack the whole each time.
_NODES: Final = (
    "(select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(s.nodes) e"
    " where %(classes)s::text[] is null or e.key = any (%(classes)s))"
)


def nodes_of(conn: Connection, name: str, classes: Collection[str]) -> dict[str, Any] | None:
    """What a server said of these classes of nodes, a minute ago at most while it is well. None: it was not asked yet."""
    row = conn.execute(
        f"select {_NODES} from agentflow.comfyui_servers s where s.name = %(name)s and s.nodes is not null",  # noqa: S608
        {"classes": list(classes), "name": name},
    ).fetchone()
    return row[0] if row else None


def known_nodes(system: System, pool: str, classes: Collection[str] | None = None) -> dict[str, Any] | None:
    """The nodes of a pool's server that answered last. None: none of them ever did.

    With `classes` those alone; all, where one of them is no node of it, since somebody will want to know what is near.
    """
    with system.database.connection() as conn:
        found = _known_nodes(conn, pool, classes)
        if classes is not None and found is not None and not found.keys() >= set(classes):
            return _known_nodes(conn, pool, None)
    return found


def _known_nodes(conn: Connection, pool: str, classes: Collection[str] | None) -> dict[str, Any] | None:
    row = conn.execute(
        f"select {_NODES} from agentflow.comfyui_servers s where s.pool = %(pool)s and s.nodes is not null"  # noqa: S608
        " order by s.well desc, s.seen_at desc limit 1",
        {"classes": None if classes is None else list(classes), "pool": pool},
    ).fetchone()
    return row[0] if row else None
