"""Kommo's account webhooks (https://developers.kommo.com/docs/webhooks-general): forms, not signed and without an id.

The token in the URL is all there is, so what they say is taken for a hint: the entities are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentflow.webhooks.sources.delivery import Delivery, Identity, Source, text_of

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config


def verify(_delivery: Delivery, _secrets: Sequence[str], _config: Config) -> None:
    """Who knows the URL has been let in."""


def identify(_delivery: Delivery, content: Any, _config: Config) -> Identity:
    """One delivery may carry several: the type is that of the first, as `leads.update`."""
    for group, actions in content.items() if isinstance(content, dict) else ():
        if group != "account" and isinstance(actions, dict) and actions:
            return Identity(None, text_of(f"{group}.{next(iter(actions))}"))
    return Identity()


def _no_secret() -> str:
    raise ValueError("Kommo signs nothing: leave it out")


def check_secret(_secret: str) -> None:
    _no_secret()


SOURCE: Final = Source("kommo", "none", verify, identify, _no_secret, check_secret)
