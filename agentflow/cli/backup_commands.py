"""`agentflow backup` and `agentflow restore`."""

from __future__ import annotations

import sys
import time

from agentflow.backup import making, restoring
from agentflow.backup.errors import Damaged, Refused
from agentflow.backup.manifest import Manifest
from agentflow.backup.place import Place
from agentflow.cli import output, progress
from agentflow.cli.direct import connected, unprepared
from agentflow.cli.errors import Failure
from agentflow.jobs.model import QUEUES


def backup(where: str, keep: int | None, as_json: bool) -> None:
    with connected() as system, progress.of_bytes(output.console(stderr=True)) as show:
        made = making.make(system, Place.open(where, make=True), keep=keep, report=show)
    said = made.manifest
    if as_json:
        output.print_json({**_summary(said), "copied_files": made.copied, "copied_bytes": made.copied_bytes})
    else:
        new = (
            f", {made.copied} of them new ({output.size(made.copied_bytes)})" if made.copied < said.files.count else ""
        )
        print(
            f"backup {said.id}: {said.rows} rows, {said.files.count} files{new}; {output.size(said.size)} in all,"
            f" in {output.duration(said.took_s)}"
        )
    if made.dropped:
        _note(f"deleted {len(made.dropped)} older: {', '.join(made.dropped)}")
    if said.unsealed:
        _note(
            f"{said.unsealed} credentials are not encrypted in the database, and so not in the backup: set ENCRYPTION_KEY"
            " and run `agentflow rotate-key`"
        )
    if said.gone:
        _note(f"{len(said.gone)} files that rows name are not in storage; the manifest lists them")


def show(where: str, as_json: bool) -> None:
    place = Place.open(where)
    listed = place.list()
    found: list[Manifest] = []
    for id_ in listed.finished:
        try:
            found.append(place.manifest(id_))
        except (Refused, Damaged) as error:
            _note(str(error))
    if as_json:
        output.print_json({"backups": [_summary(said) for said in found], "unfinished": listed.unfinished})
        return
    rows = [
        (said.id, output.ago(said.taken_at), said.version, said.rows, said.files.count, output.size(said.size))
        for said in reversed(found)
    ]
    if rows:
        columns = ("backup", "made", "version", "rows", "files", "size")
        output.console().print(output.table(columns, rows, right=("rows", "files", "size")))
    else:
        print("no backups")
    for id_ in listed.unfinished:
        print(f"{id_} was not finished")


def check(where: str, id_: str | None) -> None:
    place = Place.open(where)
    said = _chosen(place, id_)
    began = time.monotonic()
    with progress.of_bytes(output.console(stderr=True)) as bar:
        restoring.verify(place, said, bar)
    print(f"backup {said.id} is whole: {output.size(said.size)} read in {output.duration(time.monotonic() - began)}")


def restore(where: str, id_: str | None, hold: bool, as_json: bool) -> None:
    place = Place.open(where)
    said = _chosen(place, id_)
    with unprepared() as system, progress.of_bytes(output.console(stderr=True)) as bar:
        done = restoring.restore(system, place, said, hold=hold, report=bar)
    if as_json:
        output.print_json(
            {**_summary(said), "open_jobs": done.open_jobs, "held": hold, "restored_in_s": round(done.took_s, 1)}
        )
        return
    print(
        f"restored backup {said.id}, of {output.ago(said.taken_at)}: {said.rows} rows and {said.files.count} files,"
        f" {output.size(said.size)}, in {output.duration(done.took_s)}"
    )
    if hold:
        resume = "; ".join(f"agentflow rules resume queue {queue}" for queue in QUEUES)
        print(
            f"every queue is paused. {done.open_jobs} jobs were open then: `agentflow jobs list --state queued` shows them,"
            f" `agentflow jobs cancel` ends one. When you have looked: {resume}"
        )
    else:
        print(f"{done.open_jobs} jobs that were open then run as soon as there are workers")


def _chosen(place: Place, id_: str | None) -> Manifest:
    said = place.manifest(id_) if id_ is not None else place.newest()
    if said is None:
        raise Failure(f"there is no finished backup in {place.shown}")
    return said


def _summary(said: Manifest) -> dict[str, object]:
    return {
        "id": said.id,
        "taken_at": said.taken_at,
        "version": said.version,
        "rows": said.rows,
        "files": said.files.count,
        "bytes": said.size,
        "took_s": said.took_s,
        "sealed_under": said.sealed_under,
    }


def _note(text: str) -> None:
    print(f"agentflow: {text}", file=sys.stderr)
