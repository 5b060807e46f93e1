"""The HTTP API: jobs and videos in, their state out; health and metrics.

web.api         operations with typed bodies, and the checks before each of them
web.access      who is asking
web.jobs …      the operations, a module for each kind of thing
web.dashboard   pages for people
web.server      gunicorn's side: its worker, start and stop of a process
"""

from __future__ import annotations

import time
from typing import Final

from flask import Flask, Response, g, request
from werkzeug.routing import BaseConverter

from agentflow import metrics, sentry, traces
from agentflow.comfyui.versions import NO_NAME
from agentflow.system import System
from web import (
    artefacts,
    callbacks,
    crm,
    crm_oauth,
    dashboard,
    docs,
    embedding_models,
    endpoints,
    flights,
    graph,
    job_logs,
    jobs,
    knowledge,
    organizations,
    problems,
    renders,
    rules,
    schedules,
    search,
    status,
    videos,
    webhook_events,
    webhooks,
    workflows,
)
from web.access import Access
from web.api import Services, mount
from web.waiting import Seats

__all__ = ["create_app"]

#: A request's statement takes milliseconds. Callers, and the platform's checks of health behind them, wait for seconds only.
ANSWER_TIMEOUT_S: Final = 8.0


class _WorkflowName(BaseConverter):
    """Any but the one that is an operation: else a GET of it would be a look at a workflow."""

    regex = f"(?!{NO_NAME}$)[^/]+"


def create_app(system: System) -> Flask:
    """A WSGI application over `system`. Connects to nothing before the first request that needs it."""
    system.database.answer_timeout_s = ANSWER_TIMEOUT_S
    app = Flask("web", static_folder=None)
    app.url_map.merge_slashes = False  # a key with `//` is another key, not a redirect
    app.url_map.strict_slashes = False
    app.url_map.converters["workflow"] = _WorkflowName
    app.extensions["agentflow"] = services = Services(system, Access(system), Seats(system))
    app.before_request(_begin)
    app.after_request(_end)
    problems.install(app)
    groups = (
        *(
            jobs.routes,
            job_logs.routes,
            callbacks.routes,
            videos.routes,
            knowledge.routes,
            graph.routes,
            artefacts.routes,
        ),
        *(search.routes, embedding_models.routes, flights.routes),
        *(renders.routes, workflows.routes),
        *(endpoints.routes, webhook_events.routes, webhooks.routes),
        *(crm.routes, crm_oauth.routes, schedules.routes),
        *(organizations.routes, rules.routes, status.system_routes, status.open_routes),
    )
    for routes in groups:
        mount(app, services, routes)
    docs.install(app, groups)
    dashboard.install(app, services)
    return app


def _begin() -> None:
    g.began = time.monotonic()
    traces.begin(sentry.trace_of_request(request.headers.get("traceparent")))


def _end(response: Response) -> Response:
    route = request.url_rule.rule if request.url_rule else "none"
    metrics.http_answered(request.method, route, response.status_code, time.monotonic() - g.began)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")
    return response
