"""Senders of webhooks: what each kind signs, and how. Written from the vendors' pages, not with the product's code."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from flask.testing import FlaskClient

from agentflow.webhooks import content
from agentflow.webhooks.config import Config
from agentflow.webhooks.sources import SOURCES
from agentflow.webhooks.sources.delivery import Delivery, Identity

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass
class Made:
    """An endpoint as its maker knows it."""

    id: str
    source: str
    path: str
    secret: str
    client: FlaskClient

    def post(self, body: bytes, headers: dict[str, str] | None = None, **signing: Any) -> Any:
        """Send it signed, as this source's sender does."""
        signed = SIGNERS[self.source](self.secret, body, **signing)
        return self.client.post(
            self.path, data=body, headers={**JSON, **signed, **(headers or {}), "Authorization": ""}
        )

    def send(self, value: Any, **signing: Any) -> Any:
        return self.post(json.dumps(value).encode(), **signing)


def make(client: FlaskClient, source: str, *, secret: str | None = None, **more: Any) -> Made:
    theirs = {"stripe": "whsec_stripe_secret", "slack": "slack-secret-1", "kommo_chats": "channel-secret-1"}
    secret = secret or theirs.get(source)
    body = {"source": source, "name": source, **({"secret": secret} if secret else {}), **more}
    if source == "kommo":
        body["config"] = {"account_id": str(uuid4()), **more.get("config", {})}
    answer = client.post("/api/webhook-endpoints", json=body)
    assert answer.status_code == 201, answer.text
    said = answer.json
    assert (said["secret"] is None) == (secret is not None or source == "kommo")
    return Made(said["id"], source, said["path"], secret or said["secret"] or "", client)


def standard(secret: str, body: bytes, *, id: str | None = None, at: int | None = None) -> dict[str, str]:
    message_id, timestamp = id or f"msg_{uuid4().hex}", at or int(time.time())
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


def github(secret: str, body: bytes, *, id: str | None = None, event: str = "issues") -> dict[str, str]:
    signature = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {"X-Hub-Signature-256": signature, "X-GitHub-Delivery": id or str(uuid4()), "X-GitHub-Event": event}


def stripe(secret: str, body: bytes, *, at: int | None = None) -> dict[str, str]:
    timestamp = at or int(time.time())
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return {"Stripe-Signature": f"t={timestamp},v1={digest}"}


def slack(secret: str, body: bytes, *, at: int | None = None) -> dict[str, str]:
    timestamp = at or int(time.time())
    digest = hmac.new(secret.encode(), f"v0:{timestamp}:".encode() + body, hashlib.sha256).hexdigest()
    return {"X-Slack-Request-Timestamp": str(timestamp), "X-Slack-Signature": f"v0={digest}"}


def telegram(secret: str, body: bytes) -> dict[str, str]:
    return {"X-Telegram-Bot-Api-Secret-Token": secret}


def kommo(secret: str, body: bytes) -> dict[str, str]:
    return dict(FORM)


def kommo_chats(secret: str, body: bytes) -> dict[str, str]:
    return {"X-Signature": hmac.new(secret.encode(), body, hashlib.sha1).hexdigest()}


def generic(secret: str, body: bytes) -> dict[str, str]:
    return {"X-Signature": hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


SIGNERS: dict[str, Callable[..., dict[str, str]]] = {
    each.__name__: each for each in (standard, github, stripe, slack, telegram, kommo, kommo_chats, generic)
}


def delivery(headers: dict[str, str], body: bytes, now_s: float = 0.0) -> Delivery:
    return Delivery({name.lower(): value for name, value in headers.items()}, body, now_s)


def verify(source: str, secrets: list[str], came: Delivery, config: Config | None = None) -> None:
    """Raises Forged."""
    SOURCES[source].verify(came, secrets, config or Config())


def identity(source: str, came: Delivery, config: Config | None = None) -> Identity:
    parsed = content.parse(came.body, came.headers.get("content-type", ""))
    return SOURCES[source].identify(came, parsed, config or Config())


def event_of(client: FlaskClient, answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found = client.get(f"/api/webhook-events/{UUID(answer.json['event_id'])}")
    assert found.status_code == 200, found.text
    return dict(found.json)
