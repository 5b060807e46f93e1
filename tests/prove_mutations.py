"""Workers of `agentflow prove` in whose code a safeguard is missing: `dramatiq tests.prove_mutations:claim`.

The name after the colon is called before Dramatiq asks for the broker.
"""

from __future__ import annotations

import importlib

import pytest

from agentflow.broker import consuming
from agentflow.jobs import claims
from tests.core_support import mutate_code

_patch = pytest.MonkeyPatch()
_TO_BE_HAD = (
    "update agentflow.jobs set state = 'queued', worker = null, lease_until = null, slot = null,"
    " wake_at = clock_timestamp(), attempt = attempt - 1 where id = any (%s) and state = 'running'"
)


def claim() -> None:
    """Takes whatever it is told of, also what runs already. (What has ended is refused by the table's own constraints.)"""
    mutate_code(
        _patch,
        claims,
        "claim",
        ("rows = conn.execute(", f"conn.execute({_TO_BE_HAD!r}, (list(ids),)); rows = conn.execute("),
    )
    importlib.import_module("agentflow.cli.prove_worker")


def origin() -> None:
    """Acknowledges to whichever channel there is now."""
    mutate_code(_patch, consuming.ConsumingLink, "_answer", ("message.channel is not self._channel", "False"))
    importlib.import_module("agentflow.cli.prove_worker")
