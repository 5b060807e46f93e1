"""The dashboard at /dashboard: pages for people, rendered here, over the functions behind the API.

web.dashboard.frame    what every page has: who is signed in, the form token, language, headers; how a page is declared
web.dashboard.signing  in and out
web.dashboard.words    English and Russian
web.dashboard.shown    how times, numbers and JSON are shown
web.dashboard.*        the pages, a module for each
"""

from __future__ import annotations

from flask import Flask

from web.api import Services
from web.dashboard import (
    crm,
    dead_letters,
    flight,
    frame,
    graph,
    job,
    jobs,
    knowledge,
    limits,
    overview,
    renders,
    runbook,
    schedules,
    signing,
    webhooks,
)


def install(app: Flask, services: Services) -> None:
    """A further page is a module with its `pages`, named here, and a line in frame.SECTIONS."""
    groups = [signing.pages, overview.pages, jobs.pages, job.pages, dead_letters.pages, webhooks.pages, flight.pages]
    groups += [renders.pages, knowledge.pages, graph.pages, crm.pages, limits.pages, schedules.pages]
    frame.install(app, services, [*groups, runbook.pages])
