"""What goes wrong with the embedded servers."""

from __future__ import annotations


class EmbeddedError(RuntimeError):
    """The embedded servers cannot be had. The message is one line that tells what to do."""


ELSEWHERE = "or set DATABASE_URL to a Postgres of your own"
