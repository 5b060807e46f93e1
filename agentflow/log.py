"""Logging: structured JSON lines in production, readable lines on a terminal. Messages read alone; ids and units are fields."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from agentflow.settings import Settings

_NOISY = {
    "pika": logging.CRITICAL,
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
    "apscheduler": logging.ERROR,  # what it warns of is a look that takes longer than the time to the next
    "urllib3": logging.CRITICAL,  # Sentry's SDK: each attempt to connect; agentflow/sentry/ says it now and then
    "psycopg.pool": logging.CRITICAL,  # each attempt to connect; agentflow/presence.py says it once
}

# Until `configure`, in commands that never call it and in programs that import us: warnings only, and not on stdout.
structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.stdlib.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False),
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)


def configure(settings: Settings, process: str) -> None:
    """Send everything, the libraries' records too, through one formatter to stderr. `process` is web, worker …"""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    pretty = settings.agentflow_env == "development"
    render: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if pretty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                _add_process(process),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.worker_log_level)
    for name, level in _NOISY.items():
        logging.getLogger(name).setLevel(level)
    handler.addFilter(_said_elsewhere)
    # Dramatiq logs "Message … was skipped" and each message's arguments; what became of a job is logged by us, once.
    logging.getLogger("dramatiq.worker.WorkerThread").setLevel(logging.ERROR)


def _add_process(process: str) -> Any:
    def add(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        event["process"] = process
        return event

    return add


def _said_elsewhere(record: logging.LogRecord) -> bool:
    """Drop what each of Dramatiq's consumers says every 3 s while its broker is away: the broker says it once."""
    if record.name.startswith("dramatiq.worker.ConsumerThread"):
        return not str(record.msg).startswith(("Consumer encountered a connection error", "Restarting consumer"))
    return True


def get(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
