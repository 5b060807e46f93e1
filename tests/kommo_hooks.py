"""How Kommo sends webhooks: form-encoded, 2 s for an answer, a ladder of retries, and an end when too many fail.

Time is the caller's: `deliver(now)` sends what is due by then.
"""

from __future__ import annotations

import http.client
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

DEADLINE_S = 2.0
#: Seconds before the second attempt and those after it; the last two only for 499 and 5xx.
LADDER_S = (300, 900, 900, 3600)
_AT_MOST_INVALID = 100
_WITHIN_S = 7200
_ENTITIES = ("lead", "contact", "company")
SETTINGS = {
    *(
        f"{action}_{entity}"
        for entity in _ENTITIES
        for action in ("add", "update", "delete", "restore", "responsible", "note")
    ),
    *(
        "status_lead",
        "add_task",
        "update_task",
        "delete_task",
        "responsible_task",
        "add_talk",
        "update_talk",
        "delete_talk",
    ),
    *(
        "add_message",
        "add_chat_template_review",
        "add_unsorted",
        "update_unsorted",
        "delete_unsorted",
        "add_outgoing_message",
    ),
}


@dataclass
class Delivery:
    body: bytes
    due: float
    attempts: list[int] = field(default_factory=list)  # statuses; 499: no answer in time
    delivered: bool = False


@dataclass
class Hook:
    id: int
    destination: str
    settings: list[str]
    disabled: bool = False
    invalid: list[float] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "destination": self.destination,
            "settings": self.settings,
            "disabled": self.disabled,
            "sort": 1,
        }


class Hooks:
    def __init__(self, account_id: int, deadline_s: float = DEADLINE_S) -> None:
        self._account_id = account_id
        self._deadline_s = deadline_s
        self._ids = itertools.count(1)
        self.hooks: dict[str, Hook] = {}

    def subscribe(self, destination: str, settings: list[str]) -> Hook:
        """Raises ValueError for a code that is none."""
        if not settings or not set(settings) <= SETTINGS:
            raise ValueError("unknown settings")
        self.hooks[destination] = Hook(next(self._ids), destination, settings)
        return self.hooks[destination]

    def happened(self, now: float, group: str, action: str, fields: Mapping[str, Any]) -> None:
        """`leads`, `status`, with the fields as the wire has them. Companies go under `contacts`."""
        code = f"{action}_{'company' if fields.get('type') == 'company' else group.rstrip('s')}"
        pairs = [(f"{group}[{action}][0][{name}]", str(value)) for name, value in fields.items()]
        account = [("account[id]", str(self._account_id)), ("account[subdomain]", "example")]
        for hook in self.hooks.values():
            if code in hook.settings and not hook.disabled:
                hook.deliveries.append(Delivery(urlencode([*pairs, *account]).encode(), now))

    def deliver(self, now: float) -> int:
        """Returns how many requests were sent."""
        sent = 0
        for hook in self.hooks.values():
            for each in hook.deliveries:
                if hook.disabled or each.delivered or each.due > now:
                    continue
                sent += 1
                status = self._post(hook.destination, each.body)
                each.attempts.append(status)
                each.delivered = 100 <= status < 300
                if not each.delivered:
                    self._failed(hook, each, status, now)
        return sent

    def _failed(self, hook: Hook, delivery: Delivery, status: int, now: float) -> None:
        hook.invalid = [at for at in hook.invalid if at > now - _WITHIN_S] + [now]
        hook.disabled = len(hook.invalid) > _AT_MOST_INVALID
        tried = len(delivery.attempts)
        most = len(LADDER_S) if status == 499 or 500 <= status <= 599 else 2
        delivery.due = now + LADDER_S[tried - 1] if tried <= most else float("inf")

    def _post(self, destination: str, body: bytes) -> int:
        address = urlsplit(destination)
        conn = http.client.HTTPConnection(address.hostname or "", address.port, timeout=self._deadline_s)
        try:
            conn.request("POST", address.path, body, {"Content-Type": "application/x-www-form-urlencoded"})
            return conn.getresponse().status
        except TimeoutError:
            return 499
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            conn.close()
