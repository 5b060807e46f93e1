"""Storage: something small is written, read and deleted."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from uuid import uuid4

from agentflow.cli.checkup.report import Wrong
from agentflow.cli.errors import one_line
from agentflow.storage import StorageError
from agentflow.system import System


def round_trip(system: System) -> str:
    settings = system.settings
    where = "STORAGE_URL" if settings.storage_url else "SUPABASE_URL" if settings.supabase_key else "AGENTFLOW_HOME"
    key = f"doctor/{uuid4()}"
    content = os.urandom(64)
    try:
        storage = system.storage
        storage.put_bytes(key, content)
        back = b"".join(storage.read(key))
        storage.delete(key)
    except (StorageError, OSError) as error:
        keys = (
            "SUPABASE_SECRET_KEY"
            if settings.supabase_key
            else "for s3:// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION"
        )
        raise Wrong(one_line(error), f"check {where}, and {keys}") from None
    if back != content:
        raise Wrong("what was written came back changed", f"do not use the storage of {where}")
    kind = "Supabase" if settings.supabase_key else urlsplit(settings.storage_url or "file:").scheme
    return "written, read and deleted " + ("on this machine's disk" if kind == "file" else f"in the {kind} bucket")
