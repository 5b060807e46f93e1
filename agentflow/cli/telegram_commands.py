"""`agentflow telegram …`: where the bot's updates come from. The token, the address's token and the secret are never printed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from agentflow import log, organizations
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.database import Connection
from agentflow.errors import JobError
from agentflow.organizations import Organization
from agentflow.secrets import Unreadable
from agentflow.settings import Settings
from agentflow.system import System
from agentflow.telegram import bots, polling
from agentflow.telegram.polling import Polling, WebhookSet

#: https://core.telegram.org/bots/api#setwebhook
_PORTS: Final = (443, 80, 88, 8443)


def set_webhook(url: str, org: str, drop_pending: bool) -> None:
    with connected() as system:
        base = _checked(url, system.settings)
        bot_id, username = _me(system)
        with system.database.transaction() as conn:
            organization = _organization(conn, org)
            with _unless_taken(username):
                opened = bots.open_endpoint(conn, organization.id, bot_id, username, system.sealer)
        asked = {
            "url": f"{base}/webhooks/telegram/{opened.token}",
            "secret_token": opened.secret,
            "allowed_updates": list(bots.ALLOWED_UPDATES),
            "drop_pending_updates": drop_pending,
        }
        _ask(system, "setWebhook", asked)
        info = _ask(system, "getWebhookInfo", {})
    print(f"@{username} sends its updates to {base}/webhooks/telegram/…")
    print(f"endpoint {opened.endpoint.id} of {organization.slug}; an address and a secret of before work for a day")
    if info.get("pending_update_count"):
        print(f"{info['pending_update_count']} updates wait at Telegram, and come now")
    if info.get("last_error_message"):
        print(f"Telegram's last try failed: {info['last_error_message']}", file=sys.stderr)


def delete_webhook() -> None:
    with connected() as system:
        _, username = _me(system)
        _ask(system, "deleteWebhook", {})
    print(f"@{username} sends its updates nowhere; `agentflow telegram poll` asks for them")


def poll(org: str) -> None:
    import actors  # noqa: F401 - fills the registry: an update is stored with the job that handles it

    with connected() as system:
        bot_id, username = _me(system)
        if address := _ask(system, "getWebhookInfo", {}).get("url"):
            raise _is_set(username, f"a webhook is set, to {urlsplit(str(address)).netloc}")
        with system.database.transaction() as conn:
            organization = _organization(conn, org)
            with _unless_taken(username):
                endpoint = bots.connect(conn, organization.id, bot_id, username, system.sealer)
        stopped = threading.Event()
        try:
            polls = Polling(system, polling.door_of(system, organization.id, endpoint.id), stopped)
            log.configure(system.settings, "telegram")
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopped.set())
            print(f"@{username} is heard for {organization.slug}; Ctrl-C stops it", flush=True)
            polls.run()
        except Unreadable as error:
            raise Failure(f"the endpoint's secret cannot be read: {error}") from None
        except WebhookSet as error:
            raise _is_set(username, str(error)) from None


def _is_set(username: str, why: str) -> Failure:
    return Failure(f"@{username}: {why}; `agentflow telegram delete-webhook` takes a webhook away")


def _checked(url: str, settings: Settings) -> str:
    """The address without a slash at its end, where Telegram would go to it. A Bot API server of one's own goes anywhere."""
    parts = urlsplit(url)
    own = settings.telegram_api_url != Settings.model_fields["telegram_api_url"].default
    schemes = ("https", "http") if own else ("https",)
    if parts.scheme not in schemes or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise Failure("URL is the https address of your web process, such as https://agent.example.com", USAGE)
    if not own and (parts.port or 443) not in _PORTS:
        raise Failure(f"Telegram goes to the ports {', '.join(map(str, _PORTS))} alone", USAGE)
    return url.rstrip("/")


def _organization(conn: Connection, org: str) -> Organization:
    found = organizations.find(conn, org)
    if found is None:
        raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
    return found


@contextmanager
def _unless_taken(username: str) -> Iterator[None]:
    try:
        yield
    except bots.Taken:
        raise Failure(f"@{username} is the bot of another organization", USAGE) from None


def _me(system: System) -> tuple[int, str]:
    """The bot's number and name, as Telegram knows it."""
    if system.settings.telegram_bot_token is None:
        raise Failure("TELEGRAM_BOT_TOKEN is not set: @BotFather gives you one", USAGE)
    me = _ask(system, "getMe", {})
    return int(me["id"]), str(me.get("username") or me["id"])


def _ask(system: System, method: str, params: dict[str, Any]) -> Any:
    try:
        return system.telegram.ask(method, params)
    except JobError as error:
        raise Failure(f"{method}: {error}") from None
