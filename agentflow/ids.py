"""Ids of rows: UUIDs of version 7, in the order in which they were made."""

from __future__ import annotations

from uuid import UUID

from uuid_utils import compat


def new_id() -> UUID:
    """One that is greater than all that this process has made before.

    Behind the milliseconds since 1970 stands a counter (RFC 9562, section 6.2, method 1), so that many of the same millisecond
    are in order without getting ahead of the clock. Processes that were forked from one make different ones.
    """
    return compat.uuid7()
