"""Why there is no backup, or no system of it. The messages are sentences for people, and name the fix."""

from __future__ import annotations


class Refused(Exception):
    """It was not begun, and nothing was changed: the place, the target or a setting is not the right one."""


class Damaged(Exception):
    """A backup is not what it was when it was made. Of a restore that ends like this nothing can be seen in the database."""
