"""Cleaning up in storage: files whose rows are gone, files that never got a row, and what killed writes left."""

from __future__ import annotations

from typing import Final

from agentflow import log
from agentflow.jobs import files
from agentflow.system import System
from scheduler.calendar import Done
from scheduler.clean_up import until_done

logger = log.get(__name__)

_LEFTOVER_AGE_S: Final = 86_400.0
#: Each installation leaves its mark here.
_MARKS: Final = "installations"


def remove_doomed(system: System) -> Done:
    """Files of deleted jobs and videos. Behind while some of them cannot be removed."""
    done = until_done(system, lambda: files.remove_batch(system.database, system.storage), files.BATCH)
    with system.database.connection() as conn:
        stuck = files.overdue(conn)
    return Done({**done.facts, "stuck": stuck}, behind=done.behind or stuck > 0)


def doom_orphans(system: System) -> Done:
    """Files that no row names. Not in a storage that other installations use too: this one knows its own files alone."""
    mine = f"{_MARKS}/{system.installation_id}"
    marks = {stored.key for stored in system.storage.list(_MARKS)}
    if mine not in marks:
        system.storage.put_bytes(mine, b"")
        return Done({"doomed": 0})  # from tomorrow on: by then others that use it have left theirs
    if others := sorted(marks - {mine}):
        logger.warning("orphaned files stay: another installation uses this storage, too", marks=others)
        return Done({"doomed": 0})
    doomed = list(files.orphans(system.database, system.storage))
    for start in range(0, len(doomed), files.BATCH):
        with system.database.connection() as conn:
            files.doom(conn, doomed[start : start + files.BATCH])
    return Done({"doomed": len(doomed)})


def sweep(system: System) -> Done:
    """What killed writes left on a disk."""
    return Done({"deleted": system.storage.sweep(_LEFTOVER_AGE_S)})
