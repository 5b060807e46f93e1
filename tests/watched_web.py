"""`gunicorn tests.watched_web:app`: a web process that takes the jobs of tests/watched_worker.py."""

from tests import watched_worker  # noqa: F401 - registers its types
from web.wsgi import app

__all__ = ["app"]
