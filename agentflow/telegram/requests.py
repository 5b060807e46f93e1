"""What people asked the bot for, one row for each request, with its pictures and the one message that answers it.

Telegram has no keys that make sending safe to repeat. So of a request only the first message is sent, and what it becomes,
the result included, is an edit of that message, which may be done twice. Who sends it says so before, and writes its number
down after: a message between the two may be a stray, and no stray ever becomes a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.jobs import files
from agentflow.jobs.files import Doomed
from agentflow.jobs.retention import BATCH
from agentflow.telegram.updates import Language, Sender

Open = Literal["collecting", "asking", "rendering"]
Ended = Literal["delivered", "failed", "cancelled", "dropped", "unreachable"]

#: An answer to "what shall I do with it?" is awaited for so long, and what hangs is no longer counted as in work after so long.
ASKED_S: Final = 3600.0
IN_WORK_S: Final = 86_400.0
#: Who has been sending a message for so long has died over it: its worker would have been missed before.
SENDING_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class Request:
    """`answer_id` is the number of the bot's message about it; None: none is known."""

    id: UUID
    organization_id: int
    bot_id: int
    chat_id: int
    user_id: int
    language: Language
    message_id: int
    state: Open | Ended
    prompt: str | None
    render_job_id: UUID | None
    answer_id: int | None
    answer_sends: int
    answers_lost: int
    created_at: datetime

    @property
    def is_open(self) -> bool:
        return self.state in ("collecting", "asking", "rendering")


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture of a request. `storage_key` None: still to be fetched."""

    message_id: int
    file_id: str
    storage_key: str | None


_COLUMNS: Final = ", ".join(f"r.{name}" for name in Request.__dataclass_fields__)


def lock_user(conn: Connection, bot_id: int, user_id: int) -> None:
    """What one person does is handled one by one, until the transaction ends."""
    conn.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"telegram:{bot_id}:{user_id}",))


def make(
    conn: Connection,
    organization_id: int,
    bot_id: int,
    sender: Sender,
    *,
    origin: str,
    message_id: int,
    prompt: str | None,
    state: Open,
) -> Request | None:
    """None where what it comes of was a request before: an update may be handled again."""
    row = conn.execute(
        "insert into agentflow.telegram_requests as r (id, organization_id, bot_id, chat_id, user_id, language, origin,"  # noqa: S608 - constants
        " message_id, prompt, state) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        f" on conflict (bot_id, chat_id, origin) do nothing returning {_COLUMNS}",
        (
            new_id(),
            organization_id,
            bot_id,
            sender.chat_id,
            sender.user_id,
            sender.language,
            origin,
            message_id,
            prompt,
            state,
        ),
    ).fetchone()
    return Request(*row) if row else None


def get(conn: Connection, organization_id: int, request_id: UUID, *, lock: bool = False) -> Request | None:
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.telegram_requests r where r.id = %s and r.organization_id = %s"  # noqa: S608 - constants
        f"{' for no key update' if lock else ''}",
        (request_id, organization_id),
    ).fetchone()
    return Request(*row) if row else None


def of_origin(conn: Connection, organization_id: int, bot_id: int, chat_id: int, origin: str) -> Request | None:
    """Locked until the transaction ends."""
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.telegram_requests r where r.organization_id = %s and r.bot_id = %s"  # noqa: S608 - constants
        " and r.chat_id = %s and r.origin = %s for no key update",
        (organization_id, bot_id, chat_id, origin),
    ).fetchone()
    return Request(*row) if row else None


def awaiting_text(conn: Connection, organization_id: int, bot_id: int, sender: Sender) -> Request | None:
    """The newest of theirs in this chat that has no prompt yet. Locked until the transaction ends."""
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.telegram_requests r where r.organization_id = %s and r.bot_id = %s"  # noqa: S608 - constants
        " and r.user_id = %s and r.chat_id = %s and r.ended_at is null and r.state in ('collecting', 'asking')"
        " and r.prompt is null and r.created_at > clock_timestamp() - make_interval(secs => %s)"
        " order by r.created_at desc limit 1 for no key update",
        (organization_id, bot_id, sender.user_id, sender.chat_id, ASKED_S),
    ).fetchone()
    return Request(*row) if row else None


def in_work(conn: Connection, organization_id: int, bot_id: int, user_id: int) -> int:
    """How many of theirs are to be rendered: not those that wait for a text of theirs."""
    row = conn.execute(
        "select count(*) from agentflow.telegram_requests where organization_id = %s and bot_id = %s and user_id = %s"
        " and ended_at is null and state <> 'asking' and created_at > clock_timestamp() - make_interval(secs => %s)",
        (organization_id, bot_id, user_id, IN_WORK_S),
    ).fetchone()
    return int(row[0]) if row else 0


def change(conn: Connection, request: Request, *, state: Open, prompt: str | None = None) -> None:
    """`prompt` where there is one now."""
    conn.execute(
        "update agentflow.telegram_requests set state = %s, prompt = coalesce(%s, prompt)"
        " where id = %s and organization_id = %s and ended_at is null",
        (state, prompt, request.id, request.organization_id),
    )


def renders(conn: Connection, request: Request, job_id: UUID) -> None:
    conn.execute(
        "update agentflow.telegram_requests set state = 'rendering', render_job_id = %s where id = %s and organization_id = %s",
        (job_id, request.id, request.organization_id),
    )


def end(conn: Connection, request: Request, state: Ended) -> bool:
    """Whether this ended it. A result may still come to what had failed: somebody tried its job once more."""
    return (
        conn.execute(
            "update agentflow.telegram_requests set state = %(state)s, ended_at = clock_timestamp() where id = %(id)s"
            " and organization_id = %(organization)s and (ended_at is null or %(state)s = 'delivered' and state = 'failed')",
            {"state": state, "id": request.id, "organization": request.organization_id},
        ).rowcount
        > 0
    )


def drop_asking(conn: Connection, organization_id: int, bot_id: int, sender: Sender) -> int:
    """Nothing is awaited from them in this chat any more. Returns how many were."""
    return conn.execute(
        "update agentflow.telegram_requests set state = 'dropped', ended_at = clock_timestamp() where organization_id = %s"
        " and bot_id = %s and user_id = %s and chat_id = %s and state = 'asking' and ended_at is null",
        (organization_id, bot_id, sender.user_id, sender.chat_id),
    ).rowcount


# ---- pictures ----


def add_picture(conn: Connection, request: Request, message_id: int, file_id: str, key: str | None = None) -> None:
    conn.execute(
        "insert into agentflow.telegram_pictures (request_id, organization_id, message_id, file_id, storage_key)"
        " values (%s, %s, %s, %s, %s) on conflict (request_id, message_id) do nothing",
        (request.id, request.organization_id, message_id, file_id, key),
    )


def pictures(conn: Connection, request: Request) -> list[Kept]:
    """In the order in which they were sent, whatever order they came in."""
    rows = conn.execute(
        "select message_id, file_id, storage_key from agentflow.telegram_pictures where request_id = %s"
        " and organization_id = %s order by message_id",
        (request.id, request.organization_id),
    ).fetchall()
    return [Kept(*row) for row in rows]


def fetched(conn: Connection, request: Request, picture: Kept, key: str) -> None:
    conn.execute(
        "update agentflow.telegram_pictures set storage_key = %s where request_id = %s and message_id = %s"
        " and organization_id = %s",
        (key, request.id, picture.message_id, request.organization_id),
    )


# ---- the message that answers it ----


def may_send(conn: Connection, request: Request, job_id: UUID, *, most: int) -> bool:
    """Intend to send it, before it is sent. False: its number is known, another job is sending it, or `most` were sent."""
    return (
        conn.execute(
            "update agentflow.telegram_requests set answer_sends = answer_sends + 1, answer_sender = %(job)s,"
            " answer_sending_at = clock_timestamp() where id = %(id)s and organization_id = %(organization)s"
            " and answer_id is null and answer_sends < %(most)s and (answer_sender is null or answer_sender = %(job)s"
            " or answer_sending_at < clock_timestamp() - make_interval(secs => %(sending)s))",
            {
                "job": job_id,
                "id": request.id,
                "organization": request.organization_id,
                "most": most,
                "sending": SENDING_S,
            },
        ).rowcount
        > 0
    )


def sent(conn: Connection, request: Request, job_id: UUID, message_id: int) -> None:
    conn.execute(
        "update agentflow.telegram_requests set answer_id = %s, answer_sender = null, answer_sending_at = null"
        " where id = %s and organization_id = %s and answer_sender = %s and answer_id is null",
        (message_id, request.id, request.organization_id, job_id),
    )


def not_sent(conn: Connection, request: Request, job_id: UUID, *, certain: bool) -> None:
    """`certain`: nothing was sent. Else the answer was lost, and it may stand there without our knowing its number."""
    conn.execute(
        "update agentflow.telegram_requests set answer_sends = answer_sends - %s, answer_sender = null,"
        " answer_sending_at = null where id = %s and organization_id = %s and answer_sender = %s",
        (int(certain), request.id, request.organization_id, job_id),
    )


def answer_gone(conn: Connection, request: Request) -> None:
    """Somebody deleted it: another one may be sent."""
    conn.execute(
        "update agentflow.telegram_requests set answer_id = null, answers_lost = answers_lost + 1, answer_sends = 0"
        " where id = %s and organization_id = %s and answer_id = %s",
        (request.id, request.organization_id, request.answer_id),
    )


def move(conn: Connection, request: Request, chat_id: int) -> None:
    """The group has another number now; what was written there is not known under it."""
    conn.execute(
        "update agentflow.telegram_requests set chat_id = %s, answer_id = null, answer_sends = 0 where id = %s"
        " and organization_id = %s and chat_id = %s",
        (chat_id, request.id, request.organization_id, request.chat_id),
    )


# ---- retention ----


def delete_old(conn: Connection, *, days: float, limit: int = BATCH) -> int:
    """Requests of so long ago; their pictures are doomed, but for those that a newer request repeats. Returns how many."""
    with conn.transaction():
        old = conn.execute(
            "select id from agentflow.telegram_requests where created_at < clock_timestamp() - make_interval(secs => %s * 86400)"
            " order by created_at limit %s for update skip locked",
            (days, limit),
        ).fetchall()
        ids = [row[0] for row in old]
        gone = conn.execute(
            "delete from agentflow.telegram_pictures where request_id = any (%s) returning organization_id, storage_key",
            (ids,),
        ).fetchall()
        conn.execute("delete from agentflow.telegram_requests where id = any (%s)", (ids,))
        _doom(conn, {(row[0], row[1]) for row in gone if row[1] is not None})
    return len(ids)


def _doom(conn: Connection, keys: set[tuple[int, str]]) -> None:
    named = conn.execute(
        "select organization_id, storage_key from agentflow.telegram_pictures"
        " join unnest(%s::bigint[], %s::text[]) k(organization_id, storage_key) using (organization_id, storage_key)",
        ([organization_id for organization_id, _ in keys], [key for _, key in keys]),
    ).fetchall()
    files.doom(conn, [Doomed(*each) for each in sorted(keys - {(row[0], row[1]) for row in named})])
