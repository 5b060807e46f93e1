"""The background work: a module (or package) for each kind. `dramatiq actors` runs it.

Importing this package fills the registry of job types and makes a broker that connects to nothing before its first use.
"""

from __future__ import annotations

import os

# A job's child process wants one module of this package, not the worker around it.
if "AGENTFLOW_CHILD" not in os.environ:
    from agentflow.worker import surplus

    if surplus.is_surplus():
        surplus.take_nothing()
    else:
        from actors import backfill_embeddings, comfy_render, deliver_callback, write_crm  # noqa: F401
        from actors.analyze_video import job as analyze_video  # noqa: F401
        from actors.extract_graph import job as extract_graph  # noqa: F401
        from actors.generate_embeddings import job as generate_embeddings  # noqa: F401
        from actors.handle_webhook import job as handle_webhook  # noqa: F401
        from actors.ping import job as ping  # noqa: F401
        from actors.sync_crm import job as sync_crm  # noqa: F401
        from actors.telegram import begin, deliver, follow, press, say, send_file  # noqa: F401
        from agentflow.worker.process import make_global

        #: The worker of this process, started by Dramatiq.
        worker = make_global()
