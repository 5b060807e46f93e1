"""Finding due jobs: to ring the broker for them (the relay's one step), to run them here, and taking that back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

from agentflow.database import Connection
from agentflow.jobs.model import Ring


def pick_due(conn: Connection, queue: str) -> tuple[list[Ring], float | None]:
    """Stamp due jobs of a queue as sent, fairly, while its window has room. Publish them after the commit, not before.

    Returns them, and, when there were none, in how many seconds the next one is due (None: the queue is empty, or another
    process leads; negative: the window is full, or what is due is paused; 0: look again at once).
    """
    rows = conn.execute("select * from agentflow.relay_5(%s)", (queue,)).fetchall()
    rings = [Ring(row[0], queue, row[1], row[2]) for row in rows if row[0] is not None]
    return rings, next((row[3] for row in rows if row[0] is None), None)


def poll(
    conn: Connection, queue: str, room: int, reserved: int, types: Sequence[str]
) -> tuple[list[Ring], float | None]:
    """Stamp due jobs of a queue as taken by this process, for `room` free threads, of which `reserved` are for critical jobs.

    Fair as `pick_due` is. Returns them, and, when there were none, in how many seconds the next one is due (None: the queue is
    empty; negative: what is due is not for here, or paused; 0: look again at once).
    """
    rows = conn.execute(
        "select * from agentflow.poll_3(%s, %s, %s, %s)", (queue, room, reserved, list(types))
    ).fetchall()
    rings = [Ring(row[0], queue, row[1], row[2]) for row in rows if row[0] is not None]
    return rings, next((row[3] for row in rows if row[0] is None), None)


def charge(conn: Connection, work: Mapping[tuple[str, int], tuple[int, float]]) -> None:
    """What was done for (queue, organization): jobs and their seconds. Whose turn it is follows from that."""
    done = sorted(
        (queue, organization, jobs, seconds) for (queue, organization), (jobs, seconds) in work.items() if jobs
    )
    if done:
        conn.execute(
            "select agentflow.charge_1(%s::text[], %s::bigint[], %s::integer[], %s::float8[])",
            tuple(list(column) for column in zip(*done, strict=True)),
        )


def take_back(conn: Connection, ids: Sequence[UUID], delay_s: float) -> None:
    """Say that these jobs were not sent after all (the publish failed, or no thread was free): the relay rings again, after
    `delay_s`. Without one they have their place in the line again. That their messages were heard of says that rings arrive: what
    is lost later is found as soon as with a first one."""
    conn.execute(
        "with locked as materialized (select id from agentflow.jobs where id = any (%(ids)s) and state || '' = 'queued'"
        " and sent_at is not null order by id for update)"
        " update agentflow.jobs j set sent_at = null, sends = least(j.sends, 1), wake_at = case when %(delay)s > 0"
        " then greatest(j.run_at, clock_timestamp() + make_interval(secs => %(delay)s)) else j.run_at end"
        " from locked where j.id = locked.id and j.state || '' = 'queued'",
        {"ids": sorted(set(ids)), "delay": delay_s},
    )


def wake_parked(conn: Connection, ids: Sequence[UUID], reason: str) -> None:
    """What these jobs were parked for is over: they are due. Those with a concurrency key come by their line."""
    conn.execute(
        "with locked as materialized (select id from agentflow.jobs where id = any (%s) and state || '' = 'queued'"
        " and wait_reason = %s and concurrency_key is null order by id for update)"
        " update agentflow.jobs j set wait_reason = null, run_at = least(j.run_at, clock_timestamp()),"
        " wake_at = least(j.wake_at, clock_timestamp()) from locked where j.id = locked.id and j.state || '' = 'queued'",
        (sorted(set(ids)), reason),
    )


def ring_everything_again(conn: Connection, batch: int = 5_000) -> int:
    """Bring forward the next ring of every job that was sent: the broker is a new or an emptied one. Returns how many.

    Counted anew: how often the other broker was told says nothing of when to tell this one again.
    """
    rung = 0
    while done := _ring_some_again(conn, batch):
        rung += done
    return rung


def _ring_some_again(conn: Connection, limit: int) -> int:
    return conn.execute(
        "with picked as materialized (select id from agentflow.jobs where state = 'queued' and sent_at is not null"
        " order by id limit %s for update skip locked)"
        " update agentflow.jobs j set wake_at = clock_timestamp(), sent_at = null, sends = 0 from picked where j.id = picked.id",
        (limit,),
    ).rowcount
