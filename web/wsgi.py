"""`gunicorn -c web/gunicorn_config.py web.wsgi:app`: imported in each worker process, after the fork."""

from __future__ import annotations

import actors  # noqa: F401 - importing them makes their job types known
from agentflow import settings
from agentflow.system import System
from web import create_app

app = create_app(System(settings.current(), "web"))
