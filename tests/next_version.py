"""`dramatiq tests.next_version`: a worker of a version to come, whose stored functions are `settle_100` and so on."""

from __future__ import annotations

import re
from typing import Any

from agentflow.database import BoundedConnection
from tests import job_types

__all__ = ["job_types"]

_execute = BoundedConnection.execute


def execute(self: BoundedConnection, query: Any, *arguments: Any, **options: Any) -> Any:
    if isinstance(query, str):
        query = re.sub(r"\bagentflow\.(\w+_\d+)\(", r"agentflow.\g<1>00(", query)
    return _execute(self, query, *arguments, **options)


BoundedConnection.execute = execute  # type: ignore[method-assign]
