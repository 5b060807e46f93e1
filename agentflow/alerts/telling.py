"""Telling people of alerts: Telegram, a signed webhook, and the log, from which Sentry takes errors."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from agentflow import USER_AGENT, log, signing
from agentflow.alerts.prometheus import RUNBOOK
from agentflow.alerts.standing import Standing
from agentflow.alerts.table import ALERTS, Alert
from agentflow.errors import JobError
from agentflow.fetch import Guard, post

if TYPE_CHECKING:
    from agentflow.settings import Settings
    from agentflow.system import System

logger = log.get(__name__)

#: Two receivers and the database fit into the lease of whoever watches.
TIMEOUT_S: Final = 10.0
#: Telegram takes 4096 characters.
_MOST_LINES: Final = 25
_BY_NAME: Final[Mapping[str, Alert]] = {alert.name: alert for alert in ALERTS}


class NotTold(Exception):
    """The receiver does not know; it is told again at the next look. The text is a sentence for the log."""


class Receiver(Protocol):
    name: str

    def tell(self, news: Sequence[Standing]) -> None:
        """All in one message. Raises NotTold."""


def receivers(system: System) -> list[Receiver]:
    """Those that the settings name, and the log."""
    settings = system.settings
    found: list[Receiver] = [Log()]
    if settings.alert_telegram_chat is not None:
        found.append(TelegramChat(system, settings.alert_telegram_chat))
    if settings.alert_webhook_url is not None:
        found.append(Webhook(settings))
    return found


class Log:
    """An error when one fires, marked by `alert`: Sentry's integration makes an event of it, where that is set."""

    name = "log"

    def tell(self, news: Sequence[Standing]) -> None:
        for each in news:
            say = logger.error if each.status == "firing" else logger.info
            said = {"alert": each.name, "status": each.status, "severity": severity(each.name), **each.subject}
            say(summary(each), **said, value=each.value)


class TelegramChat:
    name = "telegram"

    def __init__(self, system: System, chat: str) -> None:
        self._system = system
        self._chat = chat

    def tell(self, news: Sequence[Standing]) -> None:
        text = "\n".join(map(_line, news[:_MOST_LINES]))
        if len(news) > _MOST_LINES:
            text += f"\n… and {len(news) - _MOST_LINES} more"
        try:
            self._system.telegram.ask("sendMessage", {"chat_id": self._chat, "text": text}, total_s=TIMEOUT_S)
        except JobError as error:
            raise NotTold(f"Telegram was not told: {error}") from error


class Webhook:
    """Signed as callbacks are, with ALERT_WEBHOOK_SECRET. The operator's own URL may lead to a private address."""

    name = "webhook"

    def __init__(self, settings: Settings) -> None:
        url, secret = settings.alert_webhook_url, settings.alert_webhook_secret
        assert url is not None  # noqa: S101 - asked by receivers
        self._url = url.get_secret_value()
        self._secrets = [secret.get_secret_value()] if secret is not None else []
        place = urlsplit(self._url)
        port = place.port or (443 if place.scheme == "https" else 80)
        host = f"[{place.hostname}]" if ":" in (place.hostname or "") else place.hostname
        self._guard = Guard(allow=[f"{host}:{port}"])

    def tell(self, news: Sequence[Standing]) -> None:
        body = json.dumps({"type": "alerts.changed", "data": {"alerts": [_document(each) for each in news]}}).encode()
        # The same for the same news: whoever is told twice, since a scheduler died in between, can tell.
        what = sorted((each.name, sorted(each.subject.items()), each.status, each.since.isoformat()) for each in news)
        message_id = f"msg_{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"
        headers = {
            "Content-Type": "application/json",
            **signing.headers(message_id, int(time.time()), body, self._secrets),
        }
        try:
            answer = post(
                self._url, body, headers=headers, guard=self._guard, timeout_s=TIMEOUT_S, user_agent=USER_AGENT
            )
        except JobError as error:
            raise NotTold(f"ALERT_WEBHOOK_URL was not told: {error}") from error
        if not 200 <= answer.status < 300:
            raise NotTold(f"ALERT_WEBHOOK_URL answered {answer.status}")


def severity(name: str) -> str:
    return _BY_NAME[name].severity if name in _BY_NAME else "warning"


def summary(each: Standing) -> str:
    """The table's sentence about it."""
    if (alert := _BY_NAME.get(each.name)) is None:
        return each.name  # of a version that knew more
    labels = defaultdict(str, {"job": "the scheduler", **each.subject, "value": f"{each.value:.4g}"})
    return " ".join(alert.summary.format_map(labels).split())


def _line(each: Standing) -> str:
    mark = "✅ resolved" if each.status == "resolved" else "🔴" if severity(each.name) == "critical" else "🟡"
    return f"{mark} {each.name}: {summary(each)} ({RUNBOOK}#{each.name.lower()})"


def _document(each: Standing) -> dict[str, Any]:
    return {
        "name": each.name,
        "status": each.status,
        "severity": severity(each.name),
        "subject": dict(each.subject),
        "value": each.value,
        "summary": summary(each),
        "since": each.since.isoformat(),
        "ended_at": each.ended_at.isoformat() if each.ended_at else None,
        "runbook": f"{RUNBOOK}#{each.name.lower()}",
    }
