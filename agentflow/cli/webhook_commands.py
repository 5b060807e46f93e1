"""`agentflow webhooks …` and `rotate-key`: on the database itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from pydantic import ValidationError

from agentflow import organizations, resealing
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.database import Connection
from agentflow.fetch import Guard
from agentflow.system import System
from agentflow.webhooks import config, endpoints, events, replays
from agentflow.webhooks.config import Config
from agentflow.webhooks.endpoints import Endpoint, Kind
from agentflow.webhooks.events import Filter


def create(
    org: str, source: str, name: str, config_text: str, secret_file: str | None, silence_after_s: float | None
) -> None:
    import actors  # noqa: F401 - fills the registry, by which a mapping is checked

    with connected() as system, system.database.transaction() as conn:
        organization = organizations.find(conn, org)
        if organization is None:
            raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
        wanted = _config(system, source, config_text)
        try:
            made, token, secret = endpoints.create(
                conn,
                organization.id,
                source,
                name,
                wanted,
                system.sealer,
                secret=_secret(secret_file),
                silence_after_s=silence_after_s,
            )
        except ValueError as error:
            raise Failure(f"the secret {error}", USAGE) from None
    print(f"/webhooks/{source}/{token}")
    if secret is not None:
        print(secret)
    _note(f"endpoint {made.id}: the address on your server{' and the secret' if secret else ''}; not shown again")


def list_all(org: str | None, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        organization = organizations.find(conn, org) if org is not None else None
        if org is not None and organization is None:
            raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
        found = endpoints.every(conn, organization.id if organization else None)
        slugs = {o.id: o.slug for o in organizations.every(conn)}
    if as_json:
        for each in found:
            row = {**dataclasses.asdict(dataclasses.replace(each, config=None)), "config": each.config.model_dump()}  # type: ignore[arg-type]
            print(json.dumps(row, default=str))
        return
    rows = [
        (e.id, slugs.get(e.organization_id, e.organization_id), e.source, e.name, e.config.action.kind, _state(e))
        for e in found
    ]
    if rows:
        output.console().print(output.table(("id", "organization", "source", "name", "action", "state"), rows))
    else:
        print("no endpoints yet")


def rotate(endpoint: str, kind: str, secret_file: str | None, grace_h: float) -> None:
    with connected() as system, system.database.transaction() as conn:
        found = _find(conn, endpoint)
        try:
            made = endpoints.rotate(
                conn, found, cast(Kind, kind), system.sealer, secret=_secret(secret_file), grace_s=grace_h * 3600
            )
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
    if made is not None:
        print(f"/webhooks/{found.source}/{made}" if kind == "token" else made)
    _note(f"the new {kind} is in force; the one before works for {grace_h:g} hours more")


def disable(endpoint: str, enable: bool) -> None:
    with connected() as system, system.database.transaction() as conn:
        found = _find(conn, endpoint)
        (endpoints.enable if enable else endpoints.disable)(conn, found)
    print(f"endpoint {found.id} ({found.name}) is {'enabled' if enable else 'disabled'}")


def list_events(endpoint: str | None, outcome: str | None, verdict: str | None, limit: int, as_json: bool) -> None:
    wanted = Filter(UUID(endpoint) if endpoint else None, outcome=cast(Any, outcome), verdict=cast(Any, verdict))
    with connected() as system, system.database.connection() as conn:
        found = events.search(conn, None, wanted, limit=limit)
    if as_json:
        output.json_lines(found)
        return
    rows = [
        (e.id, output.ago(e.received_at), e.type, e.verdict, e.outcome or "pending", e.duplicates, e.reason or e.detail)
        for e in found
    ]
    if rows:
        columns = ("id", "received", "type", "verdict", "outcome", "again", "why")
        output.console().print(output.table(columns, rows, right=("again",)))
    else:
        print("no webhooks")


def replay(event: str, even_if_stale: bool) -> None:
    with connected() as system:
        with system.transaction() as transaction:
            found = events.get(transaction.conn, None, UUID(event))
            if found is None:
                raise Failure(f"there is no webhook event {event}")
            try:
                job = replays.one(transaction, found, even_if_stale=even_if_stale)
            except replays.NotReplayable:
                raise Failure(f"event {event} was refused: nobody knows who sent it") from None
        print(job.id)


def rotate_key() -> None:
    with connected() as system, system.database.connection() as conn:
        if system.sealer.key_id is None:
            raise Failure("ENCRYPTION_KEY is not set; make one with: openssl rand -base64 32", USAGE)
        done = resealing.reseal(conn, system.sealer)
        key_id = system.sealer.key_id
    for table, row_id, why in done.unreadable:
        _note(f"{table} {row_id} cannot be read: {why}")
    if done.unreadable:
        raise Failure(
            f"{len(done.unreadable)} of {done.seen} values are under other keys: set ENCRYPTION_KEY_OLD to theirs"
        )
    if done.busy:
        raise Failure(
            f"{len(done.busy)} of {done.seen} values are being renewed, and are under the old key: run this again in a minute"
        )
    print(f"{done.changed} of {done.seen} values encrypted anew: all are under the key {key_id} now")


def _config(system: System, source: str, text: str) -> Config:
    try:
        wanted = Config.model_validate_json(text)
        config.check(source, wanted, guard=Guard(allow=system.settings.fetch_allow))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Failure(f"--config: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}", USAGE) from None
    except config.InvalidConfig as error:
        raise Failure(f"--config: {error}", USAGE) from None
    return wanted


def _secret(file: str | None) -> str | None:
    """From a file or stdin: what stands in a command line stands in the list of processes and the shell's history."""
    if file is None:
        return None
    try:
        return (sys.stdin.read() if file == "-" else Path(file).read_text()).strip()
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}", USAGE) from None


def _find(conn: Connection, endpoint: str) -> Endpoint:
    found = endpoints.get(conn, None, UUID(endpoint))
    if found is None:
        raise Failure(f"there is no webhook endpoint {endpoint}; `agentflow webhooks list` shows them", USAGE)
    return found


def _state(endpoint: Endpoint) -> str:
    if endpoint.disabled_at is not None:
        return f"disabled {output.ago(endpoint.disabled_at)}"
    return f"silent since {output.ago(endpoint.silent_since)}" if endpoint.silent_since is not None else "open"


def _note(text: str) -> None:
    print(f"agentflow: {text}", file=sys.stderr)
