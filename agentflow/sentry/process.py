"""Starting and stopping the SDK in a process, and what goes out: nothing that opens something."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from agentflow import __version__, log, redaction
from agentflow.redaction import Redactor
from agentflow.sentry.lines import Errors

if TYPE_CHECKING:
    from agentflow.settings import Settings

logger = log.get(__name__)

#: For connecting to Sentry and for each answer, in the SDK's thread.
_TIMEOUT_S: Final = 5
#: Envelopes that wait for it; what comes while so many wait is dropped.
_MOST_WAITING: Final = 300
_SAID_AGAIN_S: Final = 600.0
_QUIET_PATHS: Final = ("/health", "/metrics")


@dataclass(frozen=True, slots=True)
class Started:
    """Of a process that reports."""

    redactor: Redactor
    monitors: str
    traces_rate: float
    errors: Errors


_started: Started | None = None


def started() -> Started | None:
    return _started


def start(settings: Settings, process: str, *, flask: bool = False) -> None:
    """Once in each process, after the fork and before it works. Nothing happens without SENTRY_DSN."""
    global _started
    if settings.sentry_dsn is None or _started is not None:
        return
    import sentry_sdk

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # profiles of transactions: what is to follow knows no share of them
        sentry_sdk.init(
            dsn=settings.sentry_dsn.get_secret_value(),
            environment=settings.sentry_environment or settings.agentflow_env,
            release=f"agentflow@{__version__}",
            default_integrations=False,
            auto_enabling_integrations=False,
            integrations=_integrations(flask),
            transport=_transport(),
            transport_queue_size=_MOST_WAITING,
            ca_certs=str(settings.trust.bundle()) if settings.tls_ca_file else None,
            traces_sampler=_rate,
            profiles_sample_rate=settings.sentry_profiles_sample_rate,
            trace_propagation_targets=[],  # Kommo, OpenRouter and callers' servers get no headers of ours
            include_local_variables=False,  # they hold tokens, and people's texts
            max_request_body_size="never",
            max_value_length=8192,
            max_breadcrumbs=0,  # a job's own lines take their place
            auto_session_tracking=False,
            before_send=_scrubbed,
            before_send_transaction=_scrubbed_transaction,
            spotlight=False,
        )
    sentry_sdk.get_global_scope().set_tag("process", process)
    errors = Errors()
    _started = Started(redaction.of(settings), settings.sentry_monitors, settings.sentry_traces_sample_rate, errors)
    logging.getLogger().addHandler(errors)


def stop(within_s: float) -> None:
    """Send what waits, for so long at most; nothing is sent after that."""
    global _started
    if _started is None:
        return
    import sentry_sdk

    logging.getLogger().removeHandler(_started.errors)
    sentry_sdk.get_client().close(timeout=max(0.0, within_s))
    sentry_sdk.get_global_scope().set_client(None)
    _started = None


def _integrations(flask: bool) -> list[Any]:
    from sentry_sdk.integrations.httpx2 import Httpx2Integration

    found: list[Any] = [Httpx2Integration()]
    if flask:
        from sentry_sdk.integrations.flask import FlaskIntegration

        found.append(FlaskIntegration(transaction_style="url"))
    return found


def _transport() -> Any:
    from sentry_sdk.transport import HttpTransport

    class Transport(HttpTransport):
        """The SDK's own, less patient, which says in our log that it does not get through."""

        TIMEOUT = _TIMEOUT_S
        _said_at = -math.inf

        def on_dropped_event(self, reason: str) -> None:
            if time.monotonic() - self._said_at > _SAID_AGAIN_S:
                self._said_at = time.monotonic()
                logger.warning("Sentry does not take what it is sent: it is dropped", reason=reason)

    return Transport


def _rate(context: Mapping[str, Any]) -> float:
    environ = context.get("wsgi_environ")
    if environ is not None and str(environ.get("PATH_INFO", "")).startswith(_QUIET_PATHS):
        return 0.0
    parent = context.get("parent_sampled")
    if parent is not None:
        return float(parent)
    return _started.traces_rate if _started is not None else 0.0


def _scrubbed(event: Any, hint: Mapping[str, Any]) -> Any:
    """Called by the SDK for each event: also of what is not ours, such as an error's text that quotes a payload."""
    if _started is None:
        return None
    event.pop("request", None)  # addresses, headers; the route is the transaction's name
    return _started.redactor.also(hint.get("secrets", ())).value(event)


def _scrubbed_transaction(event: Any, _hint: Mapping[str, Any]) -> Any:
    """Its spans say whom a job called and for how long, and nothing of the address but the host."""
    if _started is None:
        return None
    event.pop("request", None)
    for span in event.get("spans", ()):
        data = span.get("data") or {}
        if span.get("op") == "http.client":
            method, _, url = str(span.get("description", "")).partition(" ")
            span["description"] = f"{method} {_host_of(url)}"
            for name in ("url", "http.query", "http.fragment"):
                data.pop(name, None)
        else:
            span["description"] = _started.redactor.text(str(span.get("description") or ""))
            span["data"] = _started.redactor.value(data)
    return event


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
