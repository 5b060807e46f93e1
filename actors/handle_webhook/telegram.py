"""Updates of the bot go to its conversation; those of other endpoints are handled as their owner says."""

from __future__ import annotations

from actors.handle_webhook.action import Done, Happened
from agentflow.errors import Permanent
from agentflow.system import Transaction
from agentflow.telegram import bots, conversation, updates


def act(transaction: Transaction, happened: Happened) -> Done | None:
    """None: the endpoint is not the bot's. Raises Permanent where its token is gone, or another bot's."""
    event = happened.event
    bot = bots.of_endpoint(transaction.conn, event.organization_id, event.endpoint_id)
    if bot is None:
        return None
    if transaction.system.telegram.bot_id != bot.bot_id:
        raise Permanent("TELEGRAM_BOT_TOKEN is another bot's", code="telegram_other_bot")
    said = updates.read(happened.content)
    if said is None:
        return Done("ignored", "no person wrote or pressed anything")
    heard = conversation.hear(transaction, bot, said)
    if heard.job is None:
        return Done("ignored", heard.why)
    return Done("done", job_id=heard.job.id)
