"""A system of a benchmark's own, in a temporary folder: Postgres and Valkey that others may join, and settings for processes."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
from idle import ROOT

sys.path.insert(0, str(ROOT))
from agentflow import embedded, schema, settings
from agentflow.system import System


@contextmanager
def private_system(**more: str) -> Iterator[tuple[System, dict[str, str]]]:
    """The system, and the environment of processes that belong to it, with `more` in both."""
    home = Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    home.chmod(0o755)
    try:
        with embedded.join(home) as joined:
            with psycopg.connect(joined.database_url, autocommit=True) as conn:
                schema.migrate(conn)
            environment = {
                "AGENTFLOW_ENV": "test",
                "AGENTFLOW_HOME": str(home),
                "DATABASE_URL": joined.database_url,
                "REDIS_URL": joined.redis_url,
                "STORAGE_URL": (home / "storage").as_uri(),
                "STORAGE_SHARED": "true",
                "JOB_QUEUE_NAME": f"bench-{uuid4().hex[:8]}",
                "CANARY_INTERVAL": "0",
                **more,
            }
            system = System.start(settings.load(environment), "bench")
            yield system, environment
            system.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)
