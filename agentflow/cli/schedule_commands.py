"""`agentflow schedules …`: on the database itself, like the other commands of the operator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.cli.organization_commands import find_organization
from agentflow.database import Connection
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob
from agentflow.organizations import DEFAULT_ORGANIZATION
from agentflow.schedules import firing, records, ticks
from agentflow.schedules.records import NameTaken, Schedule, TooMany, Wanted
from agentflow.schedules.when import InvalidWhen, When

_SHOWN_TIMES = 5


def list_all(org: str | None, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = records.search(conn, find_organization(conn, org).id if org is not None else None)
    if as_json:
        for each in found:
            print(json.dumps(_said(each), default=str))
    elif found:
        rows = [
            (each.id, each.organization_id, each.name, each.said, each.type, output.ago(each.next_at) or _why_not(each))
            for each in found
        ]
        columns = ("id", "organization", "name", "when", "type", "next")
        output.console().print(output.table(columns, rows, right=("organization",)))
    else:
        print("no schedules yet")


def create(org: str, name: str, type_: str, payload: str, when: When, jitter_s: int) -> None:
    import actors  # noqa: F401 - makes the types known

    with connected() as system, _refusals(), system.database.transaction() as conn:
        organization = find_organization(conn, org)
        wanted = Wanted(name, when, type_, _payload(payload), jitter_s)
        firing.check(system, organization.id, wanted, records.now(conn))
        made = records.create(conn, organization.id, wanted, most=system.settings.schedules_most)
    print(f"schedule {made.id}: {made.said}, next {output.ago(made.next_at)}")


def show(named: str, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = _find(conn, named)
        times = found.when.following(records.now(conn), _SHOWN_TIMES) if found.enabled else []
        history = ticks.history(conn, found.organization_id, found.id, limit=10)
    if as_json:
        past = [{"at": t.at, "outcome": t.outcome, "job_id": t.job_id, "missed": t.missed} for t in history]
        print(json.dumps({**_said(found), "next_times": times, "ticks": past}, default=str))
        return
    print(f"{found.name}: {found.type}, {found.said}{'' if found.enabled else ', paused'}")
    for time in times:
        print(f"  next  {time:%Y-%m-%d %H:%M:%S} UTC")
    rows = [(output.ago(t.at), t.outcome, t.missed or "", t.job_id, (t.facts or {}).get("error", "")) for t in history]
    if rows:
        output.console().print(output.table(("due", "outcome", "missed", "job", "error"), rows))


def enable(named: str, enabled: bool) -> None:
    with connected() as system, system.database.transaction() as conn:
        found = _find(conn, named, hold=True)
        wanted = Wanted(found.name, found.when, found.type, found.payload, found.jitter_s, enabled)
        changed = records.update(conn, found, wanted)
    print(
        f"{changed.name} goes on: next {output.ago(changed.next_at) or 'never'}"
        if enabled
        else f"{changed.name} is paused"
    )


def run(named: str) -> None:
    import actors  # noqa: F401 - makes the types known

    with connected() as system, _refusals():
        with system.transaction() as transaction:
            job_id = firing.fire_now(transaction, _find(transaction.conn, named, hold=True))
        print(job_id)


def delete(named: str) -> None:
    with connected() as system, system.database.transaction() as conn:
        found = _find(conn, named, hold=True)
        records.delete(conn, found.organization_id, found.id)
    print(f"schedule {found.name} is deleted")


def _find(conn: Connection, named: str, *, hold: bool = False) -> Schedule:
    """By id, or by a name of the organization that an installation starts with."""
    try:
        found = records.get(conn, None, UUID(named), hold=hold)
    except ValueError:
        found = records.named(conn, DEFAULT_ORGANIZATION, named)
        found = records.get(conn, None, found.id, hold=hold) if found is not None else None
    if found is None:
        raise Failure(f"there is no schedule {named!r}; `agentflow schedules list` shows them", USAGE)
    return found


def _payload(text: str) -> dict[str, Any]:
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise Failure(f"--payload is not JSON: {error}", USAGE) from None
    if not isinstance(payload, dict):
        raise Failure("--payload must be a JSON object", USAGE)
    return payload


def _said(schedule: Schedule) -> dict[str, Any]:
    return {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__}


def _why_not(schedule: Schedule) -> str:
    return "over" if schedule.enabled else "paused"


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (InvalidWhen, InvalidJob, UnknownType) as error:
        raise Failure(str(error), USAGE) from None
    except (NameTaken, TooMany) as error:
        raise Failure(str(error)) from None


def moment(text: str) -> datetime:
    """A time as people write it; without a zone it is UTC. Raises Failure."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise Failure(f"--at {text!r} is not a time such as 2026-03-01T07:30:00+01:00", USAGE) from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)
