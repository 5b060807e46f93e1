"""gunicorn's settings: `gunicorn -c web/gunicorn_config.py web.wsgi:app`."""

from __future__ import annotations

import os
import sys
from typing import Any

from agentflow import log
from agentflow.settings import SettingsError, check_files, current
from web import server


def _settings() -> Any:
    try:
        read = current()
        check_files(read)
        return read
    except SettingsError as error:
        print(f"agentflow: {error}", file=sys.stderr)  # noqa: T201 - logging needs the settings
        raise SystemExit(3) from None  # gunicorn's own code for "cannot start": platforms do not take it for a crash


_found = _settings()
log.configure(_found, "web")

bind = f"0.0.0.0:{os.environ.get('PORT') or 8000}"
# One process: the API mostly waits for the database, and each further process costs about 80 MB of a 512 MB instance.
workers = max(1, int(os.environ.get("WEB_CONCURRENCY") or 1))
# Threads, because a `?wait=`, an event stream and an upload hold one for seconds; no asyncio driver is needed for that.
worker_class = "web.server.Worker"
threads = _found.web_threads
# Accepted connections that may be open at once, idle ones included; beyond it they wait in the kernel.
worker_connections = 1000
backlog = 512
# 4094 is too short for cursors and signed links behind some proxies; 8190 is the most that gunicorn takes.
limit_request_line = 8190
limit_request_fields = 100
limit_request_field_size = 8190
# Of the worker's main loop, not of a request: it turns every second, so 60 s without a sign mean that it is stuck.
timeout = 60
# On SIGTERM: waits and streams end within a second, uploads get the rest. Platforms kill after 30 s.
graceful_timeout = max(1, int(_found.shutdown_grace))
# Longer than the idle time of the usual load balancers (60 s), or one of them sends a request into a closing connection.
keepalive = 75
# A worker that is restarted now and then hides a leak and cuts off who waits.
max_requests = 0
# The workers' signs of life are written to a file; on a disk such a write may block for long.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108, PTH112 - Linux' memory
# gunicorn 25 and later open a socket for remote control in the user's home; nobody here uses it.
control_socket_disable = True
# Requests are counted in /metrics; what fails is logged where it fails.
accesslog = None
logger_class = "web.server.Log"
preload_app = False  # threads, connections and obstore do not survive a fork
proc_name = "agentflow-web"


def when_ready(arbiter: Any) -> None:
    server.limit_waits(arbiter.LISTENERS)


def post_worker_init(worker: Any) -> None:
    server.start(worker)


def worker_exit(_server: Any, worker: Any) -> None:
    server.stop(worker)
