"""The Telegram bot: its token, and how its updates come."""

from __future__ import annotations

from urllib.parse import urlsplit

from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.errors import JobError
from agentflow.system import System


def bot(system: System) -> str | Remark:
    try:
        me = system.telegram.ask("getMe", {})
        info = system.telegram.ask("getWebhookInfo", {})
    except JobError as error:
        raise Wrong(
            str(error), "@BotFather shows the token (/mybots); behind a firewall, allow TELEGRAM_API_URL"
        ) from None
    name = f"@{me.get('username')}"
    address, waiting = info.get("url"), int(info.get("pending_update_count") or 0)
    if not address:
        return Remark(f"{name}; no webhook is set", "`agentflow telegram poll` has to run, or set one: set-webhook")
    where = f"{name} sends its updates to {urlsplit(str(address)).netloc}"
    if waiting and info.get("last_error_message"):
        why = f"{waiting} wait there, the last try failed: {info['last_error_message']}"
        raise Wrong(f"{where}; {why}", "see that the web process can be reached there, then: telegram set-webhook")
    return where
