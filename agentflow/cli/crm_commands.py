"""`agentflow crm …`: CRM accounts, on the database itself."""

from __future__ import annotations

import sys
from typing import Literal
from uuid import UUID

from agentflow import organizations
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.database import Connection
from agentflow.kommo import accounts, hosts, runs, syncing
from agentflow.kommo.accounts import Account, Credentials


def connect(host: str, org: str, name: str | None) -> None:
    """The token comes on stdin: on the command line all users of the machine could read it."""
    import actors  # noqa: F401 - the sync that follows is of its types

    if sys.stdin.isatty():
        print("the account's long-lived token, then Enter:", file=sys.stderr)
    token = sys.stdin.readline().strip()
    if not token:
        raise Failure("no token came on stdin: agentflow crm connect HOST < token.txt", USAGE)
    with connected() as system:
        try:
            base_url = hosts.base_url(host, allow=system.settings.fetch_allow)
        except hosts.NotKommo as error:
            raise Failure(f"{host!r} {error}", USAGE) from None
        with system.transaction() as transaction:
            organization = organizations.find(transaction.conn, org)
            if organization is None:
                raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
            made = accounts.create(
                transaction.conn,
                organization.id,
                system.sealer,
                name=name or base_url.partition("://")[2],
                base_url=base_url,
                credentials=Credentials(token=token),
            )
            syncing.submit(transaction, organization.id, made.id, "incremental")
    print(made.id)


def list_all(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = accounts.every(conn, None)
        slugs = {o.id: o.slug for o in organizations.every(conn)}
    if as_json:
        output.json_lines(found)
        return
    rows = [
        (
            a.id,
            slugs.get(a.organization_id, a.organization_id),
            a.name,
            a.state if a.deletions_held is None else f"{a.state}, {a.deletions_held} deletions wait",
            a.state_reason,
            output.ago(a.next_sync_at),
        )
        for a in found
    ]
    if rows:
        columns = ("id", "organization", "name", "state", "why", "next sync")
        output.console().print(output.table(columns, rows))
    else:
        print("no accounts; `agentflow crm connect HOST --org SLUG` connects one")


def list_runs(account: str, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        one = _account(conn, account)
        found = runs.of_account(conn, one.organization_id, one.id)
    if as_json:
        output.json_lines(found)
        return
    rows = [
        (
            output.ago(r.started_at),
            f"{r.mode}{' (plan)' if r.plan else ''}",
            r.state,
            r.calls,
            _changes(r.counts),
            r.error,
        )
        for r in found
    ]
    if rows:
        columns = ("started", "mode", "state", "calls", "changes", "error")
        output.console().print(output.table(columns, rows, right=("calls",)))
    else:
        print("no runs yet")


def sync(account: str, mode: Literal["incremental", "backfill", "reconcile"], plan: bool) -> None:
    import actors  # noqa: F401 - declares the type

    with connected() as system, system.transaction() as transaction:
        one = _account(transaction.conn, account)
        job = syncing.submit(transaction, one.organization_id, one.id, mode, plan=plan).job
    print(job.id)


def confirm(account: str) -> None:
    import actors  # noqa: F401 - declares the type

    with connected() as system, system.transaction() as transaction:
        one = _account(transaction.conn, account)
        confirmed = accounts.confirm_deletions(transaction.conn, one.organization_id, one.id)
        if confirmed is None:
            raise Failure(f"no deletions of {one.name} wait to be confirmed")
        job = syncing.submit(transaction, one.organization_id, one.id, "reconcile").job
    print(job.id)
    print(f"agentflow: up to {confirmed} of each kind may be deleted by this reconciliation", file=sys.stderr)


def _account(conn: Connection, named: str) -> Account:
    found = accounts.get(conn, None, UUID(named))
    if found is None:
        raise Failure(f"there is no account {named}; `agentflow crm list` shows them", USAGE)
    return found


def _changes(counts: dict[str, dict[str, int]]) -> str:
    """`leads +3 ~1 -2`, of each kind that changed."""
    signs = {"created": "+", "updated": "~", "deleted": "-", "held": "held "}
    said = []
    for kind, of_kind in sorted(counts.items()):
        marks = [f"{sign}{of_kind[what]}" for what, sign in signs.items() if of_kind.get(what)]
        if marks:
            said.append(f"{kind} {' '.join(marks)}")
    return ", ".join(said)
