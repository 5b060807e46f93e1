"""The kinds of senders. Each module has one `SOURCE`: how it signs, and what it calls its deliveries."""

from __future__ import annotations

from typing import Final

from agentflow.webhooks.sources import generic, github, kommo, kommo_chats, slack, standard, stripe, telegram
from agentflow.webhooks.sources.delivery import Source

SOURCES: Final[dict[str, Source]] = {
    module.SOURCE.name: module.SOURCE
    for module in (standard, github, stripe, slack, telegram, kommo, kommo_chats, generic)
}
