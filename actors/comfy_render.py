"""`comfy_render`: a graph on a ComfyUI server, and its files in storage.

A render waits in the line of its pool's GPUs, and leaves it when the server is done: its files are fetched while the next one
runs. `agentflow/comfyui/supervisor.py` says what happens when something goes wrong.
"""

from __future__ import annotations

from typing import Any, Final

from agentflow.comfyui import pool, supervisor
from agentflow.comfyui.requests import TYPE, RenderRequest, folder, prepare
from agentflow.jobs.registry import RetryClass, job
from agentflow.worker.running import JobContext

#: What COMFYUI_TIMEOUT may be at most; an attempt has that and some more.
_MOST_S: Final = 6 * 3600.0
_MORE_S: Final = 30.0


@job(
    TYPE,
    payload=RenderRequest,
    queue="gpu",
    retry=RetryClass("render", 3),
    time_limit_s=_MOST_S + _MORE_S,
    # Counted by whoever looks after the servers: those that are well.
    concurrency=lambda request: (pool.line(request.pool), None),
    repeatable=False,
    files=folder,
)
def comfy_render(context: JobContext, request: RenderRequest) -> dict[str, Any]:
    """Render a workflow, or a whole graph, on a ComfyUI server."""
    context.limit(context.system.settings.comfyui_timeout + _MORE_S)
    with context.system.database.connection() as conn:
        prepared = prepare(conn, context.job.organization_id, request, drawn_from=context.job.id)
    return supervisor.render(context, prepared, request.pool)
