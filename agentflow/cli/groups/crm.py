"""`crm`: accounts and their syncs."""

from __future__ import annotations

from typing import Literal

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def crm() -> None:
    """CRM accounts (Kommo): connecting them, their syncs, plans and runs."""


_MODE = click.option(
    "--mode",
    type=click.Choice(["incremental", "backfill", "reconcile"]),
    default="incremental",
    show_default=True,
    help="What has changed; everything; or everything, and what is gone is deleted.",
)
_ACCOUNT = click.argument("account", metavar="ID", type=click.UUID)


@crm.command("connect")
@click.argument("host")
@options.ORGANIZATION
@click.option("--name", help="For people.  [default: the host]")
def connect_account(host: str, org: str, name: str | None) -> None:
    """Connect an account such as example.kommo.com; its long-lived token is read from stdin. Prints the account's id."""
    from agentflow.cli import crm_commands

    crm_commands.connect(host, org, name)


@crm.command("list")
@options.AS_LINES
def list_accounts(as_json: bool) -> None:
    """The accounts of all organizations, and what stopped those that stopped."""
    from agentflow.cli import crm_commands

    crm_commands.list_all(as_json)


@crm.command("runs")
@_ACCOUNT
@options.AS_LINES
def list_runs(account: object, as_json: bool) -> None:
    """What the syncs of an account did, the newest first."""
    from agentflow.cli import crm_commands

    crm_commands.list_runs(str(account), as_json)


@crm.command("sync")
@_ACCOUNT
@_MODE
def sync_account(account: object, mode: Literal["incremental", "backfill", "reconcile"]) -> None:
    """Sync an account now; prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.sync(str(account), mode, plan=False)


@crm.command("plan")
@_ACCOUNT
@_MODE
def plan_account(account: object, mode: Literal["incremental", "backfill", "reconcile"]) -> None:
    """A dry run: its result (`agentflow jobs show`) says what a sync would change, and what it costs. Prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.sync(str(account), mode, plan=True)


@crm.command("confirm")
@_ACCOUNT
def confirm_account(account: object) -> None:
    """Let the deletions through that wait to be confirmed; prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.confirm(str(account))
