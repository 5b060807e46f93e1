"""Which bot is whose, and the webhook endpoint that its updates come by: those that are sent, and those that are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.secrets import Sealer
from agentflow.webhooks import endpoints
from agentflow.webhooks.config import Config
from agentflow.webhooks.endpoints import Endpoint

#: What Telegram is asked to tell us of.
ALLOWED_UPDATES: Final = ("message", "callback_query")
#: Messages of a chat are handled in the order in which they came: a text may answer a question about the picture before it.
_CONFIG: Final = Config(entity="/message/chat/id")
_COLUMNS: Final = "bot_id, organization_id, endpoint_id, username"
_NO_USERNAME: Final = re.compile(r"[^A-Za-z0-9_]")


@dataclass(frozen=True, slots=True)
class Bot:
    bot_id: int
    organization_id: int
    endpoint_id: UUID
    username: str


class Taken(Exception):
    """The bot belongs to another organization."""


def of_endpoint(conn: Connection, organization_id: int, endpoint_id: UUID) -> Bot | None:
    """The bot whose updates come by this endpoint."""
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.telegram_bots where organization_id = %s and endpoint_id = %s",  # noqa: S608 - constants
        (organization_id, endpoint_id),
    ).fetchone()
    return Bot(*row) if row else None


@dataclass(frozen=True, slots=True)
class Opened:
    """A bot's endpoint, and what opens it: known this once."""

    endpoint: Endpoint
    token: str = field(repr=False)
    secret: str = field(repr=False)


def open_endpoint(conn: Connection, organization_id: int, bot_id: int, username: str, sealer: Sealer) -> Opened:
    """The bot's endpoint with a new token and a new secret; those before work for a day. In a transaction. Raises Taken."""
    endpoint = connect(conn, organization_id, bot_id, username, sealer)
    token = endpoints.rotate(conn, endpoint, "token", sealer)
    secret = endpoints.rotate(conn, endpoint, "secret", sealer)
    assert token is not None and secret is not None  # noqa: S101 - none was given: both were made
    return Opened(endpoint, token, secret)


def connect(conn: Connection, organization_id: int, bot_id: int, username: str, sealer: Sealer) -> Endpoint:
    """The bot's endpoint, made at the first call. In a transaction. Raises Taken."""
    username = _NO_USERNAME.sub("", username)[:100] or str(bot_id)
    conn.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"telegram:{bot_id}",))
    row = conn.execute(_OF_BOT, (bot_id,)).fetchone()
    if row is not None:
        bot = Bot(*row)
        if bot.organization_id != organization_id:
            raise Taken
        found = endpoints.get(conn, organization_id, bot.endpoint_id)
        assert found is not None  # noqa: S101 - endpoints are not deleted
        return endpoints.enable(conn, found) if found.disabled_at is not None else found
    made, _, _ = endpoints.create(conn, organization_id, "telegram", f"The bot @{username}", _CONFIG, sealer)
    conn.execute(
        "insert into agentflow.telegram_bots (bot_id, organization_id, endpoint_id, username) values (%s, %s, %s, %s)",
        (bot_id, organization_id, made.id, username),
    )
    return made


_OF_BOT: Final = f"select {_COLUMNS} from agentflow.telegram_bots where bot_id = %s"  # noqa: S608 - constants
