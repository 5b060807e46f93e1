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
from web.dashboard import dead_letters, flight, frame, job, jobs, overview, runbook, signing, webhooks


def install(app: Flask, services: Services) -> None:
    """A further page is a module with its `pages`, named here, and a line in frame.SECTIONS."""
    frame.install(
        app,
        services,
        [
            *(signing.pages, overview.pages, jobs.pages, job.pages, dead_letters.pages, runbook.pages),
            *(webhooks.pages, flight.pages),
        ],
    )
