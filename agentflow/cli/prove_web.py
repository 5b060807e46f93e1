"""The web process of `agentflow prove`: takes its job types in, beside the product's."""

from __future__ import annotations

from agentflow.prove import kinds  # noqa: F401 - makes its job types known
from web.wsgi import app

__all__ = ["app"]
