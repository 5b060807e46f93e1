"""`orgs` and `keys`: who may hand work in."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def orgs() -> None:
    """Organizations: whose jobs are whose."""


@orgs.command("create")
@click.argument("slug")
@click.option("--name", help="For people.  [default: the slug]")
def create_organization(slug: str, name: str | None) -> None:
    """Make an organization, such as: agentflow orgs create acme --name 'Acme Ltd'"""
    from agentflow.cli import organization_commands

    organization_commands.create(slug, name)


@orgs.command("list")
@options.AS_LINES
def list_organizations(as_json: bool) -> None:
    """All organizations."""
    from agentflow.cli import organization_commands

    organization_commands.list_all(as_json)


@click.group(cls=options.Group)
def keys() -> None:
    """API keys of organizations. A key is shown once, when it is made."""


_SCOPES = ["submit", "read", "manage", "webhooks"]


@keys.command("create")
@options.ORGANIZATION
@click.option("--name", required=True, help="What uses the key.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(_SCOPES),
    multiple=True,
    help="What it may do; may be repeated.  [default: all]",
)
@click.option("--expires", "expires_days", type=click.FloatRange(0, 36_500, min_open=True), help="In so many days.")
def create_key(org: str, name: str, scopes: tuple[str, ...], expires_days: float | None) -> None:
    """Make a key and print it: the only line on stdout."""
    from agentflow.cli import organization_commands

    organization_commands.create_key(org, name, scopes or tuple(_SCOPES), expires_days)


@keys.command("list")
@options.OF_ORGANIZATION
@options.AS_LINES
def list_keys(org: str | None, as_json: bool) -> None:
    """Keys, the newest first: what they may do, when they were used last."""
    from agentflow.cli import organization_commands

    organization_commands.list_keys(org, as_json)


@keys.command("rotate")
@click.argument("key", metavar="ID|PREFIX")
@options.grace("Hours that the old one works.")
def rotate_key(key: str, grace_h: float) -> None:
    """Make a key with the same name, scopes and expiry and print it; the old one ends after the grace."""
    from agentflow.cli import organization_commands

    organization_commands.rotate_key(key, grace_h)


@keys.command("revoke")
@click.argument("key", metavar="ID|PREFIX")
def revoke_key(key: str) -> None:
    """End a key now: within seconds it is refused everywhere."""
    from agentflow.cli import organization_commands

    organization_commands.revoke_key(key)
