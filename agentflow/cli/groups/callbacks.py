"""`callbacks`: deliveries, and the secrets that sign them."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def callbacks() -> None:
    """Callbacks: what was delivered, telling it once more, and the secrets that sign them."""


@callbacks.command("list")
@click.argument("subject", metavar="JOB|BATCH", type=click.UUID)
@options.AS_LINES
def list_callbacks(subject: object, as_json: bool) -> None:
    """The callbacks of a job or batch, with every attempt."""
    from agentflow.cli import organization_commands

    organization_commands.list_callbacks(str(subject), as_json)


@callbacks.command("replay")
@click.argument("callback", metavar="ID", type=click.UUID)
def replay_callback(callback: object) -> None:
    """Tell it once more, under the same webhook-id."""
    from agentflow.cli import organization_commands

    organization_commands.replay_callback(str(callback))


@callbacks.command("secret")
@options.ORGANIZATION
@options.grace("Hours for which the secret before it signs along.")
def create_secret(org: str, grace_h: float) -> None:
    """Make a secret to sign an organization's callbacks with, and print it: the only line on stdout."""
    from agentflow.cli import organization_commands

    organization_commands.create_secret(org, grace_h)


@callbacks.command("secrets")
@options.ORGANIZATION
def list_secrets(org: str) -> None:
    """The secrets that sign now: when they were made, and end."""
    from agentflow.cli import organization_commands

    organization_commands.list_secrets(org)
