"""Updates by asking for them (long polling): for machines that nobody can reach.

Telegram gives an update again until the number after it is asked for. That is asked for when the update is stored, by the same
intake as a webhook's, which knows it by its number: killed in between, nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Final
from uuid import UUID

from agentflow import log
from agentflow.database import Unavailable
from agentflow.errors import Permanent, Transient, Wait
from agentflow.system import System
from agentflow.telegram import bots
from agentflow.telegram.client import Refused
from agentflow.webhooks import endpoints, intake
from agentflow.webhooks.endpoints import Door
from agentflow.webhooks.sources.delivery import Delivery

logger = log.get(__name__)

#: So long Telegram holds a question that it has no answer to.
LONG_POLL_S: Final = 25
_AT_ONCE: Final = 100
#: After a failure: twice as long with each, up to so long.
_LONGEST_PAUSE_S: Final = 30.0


class WebhookSet(Permanent):
    """Telegram sends this bot's updates to an address, or somebody else polls them."""


class Stopped(Exception):
    """Somebody asked for the end while Telegram was being asked."""


class Polling:
    """For one thread. `step` asks once; `run` goes on until `stopped` is set."""

    def __init__(self, system: System, door: Door, stopped: threading.Event) -> None:
        self._system = system
        self._door = door
        self._stopped = stopped
        self._next: int | None = None

    def run(self) -> None:
        """Raises WebhookSet, and other refusals, which do not end by themselves."""
        failures = 0
        while not self._stopped.is_set():
            self._system.heartbeat()
            try:
                self.step()
                failures = 0
            except Stopped:
                return
            except (Transient, Wait, *Unavailable) as error:
                failures += 1
                pause_s = error.seconds if isinstance(error, Wait) else min(_LONGEST_PAUSE_S, 2.0**failures)
                logger.warning("updates cannot be fetched now", error=str(error).strip(), again_in_s=pause_s)
                self._stopped.wait(pause_s)

    def step(self, wait_s: int = LONG_POLL_S) -> int:
        """Store what has come. Returns how many updates that were. Raises WebhookSet, Stopped."""
        asked: dict[str, Any] = {
            "timeout": wait_s,
            "limit": _AT_ONCE,
            "allowed_updates": list(bots.ALLOWED_UPDATES),
        }
        if self._next is not None:
            asked["offset"] = self._next
        try:
            updates = self._system.telegram.ask("getUpdates", asked, check=self._check, total_s=wait_s + 15.0)
        except Refused as refused:
            if refused.kind != "conflict":
                raise
            raise WebhookSet(str(refused), code=refused.code) from None
        for update in updates:
            self._store(update)
            self._next = update["update_id"] + 1
        return len(updates)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped

    def _store(self, update: dict[str, Any]) -> None:
        body = json.dumps(update, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        headers = {"content-type": "application/json", "x-telegram-bot-api-secret-token": self._door.secrets[0]}
        intake.receive(self._system, self._door, Delivery(headers, body, time.time()))


def door_of(system: System, organization_id: int, endpoint_id: UUID) -> Door:
    """The bot's own door, opened from inside. Raises agentflow.secrets.Unreadable."""
    with system.database.connection() as conn:
        endpoint = endpoints.get(conn, organization_id, endpoint_id)
        assert endpoint is not None  # noqa: S101 - endpoints are not deleted
        return endpoints.door_of(conn, endpoint, system.sealer)
