"""The worker of `agentflow prove`: `dramatiq agentflow.cli.prove_worker`. The product's, and prove's own job types."""

from __future__ import annotations

import actors
from agentflow.prove import kinds  # noqa: F401 - makes its job types known

actors.worker.declare_actors()
