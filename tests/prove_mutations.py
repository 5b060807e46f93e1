"""Workers of `agentflow prove` in whose code a safeguard is missing: `dramatiq tests.prove_mutations:origin`.

The name after the colon is called before Dramatiq asks for the broker.
"""

from __future__ import annotations

import importlib
import random
import threading

import pytest

from agentflow.broker import consuming
from tests.mutations import mutate_code

_patch = pytest.MonkeyPatch()
#: Longer than RabbitMQ is cut off.
_LATE_S = 5.0


def origin() -> None:
    """Acknowledges to whichever channel there is now; a tenth of all so late that it may be another one."""
    mutate_code(
        _patch, consuming.ConsumingLink, "_answer", ("message.channel is not self._channel", "self._channel is None")
    )
    settle = consuming.ConsumingLink.settle

    def late(link: consuming.ConsumingLink, message: consuming.RabbitMessage, *, requeue: bool = False) -> None:
        if random.random() < 0.1:
            threading.Timer(_LATE_S, settle, (link, message), {"requeue": requeue}).start()
        else:
            settle(link, message, requeue=requeue)

    _patch.setattr(consuming.ConsumingLink, "settle", late)
    importlib.import_module("agentflow.cli.prove_worker")
