"""`agentflow orgs …`, `keys …`, `callbacks …`: on the database itself, so that the first key can be made before there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import cast
from uuid import UUID

from agentflow import organizations, signing
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.database import Connection
from agentflow.jobs import callbacks
from agentflow.organizations import ApiKey, Organization, Scope


def create(slug: str, name: str | None) -> None:
    with connected() as system, system.database.transaction() as conn:
        try:
            made = organizations.create(conn, slug, name or slug)
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
        except organizations.SlugTaken as error:
            raise Failure(str(error)) from None
    print(
        f"organization {made.slug} is number {made.id}; its first key: agentflow keys create --org {made.slug} --name …"
    )


def list_all(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = organizations.every(conn)
    if as_json:
        output.json_lines(found)
        return
    rows = [(o.id, o.slug, o.name, output.ago(o.created_at)) for o in found]
    output.console().print(output.table(("number", "slug", "name", "created"), rows, right=("number",)))


def create_key(org: str, name: str, scopes: Sequence[str], expires_days: float | None) -> None:
    expires_at = datetime.now(UTC) + timedelta(days=expires_days) if expires_days else None
    with connected() as system, system.database.transaction() as conn:
        organization = find_organization(conn, org)
        _made, key = organizations.create_key(
            conn, organization.id, name, cast(Sequence[Scope], scopes), expires_at=expires_at
        )
    print(key)
    _note(f"a key of {organization.slug} for {', '.join(scopes)}; it is not shown again")


def list_keys(org: str | None, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        organization = find_organization(conn, org) if org is not None else None
        found = organizations.keys(conn, organization.id if organization else None)
        slugs = {o.id: o.slug for o in organizations.every(conn)}
    if as_json:
        output.json_lines(found)
        return
    rows = [
        (
            k.id,
            slugs.get(k.organization_id, k.organization_id),
            k.prefix,
            k.name,
            ", ".join(k.scopes),
            _state(k),
            output.ago(k.last_used_at) or "never",
        )
        for k in found
    ]
    if rows:
        columns = ("id", "organization", "begins with", "name", "scopes", "state", "used")
        output.console().print(output.table(columns, rows))
    else:
        print("no keys yet")


def rotate_key(named: str, grace_h: float) -> None:
    with connected() as system, system.database.transaction() as conn:
        old = _key(conn, named)
        rotated = organizations.rotate_key(conn, old.organization_id, old.id, grace_s=grace_h * 3600)
        if rotated is None:
            raise Failure(f"key {old.prefix} was revoked or has expired: make a new one")
    print(rotated[1])
    _note(f"the new key; {old.prefix} works for {grace_h:g} hours more")


def revoke_key(named: str) -> None:
    with connected() as system, system.database.transaction() as conn:
        old = _key(conn, named)
        organizations.revoke_key(conn, old.organization_id, old.id)
    print(f"key {old.prefix} ({old.name}) is revoked")


def list_callbacks(subject: str, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = callbacks.of(conn, None, UUID(subject))
    if as_json:
        output.json_lines(found)
        return
    if not found:
        print("no callbacks")
        return
    console = output.console()
    for each in found:
        what = f"replay of {each.replay_of}" if each.replay_of else "callback"
        print(
            f"{what} {each.id} to {each.url}: {each.state}"
            + (f", next {output.ago(each.next_at)}" if each.next_at else "")
        )
        rows = [
            (a.attempt, output.ago(a.at), f"{a.duration_ms} ms", a.status, a.error, a.response) for a in each.attempts
        ]
        if rows:
            console.print(output.table(("attempt", "at", "took", "status", "error", "response"), rows))


def replay_callback(callback: str) -> None:
    with connected() as system:
        with system.transaction() as transaction:
            job = callbacks.replay(transaction.conn, None, None, UUID(callback))
            if job is None:
                raise Failure(f"there is no callback {callback}")
            transaction.rings.append(callbacks.ring_for(job))
        print(job.id)


def create_secret(org: str, grace_h: float) -> None:
    with connected() as system, system.database.transaction() as conn:
        organization = find_organization(conn, org)
        _made, secret = signing.create_secret(conn, organization.id, system.sealer, grace_s=grace_h * 3600)
    print(secret)
    _note(f"signs the callbacks of {organization.slug} from now on; it is not shown again")


def list_secrets(org: str) -> None:
    with connected() as system, system.database.connection() as conn:
        found = signing.secrets_of(conn, find_organization(conn, org).id)
    if found:
        rows = [(s.id, output.ago(s.created_at), output.ago(s.expires_at) or "when another is made") for s in found]
        output.console().print(output.table(("id", "created", "ends"), rows))
    else:
        print("no secret: callbacks go out unsigned until `agentflow callbacks secret` makes one")


def find_organization(conn: Connection, named: str) -> Organization:
    organization = organizations.find(conn, named)
    if organization is None:
        raise Failure(f"there is no organization {named!r}; `agentflow orgs list` shows them", USAGE)
    return organization


def _key(conn: Connection, named: str) -> ApiKey:
    """By id or by prefix. A whole key works, too: whoever finds one in a log wants it gone, not looked up."""
    found = organizations.find_key(conn, named)
    if found is None:
        raise Failure(f"there is no key {named[:15]!r}; `agentflow keys list` shows them", USAGE)
    return found


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return f"revoked {output.ago(key.revoked_at)}"
    if key.expires_at is None:
        return "works"
    return f"expire{'d' if key.expires_at <= datetime.now(UTC) else 's'} {output.ago(key.expires_at)}"


def _note(text: str) -> None:
    print(f"agentflow: {text}", file=sys.stderr)
